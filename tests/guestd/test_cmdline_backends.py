"""-netdev, -drive and -blockdev: what they make of the configuration, and QEMU's words for what it refuses, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestd.cmdline import parse
from guestd.cmdline_help import HelpWanted
from guestd.config import GuestConfig
from vfio_model.errors import ConfigError

UDP = "dgram,local.type=inet,local.host=127.0.0.1,local.port=7001,remote.type=inet,remote.host=::1,remote.port=7002"
UNIX = "dgram,local.type=unix,local.path=/tmp/a,remote.type=unix,remote.path=/tmp/b"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def config(*words: str) -> GuestConfig:
    return parse(words).config


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return f"{caught.value.where}: {caught.value.what}"


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{UDP},id=n0", "udp:127.0.0.1:7001@[::1]:7002"),
        (f"{UNIX},id=n0", "unix:/tmp/a@/tmp/b"),
        ("dgram,id=n0,local.type=fd,local.str=7", "fd:7"),
        ("socket,id=n0,udp=10.0.0.1:1,localaddr=:2", "udp:127.0.0.1:2@10.0.0.1:1"),
        ("socket,id=n0,fd=9", "fd:9"),
        ("hubport,id=n0,hubid=3", "hub:3"),
        (
            '{"type":"dgram","id":"n0","local":{"type":"unix","path":"/a"},"remote":{"type":"unix","path":"/b"}}',
            "unix:/a@/b",
        ),
    ],
)
def test_networks_by_name(text: str, found: str) -> None:
    made = config("-device", "e1000,netdev=n0,mac=52:54:00:00:00:01", "-netdev", text)
    assert made.netdevs == {"n0": found}
    assert made.devices[0].props == {"netdev": "n0", "mac": "52:54:00:00:00:01"}


def test_a_network_may_be_plugged_into_a_hub(tmp_path: Path) -> None:
    made = config("-netdev", f"{UNIX},id=far", "-netdev", "hubport,id=p0,hubid=0,netdev=far")
    assert made.uplinks == {"far": "hub:0"} and made.netdevs["p0"] == "hub:0"
    said = refusal(
        "-netdev", f"{UNIX},id=far", "-netdev", "hubport,id=p0,hubid=0,netdev=far", "-device", "e1000,netdev=far"
    )
    assert said == "-device e1000,netdev=far: Property 'e1000.netdev' can't take value 'far', it's in use"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id=n0", "Parameter 'type' is missing"),
        ("tapp,id=n0", "Parameter 'type' does not accept value 'tapp'"),
        ("tap,id=n0", "no network 'tap' here"),
        ("hubport,hubid=1", "Parameter 'id' is missing"),
        ("hubport,hubid=1,id=0n", "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits"),
        ("hubport,id=n0", "Parameter 'hubid' is missing"),
        ("hubport,id=n0,hubid=x", "Parameter 'hubid' expects an int64 value"),
        ("hubport,id=n0,hubid=1,foo=1", "Invalid parameter 'foo'"),
        ("hubport,id=n0,hubid=1,netdev=zz", "netdev 'zz' not found"),
        ("dgram,id=n0", "dgram requires local= parameter"),
        ("dgram,id=n0,remote.type=inet,remote.host=a,remote.port=1", "dgram requires local= parameter"),
        ("dgram,id=n0,local.type=foo", "Parameter 'type' does not accept value 'foo'"),
        ("dgram,id=n0,local.type=unix,local.path=/a", "type=inet or type=unix requires remote parameter"),
        (
            "dgram,id=n0,local.type=inet,local.host=a,local.port=1,remote.type=unix,remote.path=/x",
            "remote and local types must be the same",
        ),
        ("dgram,id=n0,local.type=unix,remote.type=unix,remote.path=/x", "Parameter 'local.path' is missing"),
        (f"{UDP.replace('7002', 'abc')},id=n0", "port number 'abc' is invalid"),
        (f"{UDP.replace('7002', '70000')},id=n0", "port number '70000' is invalid"),
        (UDP.rpartition(",")[0] + ",id=n0", "Parameter 'remote.port' is missing"),
        (f"{UNIX},id=n0,local.host=x", "Parameter 'local.host' is unexpected"),
        ("socket,id=n0", "exactly one of listen=, connect=, mcast= or udp= is required"),
        ("socket,id=n0,udp=a:1,connect=a:1", "exactly one of listen=, connect=, mcast= or udp= is required"),
        ("socket,id=n0,udp=127.0.0.1:7001", "localaddr= is mandatory with udp="),
        (
            "socket,id=n0,udp=127.0.0.1,localaddr=127.0.0.1:7002",
            "host address '127.0.0.1' doesn't contain ':' separating host from port",
        ),
        ("socket,id=n0,listen=:1", "no socket,listen= here"),
    ],
)
def test_networks_that_are_refused(text: str, message: str) -> None:
    assert refusal("-netdev", text).startswith(f"-netdev {text}: {message}")


def test_names_of_networks() -> None:
    port = ("-netdev", "hubport,hubid=1,id=n0")
    assert refusal(*port, *port) == "-netdev hubport,hubid=1,id=n0: Duplicate ID 'n0' for netdev"
    missing = refusal(*port, "-device", "e1000,netdev=nope")
    assert missing == "-device e1000,netdev=nope: Property 'e1000.netdev' can't find value 'nope'"
    twice = refusal(*port, "-device", "e1000,netdev=n0", "-device", "e1000,netdev=n0")
    assert twice == "-device e1000,netdev=n0: Property 'e1000.netdev' can't take value 'n0', it's in use"
    assert config("-device", "e1000,netdev=hub:lan").devices[0].props == {"netdev": "hub:lan"}


def test_what_is_plugged_in_nowhere_is_said() -> None:
    said = parse(
        (
            *("-netdev", "hubport,hubid=1,id=n0", "-netdev", "hubport,hubid=1,id=n1", "-netdev", f"{UNIX},id=far"),
            *("-netdev", "hubport,hubid=1,id=n2,netdev=far"),
            *("-device", "e1000,netdev=n0", "-device", "e1000,bootindex=1", "-device", "e1000,id=x", "-device", "edu"),
        )
    )
    assert said.warnings == ("netdev n1 has no peer", "nic e1000.1 has no peer", "nic x has no peer")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_drives_by_name(disk: Path) -> None:
    made = config(
        *("-drive", f"file={disk},if=none,id=d0,format=raw,cache=none,aio=threads,discard=unmap,index=2"),
        *("-drive", f"file={disk},if=none,id=d1,readonly=on"),
        *("-drive", f"file.filename={disk},file.driver=file,driver=raw,if=none,media=cdrom"),
        *("-device", "nvme,drive=d0,serial=x"),
    )
    assert made.drives == {"d0": f"file:{disk}", "d1": f"file:{disk},ro", "none2": f"file:{disk},ro"}
    assert made.devices[0].props["drive"] == "d0"


def test_nodes(disk: Path) -> None:
    together = {
        "driver": "raw",
        "node-name": "d2",
        "file": {"driver": "file", "filename": str(disk)},
        "read-only": True,
    }
    made = config(
        *("-blockdev", f"driver=file,node-name=f0,filename={disk}"),
        *("-blockdev", "raw,node-name=d0,file=f0,read-only=on"),
        *("-blockdev", f"driver=raw,node-name=d1,file.driver=file,file.filename={disk}"),
        *("-blockdev", json.dumps(together)),
    )
    whole, part = f"file:{disk}", f"file:{disk},ro"
    assert made.drives == {"f0": whole, "d0": part, "d1": whole, "d2": part}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file=/nope,if=none", "Could not open '/nope': No such file or directory"),
        ("file=DISK,if=foo", "unsupported bus type 'foo'"),
        ("file=DISK", "machine type does not support if=scsi,bus=0,unit=0"),
        ("file=DISK,if=none,format=foo", "Unknown driver 'foo'"),
        ("file=DISK,if=none,format=raw,driver=raw", "Cannot specify both 'driver' and 'format'"),
        ("file=DISK,if=none,bla=1", "Block format 'raw' does not support the option 'bla'"),
        ("file=DISK,if=none,readonly=maybe", "Parameter 'read-only' expects 'on' or 'off'"),
        ("file=DISK,if=none,index=foo", "Parameter 'index' expects a number"),
        ("file=DISK,if=none,cache=foo", "invalid cache option"),
        ("file=DISK,if=none,aio=foo", "invalid aio option"),
        ("file=DISK,if=none,discard=foo", "Invalid discard option"),
        ("file=DISK,if=none,media=foo", "'foo' invalid media"),
        ("file=DISK,if=none,werror=foo", "'foo' invalid write error action"),
        ("file=DISK,if=none,snapshot=on", "snapshot=on is not here: what is written stays"),
        ("if=none,id=d0", "could not get blockdev size: No medium found"),
    ],
)
def test_drives_that_are_refused(disk: Path, text: str, message: str) -> None:
    text = text.replace("DISK", str(disk))
    assert refusal("-drive", text).startswith(f"-drive {text}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("driver=foo,node-name=d0", "Parameter 'driver' does not accept value 'foo'"),
        ("node-name=d0,filename=DISK", "Parameter 'driver' is missing"),
        ("driver=raw,node-name=d0", "Parameter 'file' is missing"),
        ("driver=raw,node-name=d0,file=nope", "Cannot find device='nope' nor node-name='nope'"),
        ("driver=file,filename=DISK", "'node-name' must be specified for the root node"),
        ("driver=file,node-name=f0", "Parameter 'filename' is missing"),
        ("driver=file,node-name=f0,filename=/nope", "Could not open '/nope': No such file or directory"),
        ("driver=file,node-name=f0,filename=DISK,bla=1", "Parameter 'bla' is unexpected"),
        ("driver=raw,node-name=f0,filename=DISK", "Parameter 'filename' is unexpected"),
        ("driver=file,node-name=f0,filename=DISK,read-only=7", "Parameter 'read-only' expects 'on' or 'off'"),
    ],
)
def test_nodes_that_are_refused(disk: Path, text: str, message: str) -> None:
    text = text.replace("DISK", str(disk))
    assert refusal("-blockdev", text) == f"-blockdev {text}: {message}"


def test_names_of_disks(disk: Path) -> None:
    drive = ("-drive", f"file={disk},if=none,id=d0")
    node = ("-blockdev", f"file,node-name=f0,filename={disk}")
    assert refusal(*drive, *drive).endswith(": Duplicate ID 'd0' for drive")
    assert refusal(*node, *node).endswith(": Duplicate nodes with node-name='f0'")
    assert refusal(*drive, "-device", "nvme,drive=d1").endswith(": Property 'nvme.drive' can't find value 'd1'")
    twice = refusal(*drive, "-device", "nvme,drive=d0,serial=a", "-device", "nvme,drive=d0,serial=b")
    assert twice.endswith(": Drive 'd0' is already in use by another device")


@pytest.mark.parametrize("option", ["-netdev", "-drive", "-blockdev"])
def test_the_options_have_help(option: str) -> None:
    with pytest.raises(HelpWanted, match=option):
        parse((option, "help"))
