"""Fuzz, with fixed seeds, against every socket of a running system.

At least half of the messages pass framing and schema, as the real codecs judge. A sender loses its connection, or gets
a refusal or an errno; meanwhile somebody who behaves well maps, does DMA and unmaps, and sees nothing of it. At the
end every process is the one that it was, and so are descriptors and locked memory.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.launcher import DaemonSpec, python
from protocols.control import messages as control
from protocols.notifier import messages as hub
from protocols.port import files
from protocols.port import messages as port
from protocols.transport.unix import close_fds
from tests.processes.disturbance import told
from tests.processes.port_client import RawFile, RawPort
from tests.processes.rig import CARD, NIC, Live
from tests.processes.senders import PacketSender, VfioUserSender, ZmqSender
from tests.processes.traffic import Traffic
from tests.protocols.fuzz import CHANNELS, Fuzzer
from vfio_model.guest_drivers.pci import MmioWindow
from vfio_model.iommu.spapr.regs import HCall, RtasToken
from vfio_model.uapi.kvm import CreateSpaprTce64, KvmIoctl, UserspaceMemoryRegion
from vfio_model.uapi.vfio import Ioctl

pytestmark = pytest.mark.machine

SEED = 20260611
COUNT = 500
"""Messages for each socket."""
QUESTIONS = (
    control.Hello,
    control.Status,
    control.Ping,
    control.ReadMemory,
    control.ConfigRead,
    control.Translate,
    control.Explain,
    control.DeviceList,
)
"""Commands to a guest that leave it as it is."""
HVA, MIB, LIOBN = 0x7000_0000_0000, 1 << 20, 0x8000_0000
LONGEST_STEP_NS = 1 << 40

Sender = ZmqSender | PacketSender | VfioUserSender


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A system with an interposer, and a device server that nobody uses."""
    with Live(scale=1, interpose=True) as system:
        spare = str(system.directory / "spare.sock")
        argv = python("-m", "hostd", "device", "--dir", str(system.directory), "--model", "edu", "--socket", spare)
        system.launcher.start([DaemonSpec("spare", argv, ready_file="spare.sock")])
        yield system


def no_quit(request: control.Request) -> control.Request | None:
    """Whoever may say quit may do so; it is not what is tested. Nor is what the interposer is told to do."""
    return (
        None if any(isinstance(command, control.Quit | control.Interpose) for command in commands(request)) else request
    )


def only_questions(request: control.Request) -> control.Request:
    """What a guest can be asked while it has other things to do: a question in place of each command that is none."""
    asked = [
        each if isinstance(each, QUESTIONS) else control.Translate(request.seq, request.cause)
        for each in commands(request)
    ]
    command = control.Batch(asked) if isinstance(request.command, control.Batch) else asked[0]
    return msgspec.structs.replace(request, command=command)


def commands(request: control.Request) -> list[control.Command]:
    """One or many."""
    return request.command.commands if isinstance(request.command, control.Batch) else [request.command]


class OwnHandles:
    """Puts handles of a client of its own into requests, so that they get past the first look."""

    def __init__(self, directory: Path, fuzzer: Fuzzer) -> None:
        self._random = fuzzer.random
        self.client = RawPort(directory, name="fuzz")
        self._container = self.client.open("/dev/vfio/vfio")
        self._vm = self.client.open("/dev/kvm")
        self.client.declare("fuzz", HVA, MIB)
        slot = UserspaceMemoryRegion(0, 0, 0, MIB, HVA).pack()
        self.client.ioctl(self._vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, slot)
        table = RawFile(directory)
        arg = CreateSpaprTce64(LIOBN, 12, 0, 0, 512).pack()
        table.send(files.CreateSpaprTce(self.client.mm.handle, self._vm, arg))
        opened, fds = table.receive()
        assert isinstance(opened, files.OpenedTable)
        close_fds(fds)
        self.client.files[opened.handle] = table
        self.mm = self.client.mm.handle

    def ioctl(self, message: port.Request) -> port.Request:
        """An ioctl of this client, on its container, with a command that exists: each in most cases."""
        if isinstance(message, port.Ping):
            return message
        changes: dict[str, Any] = {}
        if self._random.random() < 0.8:
            changes["mm"] = self.mm
        if isinstance(message, port.Hcall):
            return self._hcall(message, changes)
        if self._random.random() < 0.8:
            changes["handle"] = self._container
        if self._random.random() < 0.8:
            changes["cmd"] = int(self._random.choice([*Ioctl, *KvmIoctl]))
        if self._random.random() < 0.2:
            changes["handle"] = self._vm
        return msgspec.structs.replace(message, **changes)

    def _hcall(self, message: port.Hcall, changes: dict[str, Any]) -> port.Hcall:
        """A hypercall about a table that exists, most of the time."""
        args = list(message.args)
        if self._random.random() < 0.8:
            changes |= {"handle": self._vm, "links": 0}
            changes["nr"] = int(self._random.choice((HCall.H_PUT_TCE, HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT)))
            args[0] = LIOBN
        if self._random.random() < 0.5:
            args[1] = self._random.randrange(512) << 12
        if self._random.random() < 0.5:
            args[2] = self._random.randrange(256) << 12
        if self._random.random() < 0.5:
            args[3] = self._random.randrange(600)
        return msgspec.structs.replace(message, args=args, **changes)

    def prelude(self) -> files.Request | None:
        """Half of the connections are an mm."""
        return files.OpenMm(1 << 30, "fuzz") if self._random.random() < 0.5 else None

    def learn(self, answer: files.Response) -> None:
        """The handle of the newest mm."""
        if isinstance(answer, files.Opened):
            self.mm = answer.handle

    def file(self, message: files.Request) -> files.Request:
        """A file opened on behalf of a known mm."""
        if isinstance(message, files.CreateSpaprTce) and self._random.random() < 0.8:
            arg = CreateSpaprTce64(self._random.randrange(1 << 32), 12, 0, 0, self._random.randrange(1 << 12)).pack()
            return msgspec.structs.replace(message, mm=self.mm, vm=self._vm, arg=arg)
        if isinstance(message, files.OpenFile) and self._random.random() < 0.8:
            return msgspec.structs.replace(message, mm=self.mm)
        return message


def senders(directory: Path, own: OwnHandles) -> dict[str, Callable[[Fuzzer], Sender]]:
    """By socket."""
    zmq = CHANNELS["hostd.zmq"]
    ctl = CHANNELS["ctl"]
    return {
        "hostd.zmq": lambda _: ZmqSender(directory / "hostd.zmq", zmq, port.RESPONSES, own.ioctl),
        "interposer.zmq": lambda _: ZmqSender(directory / "interposer.zmq", zmq, port.RESPONSES, own.ioctl),
        "hostd.ctl": lambda _: ZmqSender(directory / "hostd.ctl", ctl, control.RESPONSES, no_quit),
        "notifier.ctl": lambda _: ZmqSender(directory / "notifier.ctl", ctl, control.RESPONSES, no_quit),
        "interposer.ctl": lambda _: ZmqSender(directory / "interposer.ctl", ctl, control.RESPONSES, no_quit),
        "guestd.ctl": lambda _: ZmqSender(directory / "guestd.ctl", ctl, control.RESPONSES, only_questions),
        "notifier.zmq": lambda _: ZmqSender(directory / "notifier.zmq", CHANNELS["notifier.zmq"], hub.ROUTER_FROM_HUB),
        "hostd.sock": lambda fuzzer: PacketSender(
            directory / "hostd.sock",
            CHANNELS["hostd.sock"],
            fuzzer,
            files.RESPONSES,
            prelude=own.prelude,
            learn=own.learn,
            change=own.file,
        ),
        "notifier.sock": lambda fuzzer: PacketSender(
            directory / "notifier.sock", CHANNELS["notifier.sock"], fuzzer, hub.FROM_HUB
        ),
        "card.sock": lambda fuzzer: VfioUserSender(directory / "card.sock", fuzzer, fuzzer.vfio_user),
        "spare.sock": lambda fuzzer: VfioUserSender(directory / "spare.sock", fuzzer, fuzzer.vfio_user),
    }


SOCKETS = [
    "hostd.zmq",
    "interposer.zmq",
    "hostd.ctl",
    "notifier.ctl",
    "interposer.ctl",
    "guestd.ctl",
    "notifier.zmq",
    "hostd.sock",
    "notifier.sock",
    "card.sock",
    "spare.sock",
]
STREAMS = {name: name for name in ("hostd.zmq", "hostd.sock", "notifier.sock", "notifier.zmq")} | {
    "interposer.zmq": "hostd.zmq"
}


def send_all(sender: Sender, socket_name: str, fuzzer: Fuzzer) -> None:
    """:data:`COUNT` messages."""
    if isinstance(sender, VfioUserSender):
        sender.send_many(COUNT)
        return
    for data, fds in fuzzer.stream(STREAMS.get(socket_name, "ctl")):
        if sender.tally.sent >= COUNT:
            return
        sender.send(data, fds)


class Fuzzing(threading.Thread):
    """Sends from the side; :attr:`error` is what went wrong."""

    def __init__(self, sender: Sender, name: str, fuzzer: Fuzzer) -> None:
        super().__init__(name=f"fuzz {name}", daemon=True)
        self._work = (sender, name, fuzzer)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Everything, or up to the first error."""
        try:
            send_all(*self._work)
        except Exception as error:  # noqa: BLE001  (told to the test's own thread)
            self.error = error


@pytest.mark.parametrize("name", SOCKETS)
def test_fuzz_costs_its_sender_the_connection_and_nobody_else_anything(live: Live, name: str) -> None:
    with told(SEED + SOCKETS.index(name)):
        seed = SEED + SOCKETS.index(name)
        census = live.census()
        pids = {role: daemon.pid for role, daemon in live.launcher.daemons.items()}
        fuzzer = Fuzzer(seed)
        own = OwnHandles(live.directory, fuzzer)
        sender = senders(live.directory, own)[name](fuzzer)
        traffic = Traffic(live, seed, background=bool(seed % 2))
        thread = Fuzzing(sender, name, fuzzer)
        thread.start()
        while thread.is_alive():
            traffic.step()
        thread.join()
        sender.close()
        own.client.close()
        traffic.run(20)
        traffic.everywhere()
        traffic.progress()
        traffic.finish()
        if thread.error is not None:
            raise thread.error
        tally = sender.tally
        assert tally.sent >= COUNT and 2 * tally.passed >= tally.sent, f"too few messages got through: {tally}"
        assert tally.lost, f"nothing cost anything: {tally}"
        live.launcher.check()
        assert {role: daemon.pid for role, daemon in live.launcher.daemons.items()} == pids, "a process has ended"
        live.settles(census)


def wild(request: control.Request, fuzzer: Fuzzer) -> control.Request | None:
    """Any command but quit; many of the calls are ones that exist."""
    if no_quit(request) is None:
        return None
    changed = [real(command, fuzzer) for command in commands(request)]
    if any(isinstance(command, control.ClockStep) and command.ns > LONGEST_STEP_NS for command in changed):
        return None
    command = control.Batch(changed) if isinstance(request.command, control.Batch) else changed[0]
    return msgspec.structs.replace(request, command=command)


def real(command: control.Command, fuzzer: Fuzzer) -> control.Command:
    """``command``, with the number of a call that exists, or an address where something is, in most cases."""
    if fuzzer.random.random() < 0.3:
        return command
    match command:
        case control.Hcall():
            args = [0x8000_0000, *command.args][:16]
            return msgspec.structs.replace(command, nr=int(fuzzer.random.choice(list(HCall))), args=args)
        case control.Rtas():
            return msgspec.structs.replace(command, token=int(fuzzer.random.choice(list(RtasToken))))
        case control.MmioRead() | control.MmioWrite():
            return msgspec.structs.replace(command, gpa=MmioWindow.pseries().cpu + command.gpa % (4 << 20))
        case control.ConfigRead() | control.ConfigWrite():
            address = fuzzer.random.choice(["02.0", "03.0", "05.0"])
            return msgspec.structs.replace(command, address=address, offset=command.offset % 300)
        case control.DeviceAdd():
            config = {
                "id": "x",
                "model": "edu",
                "addr": fuzzer.random.choice(["02.0", "7.3", "99"]),
                "attach": "remote",
            }
            return control.DeviceAdd(json.dumps(config).encode())
        case control.DeviceDel():
            return control.DeviceDel(fuzzer.random.choice(["nobody", "x"]))
    return command


def test_a_guest_survives_whatever_it_is_told_to_do(live: Live) -> None:
    """Also what a CPU may do to it: hypercalls, RTAS, stores to registers and memory, resets, in any order."""
    seed = SEED - 1
    with told(seed):
        census = live.census()
        pids = {role: daemon.pid for role, daemon in live.launcher.daemons.items()}
        fuzzer = Fuzzer(seed)
        sender = ZmqSender(
            live.directory / "guestd.ctl", CHANNELS["ctl"], control.RESPONSES, lambda request: wild(request, fuzzer)
        )
        for data, fds in islice(fuzzer.stream("ctl"), 4 * COUNT):
            sender.send(data, fds)
        tally = sender.tally
        assert tally.sent >= COUNT and 2 * tally.passed >= tally.sent, f"too few messages got through: {tally}"
        live.link("guestd").ask(control.Reset())
        sender.close()
        assert live.status("guestd")["state"] == "running", live.status("guestd")["reason"]
        for name in (NIC, CARD):
            assert live.device(name)["state"] == "running", live.device(name)["reason"]
            live.bring_up(name)
        traffic = Traffic(live, seed, background=False)
        traffic.run(30)
        traffic.progress()
        traffic.finish()
        live.launcher.check()
        assert {role: daemon.pid for role, daemon in live.launcher.daemons.items()} == pids, "a process has ended"
        live.settles(census)
