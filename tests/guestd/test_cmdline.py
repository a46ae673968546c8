"""QEMU's command line: its syntax, what it makes of the configuration, and what it refuses in QEMU's words."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guestd.cmdline import Invocation, parse
from guestd.cmdline_help import OPTIONS, HelpWanted
from guestd.config import DeviceConfig, GuestConfig, MonitorConfig, QtestConfig
from guestd.machine_config import PseriesConfig
from guestd.option_syntax import options, size, split
from guestd.system import run
from guestd.text_trace import TextTrace
from protocols.transport.kernel import Pidfd
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.trace_events import parse_line
from vfio_model.trace import NULL_TRACE, ListTrace
from vfio_model.trace_text import line


def parsed(text: str) -> Invocation:
    return parse(text.split())


def config(text: str) -> GuestConfig:
    return parsed(text).config


def machine(text: str) -> PseriesConfig:
    return config(text).machine


def devices(text: str) -> list[DeviceConfig]:
    return config(text).devices


# -- syntax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "implied", "found"),
    [
        ("pseries,ddw=off", "type", {"type": "pseries", "ddw": "off"}),
        ("type=pseries", "type", {"type": "pseries"}),
        ("path=/a,,b,server", "", {"path": "/a,b", "server": "on"}),
        ("/a,,,server=on", "path", {"path": "/a,", "server": "on"}),
        ("a=1,a=2", "", {"a": "2"}),
        ("a=b=c,", "", {"a": "b=c"}),
        ("", "x", {"x": ""}),
    ],
)
def test_keys_and_values(text: str, implied: str, found: dict[str, str]) -> None:
    assert split(text, implied) == found


@pytest.mark.parametrize(
    ("text", "shift", "found"),
    [("512", 20, 512 << 20), ("1G", 20, 1 << 30), ("0x10k", 0, 16 << 10), ("1.5M", 0, 3 << 19), ("7b", 20, 7)],
)
def test_sizes(text: str, shift: int, found: int) -> None:
    assert size("size", text, shift=shift) == found


@pytest.mark.parametrize("text", ["12x", "", "-1", "16E", "1e3", "G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="Parameter 'size' expects a non-negative number below 2"):
        size("size", text)


def test_json_in_place_of_keys() -> None:
    assert options('{"driver": "edu", "addr": "4"}', "driver") == {"driver": "edu", "addr": "4"}
    with pytest.raises(ConfigError, match="JSON parse error"):
        options('{"driver"', "driver")


# -- what it makes -------------------------------------------------------------------------------------------------


def test_nothing_said() -> None:
    found = parsed("")
    assert (found.config.machine.ram, found.config.machine.page_size) == (512 << 20, 1 << 16)
    assert found.directory is None and found.realtime and found.config.qtest is None and not found.config.devices


@pytest.mark.parametrize("text", ["-machine pseries", "-M pseries-11.1", "--machine type=pseries,usb=off,cap-htm=on"])
def test_the_machine_by_its_names(text: str) -> None:
    assert machine(text) == machine("")


def test_properties_of_every_bridge() -> None:
    found = machine("-machine pseries,ddw=off,pgsz=0x11000,dma_win_size=0x80000000,multitce=off,kvm-tce=on")
    assert (found.ddw, found.pgsz, found.dma_win_size, found.multitce, found.kvm) == (
        False,
        0x11000,
        1 << 31,
        False,
        True,
    )
    shared = machine("-global spapr-pci-host-bridge.ddw=off -device spapr-pci-host-bridge,index=1,ddw=on")
    assert [shared.dma_options(phb).ddw for phb in shared.phbs] == [False, True]


def test_bridges_and_their_buses() -> None:
    found = config(
        "-device spapr-pci-host-bridge,index=3 -device spapr-pci-host-bridge,index=2,id=far,pgsz=0x1000 "
        "-device edu,bus=pci.0 -device edu,bus=pci.1,addr=3.1 -device edu -device iommu-testdev,bus=far.0"
    )
    assert [(phb.index, phb.bus) for phb in found.machine.phbs] == [(0, "pci.0"), (3, "pci.1"), (2, "far.0")]
    assert [(each.bus, each.addr) for each in found.devices] == [
        ("pci.0", "00.0"),
        ("pci.1", "03.1"),
        ("far.0", "00.0"),
        ("far.0", "01.0"),
    ]


def test_devices() -> None:
    found = devices(
        "-device edu,id=e,addr=2,dma_mask=0xffffffff -device vfio-pci,host=0001:01:00.0,group=26,id=n "
        "-device vfio-user-pci,socket=/tmp/s -global edu.dma_mask=1 -device edu"
    )
    assert [each.id for each in found] == ["e", "n", "device[0]", "device[1]"]
    assert [each.attach for each in found] == ["emulated", "assigned", "remote", "emulated"]
    assert [each.addr for each in found] == ["02.0", "00.0", "01.0", "03.0"]
    assert found[0].props == {"dma_mask": 0xFFFFFFFF} and found[3].props == {"dma_mask": 1}
    assert (found[1].host, found[1].group_path, found[2].socket) == ("0001:01:00.0", "/dev/vfio/26", "/tmp/s")


@pytest.mark.parametrize(
    ("text", "dma"),
    [
        ("", "message"),
        ("-object memory-backend-memfd,id=m,size=1G -machine memory-backend=m", "shared"),
        ("-object memory-backend-memfd,id=m,size=1G,share=off -machine memory-backend=m", "message"),
        ("-object memory-backend-ram,id=m,size=1G -machine memory-backend=m", "message"),
        ("-object memory-backend-ram,id=m,size=1G,share=on -machine memory-backend=m", "shared"),
    ],
)
def test_a_remote_device_gets_memory_that_is_shared(text: str, dma: str) -> None:
    assert devices(f"{text} -device vfio-user-pci,socket.type=unix,socket.path=/tmp/s")[0].dma == dma


def test_how_a_remote_device_is_reached() -> None:
    text = "vfio-user-pci,socket=/tmp/s,dma=mapped,reconnect-ms=250"
    (found,) = devices(f"-device {text}")
    assert (found.dma, found.reconnect_ms) == ("mapped", 250)
    assert devices("-device vfio-user-pci,socket=/tmp/s")[0].reconnect_ms == 5000
    as_qemu = '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/s"},"reconnect-ms":0}'
    (shown,) = devices(f"-device {as_qemu}")
    assert (shown.socket, shown.reconnect_ms) == ("/tmp/s", 0)
    with pytest.raises(ConfigError, match="a UNIX socket with a path is needed, not 'inet'"):
        devices("-device " + as_qemu.replace("unix", "inet"))
    with pytest.raises(ConfigError, match="reconnect-ms"):
        devices("-device " + text.replace("250", "soon"))


def test_memory() -> None:
    assert machine("-m 1G").ram == machine("-m size=1024,slots=2,maxmem=4G").ram == 1 << 30
    huge = machine("-m 64M -object memory-backend-memfd,id=m,size=64M,hugetlb=on,hugetlbsize=16M -M memory-backend=m")
    assert (huge.ram, huge.page_size) == (64 << 20, 16 << 20)


def test_monitors() -> None:
    found = config(
        "-qmp unix:/a,server=on,wait=off -chardev socket,path=/b,,c,id=x -mon chardev=x,mode=control -monitor unix:/d "
        "-serial none -monitor none -chardev socket,id=y,path=/e,server=on -object monitor-qmp,id=q,chardev=y"
    ).monitors
    assert found == [
        MonitorConfig(path="/a", server=True),
        MonitorConfig(path="/b,c"),
        MonitorConfig(path="/d", mode="readline"),
        MonitorConfig(path="/e", server=True),
    ]


def test_qtest() -> None:
    found = parsed("-qtest unix:/q,server=on,wait=off -qtest-log /dev/null")
    assert found.config.qtest == QtestConfig(path="/q", server=True, log="/dev/null") and not found.realtime
    assert config("-chardev socket,id=q,path=/p -qtest chardev:q").qtest == QtestConfig(path="/p", log="")
    assert not parsed("-accel qtest").realtime and not parsed("-machine accel=qtest:tcg").realtime


def test_an_assigned_device_may_be_left_out_of_the_choice_who_tracks_writes() -> None:
    device = "-device vfio-pci,host=0001:01:00.0,group=26"
    assert config(device).devices[0].dirty_tracking
    assert not config(f"{device},x-device-dirty-page-tracking=off").devices[0].dirty_tracking


def test_the_rest(tmp_path: Path) -> None:
    events = tmp_path / "events"
    events.write_text("vfio_*  # all\n\nspapr_*\n")
    text = "-name guest=g -uuid 12345678-1234-1234-1234-123456789abc -S -incoming defer -trace a*,file=x "
    found = parsed(
        text + f"-trace events={events} -D log -runtime-dir /tmp/r -cpu power9 -smp 4 -nodefaults -nographic"
    )
    assert (found.config.name, found.config.uuid) == ("g", "12345678-1234-1234-1234-123456789abc")
    assert found.config.paused and found.config.incoming == "defer" and found.log == "log"
    assert config("-host-dir /h").host_dir == "/h" and not config("").host_dir
    assert found.patterns == ("a*", "vfio_*", "spapr_*") and found.directory == Path("/tmp/r")


# -- what it refuses -----------------------------------------------------------------------------------------------

REFUSED = {
    "-foo": "-foo: invalid option",
    "extra": "extra: Could not open 'extra'",
    "-m": "-m: requires an argument",
    "-m 12x": "-m 12x: Parameter 'size' expects",
    "-m foo=3": "-m foo=3: Invalid parameter 'foo'",
    "-machine foo": 'unsupported machine type: "foo"',
    "-machine pseries,foo=1": "Property 'pseries-machine.foo' not found",
    "-machine ddw=maybe": "Parameter 'ddw' expects 'on' or 'off'",
    "-machine pgsz=x": "Parameter 'pgsz' expects uint64",
    "-machine memory-backend=x": "Memory backend 'x' not found",
    "-accel foo": "-accel foo: invalid accelerator foo",
    "-device foo": "-device foo: 'foo' is not a valid device model name",
    "-device edu,colour=1": "-device edu,colour=1: Property 'edu.colour' not found",
    "-device edu,bus=pci.7": "-device edu,bus=pci.7: Bus 'pci.7' not found",
    "-device edu,bus=p.0 -device spapr-pci-host-bridge,index=1,id=p": "-device edu,bus=p.0: Bus 'p.0' not found",
    "-device edu,addr=99": "Property 'edu.addr' doesn't take value '99'",
    "-device edu,addr=1 -device edu,addr=1": "PCI: slot 1 already occupied by edu",
    "-device edu,id=0a": "Parameter 'id' expects an identifier",
    "-device edu,id=a -device edu,id=a": "-device edu,id=a: Duplicate ID 'a' for device",
    "-device spapr-pci-host-bridge,index=1,id=a -device edu,id=a": "-device edu,id=a: Duplicate ID 'a' for device",
    '-device edu,id=a -device {"driver":"edu","id":"a"}': "Duplicate device ID 'a'",
    "-device spapr-pci-host-bridge,index=1,id=a -device spapr-pci-host-bridge,index=2,id=a": (
        "-device spapr-pci-host-bridge,index=2,id=a: Duplicate ID 'a' for device"
    ),
    "-device spapr-pci-host-bridge,index=-1": "Parameter 'index' expects uint32_t",
    "-device spapr-pci-host-bridge,index=1,dma_win_size=0": "bridge,index=1,dma_win_size=0: dma_",
    "-device spapr-pci-host-bridge,index=1,dma_win_addr=1": "bridge,index=1,dma_win_addr=1: dma_",
    "-machine dma_win_size=0": "-machine: dma_",
    "-device spapr-vlan,reg=-1": "-device spapr-vlan,reg=-1: Parameter 'reg' expects integer",
    "-device spapr-vlan,reg=0x80000000": "Property 'spapr-vlan.reg' doesn't take value '0x80000000'",
    "-global spapr-pci-host-bridge.pgsz=x": (
        "can't apply global spapr-pci-host-bridge.pgsz=x: Parameter 'pgsz' expects uint64"
    ),
    "-smp 0": "-smp 0: Invalid CPU topology: CPU topology parameters must be greater than zero",
    "-smp cpus=2,threads=0": "CPU topology parameters must be greater than zero",
    "-smp cores=-1": "CPU topology parameters must be greater than zero",
    "-smp -1": "Invalid SMP CPUs -1. The max CPUs supported by machine 'pseries' is 4096",
    "-smp 4,maxcpus=2": "maxcpus must be equal to or greater than smp",
    "-smp x": "-smp x: Parameter 'smp.cpus' expects integer",
    "-smp 2,foo=3": "Parameter 'smp.foo' is unexpected",
    "-m 1G,slots=x": "-m 1G,slots=x: Parameter 'slots' expects a number",
    "-m 1G,maxmem=x": "Parameter 'maxmem' expects a non-negative number below 2^64",
    "-m 1G,slots=2": "slots specified but no max-size",
    "-m 2G,maxmem=1G": "maximum memory size (0x40000000) must be at least the initial memory size (0x80000000)",
    "-m 1G,slots=1,maxmem=1G": "is equal to the initial memory size",
    "-m -1": "Parameter 'size' expects a non-negative number",
    "-rtc foo": "-rtc foo: Invalid parameter 'foo'",
    "-rtc base=foo": "invalid datetime format",
    "-rtc clock=foo": "invalid option value 'foo'",
    "-boot foo=1": "Parameter 'boot.foo' is unexpected",
    "-boot zz": "Invalid boot device 'z'",
    "-msg foo=1": "Invalid parameter 'foo'",
    "-msg timestamp=x": "Parameter 'timestamp' expects 'on' or 'off'",
    "-sandbox foo": "Parameter 'enable' expects 'on' or 'off'",
    "-name a,debug-threads=x": "Parameter 'debug-threads' expects 'on' or 'off'",
    "-chardev null,id=a -chardev null,id=a": "Duplicate ID 'a' for chardev",
    "-chardev null,id=a,foo=1": "Invalid parameter 'foo'",
    "-device vfio-pci": "No provided host device",
    "-device vfio-pci,host=0:1:0.0": "No IOMMU group",
    "-device vfio-user-pci": "No socket specified",
    "-device spapr-pci-host-bridge": '"index" for PAPR PHB is mandatory',
    "-device spapr-pci-host-bridge,index=31": '"index" for PAPR PHB is too large (max 30)',
    "-device spapr-pci-host-bridge,index=0": "PHB 0 already attached",
    "-device spapr-pci-host-bridge,index=1,foo=2": "Property 'spapr-pci-host-bridge.foo' not found",
    "-global foo": "Invalid parameter 'foo'",
    "-global edu.colour=1 -device edu": "-device edu: can't apply global edu.colour=1: Property 'edu.colour' not found",
    "-object foo,id=1": "invalid object type: foo",
    "-object memory-backend-ram,size=1G": "Parameter 'id' is missing",
    "-object memory-backend-ram,id=m": "Parameter 'size' is missing",
    "-object memory-backend-ram,id=m,size=0": "property 'size' of memory-backend-ram doesn't take value '0'",
    "-object memory-backend-file,id=m,size=1G": "Parameter 'mem-path' is missing",
    "-object memory-backend-memfd,id=m,size=1G,foo=1": "Invalid parameter 'foo'",
    "-m 512 -object memory-backend-ram,id=m,size=1G -M memory-backend=m": "Machine memory size does not match",
    "-chardev foo,id=x": "'foo' is not a valid char driver name",
    "-chardev socket,path=/x": "chardev: no id specified",
    "-mon chardev=zz": '-mon chardev=zz: chardev "zz" not found',
    "-qmp foo": "-qmp foo: 'foo' is not a valid char driver",
    "-qtest foo": 'Failed to initialize device for qtest: "foo"',
    "-qtest unix:/a,bar=1": "Invalid parameter 'bar'",
    "-uuid foo": "-uuid foo: failed to parse UUID string: wrong format",
    "-name a,b=c": "Invalid parameter 'b'",
    "-trace events=/nonexistent": "/nonexistent: No such file or directory",
    "-display gtk": "Parameter 'type' does not accept value 'gtk'",
    "-serial stdio": "'stdio' is not a valid char driver",
    "-incoming foo": "'foo' is not a valid migration URI",
    "-incoming exec:cat": "-incoming exec:cat: 'exec:cat': migration over exec: is not supported",
    "-device foo,help": "Device 'foo' not found",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert REFUSED[text] in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "-smp 4,maxcpus=8,sockets=2",
        "-m 1G,slots=2,maxmem=2G",
        "-m 1G,maxmem=1G",
        "-rtc base=2026-01-01T00:00:00,clock=vm",
        "-boot order=cd,menu=on",
        "-boot c",
        "-msg timestamp=on",
        "-sandbox on,spawn=deny",
        "-name a,debug-threads=on",
        "-device spapr-pci-host-bridge,index=1,pgsz=0",
    ],
)
def test_what_has_no_effect_is_taken_where_qemu_takes_it(text: str) -> None:
    assert isinstance(config(text).machine, PseriesConfig)


def test_a_global_for_nothing_is_a_warning() -> None:
    assert parsed("-global foo.x=1").warnings == ("global foo.x has invalid class name",)


def test_a_bad_command_line_ends_with_status_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("guestd-system-ppc64", ["-device", "foo"]) == 1
    said = capsys.readouterr()
    assert said.err == "guestd-system-ppc64: -device foo: 'foo' is not a valid device model name\n" and not said.out


@pytest.mark.parametrize("size", ["1000P", "15E"])
def test_more_memory_than_there_can_be_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("guestd-system-ppc64", ["-display", "none", "-m", size]) == 1
    why = "cannot set up guest memory 'ppc_spapr.ram': Cannot allocate memory"
    assert capsys.readouterr().err == f"guestd-system-ppc64: {why}\n"


HELP = {
    "--help": "usage: guestd-system-ppc64",
    "-version": "QEMU emulator version 11.1",
    "-device help": 'name "edu", bus PCI',
    "-device edu,help": "dma_mask=<uint64>",
    "-device spapr-pci-host-bridge,help": "index=<uint32>",
    "-machine help": "pseries",
    "-M pseries,help": "memory-backend=",
    "-accel help": "qtest",
    "-object help": "memory-backend-memfd",
}


@pytest.mark.parametrize("text", HELP)
def test_help(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("guestd-system-ppc64", text.split()) == 0
    assert HELP[text] in capsys.readouterr().out


def test_help_names_every_option() -> None:
    with pytest.raises(HelpWanted) as wanted:
        parsed("-h")
    assert all(f"-{name}" in wanted.value.text for name in OPTIONS)


# -- traces as text ------------------------------------------------------------------------------------------------


def test_events_are_written_as_qemu_writes_them() -> None:
    pe = {"buid": 0x800000020000000, "cfgaddr": 0x800}
    query = line("spapr_iommu_ddw_query", {**pe, "wa": 1, "win_size": 1 << 31, "pgmask": 0x107})
    create = {"pg_size": 1 << 24, "req_size": 1 << 30, "start": 1 << 59, "liobn": 0x80000001}
    assert query == (
        "spapr_iommu_ddw_query buid=0x800000020000000 addr=0x800, 1 windows available, max window size=0x80000000, "
        "mask=0x107"
    )
    assert type(parse_line(query)).__name__ == "DdwQuery"
    assert type(parse_line(line("spapr_iommu_ddw_create", {**pe, **create}))).__name__ == "DdwCreate"
    assert line("device_add", {"id": "e", "size": 65536, "on": True}) == "device_add id=e size=0x10000 on=True"


def test_the_last_pattern_that_matches_holds_and_the_inner_trace_gets_everything() -> None:
    written: list[str] = []
    inner = ListTrace()
    trace = TextTrace(inner, ["spapr*", "-*_xlate"], written.append)
    trace.cause = 5
    for event in ("spapr_x", "spapr_iommu_xlate", "vfio_x"):
        trace(event)
    assert written == ["spapr_x\n"] and len(inner.records) == 3 and inner.cause == 5
    TextTrace(NULL_TRACE, ["*"], written.append)("later")
    assert written[-1] == "later\n"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["5,multifunction=on", "5.1"], ""),
        (["5.1", "5,multifunction=on", "5.3"], ""),
        (["5.1", "6.2"], ""),
        (["5", "5.1"], "PCI: single function device can't be populated in function 5.1"),
        (["1f.2", "1f"], "PCI: 1f.0 indicates single function, but 1f.2 is already populated."),
        (["5,multifunction=on", "5"], "PCI: slot 5 already occupied by edu"),
        (["5,multifunction=7"], "Parameter 'multifunction' expects 'on' or 'off'"),
        (["5,multifunction=on,rombar=0,acpi-index=3"], ""),
    ],
)
def test_functions_of_one_slot(places: list[str], message: str) -> None:
    words = [word for place in places for word in ("-device", f"edu,addr={place}")]
    if message:
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse(words)
    else:
        found = [device.multifunction for device in parse(words).config.devices]
        assert found == ["multifunction=on" in place for place in places]


def test_a_first_free_slot_is_one_whose_function_0_is_free() -> None:
    with pytest.raises(ConfigError, match=re.escape("PCI: 0.0 indicates single function, but 0.7 is already")):
        parse(["-device", "edu,addr=0.7", "-device", "edu"])


def test_a_guest_without_a_name_has_none() -> None:
    assert parse([]).config.name == ""


@pytest.mark.parametrize("size", ["0x1000", "0x1fff"])
def test_a_default_window_of_a_page_or_more(size: str) -> None:
    machine = parse(["-global", f"spapr-pci-host-bridge.dma_win_size={size}"]).config.machine
    assert machine.dma_options(machine.phbs[0]).dma_win_size == int(size, 0)


@pytest.mark.parametrize("text", ["-audio none", "-audio driver=none", "-run-with async-teardown=off"])
def test_what_libqtest_and_others_add_has_no_effect(text: str) -> None:
    assert not parsed(text).exit_with_parent


@pytest.mark.parametrize(
    ("text", "message"), [("-audio alsa", "does not accept value 'alsa'"), ("-audio x=y", "missing")]
)
def test_there_is_no_sound(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(text)


def test_a_machine_ends_with_its_parent_where_it_was_told(tmp_path: Path) -> None:
    assert parsed("-run-with exit-with-parent=on").exit_with_parent
    qmp = tmp_path / "qmp"
    arguments = ["-run-with", "exit-with-parent=on", "-display", "none", "-qmp", f"unix:{qmp},server=on,wait=off"]
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid); input()"
    command = [sys.executable, "-c", code, sys.executable, "-m", "guestd.system", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        machine = Pidfd.open(int(parent.stdout.readline()))
        try:
            while not qmp.exists():
                assert machine.alive()
                time.sleep(0.01)
            parent.stdin.write("\n")
            parent.stdin.close()
            parent.wait(30)
            assert select.select([machine], [], [], 30)[0], "it outlived its parent"
        finally:
            machine.send_signal(signal.SIGKILL)
            machine.close()
