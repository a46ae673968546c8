"""The start and the end of global logging, and who joins while it is on."""

from __future__ import annotations

import errno

import pytest

from tests.memory.fakes import system_memory
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection


class Recorder(MemoryListener):
    def __init__(self, log: list[str], name: str, priority: int = 0, *, able: bool = True) -> None:
        self.log, self.name, self.priority, self.able = log, name, priority, able

    def region_add(self, section: MemoryRegionSection) -> None:
        self.log.append(f"{self.name} add")

    def log_global_start(self) -> bool:
        self.log.append(f"{self.name} start")
        return self.able

    def log_global_stop(self) -> None:
        self.log.append(f"{self.name} stop")


def test_starts_go_up_the_priorities_and_stops_down() -> None:
    space, _ = system_memory(0x10000)
    log: list[str] = []
    for name, priority in (("b", 2), ("a", 1)):
        space.register_listener(Recorder(log, name, priority))
    log.clear()
    assert space.log_global_start() and space.log_global
    space.log_global_stop()
    assert log == ["a start", "b start", "b stop", "a stop"] and not space.log_global


def test_one_that_cannot_start_stops_those_that_had() -> None:
    space, _ = system_memory(0x10000)
    log: list[str] = []
    for name, able in (("a", True), ("b", True), ("c", False)):
        space.register_listener(Recorder(log, name, able=able))
    log.clear()
    assert not space.log_global_start() and not space.log_global
    assert log == ["a start", "b start", "c start", "b stop", "a stop"]


def test_registering_while_logging_is_on_joins_before_the_sections_come() -> None:
    space, _ = system_memory(0x10000)
    log: list[str] = []
    assert space.log_global_start()
    space.register_listener(Recorder(log, "a"))
    assert log == ["a start", "a add"]
    with pytest.raises(OSError, match="cannot track") as caught:
        space.register_listener(Recorder(log, "b", able=False))
    assert caught.value.errno == errno.EIO
    log.clear()
    space.log_global_stop()
    assert log == ["a stop"]


def test_the_rest_does_nothing_until_it_is_overridden() -> None:
    space, _ = system_memory(0x10000)
    (section,) = space.sections()
    listener = MemoryListener()
    listener.log_start(section, 0, 1)
    listener.log_stop(section, 1, 0)
    listener.log_sync(section)
    listener.log_sync_global(False)
    listener.log_clear(section)
    listener.log_global_after_sync()
    assert listener.log_global_start()
