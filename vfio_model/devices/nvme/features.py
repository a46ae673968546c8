"""nvme: features, as a table, and their values (NVM Express Base Specification 1.4, section 5.21.1, "Feature Specific
Information").

Nothing is saved over a power cycle: a controller reset brings the defaults back.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from vfio_model.devices.nvme.regs import Bits


class FeatureId(IntEnum):
    """Feature identifiers."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B
    TIMESTAMP = 0x0E


class Feature(NamedTuple):
    """One feature. ``subject`` are the bits of dword 11 that say which of several values is meant; ``value`` are those
    that are kept."""

    default: int
    value: int
    subject: Bits = Bits(0, 0)
    namespaced: bool = False
    data_size: int = 0
    """Bytes that go by DMA instead of in dword 11."""


TEMPERATURE_SUBJECT = Bits(16, 6)
"""Sensor and kind of threshold of TEMPERATURE_THRESHOLD."""
OVER_COMPOSITE, UNDER_COMPOSITE, ALL_SENSORS = 0x00, 0x10, 0x0F
"""Subjects: the composite temperature's two thresholds; a sensor number that means every sensor."""
VECTOR_SUBJECT = Bits(0, 16)
POWER_STATE = Bits(0, 5)
DEALLOCATED_BLOCK_ERROR = 0x10000
"""Error recovery: reading a deallocated block fails; not supported."""
WRITE_CACHE_ENABLE = 0x1
QUEUES_SUBMISSION, QUEUES_COMPLETION = Bits(0, 16), Bits(16, 16)
EVENT_HEALTH_TEMPERATURE = 0x02
"""Asynchronous event configuration: tell of critical warnings for temperature."""

FEATURES: Mapping[int, Feature] = {
    FeatureId.ARBITRATION: Feature(0x7, 0xFFFFFF07),
    FeatureId.POWER_MANAGEMENT: Feature(0, 0xFF),
    FeatureId.TEMPERATURE_THRESHOLD: Feature(0, 0xFFFF, TEMPERATURE_SUBJECT),
    FeatureId.ERROR_RECOVERY: Feature(0, 0xFFFF, namespaced=True),
    FeatureId.VOLATILE_WRITE_CACHE: Feature(WRITE_CACHE_ENABLE, 0x1),
    FeatureId.NUMBER_OF_QUEUES: Feature(0, 0xFFFFFFFF),
    FeatureId.INTERRUPT_COALESCING: Feature(0, 0xFFFF),
    FeatureId.INTERRUPT_VECTOR: Feature(0, 0x10000, VECTOR_SUBJECT),
    FeatureId.WRITE_ATOMICITY: Feature(0, 0x1),
    FeatureId.ASYNC_EVENTS: Feature(0, 0x1F),
    FeatureId.TIMESTAMP: Feature(0, 0, data_size=8),
}

OVER_TEMPERATURE_DEFAULT = 343
"""Kelvin."""

CAPABILITY_NAMESPACED, CAPABILITY_CHANGEABLE = 0x2, 0x4
"""Get Features, select 3."""


class FeatureValues:
    """What the host has set. A value that it has not is the default."""

    def __init__(self) -> None:
        self.changed: dict[tuple[int, int], int] = {}
        """By feature identifier and subject."""
        self.queues_default = 0
        """NUMBER_OF_QUEUES, until set: all that there are."""

    def default(self, fid: int, subject: int = 0) -> int:
        """What a controller reset leaves."""
        if fid == FeatureId.NUMBER_OF_QUEUES:
            return self.queues_default
        if fid == FeatureId.TEMPERATURE_THRESHOLD and subject == OVER_COMPOSITE:
            return OVER_TEMPERATURE_DEFAULT
        return FEATURES[fid].default

    def get(self, fid: int, subject: int = 0) -> int:
        """The value now."""
        found = self.changed.get((fid, subject))
        return self.default(fid, subject) if found is None else found

    def set(self, fid: int, value: int, subject: int = 0) -> None:
        """The host's new value, of which the feature's own bits are kept."""
        self.changed[fid, subject] = value & FEATURES[fid].value

    def reset(self) -> None:
        """Every feature has its default."""
        self.changed.clear()
