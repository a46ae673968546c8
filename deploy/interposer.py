"""A process between guestd and hostd that injects faults into the port's messages.

Started as ``python -m deploy.interposer --dir DIR --rules FILE``. guestd connects to ``interposer.zmq``, the
interposer to ``hostd.zmq`` with one socket for each client, so that hostd sees as many peers as there are. What
becomes of a message is decided by :mod:`protocols.interpose`; here the decision is carried out on the real sockets.
Every message is logged when it is taken (``port_take``), passed on (``port_forward``), lost (``port_drop``) or, a
hypercall, referred back to its sender (``port_refer``), with its sequence number and cause id.

The AF_UNIX connections (open files, descriptors) do not pass here. Answers pass unchanged, but for those to messages
that never reached the host and the second answer to a message that was doubled.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import click
import msgspec

from deploy import assemble, runtime_dir
from protocols.control import messages as control
from protocols.interpose import (
    Action,
    AnswerError,
    AnswerSuccess,
    AnswerTooHard,
    Deliver,
    Interposer,
    Kill,
    decode_rules,
    seen,
)
from protocols.port import messages as port
from protocols.transport.eventfile import EventFile
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import DealerClient, RouterServer, Sent
from vfio_model.errors import ConfigError, RemoteProtocolError
from vfio_model.uapi import vfio
from vfio_model.uapi.hvcall import HReturn, hcall_name
from vfio_model.uapi.kvm import ioctl_name

ROLE = "interposer"
MAX_CLIENTS = 64
"""Sockets to the host at a time, as long as the others have their answers."""
_SHAPES: dict[int, type[vfio.DmaMap] | type[vfio.DmaUnmap]] = {
    vfio.Ioctl.VFIO_IOMMU_MAP_DMA: vfio.DmaMap,
    vfio.Ioctl.VFIO_IOMMU_UNMAP_DMA: vfio.DmaUnmap,
}


def describe(message: port.Request) -> dict[str, object]:
    """Fields for the log: sequence number and name; of a map or unmap also the first ``iova`` and the size of all."""
    if isinstance(message, port.Hcall):
        return {"seq": message.seq, "hcall": hcall_name(message.nr), "count": 1, "iova": message.args[1]}
    if not isinstance(message, port.Ioctl):
        return {"seq": message.seq, "ioctl": "ping"}
    fields: dict[str, object] = {"seq": message.seq, "ioctl": ioctl_name(message.cmd), "count": message.count}
    shape = _SHAPES.get(message.cmd)
    if shape is not None and len(message.arg) >= shape.SIZE * message.count:
        each = [shape.unpack(message.arg[i * shape.SIZE :]) for i in range(message.count)]
        fields |= {"iova": each[0].iova, "size": sum(one.size for one in each)}
        if isinstance(each[0], vfio.DmaMap):
            fields["vaddr"] = each[0].vaddr
    return fields


def too_hard(message: port.Request) -> port.Return:
    """The answer to a hypercall that its process shall carry out."""
    return port.Return(message.seq, 0, 1, int(HReturn.H_TOO_HARD).to_bytes(8, sys.byteorder, signed=True))


class Client:
    """A client of the front socket and its own socket to the host.

    ``doubled``: by sequence number, how many answers beside the first will come (positive: the first is still to come).
    ``waits_for``: sequence numbers that the host has not answered.
    """

    def __init__(self, peer: bytes, back: DealerClient) -> None:
        self.peer, self.back = peer, back
        self.doubled: dict[int, int] = {}
        self.waits_for: set[int] = set()


class InterposerProcess:
    """The sockets and the loop around :class:`protocols.interpose.Interposer`."""

    def __init__(self, directory: Path, interposer: Interposer) -> None:
        self._directory, self._interposer = directory, interposer
        self._loop = Loop()
        self._lock = RoleLock(directory, ROLE)
        self._events = EventFile(directory / f"{ROLE}.events")
        self._trace = self._events.trace
        self._front = RouterServer(directory / assemble.INTERPOSED_PORT, lock=self._lock)
        self._control = RouterServer(directory / f"{ROLE}.ctl", lock=self._lock)
        self._clients: dict[bytes, Client] = {}
        self._loop.register(self._front, self._on_front)
        self._loop.register(self._control, self._on_control)
        self._loop.on_idle(self._events.flush)
        self._loop.on_signal(signal.SIGTERM, self._loop.stop)

    def run(self) -> None:
        """Serve until ``quit`` or SIGTERM."""
        try:
            self._loop.run()
        finally:
            self.close()

    def close(self) -> None:
        """Close every socket and the log."""
        for client in self._clients.values():
            client.back.close()
        self._front.close()
        self._control.close()
        self._loop.close()
        self._events.close()
        self._lock.close()

    def _drop(self, client: Client) -> None:
        """Its socket to the host goes."""
        if self._clients.pop(client.peer, None) is not None:
            self._loop.unregister(client.back)
            client.back.close()

    def _make_room(self) -> None:
        """A peer that has left says nothing: among too many, the one that was silent longest and waits for nothing."""
        if len(self._clients) >= MAX_CLIENTS:
            idle = next((client for client in self._clients.values() if not client.waits_for), None)
            if idle is not None:
                self._drop(idle)

    def _client(self, peer: bytes) -> Client:
        if peer in self._clients:
            self._clients[peer] = self._clients.pop(peer)  # the latest last
        else:
            self._make_room()
            client = Client(peer, DealerClient(self._directory / assemble.PORT))
            self._clients[peer] = client
            self._loop.register(client.back, lambda: self._on_back(client))
        return self._clients[peer]

    def _on_front(self) -> None:
        while (received := self._front.receive()) is not None:
            peer, data = received
            client = self._client(peer)
            try:
                message = port.REQUESTS.decode(data)
            except RemoteProtocolError as error:
                self._front.refuse(peer, port.RESPONSES.encode(port.Refused(str(error)[:1000])))
                self._drop(client)
                continue
            self._trace.cause = 0 if isinstance(message, port.Ping) else message.cause
            self._trace("port_take", **describe(message))
            self._carry_out(client, message, data, self._interposer.decide(seen(message)))

    def _carry_out(self, client: Client, message: port.Request, data: bytes, actions: list[Action]) -> None:
        deliveries = [action for action in actions if isinstance(action, Deliver)]
        if AnswerTooHard() in actions:
            self._trace("port_refer", **describe(message))
        elif not deliveries:
            self._trace("port_drop", **describe(message))
        if len(deliveries) > 1:
            client.doubled[message.seq] = len(deliveries) - 1
        for action in actions:
            match action:
                case Deliver(delay_ns=0):
                    self._forward(client, message, data)
                case Deliver(delay_ns=delay):
                    self._loop.call_later(delay, lambda: self._forward(client, message, data))
                case AnswerSuccess():
                    self._answer(client, message, 0)
                case AnswerError(errno=number):
                    self._answer(client, message, number)
                case AnswerTooHard():
                    self._front.send(client.peer, port.RESPONSES.encode(too_hard(message)))
                case Kill(role=role):
                    self._kill(role)

    def _forward(self, client: Client, message: port.Request, data: bytes) -> None:
        self._trace.cause = 0 if isinstance(message, port.Ping) else message.cause
        self._trace("port_forward", **describe(message))
        if not client.back.closed:  # a message that was delayed may come after its sender was refused
            client.waits_for.add(message.seq)
            client.back.send(data)

    def _answer(self, client: Client, message: port.Request, number: int) -> None:
        """Answer for the host; a success returns the argument as it came, or H_SUCCESS."""
        if isinstance(message, port.Ping):
            return
        done, arg = (1, bytes(8)) if isinstance(message, port.Hcall) else (message.count, message.arg)
        if number:
            done, arg = 0, b""
        self._front.send(client.peer, port.RESPONSES.encode(port.Return(message.seq, number, done, arg)))

    def _on_back(self, client: Client) -> None:
        while not client.back.closed and (data := client.back.receive()) is not None:
            try:
                answer: port.Response | None = port.RESPONSES.decode(data)
            except RemoteProtocolError:
                answer = None
            seq = getattr(answer, "seq", 0)
            client.waits_for.discard(seq)
            if self._is_double(client, seq):
                continue
            if self._front.send(client.peer, data) is Sent.UNREACHABLE or isinstance(answer, port.Refused):
                self._drop(client)

    def _is_double(self, client: Client, seq: int) -> bool:
        """Whether this is a further answer to ``seq``, which the client does not get."""
        extra = client.doubled.pop(seq, 0)
        if extra > 0:
            client.doubled[seq] = -extra
        elif extra < -1:
            client.doubled[seq] = extra + 1
        return extra < 0

    def _kill(self, role: str) -> None:
        run = runtime_dir.read_run_file(self._directory)
        for entry in run.processes if run is not None else ():
            if entry.role == role and runtime_dir.is_same(entry):
                self._trace("kill", role=role, pid=entry.pid)
                self._events.flush()
                os.kill(entry.pid, signal.SIGKILL)

    def _on_control(self) -> None:
        while (received := self._control.receive()) is not None:
            peer, data = received
            try:
                request = control.REQUESTS.decode(data)
            except RemoteProtocolError as error:
                self._control.refuse(peer, control.RESPONSES.encode(control.Refused(str(error)[:4096])))
                continue
            answer = self._command(request.command)
            self._events.flush()
            self._control.send(peer, control.RESPONSES.encode(control.Response(request.seq, answer)))

    def _command(self, command: control.Command | control.Batch) -> control.Answer:
        match command:
            case control.Hello():
                return control.Welcome(ROLE, os.getpid(), version("vfio-model"))
            case control.Ping():
                return control.Ok()
            case control.Quit():
                self._loop.call_later(1_000_000, self._loop.stop)
                return control.Ok()
            case control.Status():
                return control.Document(msgspec.json.encode({"rules": self._interposer.counters()}))
            case control.Interpose(rules=rules):
                try:
                    self._interposer.rules = decode_rules(rules)
                except ConfigError as error:
                    return control.Failed("ConfigError", str(error))
                return control.Ok()
        return control.Failed("NotImplemented", f"the interposer has no {type(command).__name__}")


@click.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--rules", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
def main(directory: Path, rules: Path) -> None:
    """Stand between guestd and hostd and do to messages what the rules say."""
    try:
        process = InterposerProcess(directory, Interposer(decode_rules(rules.read_bytes())))
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    process.run()


if __name__ == "__main__":
    main()
