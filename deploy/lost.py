"""Finds messages that one process sent and another never received.

The port's messages are logged at every hop: guestd writes ``port_send``, the interposer (when there is one)
``port_forward``, hostd ``port_recv``, each with the message's sequence number and cause id. A message that is in the
sender's log and not in the receiver's was lost between them, whatever anybody claims; the last process that had it
names the hop. A hypercall that the interposer refers back to its sender (``port_refer``) has arrived. For an unmap that
was lost the log also tells which mapping stayed alive, and which DMA used it after the guest believed it gone.
"""

from __future__ import annotations

from math import inf

import msgspec

from deploy.events import Log, Record

HOPS = (("guestd", "port_send"), ("interposer", "port_forward"), ("hostd", "port_recv"))
_PREFIX = "VFIO_IOMMU_"

Key = tuple[int, int]


class Lost(msgspec.Struct):
    """One lost message. ``iova`` and ``size`` (bytes) when it was about a mapping; ``ns`` when it was sent."""

    seq: int
    cause: int
    ioctl: str
    sender: str
    hop: str
    ns: int
    iova: int | None = None
    size: int | None = None
    mapping: str = ""
    stale_dma: list[str] = []

    def text(self) -> str:
        """In one or more lines, as a person reads it."""
        what = self.ioctl
        if self.iova is not None:
            what += f" of iova {self.iova:#x}" + (f", {self.size:#x} bytes" if self.size else "")
        lines = [f"{what} (message {self.seq}) was sent by {self.sender} and lost {self.hop}"]
        if self.mapping:
            lines.append(f"the mapping that stayed: {self.mapping}")
        lines += [f"used afterwards by: {dma}" for dma in self.stale_dma]
        return "\n".join(lines)


def find_lost(log: Log) -> list[Lost]:
    """Every message of the port that was lost, in the order of sending.

    A message still under way when its receiver (or its sender) ended is not lost: only those followed by a later
    message of the same sender that did arrive, or that were answered although nobody received them, are. Of the last
    moments before hostd was killed its log may say nothing: what was sent then is not judged.
    """
    blind = _blind(log)
    seen = {event: {_key(record) for record in log.named(event)} for _, event in HOPS}
    seen["port_recv"] |= {_key(record) for record in log.named("port_refer")}
    answered = {_key(record) for record in log.named("port_return")}
    last_arrival = max((record.ns for record in log.named("port_recv")), default=0)
    found = []
    for record in log.named("port_send"):
        key = _key(record)
        if key in seen["port_recv"] or any(first <= record.ns < last for first, last in blind):
            continue
        if key in answered or record.ns < last_arrival:
            found.append(_describe(record, _hop(key, seen, bool(log.named("port_forward", "port_take"))), log))
    return found


def _blind(log: Log) -> list[tuple[int, float]]:
    """From the last record of each hostd that did not end in order to the first of the next one."""
    lives: dict[int, list[Record]] = {}
    for record in log.records:
        if record.role == "hostd":
            lives.setdefault(record.pid, []).append(record)
    gone = [record.ns for record in log.named("port_lost")]
    gone += [records[0].ns for records in lives.values()]
    found = []
    for records in lives.values():
        last = records[-1]
        if last.event != "daemon_end" and any(ns > last.ns for ns in gone):
            found.append((last.ns, min((life[0].ns for life in lives.values() if life[0].ns > last.ns), default=inf)))
    return found


def _key(record: Record) -> Key:
    return record.cause, record.number("seq") or 0


def _hop(key: Key, seen: dict[str, set[Key]], interposed: bool) -> str:
    if not interposed:
        return "between guestd and hostd"
    if key in seen["port_forward"]:
        return "between interposer and hostd"
    return "in the interposer: it did not pass it on to hostd"


def _describe(record: Record, hop: str, log: Log) -> Lost:
    ioctl = str(record.fields.get("ioctl", record.fields.get("hcall", "message")))
    details = _details(record, log)
    iova, size = (details.number("iova"), details.number("size")) if details else (None, None)
    lost = Lost(
        seq=record.number("seq") or 0,
        cause=record.cause,
        ioctl=ioctl,
        sender=record.role,
        hop=hop,
        ns=record.ns,
        iova=iova,
        size=size,
    )
    if iova is not None and _is(record, "UNMAP_DMA"):
        lost.mapping = _mapping_before(log, record.ns, iova)
        lost.stale_dma = _dma_after(log, record.ns, iova, size or 1)
    return lost


def _details(record: Record, log: Log) -> Record | None:
    """The first record of this message, at any hop, that says which IOVA it was about."""
    key = _key(record)
    for candidate in (record, *log.named("port_take", "port_forward", "port_drop")):
        if _key(candidate) == key and candidate.number("iova") is not None:
            return candidate
    return None


def _is(record: Record, ioctl: str) -> bool:
    return str(record.fields.get("ioctl", "")).removeprefix(_PREFIX) == ioctl


def _covers(record: Record, iova: int) -> bool:
    start, size = record.number("iova"), record.number("size")
    return start is not None and start <= iova < start + (size or 1)


def _mapping_before(log: Log, ns: int, iova: int) -> str:
    best = ""
    for record in log.records:
        if record.ns >= ns:
            break
        if _is(record, "MAP_DMA") and _covers(record, iova):
            vaddr = record.number("vaddr")
            best = f"iova {record.number('iova'):#x}, {record.number('size'):#x} bytes" + (
                f" to hva {vaddr:#x}" if vaddr is not None else ""
            )
        elif record.event == "map_pages" and _covers(record, iova):
            best = f"iova {record.number('iova'):#x} to gpa {record.number('gpa'):#x}"
    return best


def _dma_after(log: Log, ns: int, iova: int, size: int) -> list[str]:
    """DMA that went through at ``iova`` after ``ns`` and before the guest mapped it anew."""
    found = []
    for record in log.records:
        if record.ns <= ns:
            continue
        if record.event == "map_pages" and _covers(record, iova):
            break
        at = record.number("iova")
        if record.event == "dma" and record.fields.get("moved") is True and at is not None and iova <= at < iova + size:
            what = (
                f"{record.fields.get('device')}, a {record.fields.get('direction')} of {record.number('length')} bytes"
            )
            found.append(f"{what} at {at:#x}, {(record.ns - ns) / 1e6:.1f} ms later")
    return found
