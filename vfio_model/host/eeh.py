"""EEH: a PE whose I/O and DMA stop at an error, and the operations by which its user recovers it.

::

    ┌────────┐ inject, freeze   ┌─────────┐ unfreeze I/O  ┌─────────────┐ unfreeze DMA
    │ normal │ ───────────────► │ stopped │ ────────────► │ DMA stopped │ ─────────────► normal
    └────────┘                  └─────────┘               └─────────────┘
         ▲   deactivate  ┌───────┐   hot, fundamental          (DMA before I/O leads through "unavailable")
         └────────────── │ reset │ ◄───────────────── any state
                         └───────┘

An operation is what it lifts and what it imposes (:data:`EFFECTS`). Enabling takes the PE over, so it lifts an old
freeze; configuring restores bridges, of which there are none here. The error that is injected strikes at once, without
waiting for an access that matches its address and mask. Only DMA is really stopped: loads and stores go to the device
past the host, and a reset does not reach its registers, for which there is ``VFIO_DEVICE_RESET``.

Who waits for whom: stopping DMA puts a wait for the lanes of the group on the revocation; lifting a stop waits for
nothing.

Sources: ``include/uapi/linux/vfio.h`` ("EEH PE operation struct provides ways to"), the kernel's
``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note", item 4) and
``arch/powerpc/include/uapi/asm/eeh.h``.
"""

from __future__ import annotations

import struct
from errno import EFAULT, EINVAL, ENODEV

from vfio_model.host.group import Group
from vfio_model.host.pe import Stop
from vfio_model.host.pending import Revocation
from vfio_model.uapi.vfio import EEH_PE_OP_MIN_SIZE, EehOp, EehPeOp, EehState

_HEAD = struct.Struct("=III")
_ALL = Stop.BOTH | Stop.RESET

EFFECTS: dict[int, tuple[Stop, Stop]] = {
    EehOp.VFIO_EEH_PE_DISABLE: (Stop.NOTHING, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_ENABLE: (Stop.BOTH, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_UNFREEZE_IO: (Stop.IO, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_UNFREEZE_DMA: (Stop.DMA, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_GET_STATE: (Stop.NOTHING, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_RESET_DEACTIVATE: (_ALL, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_RESET_HOT: (Stop.NOTHING, _ALL),
    EehOp.VFIO_EEH_PE_RESET_FUNDAMENTAL: (Stop.NOTHING, _ALL),
    EehOp.VFIO_EEH_PE_CONFIGURE: (Stop.NOTHING, Stop.NOTHING),
    EehOp.VFIO_EEH_PE_INJECT_ERR: (Stop.NOTHING, Stop.BOTH),
}
"""(lifted, imposed) by each operation."""

_STATES = {
    Stop.NOTHING: EehState.VFIO_EEH_PE_STATE_NORMAL,
    Stop.BOTH: EehState.VFIO_EEH_PE_STATE_STOPPED,
    Stop.DMA: EehState.VFIO_EEH_PE_STATE_STOPPED_DMA,
    Stop.IO: EehState.VFIO_EEH_PE_STATE_UNAVAIL,
}
_ERROR_TYPES = range(2)
"""EEH_ERR_TYPE_32 and EEH_ERR_TYPE_64."""
_ERROR_FUNCTIONS = range(20)
"""EEH_ERR_FUNC_MIN to EEH_ERR_FUNC_MAX, inclusive."""


def state(stops: Stop) -> EehState:
    """What VFIO_EEH_PE_GET_STATE says of a PE of which this is stopped."""
    return EehState.VFIO_EEH_PE_STATE_RESET if stops & Stop.RESET else _STATES[stops]


def pe_op(group: Group, arg: bytes, revocation: Revocation) -> int:
    """``VFIO_EEH_PE_OP`` on one group: 0, or its state (:class:`EehState`) for GET_STATE.

    :raise OSError: ENODEV for a group without a device and so without a PE, then EFAULT for fewer bytes than ``op``
        ends at, EINVAL for an argsz below that, flags or an unknown op; for INJECT_ERR also EINVAL for an argsz below
        the whole struct, EFAULT for fewer bytes, EINVAL for an error that does not exist.
    """
    if not group.devices:
        raise OSError(ENODEV, f"group {group.id} has no PE: it has no device")
    if len(arg) < EEH_PE_OP_MIN_SIZE:
        raise OSError(EFAULT, f"EehPeOp: {len(arg)} bytes of {EEH_PE_OP_MIN_SIZE} can be read")
    argsz, flags, op = _HEAD.unpack_from(arg)
    if argsz < EEH_PE_OP_MIN_SIZE or flags:
        raise OSError(EINVAL, f"argsz {argsz} is below {EEH_PE_OP_MIN_SIZE}, or flags {flags:#x} are not known")
    if op not in EFFECTS:
        raise OSError(EINVAL, f"EEH operation {op} is not known")
    if op == EehOp.VFIO_EEH_PE_INJECT_ERR:
        _check_error(argsz, arg)
    lifted, imposed = EFFECTS[op]
    if group.stop(group.stops & ~lifted | imposed) and group.lanes:
        revocation.later(group.lanes, lambda: None)
    return int(state(group.stops)) if op == EehOp.VFIO_EEH_PE_GET_STATE else 0


def _check_error(argsz: int, arg: bytes) -> None:
    if argsz < EehPeOp.SIZE:
        raise OSError(EINVAL, f"argsz {argsz} does not reach the end of err.mask")
    if len(arg) < EehPeOp.SIZE:
        raise OSError(EFAULT, f"EehPeOp: {len(arg)} bytes of {EehPeOp.SIZE} can be read")
    request = EehPeOp.unpack(arg)
    if request.type not in _ERROR_TYPES or request.func not in _ERROR_FUNCTIONS:
        raise OSError(EINVAL, f"there is no error of type {request.type}, function {request.func}")
