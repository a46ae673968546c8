"""The host's topology from a JSON file: the shape is :class:`vfio_model.host.topology.HostTopology`'s."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from vfio_model.errors import ConfigError
from vfio_model.host.hpa import Placement
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology

DEFAULT_TOPOLOGY = HostTopology(groups=(GroupSpec(26, (DeviceSpec("0000:01:00.0", "edu"),)),))
"""One group with an edu: enough to try things out."""


def read_topology(path: Path | None, hpa: Placement | None = None) -> HostTopology:
    """The topology in ``path`` (None: :data:`DEFAULT_TOPOLOGY`), checked; ``hpa`` overrides the placement.

    :raise ConfigError: naming the file and the field that is wrong.
    """
    topology = DEFAULT_TOPOLOGY if path is None else _read(path)
    if hpa is not None:
        topology = replace(topology, hpa=hpa)
    try:
        return topology.validate()
    except ConfigError as error:
        where = error.where if path is None else f"{path}: {error.where}"
        raise ConfigError(error.what, where=where, hint=error.hint) from error


def _read(path: Path) -> HostTopology:
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostTopology)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error), where=str(path)) from error
