"""One loop for both sides of every connection: what is *served* answers while the other side waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocols.transport.loop import Loop
from tests.guestd.fake_device import FakeDevice


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
