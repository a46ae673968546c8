"""Disks and networks of the devices in this process, by their names (``-drive``, ``-netdev``) or as they are written.

A device's ``drive`` or ``netdev`` is the name of one, or says itself what it is (``file:PATH``, ``hub:NAME``, …; see
``vfio_model.backends.opening``). A name that is a device's is nobody else's. While the machine stands no device hears
anything: frames wait, as many as a queue holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from guestd.config import DeviceConfig
from guestd.device_options import properties
from guestd.option_syntax import is_identifier
from protocols.transport.block import open_file
from protocols.transport.loop import Loop
from protocols.transport.net import open_datagram
from vfio_model.backends.block import BlockBackend, open_memory
from vfio_model.backends.net import FrameQueue, Hub, NetBackend, NoNet, OnFrame
from vfio_model.errors import ConfigError
from vfio_model.pci.bus import IdlePluggedHost, PCIBus

LOOK_NS: Final = 1_000_000
"""How often a machine that stands is asked whether it runs, while frames wait."""
_HUB: Final = "hub:"
_FIRST_MAC: Final = 0x525400123456
_NO_NAMES: Final = ("", "none")


def check_names(
    device: DeviceConfig,
    names: Mapping[str, Collection[str]],
    others: Iterable[DeviceConfig],
    uplinks: Collection[str] = (),
) -> None:
    """Whether the names that ``device`` gives are those of back ends (``names``: by property), and nobody else's: of
    none of ``others``, nor of ``uplinks``.

    :raise ConfigError: with QEMU's message.
    """
    others = list(others)
    for name, known in names.items():
        value = device.props.get(name)
        if not isinstance(value, str) or value in _NO_NAMES or not is_identifier(value):
            continue
        if value not in known:
            raise ConfigError(f"Property '{device.model}.{name}' can't find value '{value}'")
        if value in uplinks or any(other.props.get(name) == value for other in others):
            if name == "drive":
                raise ConfigError(f"Drive '{value}' is already in use by another device")
            raise ConfigError(f"Property '{device.model}.{name}' can't take value '{value}', it's in use")


def with_address(device: DeviceConfig, others: Iterable[DeviceConfig]) -> dict[str, int | str | bool]:
    """The properties of ``device``; a network card without an address gets the next one, as on QEMU."""
    if "mac" not in properties(device.model) or "mac" in device.props:
        return device.props
    taken = {str(other.props.get("mac", "")).lower().replace("-", ":") for other in others}
    number = _FIRST_MAC
    while (mac := number.to_bytes(6, "big").hex(":")) in taken:
        number += 1
    return {**device.props, "mac": mac}


class Backends:
    """What the devices of one machine open, in ``loop``. ``stands()`` says whether the machine does.

    ``drives`` and ``netdevs`` say what the names mean; ``uplinks`` are networks, by name, that are plugged into hubs.
    """

    def __init__(
        self,
        loop: Loop,
        stands: Callable[[], bool],
        *,
        drives: Mapping[str, str],
        netdevs: Mapping[str, str],
        uplinks: Mapping[str, str],
    ) -> None:
        self._loop, self._stands = loop, stands
        self.names: Mapping[str, Mapping[str, str]] = {"drive": drives, "netdev": netdevs}
        """What names mean, by the property that gives one."""
        self.uplinks: Mapping[str, str] = uplinks
        self._hubs: dict[str, Hub] = {}
        self._plugged: list[NetBackend] = []

    def start(self) -> None:
        """Plug networks into hubs.

        :raise ConfigError: when one cannot be opened.
        """
        for network, hub in self.uplinks.items():
            self._plug(self.names["netdev"][network], hub)

    def _plug(self, text: str, hub: str) -> None:
        far: list[NetBackend] = []

        def outward(frame: bytes) -> bool:
            far[0].send(frame)
            return True

        port = self._hub(hub).join(outward)
        self._plugged.append(port)

        def inward(frame: bytes) -> bool:
            port.send(frame)
            return True

        far.append(self._network(text, inward))
        self._plugged += far

    def open_block(self, text: str) -> BlockBackend:
        """See ``BackendHost``."""
        text = self.names["drive"].get(text, text)
        return open_memory(text) or open_file(text)

    def open_net(self, text: str, on_frame: OnFrame) -> NetBackend:
        """See ``BackendHost``."""
        looking = False

        def look() -> None:
            nonlocal looking
            looking = False
            net.resume()

        def offered(frame: bytes) -> bool:
            nonlocal looking
            if not self._stands():
                return on_frame(frame)
            if not looking:
                looking = True
                self._loop.call_later(LOOK_NS, look)
            return False

        net = self._network(self.names["netdev"].get(text, text), offered)
        return net

    def _network(self, text: str, on_frame: OnFrame) -> NetBackend:
        if text in _NO_NAMES:
            return NoNet()
        if text.startswith(_HUB):
            return self._hub(text).join(on_frame)
        return open_datagram(self._loop, text, lambda: FrameQueue(on_frame))

    def _hub(self, text: str) -> Hub:
        return self._hubs.setdefault(text.removeprefix(_HUB), Hub())

    def close(self) -> None:
        """Take networks out of hubs; devices close what is theirs. Harmless twice."""
        for net in self._plugged:
            net.close()


class EmulatedHost(IdlePluggedHost):
    """What surrounds a device in this process."""

    def __init__(self, bus: PCIBus, devfn: int, backends: Backends) -> None:
        super().__init__(bus, devfn)
        self.open_block, self.open_net = backends.open_block, backends.open_net
