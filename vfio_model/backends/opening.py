"""How a device opens what its property (``drive``, ``netdev``) names: in memory here, else by the host around it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vfio_model.backends.block import BlockBackend, open_memory
from vfio_model.backends.net import NetBackend, NoNet, OnFrame
from vfio_model.errors import ConfigError


@runtime_checkable
class BackendHost(Protocol):
    """A ``DeviceHost`` that opens files and sockets for a device."""

    def open_block(self, text: str) -> BlockBackend:
        """The disk that ``text`` names. :raise ConfigError: when it cannot be opened."""

    def open_net(self, text: str, on_frame: OnFrame) -> NetBackend:
        """The network that ``text`` names; what comes goes to ``on_frame``. :raise ConfigError: it cannot be opened."""


def open_block(host: object, text: str) -> BlockBackend:
    """The disk that ``text`` names: nothing or ``mem:SIZE`` is in memory, ``file:PATH[,ro]`` or a path is the host's.

    :raise ConfigError: when it cannot be opened.
    """
    disk = open_memory(text)
    if disk is not None:
        return disk
    if isinstance(host, BackendHost):
        return host.open_block(text)
    raise ConfigError(f"{text!r} cannot be opened here", where="drive", hint="mem:SIZE is in memory")


def open_net(host: object, text: str, on_frame: OnFrame) -> NetBackend:
    """The network ``text`` names: nothing or ``none`` is none; ``hub:NAME``, ``udp:…``, ``unix:…``, ``fd:N`` are the
    host's.

    :raise ConfigError: when it cannot be opened.
    """
    if text in ("", "none"):
        return NoNet()
    if isinstance(host, BackendHost):
        return host.open_net(text, on_frame)
    raise ConfigError(f"{text!r} cannot be opened here", where="netdev", hint="none is no network")
