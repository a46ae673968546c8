"""One loop for both sides of every connection: what is *served* answers while the other side waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.transport.loop import Loop
from tests.guestd.fake_device import FakeDevice
from tests.guestd.monitor_rig import Machine


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def fake(loop: Loop) -> Iterator[FakeDevice]:
    fake = FakeDevice(loop)
    yield fake
    fake.release()


@pytest.fixture
def machine(runtime_dir: Path, loop: Loop) -> Iterator[Machine]:
    machine = Machine(runtime_dir, loop)
    yield machine
    machine.monitors.close()
    machine.guest.close()
