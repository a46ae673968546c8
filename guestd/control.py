"""``guestd.ctl``: what a CPU would do to the machine, and questions about it.

One command at a time, at the top level of the loop: a hypercall never starts inside another one. Whatever a
command runs into is an answer (:class:`~protocols.control.messages.Failed`); only a peer that breaks the protocol
is refused.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from guestd.config import DeviceConfig
from guestd.explain import explain
from guestd.guest import Guest
from guestd.machines.board import Paravirtual
from guestd.operations import ELSEWHERE, Operations, RunState
from guestd.posted_writes import burst
from guestd.qmp_commands import MonitorCommands
from protocols.control import messages as control
from protocols.monitor.messages import CommandFailed
from protocols.transport.channel import RouterChannel
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import RouterServer
from vfio_model.errors import ConfigError, InternalGuestError, LocalProtocolError, VfioModelError
from vfio_model.pci.address import PCIAddress
from vfio_model.trace import Trace

ROLE: Final = "guestd"
MAX_TIME_NS: Final = (1 << 63) - 1
"""Virtual time does not go beyond this."""

LOOK_NS: Final = 1_000_000
"""How often it is looked whether a machine that was about to leave has left."""

Channel = RouterChannel[control.ToRole, control.FromRole]
Handler = Callable[[Any], control.Answer]


class GuestControl:
    """Serves the control socket of ``guest`` on ``loop``."""

    def __init__(self, guest: Guest, directory: Path, lock: RoleLock, loop: Loop, trace: Trace) -> None:
        self._guest, self._loop, self._trace = guest, loop, trace
        self._machine = guest.machine
        self._causes = itertools.count((os.getpid() << 32) + 1)
        self.commands = 0
        self.operations = Operations(guest, loop, trace)
        self.monitor = MonitorCommands(self.operations, version(), trace)
        """QMP's commands, for this socket and for monitors."""
        server = RouterServer(directory / f"{ROLE}.ctl", lock=lock)
        self._channel: Channel = RouterChannel(server, control.REQUESTS, control.RESPONSES, control.Refused)
        self._handlers: dict[type, Handler] = {
            control.Hello: self._hello,
            control.Status: lambda _: _document(self.status()),
            control.Ping: lambda _: control.Ok(),
            control.Quit: self._quit,
            control.Hcall: self._hcall,
            control.Rtas: self._rtas,
            control.ReadMemory: self._read_memory,
            control.WriteMemory: self._write_memory,
            control.MmioRead: self._mmio_read,
            control.MmioWrite: self._mmio_write,
            control.PortRead: lambda command: control.Value(guest.board.port_read(command.port, command.size)),
            control.PortWrite: self._port_write,
            control.ConfigRead: self._config_read,
            control.ConfigWrite: self._config_write,
            control.ClockStep: self._clock_step,
            control.Translate: self._translate,
            control.Explain: lambda command: _document(explain(guest, command.address, command.iova)),
            control.DeviceList: lambda _: _document({"devices": [guest.device_status(name) for name in guest.devices]}),
            control.DeviceAdd: self._device_add,
            control.DeviceDel: self._device_del,
            control.Reset: self._reset,
            control.Qmp: self._qmp,
        }
        self._waiting: list[tuple[bytes, control.Request]] = []
        loop.register(self._channel, self._readable)

    def _readable(self) -> None:
        received = self._channel.receive()  # one a turn: others are served in between
        if received is None:
            return
        peer, request = received
        if not isinstance(request, control.Request):
            self._channel.refuse(peer, "a request is expected")
        elif self._waits(request.command):
            if not self._waiting:
                self._loop.call_later(LOOK_NS, self._look_again)
            self._waiting.append((peer, request))
        else:
            self._serve(peer, request)

    def _waits(self, command: control.Command | control.Batch) -> bool:
        """Whether it is for a machine of which nobody knows yet where it will be."""
        commands = command.commands if isinstance(command, control.Batch) else [command]
        leaving = self.operations.state is RunState.FINISH_MIGRATE
        return leaving and any(type(each) in _OF_A_CPU for each in commands)

    def _look_again(self) -> None:
        if self.operations.state is RunState.FINISH_MIGRATE:
            self._loop.call_later(LOOK_NS, self._look_again)
            return
        waiting, self._waiting = self._waiting, []
        for peer, request in waiting:
            self._serve(peer, request)

    def _serve(self, peer: bytes, request: control.Request) -> None:
        self._trace.cause = request.cause or next(self._causes)
        try:
            response = control.Response(request.seq, self._answer(request.command))
            self._channel.send(peer, response)
        except LocalProtocolError as error:
            self._channel.send(peer, control.Response(request.seq, _failed(error)))
        finally:
            self._trace.cause = 0

    def _answer(self, command: control.Command | control.Batch) -> control.Answer | control.BatchDone:
        if not isinstance(command, control.Batch):
            return self._run(command)
        answers: list[control.Answer] = []
        elapsed: list[int] = []
        with burst() as stores:
            for each in command.commands:
                began = time.perf_counter_ns()
                if type(each) is not control.MmioWrite:
                    stores.send()
                answer = self._run(each)
                elapsed.append(time.perf_counter_ns() - began)
                answers.append(answer)
                if isinstance(answer, control.Failed):
                    break
        return control.BatchDone(answers, elapsed)

    def _run(self, command: control.Command) -> control.Answer:
        self.commands += 1
        handler = self._handlers.get(type(command))
        if handler is None:
            return control.Failed("ConfigError", f"{type(command).__name__} is not for a guest")
        broken = self.operations.error
        if broken is not None and type(command) not in _QUESTIONS:
            return _failed(broken)
        if type(command) in _OF_A_CPU and self.operations.state in ELSEWHERE:
            return control.Failed("ConfigError", f"the machine is not here: {self.operations.state}")
        try:
            return handler(command)
        except InternalGuestError as error:
            self.operations.fail(error)
            return _failed(error)
        except CommandFailed as refusal:
            return control.Failed(refusal.error_class, refusal.reason[:4000])
        except (VfioModelError, OSError, OverflowError, MemoryError) as error:
            return _failed(error)

    # -- the process ---------------------------------------------------------------------------------------------

    def _hello(self, _: control.Hello) -> control.Answer:
        return control.Welcome(ROLE, os.getpid(), version())

    def _quit(self, _: control.Quit) -> control.Answer:
        self.operations.quit()
        return control.Ok()

    def status(self) -> dict[str, object]:
        """What ``status`` says."""
        operations = self.operations
        about = {"role": ROLE, "pid": os.getpid(), "state": str(operations.state), "commands": self.commands}
        return {**about, "reason": str(operations.error or ""), **self._guest.status()}

    # -- the machine ---------------------------------------------------------------------------------------------

    def _hcall(self, command: control.Hcall) -> control.Answer:
        ret, outs = self._calls().hcall(command.nr, *command.args)
        return control.HcallDone(ret, outs)

    def _calls(self) -> Paravirtual:
        """:raise ConfigError: the machine has none."""
        calls = self._guest.board.calls
        if calls is None:
            raise ConfigError("this machine has neither hypercalls nor RTAS")
        return calls

    def _rtas(self, command: control.Rtas) -> control.Answer:
        return control.RtasDone(self._calls().rtas(command.token, command.args, command.nret))

    def _read_memory(self, command: control.ReadMemory) -> control.Answer:
        data = bytearray(command.size)
        result = self._machine.system.read(command.gpa, data)
        return control.Bytes(int(result), bytes(data))

    def _write_memory(self, command: control.WriteMemory) -> control.Answer:
        result = self._machine.write_memory(command.gpa, command.data)
        if result:
            return control.Failed("MemTxResult", f"{result!r} at {command.gpa:#x}")
        return control.Ok()

    def _mmio_read(self, command: control.MmioRead) -> control.Answer:
        return control.Value(self._machine.mmio_read(command.gpa, command.size))

    def _mmio_write(self, command: control.MmioWrite) -> control.Answer:
        mask = (1 << command.size * 8) - 1
        self._machine.mmio_write(command.gpa, command.size, command.value & mask)
        return control.Ok()

    def _port_write(self, command: control.PortWrite) -> control.Answer:
        mask = (1 << command.size * 8) - 1
        self._guest.board.port_write(command.port, command.size, command.value & mask)
        return control.Ok()

    def _config_read(self, command: control.ConfigRead) -> control.Answer:
        address = PCIAddress.parse(command.address)
        bus = self._guest.board.bus_at(address)
        return control.Value(bus.config_read(address.devfn, command.offset, command.size))

    def _config_write(self, command: control.ConfigWrite) -> control.Answer:
        address = PCIAddress.parse(command.address)
        self._guest.board.bus_at(address).config_write(address.devfn, command.offset, command.size, command.value)
        return control.Ok()

    def _clock_step(self, command: control.ClockStep) -> control.Answer:
        clock = self._guest.clock
        if command.ns > MAX_TIME_NS - clock.now_ns:
            raise ConfigError(f"{command.ns} ns from {clock.now_ns} is beyond the end of virtual time")
        return control.Value(clock.step(command.ns))

    def _translate(self, command: control.Translate) -> control.Answer:
        translated, perm, mask = self._calls().translate(command.liobn, command.ioba)
        return control.Translation(translated, mask, perm)

    def _device_add(self, command: control.DeviceAdd) -> control.Answer:
        try:
            config = msgspec.json.decode(command.config, type=DeviceConfig)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(str(error), where="device-add") from error
        self.operations.add_device(config)
        return control.Ok()

    def _device_del(self, command: control.DeviceDel) -> control.Answer:
        self.operations.remove_device(command.id)
        return control.Ok()

    def _reset(self, _: control.Reset) -> control.Answer:
        self.operations.reset()
        return control.Ok()

    def _qmp(self, command: control.Qmp) -> control.Answer:
        try:
            arguments = msgspec.json.decode(command.arguments, type=dict[str, object])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(str(error), where="arguments") from error
        return _document(self.monitor.ask(command.execute, arguments))

    def close(self) -> None:
        """Stop serving. Harmless twice."""
        self.monitor.migration.close()
        self._loop.unregister(self._channel)
        self._channel.close()


_QUESTIONS = frozenset(
    (
        control.Hello,
        control.Status,
        control.Ping,
        control.Quit,
        control.DeviceList,
        control.Explain,
        control.ReadMemory,
        control.Qmp,  # its commands look for themselves
    )
)
"""What is still answered when the guest cannot go on."""
_OF_A_CPU = frozenset(
    (
        control.Hcall,
        control.Rtas,
        control.WriteMemory,
        control.MmioRead,
        control.MmioWrite,
        control.PortRead,
        control.PortWrite,
        control.ConfigWrite,
        control.ClockStep,
    )
)
"""What only the machine's CPUs do, which run where the machine is."""


def version() -> str:
    """The version of this program."""
    try:
        return metadata.version("vfio-model")
    except metadata.PackageNotFoundError:
        return "unknown"


def _document(value: object) -> control.Document:
    return control.Document(msgspec.json.encode(value))


def _failed(error: Exception) -> control.Failed:
    return control.Failed(type(error).__name__, str(error)[:4000])
