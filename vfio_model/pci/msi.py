"""Message signalled interrupts: the capability in its four layouts (32 or 64-bit address, with or without masks).

PCI Local Bus Specification 3.0, 6.8.1, "MSI Capability Structure". The guest writes an address and a data value;
vector n is a write of the data, its low bits replaced by n, to that address. Who performs the write is not decided
here: in the guest machine it is a DMA write through the device's own address space, in a device process it is an
eventfd.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_MSI = 0x05

CONTROL_ENABLE = 0x0001
CONTROL_MULTIPLE_CAPABLE_SHIFT = 1
CONTROL_MULTIPLE_ENABLE_SHIFT = 4
CONTROL_MULTIPLE_ENABLE = 7 << CONTROL_MULTIPLE_ENABLE_SHIFT
CONTROL_64BIT = 0x0080
CONTROL_MASKS = 0x0100
CONTROL_LAYOUT = CONTROL_64BIT | CONTROL_MASKS


def size(layout: int) -> int:
    """Bytes of the capability whose control register has the bits ``layout``."""
    return (14 if layout & CONTROL_64BIT else 10) + (10 if layout & CONTROL_MASKS else 0)


class MsiCapability:
    """The capability of a device with ``vectors`` (1, 2, 4 … 32) messages, added to ``config``."""

    def __init__(
        self,
        config: ConfigSpace,
        vectors: int,
        *,
        layout: int = CONTROL_64BIT,
        place: tuple[int, int] | None = None,
    ) -> None:
        """``layout``: which of :data:`CONTROL_LAYOUT` the control register has. ``place``: as of
        :meth:`ConfigSpace.add_capability`."""
        assert vectors in (1, 2, 4, 8, 16, 32), "MSI offers a power of two of vectors, at most 32"
        self.vectors, self.layout = vectors, layout
        self._config = config
        capable = (vectors.bit_length() - 1) << CONTROL_MULTIPLE_CAPABLE_SHIFT
        fields = [
            Field("control", 2, 2, layout | capable, CONTROL_ENABLE | CONTROL_MULTIPLE_ENABLE),
            Field("address_lo", 4, 4, writable=0xFFFFFFFC),
        ]
        data = 8
        if layout & CONTROL_64BIT:
            fields.append(Field("address_hi", 8, 4, writable=0xFFFFFFFF))
            data = 12
        fields.append(Field("data", data, 2, writable=0xFFFF))
        if layout & CONTROL_MASKS:
            every = (1 << vectors) - 1
            fields += (Field("mask", data + 4, 4, writable=every), Field("pending", data + 8, 4, volatile=every))
        self.offset = config.add_capability(CAP_ID_MSI, size(layout), fields, prefix="msi", place=place)
        config.on_write("msi.control", self._bounded)

    def _bounded(self) -> None:
        """Once enabled, no more vectors are allocated than there are (as QEMU has it)."""
        control, most = self._config.get("msi.control"), self.vectors.bit_length() - 1
        if control & CONTROL_ENABLE and control & CONTROL_MULTIPLE_ENABLE > most << CONTROL_MULTIPLE_ENABLE_SHIFT:
            self._config.set("msi.control", control & ~CONTROL_MULTIPLE_ENABLE | most << CONTROL_MULTIPLE_ENABLE_SHIFT)

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched message interrupts on (and INTx thereby off)."""
        return bool(self._config.get("msi.control") & CONTROL_ENABLE)

    @property
    def allocated(self) -> int:
        """How many vectors the guest has given to the device, at most :attr:`vectors`."""
        control = self._config.get("msi.control")
        return min(1 << ((control & CONTROL_MULTIPLE_ENABLE) >> CONTROL_MULTIPLE_ENABLE_SHIFT), self.vectors)

    def set_message(self, address: int, data: int) -> None:
        """Write address and data as the platform does, without the guest."""
        self._config.set("msi.address_lo", address & 0xFFFFFFFF)
        if self.layout & CONTROL_64BIT:
            self._config.set("msi.address_hi", address >> 32)
        self._config.set("msi.data", data)

    def message(self, vector: int) -> tuple[int, int]:
        """(address, 32-bit data) of ``vector``; a vector that was not given shares with another (taken modulo)."""
        config = self._config
        high = config.get("msi.address_hi") if self.layout & CONTROL_64BIT else 0
        address = high << 32 | config.get("msi.address_lo")
        spread = self.allocated - 1
        return address, config.get("msi.data") & ~spread | vector & spread

    def raise_(self, vector: int, send: Callable[[int], None]) -> None:
        """``send(vector)``, or keep it pending while it is masked."""
        if self.layout & CONTROL_MASKS and self._config.get("msi.mask") >> vector & 1:
            self._config.set("msi.pending", self._config.get("msi.pending") | 1 << vector)
        else:
            send(vector)

    def unmasked(self, send: Callable[[int], None]) -> None:
        """Send what is pending and need not wait any more; to be called after a write to the masks."""
        ready = self._config.get("msi.pending") & ~self._config.get("msi.mask")
        self._config.set("msi.pending", self._config.get("msi.pending") & ~ready)
        for vector in range(self.vectors):
            if ready >> vector & 1:
                send(vector)
