"""The command table: every QMP command and what it takes (QEMU's ``qapi/*.json``). Who carries them out has one handler
for each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocols.monitor.schema import Arg, Enum, ListOf, Struct

MIGRATION_CAPABILITIES: Final = (
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
)
MIGRATION_PARAMETERS: Final = {"downtime-limit": 300, "max-bandwidth": 134217728, "multifd-channels": 2}
"""Those that there are, with their defaults: milliseconds, bytes a second, connections."""

_NOTHING = Struct()
_CAPABILITY = Struct((Arg("capability", Enum(MIGRATION_CAPABILITIES)), Arg("state", "boolean")))
_PATH = Arg("path", "string")
_FD_NAME = Struct((Arg("fdname", "string"),))

COMMANDS: Final[Mapping[str, Struct]] = {
    "qmp_capabilities": Struct((Arg("enable", ListOf(Enum(())), optional=True),)),
    "query-version": _NOTHING,
    "query-commands": _NOTHING,
    "query-status": _NOTHING,
    "query-name": _NOTHING,
    "query-uuid": _NOTHING,
    "query-target": _NOTHING,
    "query-kvm": _NOTHING,
    "query-cpus-fast": _NOTHING,
    "query-pci": _NOTHING,
    "qom-list-types": Struct((Arg("implements", "string", optional=True), Arg("abstract", "boolean", optional=True))),
    "qom-list": Struct((_PATH,)),
    "qom-get": Struct((_PATH, Arg("property", "string"))),
    "device_add": Struct((Arg("driver", "any", optional=True),), open=True),
    "device_del": Struct((Arg("id", "string"),)),
    "stop": _NOTHING,
    "cont": _NOTHING,
    "system_reset": _NOTHING,
    "system_powerdown": _NOTHING,
    "quit": _NOTHING,
    "getfd": _FD_NAME,
    "closefd": _FD_NAME,
    "migrate": Struct(
        (
            Arg("uri", "string", optional=True),
            Arg("channels", ListOf(Struct(open=True)), optional=True),
            Arg("detach", "boolean", optional=True),
            Arg("resume", "boolean", optional=True),
        )
    ),
    "migrate-incoming": Struct((Arg("uri", "string", optional=True), Arg("exit-on-error", "boolean", optional=True))),
    "migrate_cancel": _NOTHING,
    "query-migrate": _NOTHING,
    "migrate-set-capabilities": Struct((Arg("capabilities", ListOf(_CAPABILITY)),)),
    "query-migrate-capabilities": _NOTHING,
    "migrate-set-parameters": Struct(tuple(Arg(name, "uint64", optional=True) for name in MIGRATION_PARAMETERS)),
    "query-migrate-parameters": _NOTHING,
    "human-monitor-command": Struct((Arg("command-line", "string"), Arg("cpu-index", "integer", optional=True))),
}
