"""Hypercalls that the host answers: from the message to the Return, after the revoke of what it replaced."""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from errno import EBADF, EIO

from hostd.events import SendReturn
from hostd.jobs import DmaWait, Job, Steps, Until
from hostd.state import ServiceState
from protocols.port.messages import Hcall, Return
from vfio_model.host.pending import Pending
from vfio_model.uapi.hvcall import HReturn

_RET = struct.Struct("=q")


class HcallService:
    """Runs hypercalls of ZeroMQ peers against the host."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state

    def submit(self, peer: bytes, message: Hcall) -> None:
        """Begin ``message``; its Return comes as an effect, now or later.

        It never waits behind an operation of a container: while one is pending, the hypercall is too hard, and what its
        process sends instead takes its turn.
        """
        state = self._state
        state.cause = message.cause
        file = state.clients.file_for(message.mm, message.handle)
        if file is None:
            state.emit(SendReturn(peer, Return(message.seq, EBADF, 0, b"")))
            return
        containers = state.host.linked_containers(file.handle, message.args[0])
        if not all(state.jobs.idle(container) for container in containers):
            self._answer(peer, message, int(HReturn.H_TOO_HARD))
            return
        client = state.clients.mms[message.mm]
        try:
            result = state.host.hcall(client.mm, file.handle, message.nr, message.args, message.links)
        except OSError as error:
            state.emit(SendReturn(peer, Return(message.seq, error.errno or EIO, 0, b"")))
            return
        if isinstance(result, Pending):
            wait = state.begin_revoke(result.lane_devices)
            if wait is not None:
                self._finish_later(containers, client.pid, message, self._steps(peer, message, wait, result))
                return
            result = result.finish()
        self._answer(peer, message, result)

    def _finish_later(self, containers: Sequence[Hashable], pid: int, message: Hcall, steps: Steps) -> None:
        """Operations of every container that it changed wait behind it."""
        jobs, label = self._state.jobs, f"hypercall {message.nr:#x}"
        first, *others = containers
        job = Job(label, steps, pid)
        jobs.submit(first, job)
        for container in others:
            jobs.submit(container, Job(label, _until_over(job), pid))

    def _steps(self, peer: bytes, message: Hcall, wait: DmaWait, pending: Pending[int]) -> Steps:
        yield wait
        self._answer(peer, message, pending.finish())

    def _answer(self, peer: bytes, message: Hcall, ret: int) -> None:
        self._state.emit(SendReturn(peer, Return(message.seq, 0, 1, _RET.pack(ret))))


def _until_over(job: Job) -> Steps:
    """What a job does that keeps another queue until ``job`` is over."""
    yield Until("a hypercall", lambda: job.over)
