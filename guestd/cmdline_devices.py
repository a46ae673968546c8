"""``-device``, ``-global`` and ``-object`` of QEMU's command line, as parts of the configuration."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from guestd.backends import check_names
from guestd.cmdline_backends import BackendNames
from guestd.config import ANONYMOUS, DeviceConfig
from guestd.device_options import ASSIGNED, REMOTE, device_config, driver_of, drivers
from guestd.machine_config import MachineConfig
from guestd.option_syntax import identifier, only, size, split, switch
from guestd.places import Buses, Occupant
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError
from vfio_model.pci.address import PCIAddress

_BACKENDS: Final = ("memory-backend-memfd", "memory-backend-ram", "memory-backend-file", "memory-backend-shm")
_BACKEND_KEYS: Final = frozenset(
    (
        "qom-type",
        "id",
        "size",
        "share",
        "hugetlb",
        "hugetlbsize",
        "seal",
        "prealloc",
        "prealloc-threads",
        "reserve",
        "merge",
        "dump",
        "policy",
        "host-nodes",
        "mem-path",
        "align",
        "offset",
        "pmem",
        "discard-data",
        "readonly",
        "rom",
        "x-use-canonical-path-for-ramblock-id",
    )
)
_SMALLEST_PAGE: Final = 4096
_HUGE_PAGE: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """``-object memory-backend-…``. ``page_size`` 0: as usual."""

    id: str
    size: int = 0
    share: bool = False
    page_size: int = 0


def memory_backend(given: Mapping[str, object]) -> MemoryBackend:
    """:raise ConfigError: for what QEMU refuses, too."""
    kind = given.get("qom-type")
    if kind not in _BACKENDS:
        raise ConfigError(f"invalid object type: {kind}")
    if "id" not in given:
        raise ConfigError("Parameter 'id' is missing")
    name = identifier(given["id"])
    only(given, _BACKEND_KEYS)
    if "size" not in given:
        raise ConfigError("Parameter 'size' is missing")
    if kind == "memory-backend-file" and "mem-path" not in given:
        raise ConfigError("Parameter 'mem-path' is missing")
    bytes_ = size("size", given["size"])
    if not bytes_:
        raise ConfigError(f"property 'size' of {kind} doesn't take value '0'")
    share = switch("share", given.get("share", kind in ("memory-backend-memfd", "memory-backend-shm")))
    return MemoryBackend(name, bytes_, share, _page_size(given))


def _page_size(given: Mapping[str, object]) -> int:
    page = size("hugetlbsize", given["hugetlbsize"]) if "hugetlbsize" in given else 0
    if page and (page < _SMALLEST_PAGE or page & (page - 1)):
        raise ConfigError(f"hugetlbsize {page} is not a power of two of at least {_SMALLEST_PAGE}")
    if not page and switch("hugetlb", given.get("hugetlb", "off")):
        page = _HUGE_PAGE
    if not page and "mem-path" in given:
        try:
            page = os.statvfs(str(given["mem-path"])).f_bsize
        except OSError as error:
            raise ConfigError(f"can't open backing store {given['mem-path']}: {error.strerror}") from error
        page = page if page >= _HUGE_PAGE else 0
    return page


@dataclass(frozen=True, slots=True)
class DeviceWords:
    """One ``-device``; ``text`` when it was not JSON."""

    options: dict[str, object]
    text: bool
    where: str


class Globals:
    """``-global DRIVER.PROPERTY=VALUE``: defaults of every device of that kind."""

    def __init__(self) -> None:
        self._given: list[tuple[str, str, str]] = []
        self.check: Callable[[str, str, str], None] = lambda driver, name, value: None
        """What is wrong at once; raises ConfigError."""

    def add(self, text: str) -> None:
        """:raise ConfigError: when it is neither form."""
        head, equals, value = text.partition("=")
        driver, dot, name = head.partition(".")
        if not (equals and dot):
            given = split(text)
            only(given, ("driver", "property", "value"))
            if set(given) != {"driver", "property", "value"}:
                raise ConfigError("options 'driver', 'property', and 'value' are required")
            driver, name, value = given["driver"], given["property"], given["value"]
        self._given.append((driver, name, value))
        try:
            self.check(driver, name, value)
        except ConfigError as error:
            raise ConfigError(f"can't apply global {driver}.{name}={value}: {error}") from error

    def of(self, driver: object, known: Collection[str] | None = None) -> dict[str, object]:
        """The defaults of ``driver``, whose properties are ``known``; None: any.

        :raise ConfigError: for a property that it has not got.
        """
        if known is None and driver in DEVICES:
            known = DEVICES[str(driver)].PROPS
        found: dict[str, object] = {}
        for kind, name, value in self._given:
            if kind == driver:
                if known is not None and name not in known:
                    what = f"can't apply global {kind}.{name}={value}: Property '{kind}.{name}' not found"
                    raise ConfigError(what)
                found[name] = value
        return found

    def warnings(self, own: Collection[str]) -> list[str]:
        """About what holds for nothing; ``own`` are the machine's own drivers."""
        known = (*drivers(), *own)
        return [f"global {kind}.{name} has invalid class name" for kind, name, _ in self._given if kind not in known]


@dataclass(frozen=True, slots=True)
class MachineAsked:
    """``-machine``: its type, its properties as they are ``given``, and what is known of its RAM, as fields of the
    configuration.
    """

    kind: str
    given: Mapping[str, object]
    ram: Mapping[str, object]


class MachineWords(ABC):
    """What a command line says of the machine: one kind for each binary."""

    ARCH: ClassVar[str]
    MACHINES: ClassVar[Mapping[str, str]]
    """What ``-machine help`` lists, the default first, with the descriptions."""
    CPUS_OF: ClassVar[str]
    """What QEMU calls the machine that has too many CPUs."""
    OWN: ClassVar[Sequence[str]]
    """Drivers of its own."""
    DRIVERS: ClassVar[Mapping[str, Sequence[str]]]
    """Those that ``-device help`` lists, with what the help of each says."""
    OFF_PCI: ClassVar[Collection[str]]
    """Of these, what is on no PCI bus."""
    MACHINE_HELP: ClassVar[Sequence[str]]

    buses: Buses
    """Those so far."""

    @abstractmethod
    def check_global(self, driver: str, name: str, value: str) -> None:
        """:raise ConfigError: what is refused before any device is made."""

    @abstractmethod
    def configure(self, asked: MachineAsked, devices: Sequence[DeviceWords], defaults: Globals) -> None:
        """The machine that is ``asked`` for; ``devices`` are all that will come.

        :raise ConfigError: with QEMU's message.
        """

    @abstractmethod
    def take(self, words: DeviceWords, given: Globals, place: int) -> bool:
        """Whether ``words`` are of the machine itself, which then has it; ``place`` of them had no id before.

        :raise ConfigError: with QEMU's message.
        """

    @property
    def unnamed(self) -> int:
        """How many of what was taken had no id and count as devices."""
        return 0

    @abstractmethod
    def config(self) -> MachineConfig:
        """When all devices have come."""


def plug_all(
    devices: Sequence[DeviceWords], machine: MachineWords, given: Globals, names: BackendNames, *, shared: bool
) -> list[DeviceConfig]:
    """Every PCI device of ``devices``, each on its bus, which a bridge before it has made; what is the machine's own
    goes to ``machine``. ``names`` are those of back ends; ``shared``: whether remote ones get guest RAM.

    :raise ConfigError: naming the option.
    """
    taken: dict[str, DeviceConfig] = {}
    for words in devices:
        own = words.options
        place = machine.unnamed + sum(name.startswith(ANONYMOUS) for name in taken)
        try:
            if machine.take(words, given, place):
                continue
            config = _plug({**given.of(own.get("driver")), **own}, machine.buses, taken, place, text=words.text)
            known = {"drive": names.drives, "netdev": names.netdevs}
            check_names(config, known, taken.values(), names.uplinks)
        except ConfigError as error:
            raise ConfigError(str(error), where=words.where) from error
        if config.attach == "remote" and "dma" not in own and not shared:
            config.dma = "message"
        taken[config.id] = config
    return list(taken.values())


def _plug(
    own: dict[str, object], buses: Buses, taken: Mapping[str, DeviceConfig], place: int, *, text: bool
) -> DeviceConfig:
    if own.get("driver") == REMOTE and "socket.path" in own:
        own["socket"] = own.pop("socket.path")
        own.pop("socket.type", None)
    if own.get("driver") == REMOTE and not own.get("socket"):
        raise ConfigError("No socket specified")
    if own.get("driver") == ASSIGNED and "host" in own and "group" not in own:
        raise ConfigError("No IOMMU group: use group=N", hint="there is no sysfs to find it in")
    config = device_config(own, buses, taken, anonymous=f"{ANONYMOUS}{place}]", text=text)
    devfn = PCIAddress.parse(config.addr).devfn
    occupant = Occupant(driver_of(config), str(own.get("id", "")), config.multifunction)
    buses.slots[config.bus].devices[devfn] = occupant
    return config
