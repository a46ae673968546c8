"""nvme: the admin command set (NVM Express Base Specification 1.4, chapter 5)."""

from __future__ import annotations

from collections.abc import Mapping

from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.admin_features import get_features, set_features
from vfio_model.devices.nvme.admin_logs import get_log_page
from vfio_model.devices.nvme.controller import Controller, Handler, Outcome, result
from vfio_model.devices.nvme.events import REQUEST_LIMIT
from vfio_model.devices.nvme.identify import identify
from vfio_model.devices.nvme.namespace import BLOCK_SHIFTS
from vfio_model.devices.nvme.queues import CompletionQueue, SubmissionQueue
from vfio_model.devices.nvme.regs import AdminOpcode, Command, Status

NOT_ABORTED = 1
"""Dword 0 of Abort's completion: the command ran to its end, or goes on."""
FORMAT_LBAF, FORMAT_PROTECTION, FORMAT_ERASE = regs.Bits(0, 4), regs.Bits(5, 3), regs.Bits(9, 3)
ERASE_CRYPTOGRAPHIC = 2


def _check_new_queue(controller: Controller, command: Command, existing: Mapping[int, object], entry_shift: int) -> int:
    """What creating a queue of either kind may fail with; ``entry_shift`` is what CC says of its entries and should
    be."""
    qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
    if not 1 <= qid <= controller.limits.io_queues or qid in existing:
        return Status.INVALID_QUEUE_ID
    if not 2 <= size <= regs.MAX_QUEUE_ENTRIES or entry_shift:
        return Status.INVALID_QUEUE_SIZE
    if not command.cdw11 & regs.QUEUE_CONTIGUOUS:
        return Status.INVALID_FIELD
    return Status.INVALID_PRP_OFFSET if command.prp1 & controller.memory.page_size - 1 else 0


def create_cq(controller: Controller, command: Command) -> int:
    """Section 5.3, "Create I/O Completion Queue command"."""
    queues = controller.queues
    status = _check_new_queue(controller, command, queues.completion, controller.entry_sizes[1] ^ regs.CQES)
    if status:
        return status
    vector = command.cdw11 >> 16
    if vector >= controller.interrupts.vectors:
        return Status.INVALID_INTERRUPT_VECTOR
    qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
    irq_enabled = bool(command.cdw11 & regs.QUEUE_IRQ_ENABLED)
    queues.add_completion(CompletionQueue(qid, command.prp1, size, vector, irq_enabled))
    return 0


def create_sq(controller: Controller, command: Command) -> int:
    """Section 5.4, "Create I/O Submission Queue command"."""
    queues = controller.queues
    status = _check_new_queue(controller, command, queues.submission, controller.entry_sizes[0] ^ regs.SQES)
    if status:
        return status
    cqid = command.cdw11 >> 16
    if not 1 <= cqid <= controller.limits.io_queues:
        return Status.INVALID_QUEUE_ID
    cq = queues.completion.get(cqid)
    if cq is None:
        return Status.INVALID_CQ
    qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
    queues.add_submission(SubmissionQueue(qid, command.prp1, size, cq))
    return 0


def delete_sq(controller: Controller, command: Command) -> int:
    """Section 5.6, "Delete I/O Submission Queue command": commands that were not fetched are gone."""
    sq = controller.queues.submission.get(command.cdw10 & 0xFFFF)
    if sq is None or sq.id == 0:
        return Status.INVALID_QUEUE_ID
    controller.queues.remove_submission(sq)
    return 0


def delete_cq(controller: Controller, command: Command) -> int:
    """Section 5.5, "Delete I/O Completion Queue command"."""
    cq = controller.queues.completion.get(command.cdw10 & 0xFFFF)
    if cq is None or cq.id == 0:
        return Status.INVALID_QUEUE_ID
    if cq.feeders:
        return Status.INVALID_QUEUE_DELETION
    controller.queues.remove_completion(cq)
    controller.interrupts.consumed()
    return 0


def abort(controller: Controller, command: Command) -> int:
    """Section 5.1, "Abort command": only a request for an asynchronous event waits long enough to be aborted."""
    sqid, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
    if sqid not in controller.queues.submission:
        return Status.INVALID_FIELD
    aborted = sqid == 0 and controller.events.abort(cid)
    return result(0 if aborted else NOT_ABORTED)


def async_event_request(controller: Controller, command: Command) -> Outcome:
    """Section 5.2, "Asynchronous Event Request command"."""
    if len(controller.events.requests) >= REQUEST_LIMIT:
        return Status.ASYNC_EVENT_LIMIT
    controller.events.requests.append(command.cid)
    return None


def format_nvm(controller: Controller, command: Command) -> int:
    """Section 5.23, "Format NVM command"."""
    targets = (
        list(controller.namespaces.values())
        if command.nsid == regs.BROADCAST_NSID
        else [each for each in controller.namespaces.values() if each.nsid == command.nsid]
    )
    if not targets:
        return Status.INVALID_NAMESPACE
    index, erase = FORMAT_LBAF.of(command.cdw10), FORMAT_ERASE.of(command.cdw10)
    if index >= len(BLOCK_SHIFTS) or FORMAT_PROTECTION.of(command.cdw10):
        return Status.INVALID_FORMAT
    if erase >= ERASE_CRYPTOGRAPHIC:
        return Status.INVALID_FIELD
    for namespace in targets:
        status = namespace.reformat(index)
        if status:
            return status
    return 0


HANDLERS: Mapping[int, Handler] = {
    AdminOpcode.DELETE_SQ: delete_sq,
    AdminOpcode.CREATE_SQ: create_sq,
    AdminOpcode.GET_LOG_PAGE: get_log_page,
    AdminOpcode.DELETE_CQ: delete_cq,
    AdminOpcode.CREATE_CQ: create_cq,
    AdminOpcode.IDENTIFY: identify,
    AdminOpcode.ABORT: abort,
    AdminOpcode.SET_FEATURES: set_features,
    AdminOpcode.GET_FEATURES: get_features,
    AdminOpcode.ASYNC_EVENT_REQUEST: async_event_request,
    AdminOpcode.FORMAT_NVM: format_nvm,
}
