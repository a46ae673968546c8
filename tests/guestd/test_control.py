"""``guestd.ctl``: what a CPU would do, questions, and mistakes; a guest with an emulated device, and no host at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guestd.config import DeviceConfig, GuestConfig
from guestd.control import GuestControl
from guestd.guest import Guest
from guestd.machine_config import PseriesConfig
from protocols.control import messages as control
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import DealerClient
from tests.acceleration import kvm
from tests.guestd.accelerated_guest import HostedGuest
from vfio_model.errors import ConfigError, InternalGuestError
from vfio_model.iommu.spapr.regs import HCall, RtasToken, phb_buid
from vfio_model.ranges import U32_MAX
from vfio_model.trace import ListTrace

pytestmark = pytest.mark.machine

Ask = Callable[[control.Command], control.Answer]
LIOBN = 0x8000_0000
EDU = DeviceConfig(id="edu0", model="edu", addr="02.0")
BAR = 0xC000_0000


class Running:
    """A guest whose control socket is asked from the same loop."""

    def __init__(self, directory: Path, loop: Loop, config: GuestConfig) -> None:
        self.loop = loop
        self._lock = RoleLock(directory, "guestd")
        self.trace = ListTrace()
        config.machine.kvm = kvm()
        self.guest = HostedGuest(config, directory, loop, self.trace)
        self.guest.start()
        self.control = GuestControl(self.guest, directory, self._lock, loop, self.trace)
        self.client = DealerClient(directory / "guestd.ctl")
        self._seq = 0

    def exchange(self, command: control.Command | control.Batch) -> control.Answer | control.BatchDone:
        """One request and its answer."""
        self._seq += 1
        self.client.send(control.REQUESTS.encode(control.Request(self._seq, 0, command)))
        while (data := self.client.receive()) is None:
            self.loop.run_once(0.01)
        response = control.RESPONSES.decode(data)
        assert isinstance(response, control.Response) and response.seq == self._seq
        return response.answer

    def ask(self, command: control.Command) -> control.Answer:
        """The answer to a single command."""
        answer = self.exchange(command)
        assert not isinstance(answer, control.BatchDone)
        return answer

    def document(self, command: control.Command) -> dict[str, object]:
        """The JSON object that answers ``command``."""
        answer = self.ask(command)
        assert isinstance(answer, control.Document), answer
        found: dict[str, object] = msgspec.json.decode(answer.json)
        return found

    def close(self) -> None:
        self.client.close()
        self.control.close()
        self.guest.close()
        self._lock.close()


@pytest.fixture
def running(runtime_dir: Path, loop: Loop) -> Iterator[Running]:
    config = GuestConfig(machine=PseriesConfig(ram=1 << 24), devices=[EDU])
    running = Running(runtime_dir, loop, config)
    yield running
    running.close()


def config_word(running: Running, offset: int, size: int, value: int) -> None:
    assert running.ask(control.ConfigWrite("02.0", offset, size, value)) == control.Ok()


def test_hello_says_who_answers(running: Running) -> None:
    answer = running.ask(control.Hello())
    assert isinstance(answer, control.Welcome) and answer.role == "guestd"
    assert running.ask(control.Ping()) == control.Ok()


def test_hypercalls_and_rtas_calls(running: Running) -> None:
    assert running.ask(control.Hcall(HCall.H_PUT_TCE, [LIOBN, 0x3000, 0x5003])) == control.HcallDone(0, [])
    assert running.ask(control.Hcall(HCall.H_GET_TCE, [LIOBN, 0x3000])) == control.HcallDone(0, [0x5003])
    assert running.ask(control.Hcall(HCall.H_GET_TCE, [1, 0])) == control.HcallDone(-4, [])
    assert running.ask(control.Translate(LIOBN, 0x3123)) == control.Translation(0x5000, 0xFFF, 3)
    buid = phb_buid(0)
    query = control.Rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, [0, buid >> 32, buid & U32_MAX], 5)
    answer = running.ask(query)
    assert isinstance(answer, control.RtasDone) and answer.rets[:2] == [0, 1]


def test_memory(running: Running) -> None:
    assert running.ask(control.WriteMemory(0x1000, b"abcd")) == control.Ok()
    assert running.ask(control.ReadMemory(0x1000, 4)) == control.Bytes(0, b"abcd")
    nowhere = running.ask(control.ReadMemory(1 << 60, 4))
    assert isinstance(nowhere, control.Bytes) and nowhere.result != 0
    assert isinstance(running.ask(control.WriteMemory(1 << 60, b"x")), control.Failed)


def test_registers_of_a_device(running: Running) -> None:
    assert running.ask(control.ConfigRead("02.0", 0, 4)) == control.Value(0x11E8_1234)
    config_word(running, 0x10, 4, BAR)
    config_word(running, 0x04, 2, 2)
    (device,) = msgspec.convert(running.document(control.DeviceList())["devices"], list[dict[str, object]])
    assert device["bars"] == {"0": BAR} and device["address"] == "0000:00:02.0"
    gpa = BAR - 0x8000_0000 + 0x2000_8000_0000
    assert running.ask(control.MmioRead(gpa, 4)) == control.Value(0x0100_00ED)
    assert running.ask(control.MmioWrite(gpa + 4, 4, 0xFFFF_0000_1111)) == control.Ok()
    assert running.ask(control.MmioRead(gpa + 4, 4)) == control.Value(0xFFFF_EEEE)


def test_the_clock(running: Running) -> None:
    assert running.ask(control.ClockStep(5)) == control.Value(5)
    assert running.ask(control.ClockStep(7)) == control.Value(12)
    assert isinstance(running.ask(control.ClockStep((1 << 64) - 1)), control.Failed)
    assert running.ask(control.ClockStep(1)) == control.Value(13)


def test_a_batch_stops_at_the_first_that_fails(running: Running) -> None:
    good = control.Ping()
    done = running.exchange(control.Batch([good, control.Explain("1f.7", 0), good]))
    assert isinstance(done, control.BatchDone)
    assert [type(answer) for answer in done.answers] == [control.Ok, control.Failed]
    assert len(done.elapsed_ns) == 2


def test_explain_names_the_entry_that_fails(running: Running) -> None:
    config_word(running, 0x04, 2, 4)

    def failing(iova: int) -> str | None:
        steps = msgspec.convert(running.document(control.Explain("02.0", iova))["steps"], list[dict[str, object]])
        return next((str(step["what"]) for step in steps if not step["ok"]), None)

    running.ask(control.Hcall(HCall.H_PUT_TCE, [LIOBN, 0x3000, 0x5001]))
    running.ask(control.Hcall(HCall.H_PUT_TCE, [LIOBN, 0x4000, 0x40_0000_0003]))
    found = running.document(control.Explain("edu0", 0x3123))
    assert (found["result"], found["perm"]) == (0x5123, "r")
    assert failing(0x3123) is None
    assert failing(0x9000) == "TCE"
    assert failing(0x4000) == "guest-physical"
    assert failing(1 << 50) == "DMA window"
    config_word(running, 0x04, 2, 0)
    assert failing(0x3123) == "bus master"


def test_devices_come_and_go(running: Running) -> None:
    spec = {"id": "edu1", "model": "edu", "addr": "03.0"}
    assert running.ask(control.DeviceAdd(msgspec.json.encode(spec))) == control.Ok()
    assert running.ask(control.ConfigRead("03.0", 0, 2)) == control.Value(0x1234)
    assert isinstance(running.ask(control.DeviceAdd(msgspec.json.encode(spec))), control.Failed)
    assert isinstance(running.ask(control.DeviceAdd(b'{"id": 5}')), control.Failed)
    assert running.ask(control.DeviceDel("edu1")) == control.Ok()
    assert running.ask(control.ConfigRead("03.0", 0, 2)) == control.Value(0xFFFF)
    assert isinstance(running.ask(control.DeviceDel("edu1")), control.Failed)


def test_an_assigned_device_without_a_host_is_refused_and_the_guest_goes_on(running: Running) -> None:
    spec = {"id": "nic", "attach": "assigned", "addr": "04.0", "host": "0000:01:00.0", "group": 26}
    answer = running.ask(control.DeviceAdd(msgspec.json.encode(spec)))
    assert isinstance(answer, control.Failed) and "nic" in answer.reason and "hostd" in answer.reason
    assert running.ask(control.Ping()) == control.Ok()
    assert running.ask(control.ConfigRead("04.0", 0, 2)) == control.Value(0xFFFF)


def test_a_guest_that_cannot_go_on_still_answers_questions(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_ns: int = 0) -> int:
        raise InternalGuestError("out of luck")

    monkeypatch.setattr(running.guest.clock, "step", fail)
    assert isinstance(running.ask(control.ClockStep(1)), control.Failed)
    failed = running.ask(control.Hcall(HCall.H_PUT_TCE, [LIOBN, 0, 0]))
    assert isinstance(failed, control.Failed) and "out of luck" in failed.reason
    status = running.document(control.Status())
    assert (status["state"], status["reason"]) == ("internal-error", "out of luck")


def test_what_is_no_command_of_a_guest(running: Running) -> None:
    assert isinstance(running.ask(control.Interpose(b"[]")), control.Failed)


def test_a_malformed_peer_is_refused_and_others_go_on(running: Running, runtime_dir: Path, loop: Loop) -> None:
    bad = DealerClient(runtime_dir / "guestd.ctl")
    bad.send(b"\xc1\xc1")
    while (data := bad.receive()) is None:
        loop.run_once(0.01)
    assert isinstance(control.RESPONSES.decode(data), control.Refused)
    bad.close()
    assert running.ask(control.Ping()) == control.Ok()


def test_a_reset_empties_the_windows(running: Running) -> None:
    running.ask(control.Hcall(HCall.H_PUT_TCE, [LIOBN, 0x3000, 0x5003]))
    assert running.ask(control.Reset()) == control.Ok()
    assert running.ask(control.Translate(LIOBN, 0x3000)) == control.Translation(0, 0xFFF, 0)


def test_quit_ends_the_loop(running: Running, loop: Loop) -> None:
    assert running.ask(control.Quit()) == control.Ok()
    loop.run()  # returns


def test_an_unknown_model_is_a_configuration_error(runtime_dir: Path, loop: Loop) -> None:
    config = GuestConfig(machine=PseriesConfig(ram=1 << 24), devices=[DeviceConfig(id="x", model="nope", addr="02.0")])
    guest = Guest(config, runtime_dir, loop, ListTrace())
    with pytest.raises(ConfigError, match=r"x: .*nope"):
        guest.start()
    guest.close()


def test_a_property_that_its_model_does_not_have_is_named_with_the_device(runtime_dir: Path, loop: Loop) -> None:
    device = DeviceConfig(id="x", model="edu", addr="02.0", props={"nope": 1})
    guest = Guest(GuestConfig(machine=PseriesConfig(ram=1 << 24), devices=[device]), runtime_dir, loop, ListTrace())
    with pytest.raises(ConfigError, match=r"device x: EduDevice has no property 'nope' \(properties: dma_mask\)"):
        guest.start()
    guest.close()


def test_the_commands_of_qmp_are_commands_here_too(running: Running) -> None:
    assert running.document(control.Qmp("query-status")) == {"status": "running", "running": True}
    running.ask(control.Qmp("stop"))
    assert running.document(control.Status())["state"] == "paused"
    assert running.ask(control.ClockStep(5)) == control.Value(5)
    running.ask(control.Qmp("cont"))
    failed = running.ask(control.Qmp("device_del", b'{"id": "nope"}'))
    assert failed == control.Failed("DeviceNotFound", "Device 'nope' not found")
    assert isinstance(running.ask(control.Qmp("nope")), control.Failed)
    assert isinstance(running.ask(control.Qmp("stop", b"[" * 100_000)), control.Failed)
    assert isinstance(running.ask(control.Qmp("stop", b'{"x": 1}')), control.Failed)
