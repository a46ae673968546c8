"""EEH for a guest's bridge: which container its operations go to.

A container's operation acts on every group in turn, and a bridge is one PE. So a bridge has EEH only while exactly one
container follows its address space, with exactly one group in it (QEMU's ``vfio_eeh_as_ok``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import EehOp, EehState
from vfio_model.vfio.connect import VFIOContainer
from vfio_model.vfio.ioctl import SpaprContainer


def eeh_port(containers: Iterable[VFIOContainer]) -> Callable[[EehOp], EehState] | None:
    """``VFIO_EEH_PE_OP`` on the one group of the one container that follows a bridge's address space; None when it is
    not one.

    What is returned raises ``OSError`` as the ioctl does, and ENODEV when the host is gone.
    """
    following = list(containers)
    if len(following) != 1 or len(following[0].groups) != 1:
        return None
    container = following[0]
    ioctls = SpaprContainer(container.port, container.handle)

    def operate(op: EehOp) -> EehState:
        try:
            return ioctls.eeh_pe_op(op)
        except PeerLost as error:
            raise OSError(errno.ENODEV, str(error)) from error

    return operate
