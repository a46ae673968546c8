"""``-netdev``, ``-drive`` and ``-blockdev`` of QEMU's command line: names of networks and disks, and what they mean.

A subset: networks of datagrams (``dgram``, ``socket,udp=``) and hubs, disks that are files as they are (``raw``). What
QEMU has beyond it is an error that says so. Messages are those of QEMU 11.1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from guestd.config import ANONYMOUS, DeviceConfig
from guestd.device_options import properties
from guestd.option_syntax import identifier, number, only, options, switch
from vfio_model.errors import ConfigError

_NETWORKS: Final = ("dgram", "socket", "hubport")
_OTHER_NETWORKS: Final = frozenset(
    (
        *("af-xdp", "bridge", "l2tpv3", "nic", "none", "passt", "stream", "tap", "user"),
        *("vde", "vhost-user", "vhost-vdpa"),
    )
)
_OTHER_BUSES: Final = frozenset(("floppy", "ide", "mtd", "pflash", "scsi", "sd", "virtio", "xen"))
_WAYS: Final = ("listen", "connect", "mcast", "udp", "fd")
_ENDS: Final = {"inet": ("host", "port"), "unix": ("path",), "fd": ("str",)}
"""What a ``dgram`` says of an end, by type."""
_CHOICES: Final = {
    "cache": (("none", "writeback", "unsafe", "directsync", "writethrough"), "invalid cache option"),
    "aio": (("threads", "native", "io_uring"), "invalid aio option"),
    "discard": (("ignore", "off", "unmap", "on"), "Invalid discard option"),
    "media": (("disk", "cdrom"), "'{}' invalid media"),
    "werror": (("ignore", "stop", "report", "enospc"), "'{}' invalid write error action"),
    "rerror": (("ignore", "stop", "report"), "'{}' invalid read error action"),
    "detect-zeroes": (("off", "on", "unmap"), "Parameter 'detect-zeroes' does not accept value '{}'"),
}
"""Choices of ``-drive`` that make no difference here, but for ``media``; and what is said of other words."""
_DRIVE: Final = frozenset(
    (
        *(*_CHOICES, "file", "file.driver", "file.filename", "file.locking", "if", "id", "format", "driver"),
        *("readonly", "read-only", "index", "bus", "unit", "snapshot"),
    )
)
_NODE: Final = ("driver", "node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "force-share")
_FILE_NODE: Final = frozenset((*_NODE, "filename", "locking", "aio", "cache.direct", "cache.no-flush"))
_RAW_NODE: Final = frozenset((*_NODE, "file", "file.driver", "file.filename", "file.locking"))
_NODES: Final = {"file": _FILE_NODE, "host_device": _FILE_NODE, "raw": _RAW_NODE}
_PORT: Final = re.compile(r"[0-9]{1,5}")
_LAST_PORT: Final = 65535


@dataclass
class BackendNames:
    """What the options so far said; see :class:`guestd.config.GuestConfig` for the three."""

    netdevs: dict[str, str] = field(default_factory=dict)
    drives: dict[str, str] = field(default_factory=dict)
    uplinks: dict[str, str] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    """Those of :attr:`drives` that are nodes of ``-blockdev``."""
    ports: set[str] = field(default_factory=set)
    """Those of :attr:`netdevs` that plug another one into a hub."""

    def warnings(self, devices: Iterable[DeviceConfig]) -> list[str]:
        """About networks that lead nowhere, and cards without one."""
        cards = [device for device in devices if "netdev" in properties(device.model)]
        used = {device.props.get("netdev") for device in cards} | self.uplinks.keys() | self.ports
        idle = [f"netdev {name} has no peer" for name in self.netdevs if name not in used]
        unnamed: Counter[str] = Counter()
        for card in cards:
            name = card.id
            if name.startswith(ANONYMOUS):
                name = f"{card.model}.{unnamed[card.model]}"
                unnamed[card.model] += 1
            if not card.props.get("netdev"):
                idle.append(f"nic {name} has no peer")
        return idle

    # -- networks ------------------------------------------------------------------------------------------------

    def netdev(self, value: str) -> None:
        """``-netdev``. :raise ConfigError: for what QEMU refuses, too, and for kinds that are not here."""
        given = _flat(options(value, "type"))
        kind = _needed(given, "type")
        if kind not in _NETWORKS and kind not in _OTHER_NETWORKS:
            raise ConfigError(f"Parameter 'type' does not accept value '{kind}'")
        name = identifier(_needed(given, "id"))
        if name in self.netdevs:
            raise ConfigError(f"Duplicate ID '{name}' for netdev")
        own = {key: text for key, text in given.items() if key not in ("type", "id")}
        if kind not in _NETWORKS:
            raise ConfigError(f"no network '{kind}' here", hint=f"{', '.join(_NETWORKS)} are")
        self.netdevs[name] = self._hubport(name, own) if kind == "hubport" else _MAKERS[kind](own)

    def _hubport(self, name: str, given: Mapping[str, object]) -> str:
        only(given, ("hubid", "netdev"))
        _needed(given, "hubid")
        hub = f"hub:{number('hubid', given['hubid'], kind='an int64 value')}"
        if "netdev" in given:
            peer = str(given["netdev"])
            if peer not in self.netdevs:
                raise ConfigError(f"netdev '{peer}' not found")
            if peer in self.uplinks:
                raise ConfigError(f"netdev '{peer}' is on a hub already")
            self.uplinks[peer] = hub
            self.ports.add(name)
        return hub

    # -- disks ---------------------------------------------------------------------------------------------------

    def drive(self, value: str) -> None:
        """``-drive``. :raise ConfigError: as :meth:`netdev`."""
        given = options(value, "")
        for name in given:
            if name not in _DRIVE:
                raise ConfigError(f"Block format 'raw' does not support the option '{name}'")
        bus = str(given.get("if", "scsi"))
        if bus in _OTHER_BUSES:
            raise ConfigError(f"machine type does not support if={bus},bus=0,unit=0", hint="if=none and a -device")
        if bus != "none":
            raise ConfigError(f"unsupported bus type '{bus}'")
        name = identifier(given["id"]) if "id" in given else f"none{len(self.drives)}"
        if name in self.drives and name not in self.nodes:
            raise ConfigError(f"Duplicate ID '{name}' for drive")
        self._check_drive(given)
        path = str(given.get("file", given.get("file.filename", "")))
        read_only = _is_read_only(given) or given.get("media") == "cdrom"
        self.drives[name] = _file(path, read_only)

    def _check_drive(self, given: Mapping[str, object]) -> None:
        if "format" in given and "driver" in given:
            raise ConfigError("Cannot specify both 'driver' and 'format'")
        kind = given.get("format", given.get("driver", "raw"))
        if kind != "raw":
            raise ConfigError(f"Unknown driver '{kind}'")
        for name, (known, message) in _CHOICES.items():
            if name in given and given[name] not in known:
                raise ConfigError(message.format(given[name]))
        for name in ("index", "bus", "unit"):
            if name in given:
                number(name, given[name], kind="a number")
        if switch("snapshot", given.get("snapshot", "off")):
            raise ConfigError("snapshot=on is not here: what is written stays")

    def blockdev(self, value: str) -> None:
        """``-blockdev``. :raise ConfigError: as :meth:`netdev`."""
        given = _flat(options(value, "driver"))
        kind = _needed(given, "driver")
        if kind not in _NODES:
            raise ConfigError(f"Parameter 'driver' does not accept value '{kind}'")
        _expected(given, _NODES[kind])
        if "node-name" not in given:
            raise ConfigError("'node-name' must be specified for the root node")
        node = identifier(given["node-name"])
        if node in self.nodes:
            raise ConfigError(f"Duplicate nodes with node-name='{node}'")
        self.drives[node] = self._node(kind, given)
        self.nodes.add(node)

    def _node(self, kind: str, given: Mapping[str, object]) -> str:
        read_only = _is_read_only(given)
        if kind != "raw":
            return _file(_needed(given, "filename"), read_only)
        if "file.driver" in given:
            return _file(_needed(given, "file.filename"), read_only)
        below = _needed(given, "file")
        if below not in self.nodes:
            raise ConfigError(f"Cannot find device='{below}' nor node-name='{below}'")
        text = self.drives[below]
        return f"{text},ro" if read_only and not text.endswith(",ro") else text


def _flat(given: Mapping[str, object], inside: str = "") -> dict[str, object]:
    """JSON's nested objects as the command line writes them: ``local.host``."""
    found: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{inside}{name}.")
        else:
            found[inside + name] = value
    return found


def _needed(given: Mapping[str, object], name: str) -> str:
    if name not in given:
        raise ConfigError(f"Parameter '{name}' is missing")
    return str(given[name])


def _dgram(given: Mapping[str, object]) -> str:
    if not any(name.startswith("local.") for name in given):
        raise ConfigError("dgram requires local= parameter")
    kind = _needed(given, "local.type")
    if kind not in _ENDS:
        raise ConfigError(f"Parameter 'type' does not accept value '{kind}'")
    expected = {f"local.{name}" for name in ("type", *_ENDS[kind])}
    if kind == "fd":
        _expected(given, expected)
        return f"fd:{number('local.str', _needed(given, 'local.str'))}"
    if not any(name.startswith("remote.") for name in given):
        raise ConfigError("type=inet or type=unix requires remote parameter")
    if _needed(given, "remote.type") != kind:
        raise ConfigError("remote and local types must be the same")
    _expected(given, expected | {f"remote.{name}" for name in ("type", *_ENDS[kind])})
    ends = [[_needed(given, f"{end}.{name}") for name in _ENDS[kind]] for end in ("local", "remote")]
    if kind == "unix":
        return f"unix:{ends[0][0]}@{ends[1][0]}"
    return "udp:" + "@".join(_address(host, port) for host, port in ends)


def _socket(given: Mapping[str, object]) -> str:
    only(given, (*_WAYS, "localaddr"))
    ways = [name for name in _WAYS if name in given]
    if len(ways) != 1:
        raise ConfigError("exactly one of listen=, connect=, mcast= or udp= is required")
    if ways == ["fd"]:
        return f"fd:{number('fd', given['fd'])}"
    if ways != ["udp"]:
        raise ConfigError(f"no socket,{ways[0]}= here", hint="socket,udp=HOST:PORT,localaddr=HOST:PORT is")
    if "localaddr" not in given:
        raise ConfigError("localaddr= is mandatory with udp=")
    ends = (_host_and_port(str(given[name])) for name in ("localaddr", "udp"))
    return "udp:" + "@".join(_address(*end) for end in ends)


_MAKERS: Final = {"dgram": _dgram, "socket": _socket}


def _host_and_port(text: str) -> tuple[str, str]:
    host, colon, port = text.partition(":")
    if not colon:
        raise ConfigError(f"host address '{text}' doesn't contain ':' separating host from port")
    return host or "127.0.0.1", port


def _address(host: str, port: str) -> str:
    if not _PORT.fullmatch(port) or int(port) > _LAST_PORT:
        raise ConfigError(f"port number '{port}' is invalid")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _expected(given: Mapping[str, object], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"Parameter '{name}' is unexpected")


def _is_read_only(given: Mapping[str, object]) -> bool:
    return any(switch("read-only", given.get(name, "off")) for name in ("readonly", "read-only"))


def _file(path: str, read_only: bool) -> str:
    """:raise ConfigError: there is no such file."""
    if not path:
        raise ConfigError("could not get blockdev size: No medium found")
    try:
        Path(path).stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"Could not open '{path}': {reason}") from error
    return f"file:{path},ro" if read_only else f"file:{path}"
