"""PCI Express: extended configuration space, its capabilities, and what a function may ask of its IOMMU."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.types import PCI_NO_PASID, IOMMUNotifierFlag, MemTxResult
from vfio_model.pci.config_space import CONFIG_SIZE, EXTENDED_CONFIG_SIZE
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.pci.express import ExpressSpec, PortType
from vfio_model.pci.iommu_ops import (
    AtsCompletion,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponse,
    PageResponseFn,
)
from vfio_model.pci.translation_caps import AtsSpec, PasidSpec, PriSpec
from vfio_model.testing.bench import Host
from vfio_model.vmstate.fields import VMStateDescription, decode, encode

COMMAND, MASTER = 4, 4
ATS, PRI, PASID = 0x100, 0x108, 0x118
ATS_CONTROL, PRI_CONTROL, PRI_STATUS, PASID_CONTROL = ATS + 6, PRI + 4, PRI + 6, PASID + 6


class Plain(PCIDevice):
    VENDOR_ID, DEVICE_ID = 0x1234, 1


class Express(Plain):
    EXPRESS = ExpressSpec(flr=True)


class Sharer(Plain):
    EXPRESS = ExpressSpec()
    ATS = AtsSpec(queue_depth=16)
    PRI = PriSpec(max_requests=64)
    PASID = PasidSpec(priv=True)
    VMSTATE = VMStateDescription("sharer", 1, (PARENT,))


class Port:
    """An ``IommuPort`` that keeps what it is asked."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.notifiers: list[tuple[int, IOMMUNotifier]] = []
        self.listeners: dict[int, PageResponseFn] = {}
        self.space = AddressSpace("translated", MemoryRegion("nothing", 1 << 64))

    def get_iotlb_info(self) -> IotlbInfo:
        return IotlbInfo(48, 4096)

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        self.notifiers.append((pasid, notifier))

    def unregister_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        self.notifiers.remove((pasid, notifier))

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        self.said.append(request)
        return AtsCompletion([])

    def translated_space(self, pasid: int) -> DMAImpl:
        self.said.append(pasid)
        return self.space

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        self.listeners[pasid] = fn

    def pri_unregister_notifier(self, pasid: int) -> None:
        del self.listeners[pasid]

    def pri_request_page(self, request: PageRequest) -> None:
        self.said.append(request)


def ignore(notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
    """No cache."""


NOTIFIER = IOMMUNotifier(ignore, IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, (1 << 64) - 1)
REQUEST = AtsRequest(0x1000, 0x1000)
PAGE = PageRequest(0x1000, PCI_NO_PASID, 3, last=True, is_read=True, is_write=False)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as error:
        call()
    return error.value.errno


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
def sharer(port: Port) -> Sharer:
    host = Host()
    host.iommu = port
    return Sharer(host)


def enable(sharer: Sharer, *, pasid: bool = True, ats: bool = True, pri: bool = True) -> None:
    sharer.config_write(COMMAND, 2, MASTER)
    sharer.config_write(PASID_CONTROL, 2, int(pasid))
    sharer.config_write(ATS_CONTROL, 2, 0x8000 if ats else 0)
    sharer.config_write(PRI_CONTROL, 2, int(pri))


# -- configuration space


def test_only_an_express_function_has_4096_bytes() -> None:
    plain, express = Plain(Host()), Express(Host())
    assert (len(bytes(plain.config)), len(bytes(express.config))) == (CONFIG_SIZE, EXTENDED_CONFIG_SIZE)
    plain.config_write(0x200, 4, 0x12345678)
    express.config_write(0x200, 4, 0x12345678)
    assert plain.config_read(0x200, 4) == 0xFFFFFFFF and express.config_read(0x200, 4) == 0x12345678
    assert express.config_read(0xFFC, 4) == 0 and express.config_read(0x1000, 4) == 0xFFFFFFFF


def test_a_function_without_extended_capabilities_says_so() -> None:
    express = Express(Host())
    express.config_write(0x100, 4, 0xFFFFFFFF)
    assert express.config_read(0x100, 4) == 0


def test_the_chain_of_extended_capabilities(sharer: Sharer) -> None:
    headers = [sharer.config_read(at, 4) for at in (ATS, PRI, PASID)]
    assert headers == [0x1081000F, 0x11810013, 0x0001001B]
    for at in (ATS, PRI, PASID):
        sharer.config_write(at, 4, 0xFFFFFFFF)
    assert headers == [sharer.config_read(at, 4) for at in (ATS, PRI, PASID)]


def test_registers_and_masks_of_the_three(sharer: Sharer) -> None:
    assert sharer.config_read(ATS + 4, 4) == 0x30, "queue depth 16, page aligned, disabled"
    assert sharer.config_read(PRI + 4, 4) == 0x81000000 and sharer.config_read(PRI + 8, 4) == 64
    assert sharer.config_read(PASID + 4, 4) == 0x1404
    for at in (ATS + 4, PRI + 12, PASID + 4):
        sharer.config_write(at, 4, 0xFFFFFFFF)
    assert sharer.config_read(ATS + 4, 4) == 0x800F0030
    assert sharer.config_read(PRI + 12, 4) == 0xFFFFFFFF and sharer.config_read(PASID + 4, 4) == 0x00071404
    assert sharer.ats is not None and sharer.ats.translation_unit == 1 << 27


def test_a_queue_depth_of_32_is_written_0() -> None:
    class Deep(Sharer):
        ATS = AtsSpec()

    assert Deep(Host()).config_read(ATS + 4, 4) == 0x20


def test_page_requests_are_stopped_while_disabled_and_errors_are_cleared_by_ones(sharer: Sharer) -> None:
    sharer.config_write(PRI + 12, 4, 17)
    assert sharer.page_requests_allocated == 0
    sharer.config_write(PRI_CONTROL, 2, 3)
    assert sharer.config_read(PRI_CONTROL, 2) == 1 and sharer.config_read(PRI_STATUS, 2) == 0x8000
    assert sharer.page_requests_allocated == 17
    assert sharer.pri is not None
    sharer.pri.failed()
    sharer.pri.failed(unexpected_group=True)
    assert sharer.config_read(PRI_STATUS, 2) == 0x8003
    sharer.config_write(PRI_STATUS, 2, 1)
    assert sharer.config_read(PRI_STATUS, 2) == 0x8002
    sharer.config_write(PRI_CONTROL, 2, 0)
    assert sharer.config_read(PRI_STATUS, 2) == 0x8102


def test_reset_disables_all_three(sharer: Sharer) -> None:
    enable(sharer)
    assert sharer.ats_enabled and sharer.pri_enabled and sharer.pasid_enabled
    sharer.reset()
    assert not (sharer.ats_enabled or sharer.pri_enabled or sharer.pasid_enabled)
    assert sharer.config_read(PRI_STATUS, 2) == 0x8100


def test_a_function_level_reset_resets_and_reads_back_zero() -> None:
    express = Express(Host())
    control = 0x48
    express.config_write(COMMAND, 2, MASTER)
    express.config_write(control, 2, 0x800F)
    assert express.config_read(COMMAND, 2) == 0 and express.config_read(control, 2) == 0
    express.config_write(control, 2, 0x000F)
    assert express.config_read(control, 2) == 0xF
    without = Sharer(Host())
    without.config_write(COMMAND, 2, MASTER)
    without.config_write(control, 2, 0x8000)
    assert without.config_read(COMMAND, 2) == MASTER


def test_state_of_either_size_is_taken_and_of_the_other_refused(sharer: Sharer) -> None:
    class Small(Plain):
        VMSTATE = VMStateDescription("small", 1, (PARENT,))

    enable(sharer)
    for device, other in ((sharer, Small(Host())), (Small(Host()), sharer)):
        assert device.VMSTATE is not None
        twin = type(device)(Host())
        data = encode(device.VMSTATE, device.export_state())
        state = decode(device.VMSTATE, 1, data, twin.export_state(), where="twin")
        twin.check_state(state, where="twin")
        twin.import_state(state)
        assert bytes(twin.config) == bytes(device.config)
        with pytest.raises(VMStateError, match="configuration space"):
            other.check_state(state, where="other")


# -- declarations


def test_what_cannot_be_declared() -> None:
    with pytest.raises(ConfigError, match="extended capability"):

        class _NotExpress(Plain):
            ATS = AtsSpec()

    with pytest.raises(ConfigError, match="need ATS"):

        class _NoAts(Express):
            PRI = PriSpec()

    with pytest.raises(ConfigError, match="no PasidSpec"):

        class _Number(Express):
            PASID = 20  # type: ignore[assignment]

    for make in (
        lambda: PasidSpec(width=21),
        lambda: AtsSpec(queue_depth=33),
        lambda: PriSpec(max_requests=0),
        lambda: ExpressSpec(width=3),
    ):
        with pytest.raises(ConfigError):
            make()


def test_an_endpoint_shows_where_it_is_plugged() -> None:
    device = Express(Host())
    assert device.express is not None and device.express.type is PortType.ENDPOINT
    device.express.plugged_into(root_complex=True)
    assert device.config_read(0x42, 2) == 0x0092
    device.express.plugged_into(root_complex=False)
    assert device.config_read(0x42, 2) == 0x0002


# -- services


def test_what_a_translation_request_is_checked_for_in_order(sharer: Sharer, port: Port) -> None:
    none, pasid = REQUEST._replace(max_entries=0), REQUEST._replace(pasid=5)
    assert refused(lambda: sharer.ats_request_translation(none)) == errno.EPERM
    enable(sharer, pasid=False, ats=False)
    assert refused(lambda: sharer.ats_request_translation(pasid._replace(max_entries=0))) == errno.EPERM
    assert refused(lambda: sharer.ats_request_translation(none)) == errno.ENOSPC
    assert refused(lambda: sharer.ats_request_translation(REQUEST)) == errno.EPERM
    enable(sharer)
    assert sharer.ats_request_translation(pasid) == AtsCompletion([]) and port.said == [pasid]


def test_what_a_page_request_is_checked_for_in_order(sharer: Sharer, port: Port) -> None:
    assert refused(lambda: sharer.pri_request_page(PAGE)) == errno.EPERM
    enable(sharer, pri=False, pasid=False)
    assert refused(lambda: sharer.pri_request_page(PAGE)) == errno.EPERM
    enable(sharer, pasid=False)
    assert refused(lambda: sharer.pri_request_page(PAGE._replace(pasid=5))) == errno.EPERM
    sharer.pri_request_page(PAGE)
    assert port.said == [PAGE]


def test_numbers_that_no_message_can_carry_are_refused(sharer: Sharer, port: Port) -> None:
    enable(sharer)
    for pasid in (1 << 20, (1 << 32) - 2):
        assert refused(lambda pasid=pasid: sharer.pri_request_page(PAGE._replace(pasid=pasid))) == errno.EINVAL
        assert (
            refused(lambda pasid=pasid: sharer.ats_request_translation(REQUEST._replace(pasid=pasid))) == errno.EINVAL
        )
        assert refused(lambda pasid=pasid: sharer.open_atc(pasid)) == errno.EINVAL
    for group in (512, -1):
        request = PAGE._replace(pasid=5, prgi=group)
        assert refused(lambda request=request: sharer.pri_request_page(request)) == errno.EINVAL
    sharer.pri_request_page(PAGE._replace(pasid=(1 << 20) - 1, prgi=511))
    assert len(port.said) == 1


def test_notifiers_need_pasid_enabled_and_pages_bus_mastering(sharer: Sharer, port: Port) -> None:
    answers: list[PageResponse] = []

    def answer(prgi: int, code: PageResponse) -> None:
        answers.append(code)

    assert refused(lambda: sharer.register_iotlb_notifier(5, NOTIFIER)) == errno.EPERM
    assert refused(lambda: sharer.unregister_iotlb_notifier(5, NOTIFIER)) == errno.EPERM
    assert refused(lambda: sharer.pri_register_notifier(PCI_NO_PASID, answer)) == errno.EPERM
    sharer.register_iotlb_notifier(PCI_NO_PASID, NOTIFIER)
    enable(sharer)
    sharer.register_iotlb_notifier(5, NOTIFIER)
    sharer.pri_register_notifier(5, answer)
    assert port.notifiers == [(PCI_NO_PASID, NOTIFIER), (5, NOTIFIER)]
    port.listeners[5](3, PageResponse.INVALID_REQUEST)
    assert answers == [PageResponse.INVALID_REQUEST]
    sharer.unregister_iotlb_notifier(5, NOTIFIER)
    sharer.config_write(COMMAND, 2, 0)
    sharer.pri_unregister_notifier(5)
    assert not port.listeners and len(port.notifiers) == 1


def test_without_an_iommu_there_is_nothing_to_ask() -> None:
    sharer = Sharer(Host())
    enable(sharer)
    for call in (
        sharer.get_iotlb_info,
        lambda: sharer.ats_request_translation(REQUEST),
        lambda: sharer.translated_space(5),
        lambda: sharer.pri_request_page(PAGE),
        lambda: sharer.pri_register_notifier(5, lambda prgi, code: None),
        lambda: sharer.register_iotlb_notifier(5, NOTIFIER),
        lambda: sharer.unregister_iotlb_notifier(5, NOTIFIER),
    ):
        assert refused(call) == errno.ENODEV
    sharer.pri_unregister_notifier(5)


def test_without_the_capability_nothing_is_enabled(port: Port) -> None:
    host = Host()
    host.iommu = port
    express = Express(host)
    express.config_write(COMMAND, 2, MASTER)
    assert refused(lambda: express.ats_request_translation(REQUEST)) == errno.EPERM
    assert refused(lambda: express.pri_request_page(PAGE)) == errno.EPERM
    assert refused(lambda: express.ats_request_translation(REQUEST._replace(pasid=0))) == errno.EPERM
    assert express.get_iotlb_info() == IotlbInfo(48, 4096) and express.page_requests_allocated == 0


def test_a_reset_unregisters_and_stops_translated_requests(sharer: Sharer, port: Port) -> None:
    enable(sharer)
    sharer.register_iotlb_notifier(5, NOTIFIER)
    sharer.pri_register_notifier(5, lambda prgi, code: None)
    space = sharer.translated_space(5)
    assert space is sharer.translated_space(5) and space.impl is port.space and port.said == [5]
    sharer.reset_enter()
    assert not port.notifiers and not port.listeners and space.impl is not port.space
    assert refused(lambda: sharer.ats_request_translation(REQUEST)) == errno.EPERM, "the command register says yes"
    sharer.reset_hold()
    sharer.reset_exit()
    assert space.write(0, b"x") == MemTxResult.DECODE_ERROR


@pytest.mark.parametrize(("offset", "value"), [(COMMAND, 0), (ATS_CONTROL, 0)])
def test_translated_requests_stop_with_bus_mastering_and_with_ats(
    sharer: Sharer, port: Port, offset: int, value: int
) -> None:
    enable(sharer)
    space = sharer.translated_space(5)
    sharer.config_write(offset, 2, value)
    assert space.impl is not port.space
    enable(sharer)
    assert sharer.translated_space(5).impl is port.space


def test_bridges_that_do_not_forward_stop_every_request(sharer: Sharer, port: Port) -> None:
    enable(sharer)
    sharer.attach_dma(port.space)
    sharer.set_upstream(False)
    assert refused(lambda: sharer.ats_request_translation(REQUEST)) == errno.EPERM
    assert sharer.dma.impl is not port.space
    sharer.set_upstream(True)
    assert sharer.dma.impl is port.space
    sharer.ats_request_translation(REQUEST)
