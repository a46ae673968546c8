"""Every test that asks for ``adapter`` runs over every implementation of the uapi seam."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.adapters import EXPECTED, Adapter, adapters
from tests.conformance.connections import DeviceServers
from tests.conformance.live_host import LiveHosts


@pytest.fixture(scope="session")
def live_hosts() -> Iterator[LiveHosts]:
    """The host processes of this worker."""
    hosts = LiveHosts(Path(os.environ["VFIO_MODEL_RUNTIME_BASE"]))
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def device_servers() -> Iterator[DeviceServers]:
    """The device servers of this worker."""
    servers = DeviceServers(Path(os.environ["VFIO_MODEL_RUNTIME_BASE"]))
    yield servers
    servers.close()


@pytest.fixture(params=EXPECTED)
def adapter(request: pytest.FixtureRequest, live_hosts: LiveHosts) -> Adapter:
    """An implementation of the uapi seam."""
    return adapters(live_hosts)[request.param]
