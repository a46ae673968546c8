"""The guest's side of the notifier: invalidations that reach every process which caches its translations.

A :class:`SpaceFollower` turns IOMMU notifications of one DMA address space into records of the invalidation ring;
:meth:`Publisher.flush`, called before the hypercall returns, publishes them and revokes: when it has returned, no
subscriber's DMA uses what was invalidated. The invalidation itself takes no message; the hub only introduces
subscribers (their lanes come here, the ring goes to them) and carries messages to those without shared memory.

Both kinds of IOMMU event invalidate: overwriting a valid entry is a MAP for its followers, and the cached old one
must go.

A subscriber that stays in its DMA section past the deadline is *fenced*: its process is killed, as a frozen PE's
DMA is stopped, and the guest sees its device dead. Never does a hypercall return success while it may still copy.
Without the hub the lanes that are known go on being waited for, and the connection is tried again. A hub that comes
back numbers its subscribers anew; one that is known is recognized by its lanes, never by a number or a name.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from guestd.polling import poll_until
from protocols.notifier import messages as wire
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, create_memory, map_memory
from protocols.transport.unix import SeqpacketConnection, close_fds
from vfio_model.errors import DeadlineExceeded, PeerLost, RemoteProtocolError
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.lane import LANES, LANES_SIZE, LaneArea, lane_counts, lanes_retired
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.revoke import Fence, Revoke
from vfio_model.memory.ring import RecordFlags, RingWriter, init_ring, pasid_flags, ring_size
from vfio_model.memory.types import PCI_NO_PASID
from vfio_model.ranges import U64_MAX
from vfio_model.trace import NULL_TRACE, Trace

LANE_SECONDS: Final = 2.0
"""How long a subscriber may stay in one DMA section; below 1 s a busy machine makes healthy devices late."""
FENCE_SECONDS: Final = 5.0
FLUSH_SECONDS: Final = 2.0
RETRY_NS: Final = 100_000_000
UNTRANSLATED: Final = pasid_flags(PCI_NO_PASID)
"""The flags of a record about untranslated requests without PASID."""

HubChannel = FdChannel[wire.FromHub, wire.ToHub]


class _Subscriber:
    """Another process's lanes, mapped here, and the process; a ``LaneSet`` that may go while it is waited for."""

    def __init__(self, message: wire.LaneAdd, fds: list[int]) -> None:
        """Takes ``fds`` (lanes, pidfd) over. :raise RemoteProtocolError: when the lanes are none."""
        self.name, self.pid = message.name, message.pid
        self.process = Pidfd(fds[1], message.pid)
        status = os.fstat(fds[0])
        self.identity = status.st_dev, status.st_ino
        """Of the lanes' memfd: whoever subscribes again with it is the same."""
        try:
            self._memory = map_memory(fds[0], size=LANES_SIZE, what=f"lanes of {message.name}")
        except RemoteProtocolError:
            self.process.close()
            raise
        try:
            LaneArea(message.name, self._memory.words)
        except RemoteProtocolError:
            self._memory.close()
            self.process.close()
            raise
        self._gone = False
        self._counts = lane_counts(self._memory.words)

    def snapshot(self) -> list[int]:
        """The counters; all even once it has left."""
        return [0] * LANES if self._gone else self._counts.tolist()

    def alive(self) -> bool:
        """Whether it may still be copying."""
        return not self._gone and not lanes_retired(self._memory.words) and self.process.alive()

    def close(self) -> None:
        """It has left, or is dead."""
        self._gone = True
        self._counts.release()
        self._memory.close()
        self.process.close()


class Publisher:
    """Publishes the address spaces that are followed, by ``name``, at the hub of ``directory``."""

    def __init__(
        self, directory: Path, name: str, loop: Loop, fence: Fence, *, on_x86: bool = True, trace: Trace = NULL_TRACE
    ) -> None:
        self.path = directory / "notifier.sock"
        self._name, self._loop, self._fence, self._trace = name, loop, fence, trace
        self._ring: MappedMemory = create_memory("invalidation-ring", ring_size(), exclusive=True)
        init_ring(self._ring.words)
        self._writer = RingWriter(self._ring.words, None if on_x86 else fence)
        self._spaces: set[int] = set()
        self._subscribers: dict[int, _Subscriber] = {}
        self._orphans: list[_Subscriber] = []
        """Whom a hub that is gone introduced: they have the ring, and use it."""
        self._channel: HubChannel | None = None
        self._records: list[wire.Record] = []
        self._ats = False
        """Whether something that devices asked for by ATS is among what is queued."""
        self._revoke_wanted = False
        self._timed_out: OSError | None = None
        """Who was too late for that, until somebody asks."""
        self._wanted = False
        self._flush_seq = 0
        self._flushed: wire.FlushDone | None = None
        self.invalidations = 0
        """Flushes that had something to say."""
        self._closed = False
        self._connect()

    # -- what the vIOMMU says ------------------------------------------------------------------------------------

    def add_space(self, as_id: int) -> None:
        """Invalidations of ``as_id`` may come from now on."""
        self._spaces.add(as_id)
        self._tell(wire.AddSpace(as_id))

    def append(self, as_id: int, iova: int, last: int, flags: int = UNTRANSLATED) -> None:
        """Queue the invalidation of ``iova``..``last`` (inclusive) of ``as_id``; ``flags`` as in the ring."""
        self._writer.append(as_id, iova, last, flags)
        self._ats = self._ats or bool(flags & RecordFlags.ATS)
        if self._wanted:
            self._records.append(wire.Record(as_id, iova, last, flags))

    def flush(self) -> OSError | None:
        """Publish what is queued and return when nobody uses it any more; the error when that cannot be had."""
        revoke, self._revoke_wanted = self._revoke_wanted, False
        if not self._writer.publish() and not revoke:
            return None
        self.invalidations += 1
        ats, self._ats = self._ats, False
        records, self._records = self._records, []
        if records and self._wanted:
            for first in range(0, len(records), wire.MAX_RECORDS):
                self._tell(wire.Publish(self._trace.cause, records[first : first + wire.MAX_RECORDS]))
        error = self._revoke(told=ats)
        return (self._flush_messages() if records and self._wanted else None) or error

    def flush_ats(self) -> OSError | None:
        """As :meth:`flush`, where invalidations of caches (ATS) were among it: ETIMEDOUT, too, when a process had to be
        killed for its end. Its device did not acknowledge in time; nobody uses what was invalidated all the same.
        """
        error = self.flush()
        late, self._timed_out = self._timed_out, None
        return error or late

    def want_revoke(self) -> None:
        """A right was taken away by a word in shared memory: the next flush waits for the sections that are open."""
        self._revoke_wanted = True

    def _revoke(self, *, told: bool) -> OSError | None:
        """``told``: somebody asks by :meth:`flush_ats` whether all were in time."""
        subscribers = self._known()
        revoke = Revoke(self._fence, subscribers)
        if revoke.start():
            return None
        try:
            poll_until(self._loop, revoke.poll, LANE_SECONDS, "subscribers", "an invalidation")
            return None
        except DeadlineExceeded:
            late = revoke.late_sets  # looks again: the waiter may have been the one that was late
        if told and late:
            names = ", ".join(lanes.name for lanes in late)
            self._timed_out = OSError(errno.ETIMEDOUT, f"no acknowledgement within {LANE_SECONDS:g} s from {names}")
        for subscriber in subscribers:
            if subscriber in late and subscriber.alive():
                self._trace("notifier_fenced", name=subscriber.name, pid=subscriber.pid, seconds=LANE_SECONDS)
                subscriber.process.send_signal(signal.SIGKILL)
        try:
            poll_until(self._loop, revoke.poll, FENCE_SECONDS, ", ".join(lanes.name for lanes in late), "its end")
        except DeadlineExceeded as error:
            return OSError(errno.ETIMEDOUT, str(error))
        return None

    def _known(self) -> list[_Subscriber]:
        return [*self._subscribers.values(), *self._orphans]

    def _flush_messages(self) -> OSError | None:
        """Wait for those who are told by message. They notice themselves that a hub is gone, but not that it hangs."""
        self._flush_seq += 1
        wanted = self._flush_seq
        self._tell(wire.Flush(wanted, int(FLUSH_SECONDS * 1e9)))

        def over() -> bool:
            return self._channel is None or (self._flushed is not None and self._flushed.seq == wanted)

        try:
            self._loop.serve_until(over, 2 * FLUSH_SECONDS, "notifier", "Flush")
        except DeadlineExceeded as error:
            self._lost(str(error))
            return OSError(errno.ETIMEDOUT, str(error))
        done = self._flushed
        if self._channel is None or done is None or not done.late:
            return None
        self._trace("notifier_late", names=done.late)
        return OSError(errno.ETIMEDOUT, f"no acknowledgement from {', '.join(done.late)}")

    # -- the hub -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._closed:
            return
        try:
            connection = SeqpacketConnection.connect(self.path, "notifier")
        except PeerLost:
            self._loop.call_later(RETRY_NS, self._connect)
            return
        channel: HubChannel = FdChannel(connection, wire.FROM_HUB, wire.TO_HUB, wire.fd_count)
        self._channel = channel
        self._loop.register(channel, lambda: self._readable(channel), served=True)
        self._trace("notifier_connected", name=self._name)
        self._tell(wire.Announce(self._name, sorted(self._spaces)), (self._ring.fd,))

    def _tell(self, message: wire.ToHub, fds: tuple[int, ...] = ()) -> None:
        if self._channel is not None:
            try:
                self._channel.send(message, fds)
            except PeerLost as error:
                self._lost(str(error))

    def _readable(self, channel: HubChannel) -> None:
        try:
            while self._channel is channel and (received := channel.receive()) is not None:
                self._message(*received)
        except (PeerLost, RemoteProtocolError) as error:
            self._lost(str(error))

    def _message(self, message: wire.FromHub, fds: list[int]) -> None:
        match message:
            case wire.LaneAdd():
                self._add(message, fds)
            case wire.LaneRemove():
                self._remove(message.subscriber)
            case wire.Want():
                self._wanted = message.records
                self._tell(wire.Wanted(message.seq))
            case wire.FlushDone():
                self._flushed = message
            case _:
                close_fds(fds)
                raise RemoteProtocolError(f"{type(message).__name__} to a publisher")

    def _add(self, message: wire.LaneAdd, fds: list[int]) -> None:
        try:
            subscriber = _Subscriber(message, fds)
        except RemoteProtocolError as error:  # the subscriber's fault, which the hub could not see
            self._trace("notifier_refused", name=message.name, reason=str(error))
            return
        self._forget(lambda known: not known.alive() or known.identity == subscriber.identity)
        self._remove(message.subscriber)
        self._subscribers[message.subscriber] = subscriber
        self._trace("notifier_subscribed", name=message.name, pid=message.pid)
        self._tell(wire.LaneReady(message.subscriber))

    def _remove(self, number: int) -> None:
        subscriber = self._subscribers.pop(number, None)
        if subscriber is not None:
            subscriber.close()

    def _forget(self, which: Callable[[_Subscriber], bool]) -> None:
        for number in [number for number, known in self._subscribers.items() if which(known)]:
            self._remove(number)
        for known in [known for known in self._orphans if which(known)]:
            self._orphans.remove(known)
            known.close()

    def _lost(self, reason: str) -> None:
        if self._channel is None:
            return
        self._trace("notifier_lost", reason=reason)
        self._loop.unregister(self._channel)
        self._channel.close()
        self._channel = None
        self._wanted = False
        self._records.clear()
        self._orphans += self._subscribers.values()
        self._subscribers.clear()
        self._loop.call_later(RETRY_NS, self._connect)

    def status(self) -> dict[str, object]:
        """For guestd's status."""
        return {
            "connected": self._channel is not None,
            "subscribers": sorted(subscriber.name for subscriber in self._known()),
            "invalidations": self.invalidations,
            "records": self._writer.head,
        }

    def close(self) -> None:
        """Leave the hub. Harmless twice."""
        self._closed = True
        if self._channel is not None:
            self._loop.unregister(self._channel)
            self._channel.close()
            self._channel = None
        self._forget(lambda _: True)
        self._ring.close()


class Invalidations(Protocol):
    """Where invalidations go: a :class:`Publisher`, or a ring whose readers are in this process."""

    def append(self, as_id: int, iova: int, last: int, flags: int = UNTRANSLATED) -> None:
        """Queue the invalidation of ``iova``..``last`` (inclusive) of ``as_id``, of what is cached for untranslated
        requests without PASID unless ``flags`` (as in the ring) say otherwise."""

    def flush(self) -> OSError | None:
        """Return when nobody uses what is queued any more; the error when that cannot be had."""


class SpaceFollower(MemoryListener):
    """Follows every IOMMU section of one address space for ``publisher``, and RAM that it shows as it is.

    What goes is invalidated when it *has gone*: until the new view is in force, whoever asks for a translation
    still gets one through it, also while other listeners wait for the host.
    """

    priority = 20

    def __init__(self, publisher: Invalidations, as_id: int) -> None:
        self._publisher, self._as_id = publisher, as_id
        self._notifiers: dict[tuple[int, int], IOMMUNotifier] = {}
        self._gone: list[tuple[int, int]] = []
        self._unheard: set[tuple[int, int]] = set()

    @property
    def complete(self) -> bool:
        """Whether all changes are heard of: what a vIOMMU does not tell its followers must not be cached."""
        return not self._unheard

    def region_add(self, section: MemoryRegionSection) -> None:
        """A window appeared."""
        if not isinstance(section.mr, IOMMUMemoryRegion):
            return
        where = section.range.start, section.range.last
        notifier = self._notifier(section)
        try:
            section.mr.register_notifier(notifier)
        except OSError:
            self._unheard.add(where)
            return
        self._notifiers[where] = notifier

    def _notifier(self, section: MemoryRegionSection) -> IOMMUNotifier:
        assert isinstance(section.mr, IOMMUMemoryRegion), "others have no notifiers"
        offset = section.offset_within_address_space - section.offset_within_region
        as_id, append = self._as_id, self._publisher.append

        def changed(_notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
            append(as_id, entry.iova + offset & U64_MAX, entry.last + offset & U64_MAX)

        def run_changed(_notifier: IOMMUNotifier, run: IOMMUTLBRun) -> None:
            append(as_id, run.iova + offset & U64_MAX, run.last + offset & U64_MAX)

        start = section.offset_within_region
        return IOMMUNotifier(
            changed,
            section.mr.cache_events,
            start,
            start + section.size - 1,
            fn_run=run_changed,
            flush=self._publisher.flush,
        )

    def region_del(self, section: MemoryRegionSection) -> None:
        """A window goes, or memory."""
        where = section.range.start, section.range.last
        if isinstance(section.mr, RAMRegion):
            self._gone.append(where)
        if not isinstance(section.mr, IOMMUMemoryRegion):
            return
        notifier = self._notifiers.pop(where, None)
        if notifier is not None:
            section.mr.unregister_notifier(notifier)
        self._unheard.discard(where)
        self._gone.append(where)

    def commit(self) -> None:
        """The new view is in force: everything cached of windows that went goes; who is too late is fenced."""
        gone, self._gone = self._gone, []
        for start, last in gone:
            self._publisher.append(self._as_id, start, last)
        if gone:
            self._publisher.flush()
