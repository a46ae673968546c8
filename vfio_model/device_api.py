"""What the author of a device imports: every name of the device API, from one place.

``docs/devices.md`` explains them. They live where they are defined; this module only gathers them.
"""

from __future__ import annotations

from vfio_model.backends.block import BlockBackend
from vfio_model.backends.net import NetBackend
from vfio_model.backends.opening import open_block, open_net
from vfio_model.clock import Timer
from vfio_model.devices.register_file import Register, RegisterFile, fields_of
from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.types import PCI_NO_PASID, DMADirection, MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.device import BAR_MEMORY_STATE, MSIX_STATE, PARENT, DeviceHost, PCIDevice, Prop
from vfio_model.pci.doorbell import Doorbell
from vfio_model.pci.express import ExpressSpec, PortType
from vfio_model.pci.iommu_ops import (
    Atc,
    AtcOutcome,
    AtsCompletion,
    AtsRequest,
    IommuPort,
    IotlbInfo,
    PageRequest,
    PageResponse,
)
from vfio_model.pci.msix import MsixSpec
from vfio_model.pci.power import PowerSpec
from vfio_model.pci.translation_caps import AtsSpec, PasidSpec, PriSpec
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

__all__ = [
    "BAR_MEMORY_STATE",
    "MSIX_STATE",
    "PARENT",
    "PCI_NO_PASID",
    "Atc",
    "AtcOutcome",
    "AtsCompletion",
    "AtsRequest",
    "AtsSpec",
    "BarSpec",
    "BarType",
    "BlockBackend",
    "ConfigError",
    "DMADirection",
    "DMAMapping",
    "DeviceHost",
    "Doorbell",
    "ExpressSpec",
    "Field",
    "IommuPort",
    "IotlbInfo",
    "MemTxResult",
    "MsixSpec",
    "NetBackend",
    "PCIDevice",
    "PageRequest",
    "PageResponse",
    "PasidSpec",
    "PortType",
    "PowerSpec",
    "PriSpec",
    "Prop",
    "Register",
    "RegisterFile",
    "State",
    "Timer",
    "Type",
    "VMStateDescription",
    "VMStateError",
    "fields_of",
    "open_block",
    "open_net",
]
