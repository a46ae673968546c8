"""The host's side in this process: groups, containers and tables, assigned devices, and the port that leads there.

A request is the message that it would be on the wire (:class:`protocols.port.messages.Ioctl`), numbered, logged at
every hop, and shown to the interposer's rules; it is then carried out by a call. Batches are cut as on the wire, so
that a rule counts the same messages in both modes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence

import msgspec

from deploy.inline.device import InlineConnection, InlineDevice, Soon
from deploy.inline.log import InlineLog
from deploy.interposer import describe, too_hard
from hostd import host_explain
from protocols.interpose import AnswerError, AnswerSuccess, AnswerTooHard, Deliver, Interposer, Rule, seen
from protocols.port.messages import MAX_ARG, MAX_COUNT, Hcall, Ioctl, Return
from vfio_model.errors import ConfigError, InternalGuestError
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.group import Group, HostDevice
from vfio_model.host.host import Host, private_buffers
from vfio_model.host.layout import DIRTY_BYTES
from vfio_model.host.mm import Mm
from vfio_model.host.pending import Pending
from vfio_model.host.topology import HostTopology
from vfio_model.memory.lane import LaneArea
from vfio_model.uapi.hvcall import hcall_name
from vfio_model.vfio.direct import DirectPort, T
from vfio_model.vfio.ioctl import BatchError

UNLIMITED = (1 << 64) - 1


class InlineHost:
    """A host of ``topology`` with one client, the guest, which locks at most ``memlock`` bytes.

    :raise ConfigError: when the topology makes no sense.
    """

    def __init__(self, topology: dict[str, object], memlock: int, name: str, log: InlineLog, soon: Soon) -> None:
        try:
            spec = msgspec.convert(topology, HostTopology)
        except msgspec.ValidationError as error:
            raise ConfigError(str(error), where="host") from error
        self._log, self._soon, self._trace = log, soon, log.trace("hostd")
        self.host = Host(spec, on_device_open=self._open, on_device_close=self._close, trace=self._trace)
        mm = self.host.create_mm(None if memlock >= UNLIMITED else memlock, name)
        self.port = InlinePort(self, mm, log)
        self.units: dict[int, InlineDevice] = {}
        """Open devices by token."""
        self._tokens = 0
        self.now_ns: Callable[[], int] = lambda: 0
        """The guest's time, which a new device begins with."""

    def lanes(self, names: Iterable[str]) -> list[LaneArea]:
        """The lane areas of the open devices among ``names``."""
        wanted = set(names)
        return [unit.lanes for unit in self.units.values() if unit.name in wanted]

    # -- devices -----------------------------------------------------------------------------------------------------

    def _open(self, group: Group, device: HostDevice) -> int:
        container = group.container
        assert container is not None and container.driver is not None, "the host opens devices of attached groups"
        trace = self._log.trace(f"device-{device.name}")
        try:
            unit = InlineDevice(device.name, device.spec.model, device.spec.props, trace, self.now_ns())
        except ConfigError as error:
            raise OSError(errno.EIO, str(error)) from error
        words = container.driver.domain_words
        device.dirty = private_buffers(f"dirty.{device.name}", DIRTY_BYTES).cast("B")
        unit.start(AssignedImpl(device.pe.words, words, self.port.segments, unit.lane, dirty=device.dirty))
        self._tokens += 1
        self.units[self._tokens] = unit
        self._trace("hostd_device_ready", name=device.name, key=self._tokens, pid=os.getpid())
        return self._tokens

    def _close(self, group: Group, device: HostDevice, token: int) -> None:
        unit = self.units.pop(token, None)
        if unit is not None:
            unit.stop()

    def take_device(self, token: int) -> InlineConnection:
        """The connection to the open device with ``token``."""
        return InlineConnection(self.units[token], self._soon, lambda: self.port.device_closed(token))

    # -- the operator ------------------------------------------------------------------------------------------------

    def explain(self, name: str, iova: int) -> dict[str, object]:
        """Stage 2 for the host's device ``name``, as hostd answers it."""
        return host_explain.explain(self.host, name, iova)

    def status(self) -> dict[str, object]:
        """What hostd's status says, as far as it has a meaning here."""
        mm, pid = self.port.mm, os.getpid()
        return {
            "role": "hostd",
            "pid": pid,
            "mms": [{"name": mm.name, "pid": pid, "locked_vm": mm.locked_vm, "memlock": mm.memlock}],
            "devices": [{"name": unit.name, "pid": pid, "state": "running"} for unit in self.units.values()],
            "pending": [],
            "queued": 0,
            "revokes": self.port.revokes,
            "locked_vm": mm.locked_vm,
        }

    def close(self) -> None:
        """The client goes: everything it had is released."""
        self.port.exit()
        self._trace("hostd_exit_mm", name=self.port.mm.name, pid=os.getpid(), locked_vm=self.port.mm.locked_vm)


class InlinePort(DirectPort):
    """A :class:`~vfio_model.vfio.direct.DirectPort` whose ioctls are messages first.

    :attr:`interposer` decides about each of them; None: there is none.
    """

    def __init__(self, owner: InlineHost, mm: Mm, log: InlineLog) -> None:
        super().__init__(owner.host, mm, lanes=owner.lanes, idle=_stuck, devices=owner.take_device)
        self._guest, self._host = log.trace("guestd"), log.trace("hostd")
        self._between = log.trace("interposer")
        self.interposer: Interposer | None = None
        self.revokes = 0
        """Revocations that were begun."""
        self._seq = 0

    def run(self, outcome: T | Pending[T]) -> T:
        """See :class:`~vfio_model.vfio.direct.DirectPort`."""
        self.revokes += isinstance(outcome, Pending)
        return super().run(outcome)

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        answer = self._call(handle, cmd, arg, 1)
        if answer.errno:
            raise OSError(answer.errno, f"{self.host.ioctl_name(handle, cmd)}: {os.strerror(answer.errno)}")
        return answer.arg

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`; in as many messages as on the wire."""
        size = len(args) // count if count else 1
        step = min(MAX_COUNT, MAX_ARG // size)
        for first in range(0, count, step):
            some = min(step, count - first)
            answer = self._call(handle, cmd, bytes(args[first * size : (first + some) * size]), some)
            if answer.errno:
                what = f"{self.host.ioctl_name(handle, cmd)}: {os.strerror(answer.errno)}"
                raise BatchError(answer.errno, what, first + answer.done)
        return count

    def hcall(self, vm: int, nr: int, args: Sequence[int], links: int) -> int:
        """See :class:`~vfio_model.vfio.kvm.KvmPort`."""
        self._seq += 1
        self._guest("port_send", seq=self._seq, hcall=hcall_name(nr), count=1)
        answer = self._pass(Hcall(self._seq, self._guest.cause, 0, vm, nr, list(args), links))
        if answer.errno:
            raise OSError(answer.errno, f"{hcall_name(nr)}: {os.strerror(answer.errno)}")
        return int.from_bytes(answer.arg, sys.byteorder, signed=True)

    def _call(self, handle: int, cmd: int, arg: bytes, count: int) -> Return:
        self._seq += 1
        trace = self._guest
        trace("port_send", seq=self._seq, ioctl=self.host.ioctl_name(handle, cmd), handle=handle, count=count)
        return self._pass(Ioctl(self._seq, trace.cause, 0, handle, cmd, count, arg))

    def _pass(self, message: Ioctl | Hcall) -> Return:
        trace = self._guest
        answer = self._carry_out(message) if self.interposer is None else self._interpose(self.interposer, message)
        trace("port_return", seq=message.seq, errno=answer.errno, done=answer.done)
        return answer

    def _interpose(self, interposer: Interposer, message: Ioctl | Hcall) -> Return:
        """Do what the rules say; the first answer counts. A delayed message arrives at once: nothing else runs
        meanwhile.
        """
        self._between("port_take", **describe(message))
        actions = interposer.decide(seen(message))
        if AnswerTooHard() in actions:
            self._between("port_refer", **describe(message))
            return too_hard(message)
        if not any(isinstance(action, Deliver) for action in actions):
            self._between("port_drop", **describe(message))
        answers: list[Return] = []
        for action in actions:
            match action:
                case Deliver():
                    self._between("port_forward", **describe(message))
                    answers.append(self._carry_out(message))
                case AnswerSuccess():
                    success = (message.count, message.arg) if isinstance(message, Ioctl) else (1, bytes(8))
                    answers.append(Return(message.seq, 0, *success))
                case AnswerError(errno=number):
                    answers.append(Return(message.seq, number, 0, b""))
        assert answers, "rules that lose a message are refused before the run"
        return answers[0]

    def _carry_out(self, message: Ioctl | Hcall) -> Return:
        if isinstance(message, Hcall):
            self._host("port_recv", seq=message.seq, hcall=hcall_name(message.nr), count=1)
            ret = super().hcall(message.handle, message.nr, message.args, message.links)
            return Return(message.seq, 0, 1, ret.to_bytes(8, sys.byteorder, signed=True))
        seq, count, name = message.seq, message.count, self.host.ioctl_name(message.handle, message.cmd)
        self._host("port_recv", seq=seq, ioctl=name, count=count)
        try:
            if count == 1:
                return Return(seq, 0, 1, super().ioctl(message.handle, message.cmd, message.arg))
            return Return(seq, 0, super().ioctl_many(message.handle, message.cmd, message.arg, count), b"")
        except OSError as error:
            number, done = error.errno or errno.EIO, error.done if isinstance(error, BatchError) else 0
            self._host("vfio_ioctl_failed", ioctl=name, errno=number, reason=error.strerror or "")
            return Return(seq, number, done, b"")


def _stuck() -> None:
    raise InternalGuestError("a revoke found a device inside a DMA section, which one thread can never leave again")


def lossless(rules: Iterable[Rule]) -> None:
    """:raise ConfigError: for a rule that needs processes: one that kills, or lets a request run into its deadline."""
    for index, rule in enumerate(rules):
        if rule.action in ("kill", "lose"):
            raise ConfigError(
                f"{rule.action} needs processes of their own",
                where=f"interpose[{index}]",
                hint="run it without --inline",
            )
