"""nvme: the Identify command (NVM Express Base Specification 1.4, section 5.15)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.controller import Controller
from vfio_model.devices.nvme.events import REQUEST_LIMIT
from vfio_model.devices.nvme.logs import ERROR_ENTRIES
from vfio_model.devices.nvme.regs import Command, Status
from vfio_model.devices.nvme.structures import IDENTIFY_CONTROLLER, IDENTIFY_SIZE

OUI = bytes((0x00, 0x54, 0x52))
"""IEEE OUI 52-54-00, little-endian: locally administered."""
OACS_FORMAT = 0x0002
FRMW_ONE_READ_ONLY_SLOT = 0x03
LPA_EFFECTS, LPA_EXTENDED = 0x02, 0x04
"""The effects log is there; log pages have an offset and a 32-bit length."""
ONCS_COMPARE, ONCS_DATASET, ONCS_WRITE_ZEROES, ONCS_TIMESTAMP, ONCS_VERIFY = 0x01, 0x04, 0x08, 0x40, 0x80
VWC_PRESENT = 0x01
VWC_FLUSH_BROADCAST = 0x06
"""Flush takes the broadcast namespace identifier."""
FNA_ALL_NAMESPACES = 0x01
"""A format is of all namespaces, of which there is one."""
CONTROLLER_TYPE_IO = 1
WARNING_KELVIN, CRITICAL_KELVIN = 343, 373
_LIST_ENTRIES = IDENTIFY_SIZE // 4


def _controller(controller: Controller, command: Command) -> bytearray | Status:
    identity, limits = controller.identity, controller.limits
    return IDENTIFY_CONTROLLER.build(
        vid=identity.vendor_id,
        ssvid=identity.subsystem_vendor_id,
        sn=identity.serial,
        mn=identity.model,
        fr=identity.firmware,
        rab=6,
        ieee=OUI,
        mdts=limits.mdts,
        ver=regs.VERSION,
        rtd3r=100_000,
        rtd3e=100_000,
        cntrltype=CONTROLLER_TYPE_IO,
        oacs=OACS_FORMAT,
        acl=3,
        aerl=REQUEST_LIMIT - 1,
        frmw=FRMW_ONE_READ_ONLY_SLOT,
        lpa=LPA_EFFECTS | LPA_EXTENDED,
        elpe=ERROR_ENTRIES - 1,
        wctemp=WARNING_KELVIN,
        cctemp=CRITICAL_KELVIN,
        sqes=regs.SQES << 4 | regs.SQES,
        cqes=regs.CQES << 4 | regs.CQES,
        nn=max(controller.namespaces),
        oncs=ONCS_COMPARE | ONCS_DATASET | ONCS_WRITE_ZEROES | ONCS_TIMESTAMP | ONCS_VERIFY,
        fna=FNA_ALL_NAMESPACES,
        vwc=VWC_PRESENT | VWC_FLUSH_BROADCAST,
        subnqn=identity.nqn.encode("ascii"),
        psd0_mp=2500,
        psd0_enlat=16,
        psd0_exlat=4,
    )


def _namespace(controller: Controller, command: Command) -> bytearray | Status:
    namespace = controller.namespaces.get(command.nsid)
    if namespace is not None:
        return namespace.identify()
    # An identifier that is valid but has no namespace is answered with zeroes.
    valid = 1 <= command.nsid <= max(controller.namespaces)
    return bytearray(IDENTIFY_SIZE) if valid else Status.INVALID_NAMESPACE


def _active_namespaces(controller: Controller, command: Command) -> bytearray | Status:
    if command.nsid >= regs.BROADCAST_NSID - 1:
        return Status.INVALID_NAMESPACE
    found = sorted(nsid for nsid in controller.namespaces if nsid > command.nsid)[:_LIST_ENTRIES]
    return bytearray(struct.pack(f"<{len(found)}I", *found).ljust(IDENTIFY_SIZE, b"\0"))


def _descriptors(controller: Controller, command: Command) -> bytearray | Status:
    namespace = controller.namespaces.get(command.nsid)
    return Status.INVALID_NAMESPACE if namespace is None else namespace.descriptors()


STRUCTURES: Mapping[int, Callable[[Controller, Command], bytearray | Status]] = {
    0x00: _namespace,
    0x01: _controller,
    0x02: _active_namespaces,
    0x03: _descriptors,
}
"""By the value of CNS."""


def identify(controller: Controller, command: Command) -> int:
    """The structure that CNS names."""
    structure = STRUCTURES.get(command.cdw10 & 0xFF)
    if structure is None:
        return Status.INVALID_FIELD
    data = structure(controller, command)
    return data if isinstance(data, Status) else controller.memory.to_host(command, data)
