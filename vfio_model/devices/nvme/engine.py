"""nvme: from a doorbell to a completion.

A doorbell's new tail makes its queue *ready*; ready queues take turns, a batch of commands each (NVM Express Base
Specification 1.4, section 4.13.1, "Round Robin Arbitration"). One register write does a bounded amount of work; what is
left is done when the process has nothing else to do, so that a guest cannot keep it::

    doorbell ──► ready ──► batch: fetch, carry out, post ──► ready again, while commands wait and completions have room
                   ▲            │ bound reached
                   └─ when idle ┘

A completion queue that is full stops its submission queues until its head moves. When an entry can be neither fetched
nor posted the controller has failed (CSTS.CFS) and does nothing more until it is reset.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.devices.nvme import admin, nvm
from vfio_model.devices.nvme.controller import RESULT_SHIFT, Controller
from vfio_model.devices.nvme.events import INVALID_DOORBELL_REGISTER, INVALID_DOORBELL_VALUE, Event
from vfio_model.devices.nvme.logs import NO_QUEUE
from vfio_model.devices.nvme.queues import CompletionQueue, SubmissionQueue
from vfio_model.devices.nvme.regs import (
    CQE,
    CQE_SIZE,
    SQE,
    SQE_SIZE,
    STATUS_DNR,
    STATUS_MORE,
    TRANSIENT,
    Command,
    Status,
)
from vfio_model.memory.dma import DMASpace

BATCH = 64
"""Commands of one queue before it is another's turn, and entries of one interrupt."""
COMMANDS_AT_ONCE = 256
BYTES_AT_ONCE = 8 << 20
"""What one register write may do."""
_STATUS_MASK = (1 << RESULT_SHIFT) - 1


class Engine:
    """Carries out the commands in the queues of ``controller``. ``when_idle`` is
    :meth:`~vfio_model.pci.device.PCIDevice.run_when_idle`."""

    def __init__(self, controller: Controller, dma: DMASpace, when_idle: Callable[[Callable[[], bool]], None]) -> None:
        self._controller, self._dma, self._when_idle = controller, dma, when_idle
        self._ready: dict[int, None] = {}
        """Identifiers of submission queues, next first."""
        self._working = self._scheduled = False
        self._entries = memoryview(bytearray(BATCH * SQE_SIZE))
        self._completions = memoryview(bytearray(BATCH * CQE_SIZE))

    # -- doorbells (sections 3.1.24 and 3.1.25)

    def ring(self, index: int, value: int) -> None:
        """Doorbell ``index`` was written: of a submission queue's tail when even, of a completion queue's head when
        odd. Ignored unless the controller is ready."""
        qid, of_completion = index >> 1, index & 1
        queues = self._controller.queues
        if self._controller.failed or not queues.submission:
            return
        known = qid in (queues.completion if of_completion else queues.submission)
        if not known:
            self._refuse(NO_QUEUE, INVALID_DOORBELL_REGISTER)
        elif of_completion:
            self._take(queues.completion[qid], value)
        else:
            self._submit(queues.submission[qid], value)

    def _submit(self, sq: SubmissionQueue, tail: int) -> None:
        if tail >= sq.size or (tail - sq.tail) % sq.size > sq.room:
            self._refuse(sq.id, INVALID_DOORBELL_VALUE)
            return
        sq.tail = tail
        self._ready[sq.id] = None
        self.work()

    def _take(self, cq: CompletionQueue, head: int) -> None:
        if head >= cq.size or (head - cq.head) % cq.size > cq.unconsumed:
            self._refuse(NO_QUEUE, INVALID_DOORBELL_VALUE)
            return
        cq.head = head
        self._controller.interrupts.consumed()
        self._wake(cq)
        if self._ready or not cq.id:
            self.work()

    def resume(self) -> None:
        """Go on with what the queues hold, when the process is idle: they were loaded."""
        for cq in self._controller.queues.completion.values():
            self._wake(cq)
        self._defer()

    def _wake(self, cq: CompletionQueue) -> None:
        """``cq`` may have room."""
        for sq in cq.feeders:
            if sq.head != sq.tail:
                self._ready[sq.id] = None

    def _refuse(self, sqid: int, event: Event) -> None:
        self._controller.errors.add_doorbell(sqid)
        self._controller.events.raise_(event)
        self.work()

    # -- turns

    def stop(self) -> None:
        """Nothing is ready any more: the controller is disabled or has failed."""
        self._ready.clear()

    def work(self) -> None:
        """Carry out commands, within bounds. Harmless while commands are carried out already: those go on with what
        was added."""
        if self._working:
            return
        self._working = True
        try:
            self._take_turns()
            self._tell_events()
        finally:
            self._working = False
        self._defer()

    def _defer(self) -> None:
        if self._ready and not self._scheduled:
            self._scheduled = True
            self._when_idle(self._idle_slice)

    def _idle_slice(self) -> bool:
        if not self._working:
            self.work()
        self._scheduled = bool(self._ready)
        return self._scheduled

    def _take_turns(self) -> None:
        ready, controller = self._ready, self._controller
        submission, memory = controller.queues.submission, controller.memory
        left, enough = COMMANDS_AT_ONCE, memory.moved + BYTES_AT_ONCE
        while ready and left > 0 and memory.moved < enough:
            qid = next(iter(ready))
            del ready[qid]
            sq = submission.get(qid)
            if sq is None:
                continue
            left -= self._batch(sq, min(BATCH, left), enough)
            if sq.head != sq.tail and sq.cq.room and submission.get(qid) is sq and not controller.failed:
                ready[qid] = None

    def _batch(self, sq: SubmissionQueue, most: int, enough: int) -> int:
        """Carry out up to ``most`` commands of ``sq``; how many it were."""
        controller, cq, head = self._controller, sq.cq, sq.head
        most = min(most, sq.pending, cq.room, sq.size - head, cq.size - cq.tail)
        if most <= 0:
            return 0
        entries = self._entries[: most * SQE_SIZE]
        if self._dma.read(sq.base + head * SQE_SIZE, entries):
            self._fail()
            return 0
        epoch, memory, phase = controller.epoch, controller.memory, cq.phase
        handlers = nvm.HANDLERS if sq.id else admin.HANDLERS
        traced = controller.trace.enabled
        pack, completions, at, done = CQE.pack_into, self._completions, 0, 0
        for command in map(Command._make, SQE.iter_unpack(entries)):
            if traced:
                self._trace(sq.id, command)
            handler = handlers.get(command.opcode)
            if handler is None:
                outcome: int | None = Status.INVALID_OPCODE
            elif command.flags:  # fused operations and SGLs are not supported
                outcome = Status.INVALID_FIELD
            else:
                outcome = handler(controller, command)
            if controller.epoch != epoch:
                return done
            done += 1
            head += 1
            sq.head = head if head < sq.size else 0
            if outcome is None:
                continue
            status = outcome & _STATUS_MASK
            if status:
                status = self._note(sq.id, command, status)
            pack(completions, at, outcome >> RESULT_SHIFT, 0, sq.head, sq.id, command.cid, status << 1 | phase)
            at += CQE_SIZE
            if memory.moved >= enough:
                break
        if at:
            self._post(cq, completions[:at])
        return done

    def _trace(self, sqid: int, command: Command) -> None:
        event = "pci_nvme_io_cmd" if sqid else "pci_nvme_admin_cmd"
        self._controller.trace(event, cid=command.cid, sqid=sqid, nsid=command.nsid, opcode=command.opcode)

    def _note(self, sqid: int, command: Command, status: int) -> int:
        """``command`` fails: log it; the status field with all its bits."""
        field = status | STATUS_MORE | (0 if status in TRANSIENT else STATUS_DNR)
        self._controller.errors.add(sqid, command, field)
        return field

    # -- completions

    def _post(self, cq: CompletionQueue, entries: memoryview) -> None:
        """Post ``entries``, for which there is room before the ring's end."""
        epoch = self._controller.epoch
        if self._dma.write(cq.base + cq.tail * CQE_SIZE, entries):
            self._fail()
        elif self._controller.epoch == epoch:
            cq.advance(len(entries) // CQE_SIZE)
            self._controller.interrupts.posted(cq)

    def _tell_events(self) -> None:
        """Answer requests for events, as far as there are events and room."""
        controller, events = self._controller, self._controller.events
        if not events.queue and not events.aborted:
            return
        cq = controller.queues.completion.get(0)
        sq = controller.queues.submission.get(0)
        while cq is not None and sq is not None and cq.room and not controller.failed:
            answer = events.next()
            if answer is None:
                return
            cid, event = answer
            status = 0 if event is not None else Status.ABORT_REQUESTED
            entry = memoryview(bytearray(CQE_SIZE))
            dword0 = 0 if event is None else event.result
            CQE.pack_into(entry, 0, dword0, 0, sq.head, sq.id, cid, status << 1 | cq.phase)
            self._post(cq, entry)
            cq = controller.queues.completion.get(0)

    def _fail(self) -> None:
        self._controller.failed = True
        self.stop()
