"""nvme: what of a controller migrates. A disk in memory does; of any other both sides open the same one.

Commands are carried out to their end, so that between two accesses a command has either been fetched and completed or
is still in its queue. What waits are requests for asynchronous events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.backends.block import CHUNK, MemoryDisk
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.controller import Controller
from vfio_model.devices.nvme.events import QUEUE_LIMIT, REQUEST_LIMIT, Event, EventType
from vfio_model.devices.nvme.features import FEATURES, FeatureId
from vfio_model.devices.nvme.logs import ERROR_ENTRIES
from vfio_model.devices.nvme.namespace import BLOCK_SHIFTS, Namespace
from vfio_model.devices.nvme.queues import CompletionQueue, SubmissionQueue
from vfio_model.devices.nvme.structures import ERROR_ENTRY
from vfio_model.devices.register_file import RegisterFile, fields_of
from vfio_model.errors import VMStateError
from vfio_model.pci import msix
from vfio_model.pci.device import PARENT
from vfio_model.ranges import U64_MAX
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

_RING = (Field("id"), Field("base", Type.U64), Field("size"), Field("head"), Field("tail"))
_CQ = VMStateDescription(
    "nvme/cq", 1, (*_RING, Field("vector"), Field("irq_enabled", Type.BOOL), Field("phase", Type.U8))
)
_SQ = VMStateDescription("nvme/sq", 1, (*_RING, Field("cqid")))
_FEATURE = VMStateDescription("nvme/feature", 1, (Field("fid", Type.U8), Field("subject"), Field("value")))
_EVENT = VMStateDescription("nvme/event", 1, (Field("type", Type.U8), Field("info", Type.U8), Field("log", Type.U8)))
_CHUNK = VMStateDescription("nvme/chunk", 1, (Field("number"), Field("content", Type.U8, array=CHUNK)))
_COUNTERS = ("bytes_read", "bytes_written", "reads", "writes", "media_errors", "critical_warning")
_LISTS = {"cq": _CQ, "sq": _SQ, "feature": _FEATURE, "event": _EVENT, "chunk": _CHUNK}

NVME = VMStateDescription(
    "nvme",
    1,
    (
        PARENT,
        msix.STATE,
        *(Field(name, equal=True) for name in ("io_queues", "vectors", "mdts")),
        Field("disk_size", Type.U64, equal=True),
        Field("block_shift", Type.U8),
        *fields_of(regs.REGISTERS),
        Field("failed", Type.BOOL),
        Field("timestamp_base", Type.U64),
        Field("timestamp_set", Type.BOOL),
        *(
            field
            for name, struct in _LISTS.items()
            for field in (Field(f"{name}_count"), Field(f"{name}s", array=f"{name}_count", struct=struct))
        ),
        Field("request_count"),
        Field("requests", Type.U16, array="request_count"),
        Field("aborted_count"),
        Field("aborted", Type.U16, array="aborted_count"),
        Field("masked_count"),
        Field("masked", Type.U8, array="masked_count"),
        Field("errors", Type.U64),
        Field("error_size"),
        Field("error_log", Type.U8, array="error_size"),
        *(Field(name, Type.U64) for name in _COUNTERS),
    ),
)


def export(registers: RegisterFile, controller: Controller) -> State:
    """The fields of :data:`NVME`, its parent's apart."""
    namespace, events, limits = controller.namespaces[1], controller.events, controller.limits
    lists: dict[str, list[State]] = {
        "cq": [
            {**_ring(cq), "vector": cq.vector, "irq_enabled": cq.irq_enabled, "phase": cq.phase}
            for cq in controller.queues.completion.values()
        ],
        "sq": [{**_ring(sq), "cqid": sq.cq.id} for sq in controller.queues.submission.values()],
        "feature": [
            {"fid": fid, "subject": subject, "value": value}
            for (fid, subject), value in controller.features.changed.items()
        ],
        "event": [event._asdict() for event in events.queue],
        "chunk": [{"number": number, "content": content} for number, content in _stored(namespace)],
    }
    error_log = b"".join(controller.errors.entries)
    return {
        "io_queues": limits.io_queues,
        "vectors": limits.vectors,
        "mdts": limits.mdts,
        "disk_size": namespace.disk.size,
        "block_shift": namespace.shift,
        **registers.export_state(),
        "failed": controller.failed,
        "timestamp_base": controller.timestamp_base & U64_MAX,
        "timestamp_set": controller.timestamp_set,
        **{f"{name}_count": len(rows) for name, rows in lists.items()},
        **{f"{name}s": rows for name, rows in lists.items()},
        "request_count": len(events.requests),
        "requests": list(events.requests),
        "aborted_count": len(events.aborted),
        "aborted": list(events.aborted),
        "masked_count": len(events.masked),
        "masked": bytes(sorted(events.masked)),
        "errors": controller.errors.count,
        "error_size": len(error_log),
        "error_log": error_log,
        **{name: getattr(controller.health, name) for name in _COUNTERS},
    }


def _stored(namespace: Namespace) -> list[tuple[int, bytes]]:
    return namespace.disk.export_chunks() if isinstance(namespace.disk, MemoryDisk) else []


def _ring(queue: CompletionQueue | SubmissionQueue) -> State:
    return {name: getattr(queue, name) for name in ("id", "base", "size", "head", "tail")}


def check(registers: RegisterFile, controller: Controller, state: Mapping[str, Any], *, where: str) -> None:
    """:raise VMStateError: when ``state`` is none that ``controller`` can be in."""
    registers.check_state(state, where=where)
    for problem, found in _problems(controller, state):
        if found:
            raise VMStateError(f"nvme: {problem}", where=where)


def _problems(controller: Controller, state: Mapping[str, Any]) -> list[tuple[str, bool]]:
    cap = state["cap_lo"] | state["cap_hi"] << 32
    cqs = {cq["id"]: cq for cq in state["cqs"]}
    sqs = {sq["id"]: sq for sq in state["sqs"]}
    enabled = bool(state["csts"] & regs.CSTS_RDY)
    page_shift = regs.MIN_PAGE_SHIFT + regs.CC_MPS.of(state["cc"])
    most = controller.limits.io_queues
    rings = (*state["cqs"], *state["sqs"])
    vectors, disk = controller.limits.vectors, controller.namespaces[1].disk
    chunks = -(-disk.size // CHUNK) if isinstance(disk, MemoryDisk) else 0
    log_sizes = range(0, (ERROR_ENTRIES + 1) * ERROR_ENTRY.size, ERROR_ENTRY.size)
    return [
        ("other capabilities", (cap, state["vs"]) != (regs.CAP_VALUE, regs.VERSION)),
        ("a block size that there is not", state["block_shift"] not in BLOCK_SHIFTS),
        ("a page size that there is not", enabled and page_shift > regs.MAX_PAGE_SHIFT),
        ("a queue twice", len(cqs) != state["cq_count"] or len(sqs) != state["sq_count"]),
        ("a queue beyond the last", any(ring["id"] > most for ring in rings)),
        ("an entry outside its queue", any(not _is_ring(ring) for ring in rings)),
        ("queues without an admin queue", (0 in sqs, 0 in cqs) != (enabled, enabled) or (not enabled and bool(rings))),
        ("a submission queue without its completion queue", any(sq["cqid"] not in cqs for sq in state["sqs"])),
        ("an admin queue that completes elsewhere", 0 in sqs and sqs[0]["cqid"] != 0),
        ("an interrupt vector that there is not", any(cq["vector"] >= vectors for cq in cqs.values())),
        ("a phase that is neither 0 nor 1", any(cq["phase"] > 1 for cq in cqs.values())),
        ("a feature that there is not", any(row["fid"] not in FEATURES for row in state["features"])),
        ("an event that there is not", any(event["type"] not in iter(EventType) for event in state["events"])),
        ("an event mask that there is not", any(type_ not in iter(EventType) for type_ in state["masked"])),
        ("more events than are kept", state["event_count"] > QUEUE_LIMIT),
        ("more requests than may wait", max(state["request_count"], state["aborted_count"]) > REQUEST_LIMIT),
        ("data outside the disk", any(chunk["number"] >= chunks for chunk in state["chunks"])),
        ("a broken error log", state["error_size"] not in log_sizes),
    ]  # fmt: skip


def _is_ring(ring: Mapping[str, int]) -> bool:
    limit = regs.MAX_QUEUE_ENTRIES if ring["id"] else regs.AQA_ASQS.of(-1) + 1
    return 2 <= ring["size"] <= limit and max(ring["head"], ring["tail"]) < ring["size"]


def load(registers: RegisterFile, controller: Controller, state: Mapping[str, Any]) -> None:
    """Take a checked ``state``."""
    controller.reset()
    registers.import_state(state)
    cc = registers[regs.CC]
    controller.memory.page_size = 1 << min(regs.MIN_PAGE_SHIFT + regs.CC_MPS.of(cc), regs.MAX_PAGE_SHIFT)
    controller.entry_sizes = regs.CC_IOSQES.of(cc), regs.CC_IOCQES.of(cc)
    controller.failed = state["failed"]
    controller.interrupts.mask = registers[regs.INTMS]
    controller.timestamp_base, controller.timestamp_set = state["timestamp_base"], state["timestamp_set"]
    _load_queues(controller, state)
    for row in state["features"]:
        controller.features.set(row["fid"], row["value"], row["subject"])
    namespace = controller.namespaces[1]
    namespace.shift = state["block_shift"]
    if isinstance(namespace.disk, MemoryDisk):
        namespace.disk.import_chunks((chunk["number"], chunk["content"]) for chunk in state["chunks"])
    namespace.write_cache = bool(controller.features.get(FeatureId.VOLATILE_WRITE_CACHE))
    events = controller.events
    events.requests.extend(state["requests"])
    events.aborted.extend(state["aborted"])
    events.masked.update(EventType(type_) for type_ in state["masked"])
    events.queue.extend(Event(EventType(row["type"]), row["info"], row["log"]) for row in state["events"])
    controller.errors.count = state["errors"]
    log = state["error_log"]
    controller.errors.entries.clear()
    controller.errors.entries.extend(log[at : at + ERROR_ENTRY.size] for at in range(0, len(log), ERROR_ENTRY.size))
    for name in _COUNTERS:
        setattr(controller.health, name, state[name])


def _load_queues(controller: Controller, state: Mapping[str, Any]) -> None:
    queues = controller.queues
    for cq in state["cqs"]:
        queues.add_completion(CompletionQueue(**cq))
    for sq in state["sqs"]:
        ring = {name: sq[name] for name in ("id", "base", "size", "head", "tail")}
        queues.add_submission(SubmissionQueue(cq=queues.completion[sq["cqid"]], **ring))
