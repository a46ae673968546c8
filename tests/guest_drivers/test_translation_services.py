"""How a driver finds and enables PASID, PRI and ATS in configuration space."""

from __future__ import annotations

import pytest

from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.guest_drivers import translation_services as services
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.translation_caps import CAP_ID_ATS, CAP_ID_PASID, CAP_ID_PRI
from vfio_model.testing.bench import Host

DEVFN = 0x18


class Config:
    """Configuration cycles to one function."""

    def __init__(self, device: PCIDevice) -> None:
        self._device = device

    def read(self, devfn: int, offset: int, size: int) -> int:
        return self._device.config_read(offset, size) if devfn == DEVFN else (1 << size * 8) - 1

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        if devfn == DEVFN:
            self._device.config_write(offset, size, value)


def test_enabled_and_disabled_again() -> None:
    device = SvmDevice(Host())
    config = Config(device)
    services.enable_pasid(config, DEVFN)
    services.enable_pri(config, DEVFN, 5000)
    services.enable_ats(config, DEVFN, 13)
    assert device.pasid_enabled and device.pri_enabled and device.ats_enabled
    assert device.pasid is not None and device.ats is not None
    assert device.config_read(device.pasid.offset + 6, 2) == 1 | 4, "privileged mode, which it has"
    assert device.page_requests_allocated == 2048, "no more than it can have"
    assert device.ats.translation_unit == 8192
    services.disable(config, DEVFN)
    assert not (device.pasid_enabled or device.pri_enabled or device.ats_enabled)


@pytest.mark.parametrize("devfn", [DEVFN, 0x20], ids=["conventional", "nobody"])
def test_where_there_are_none(devfn: int) -> None:
    config = Config(EduDevice(Host()))
    assert [services.find_extended_capability(config, devfn, cap) for cap in (CAP_ID_ATS, CAP_ID_PRI)] == [None, None]
    for enable, what in (
        (services.enable_pasid, "PASID"),
        (services.enable_pri, "page request"),
        (services.enable_ats, "ATS"),
    ):
        with pytest.raises(DriverError, match=f"no {what} capability"):
            enable(config, devfn)
    services.disable(config, devfn)


def test_a_list_that_is_a_ring_ends() -> None:
    class Ring(Config):
        def read(self, devfn: int, offset: int, size: int) -> int:
            return 0x1000_0001

    config = Ring(SvmDevice(Host()))
    assert services.find_extended_capability(config, DEVFN, CAP_ID_PASID) is None
