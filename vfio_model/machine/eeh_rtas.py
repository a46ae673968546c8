"""The RTAS calls of enhanced error handling (LoPAPR "Enhanced I/O Error Handling (EEH) Option Functions"), over VFIO.

A bridge has them only while its functions' errors can be seen at all: while exactly one VFIO container with exactly one
group follows its address space (:class:`EehPort`). Otherwise each call is a PARAM_ERROR. The whole bridge is one PE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vfio_model.iommu.spapr.regs import RtasStatus, RtasToken
from vfio_model.iommu.spapr.rtas import HW_ERROR, PARAM_ERROR, RtasHandler
from vfio_model.machine.phb import EehPort, SpaprPhb
from vfio_model.uapi.vfio import EehOp
from vfio_model.vfio.pci import VFIOPCIDevice

_SUCCESS = int(RtasStatus.SUCCESS)
OPTION_ENABLE = 1
OPTIONS: Mapping[int, EehOp] = {
    0: EehOp.VFIO_EEH_PE_DISABLE,
    OPTION_ENABLE: EehOp.VFIO_EEH_PE_ENABLE,
    2: EehOp.VFIO_EEH_PE_UNFREEZE_IO,
    3: EehOp.VFIO_EEH_PE_UNFREEZE_DMA,
}
"""``ibm,set-eeh-option``: disable, enable, release the freeze of loads and stores, of DMA."""
RESETS: Mapping[int, EehOp] = {
    0: EehOp.VFIO_EEH_PE_RESET_DEACTIVATE,
    1: EehOp.VFIO_EEH_PE_RESET_HOT,
    3: EehOp.VFIO_EEH_PE_RESET_FUNDAMENTAL,
}
"""``ibm,set-slot-reset``: deactivate, hot, fundamental."""
GET_PE_ADDR, GET_PE_MODE = 0, 1
"""What ``ibm,get-config-addr-info2`` is asked."""
PE_MODE_SHARED = 2
EEH_SUPPORTED = 1
UNAVAILABLE_MS, RECOVERY_MS = 1000, 0
"""How long an unavailable PE stays so, and how long recovery takes, as ``ibm,read-slot-reset-state2`` tells it."""
ERROR_LOGS = (1, 2)
"""``ibm,slot-error-detail``: the log of a temporary, of a permanent error."""
NO_ERRORS_FOUND = 1


class EehRtas:
    """The calls over the PHBs, by BUID."""

    def __init__(self, phbs: Mapping[int, SpaprPhb]) -> None:
        self._phbs = phbs
        self.handlers: dict[int, RtasHandler] = {
            int(RtasToken.IBM_SET_EEH_OPTION): self.set_eeh_option,
            int(RtasToken.IBM_GET_CONFIG_ADDR_INFO2): self.get_config_addr_info2,
            int(RtasToken.IBM_READ_SLOT_RESET_STATE2): self.read_slot_reset_state2,
            int(RtasToken.IBM_SET_SLOT_RESET): self.set_slot_reset,
            int(RtasToken.IBM_CONFIGURE_PE): self.configure_pe,
            int(RtasToken.IBM_SLOT_ERROR_DETAIL): self.slot_error_detail,
        }

    def _find(self, args: Sequence[int]) -> tuple[SpaprPhb, EehPort] | None:
        """The bridge named by cells 1 and 2, if errors can be handled there."""
        phb = self._phbs.get(args[1] << 32 | args[2])
        port = phb.eeh() if phb is not None else None
        return (phb, port) if phb is not None and port is not None else None

    def set_eeh_option(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, option. Enabling needs an assigned function on that bus."""
        found = self._find(args) if len(args) == 4 and nret == 1 else None
        op = OPTIONS.get(args[3]) if found is not None else None
        if found is None or op is None:
            return PARAM_ERROR
        phb, port = found
        if args[3] == OPTION_ENABLE and not (args[0] >> 16 & 0xFF == phb.bus.number and _has_assigned(phb)):
            return PARAM_ERROR
        return _answer(lambda: port(op), HW_ERROR)

    def get_config_addr_info2(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, question -> the PE's address, or that functions share it."""
        found = self._find(args) if len(args) == 4 and nret == 2 else None
        if found is None or args[3] not in (GET_PE_ADDR, GET_PE_MODE):
            return PARAM_ERROR
        phb, _ = found
        if args[3] == GET_PE_MODE:
            return [_SUCCESS, PE_MODE_SHARED]
        return [_SUCCESS, (phb.bus.number << 16) + 1] if phb.function(args[0]) is not None else PARAM_ERROR

    def read_slot_reset_state2(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo -> state, EEH support, and the two times in ms."""
        found = self._find(args) if len(args) == 3 and nret in (4, 5) else None
        if found is None:
            return PARAM_ERROR
        try:
            state = int(found[1](EehOp.VFIO_EEH_PE_GET_STATE))
        except OSError:
            return PARAM_ERROR
        return [_SUCCESS, state, EEH_SUPPORTED, UNAVAILABLE_MS, RECOVERY_MS][:nret]

    def set_slot_reset(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, option. There is no MSI-X that would have to go off before a reset."""
        found = self._find(args) if len(args) == 4 and nret == 1 else None
        op = RESETS.get(args[3]) if found is not None else None
        if found is None or op is None:
            return PARAM_ERROR
        _, port = found
        return _answer(lambda: port(op), HW_ERROR)

    def configure_pe(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo."""
        found = self._find(args) if len(args) == 3 and nret == 1 else None
        if found is None:
            return PARAM_ERROR
        return _answer(lambda: found[1](EehOp.VFIO_EEH_PE_CONFIGURE), PARAM_ERROR)

    def slot_error_detail(self, args: Sequence[int], nret: int) -> list[int]:
        """config_addr, buid_hi, buid_lo, two buffers, which log. There is never one."""
        found = self._find(args) if len(args) == 8 and nret == 1 else None
        return PARAM_ERROR if found is None or args[7] not in ERROR_LOGS else [NO_ERRORS_FOUND]


def _has_assigned(phb: SpaprPhb) -> bool:
    return any(isinstance(device, VFIOPCIDevice) for device in phb.bus)


def _answer(operation: Callable[[], object], failure: list[int]) -> list[int]:
    try:
        operation()
    except OSError:
        return failure
    return [_SUCCESS]
