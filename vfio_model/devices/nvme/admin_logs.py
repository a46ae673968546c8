"""nvme: Get Log Page (NVM Express Base Specification 1.4, section 5.14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vfio_model.devices.nvme import events, regs
from vfio_model.devices.nvme.controller import Controller
from vfio_model.devices.nvme.logs import effects_log, firmware_log
from vfio_model.devices.nvme.regs import Command, Status
from vfio_model.devices.nvme.structures import CHANGED_NAMESPACES_SIZE

RETAIN_EVENT = 1 << 15
"""Dword 10: the event that told of this page stays masked."""

PAGES: Mapping[int, Callable[[Controller], bytes | bytearray]] = {
    events.LOG_ERROR: lambda controller: controller.errors.log(),
    events.LOG_HEALTH: lambda controller: controller.health.log(controller.errors.count, controller.clock.now_ns),
    events.LOG_FIRMWARE: lambda controller: firmware_log(controller.identity.firmware),
    events.LOG_CHANGED_NAMESPACES: lambda controller: bytes(CHANGED_NAMESPACES_SIZE),
    events.LOG_EFFECTS: lambda controller: effects_log(),
}
"""By log page identifier. Namespaces never change."""


def get_log_page(controller: Controller, command: Command) -> int:
    """Section 5.14, "Get Log Page command". Behind a page's end nothing is written."""
    lid = command.cdw10 & 0xFF
    page = PAGES.get(lid)
    if page is None:
        return Status.INVALID_LOG_PAGE
    if command.nsid not in (0, regs.BROADCAST_NSID) and lid != events.LOG_HEALTH:
        return Status.INVALID_FIELD
    data = page(controller)
    length = ((command.cdw11 & 0xFFFF) << 16 | command.cdw10 >> 16) + 1 << 2
    offset = command.cdw12 | command.cdw13 << 32
    if offset & 3 or offset > len(data):
        return Status.INVALID_FIELD
    part = memoryview(data)[offset : offset + length]
    status = controller.memory.to_host(command, part) if part else 0
    if not status and not command.cdw10 & RETAIN_EVENT:
        controller.events.log_read(lid)
    return status
