"""Message signalled interrupts: the 64-bit capability without per-vector masking.

PCI Local Bus Specification 3.0, 6.8.1, "MSI Capability Structure". The guest writes an address and a data value;
vector n is a write of the data, its low bits replaced by n, to that address. Who performs the write is not decided
here: in the guest machine it is a DMA write through the device's own address space, in a device process it is an
eventfd.
"""

from __future__ import annotations

from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_MSI = 0x05
MSI_SIZE_64 = 14
"""Bytes of the capability with a 64-bit address and no mask bits."""

CONTROL_ENABLE = 0x0001
CONTROL_MULTIPLE_CAPABLE_SHIFT = 1
CONTROL_MULTIPLE_ENABLE_SHIFT = 4
CONTROL_MULTIPLE_ENABLE = 7 << CONTROL_MULTIPLE_ENABLE_SHIFT
CONTROL_64BIT = 0x0080


class MsiCapability:
    """The capability of a device with ``vectors`` (1, 2, 4 … 32) messages, added to ``config``."""

    def __init__(self, config: ConfigSpace, vectors: int) -> None:
        assert vectors in (1, 2, 4, 8, 16, 32), "MSI offers a power of two of vectors, at most 32"
        self.vectors = vectors
        self._config = config
        capable = (vectors.bit_length() - 1) << CONTROL_MULTIPLE_CAPABLE_SHIFT
        self.offset = config.add_capability(
            CAP_ID_MSI,
            MSI_SIZE_64,
            (
                Field("control", 2, 2, CONTROL_64BIT | capable, CONTROL_ENABLE | CONTROL_MULTIPLE_ENABLE),
                Field("address_lo", 4, 4, writable=0xFFFFFFFC),
                Field("address_hi", 8, 4, writable=0xFFFFFFFF),
                Field("data", 12, 2, writable=0xFFFF),
            ),
            prefix="msi",
        )

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
        self._config.set("msi.address_hi", address >> 32)
        self._config.set("msi.data", data)

    def message(self, vector: int) -> tuple[int, int]:
        """(address, 32-bit data) of ``vector``; a vector that was not given shares with another (taken modulo)."""
        config = self._config
        address = config.get("msi.address_hi") << 32 | config.get("msi.address_lo")
        spread = self.allocated - 1
        return address, config.get("msi.data") & ~spread | vector & spread
