"""nvme: Get Features and Set Features (NVM Express Base Specification 1.4, sections 5.13 and 5.21)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vfio_model.devices.nvme import features, regs
from vfio_model.devices.nvme.controller import Controller, result
from vfio_model.devices.nvme.events import TEMPERATURE
from vfio_model.devices.nvme.features import FEATURES, Feature, FeatureId
from vfio_model.devices.nvme.logs import TEMPERATURE_KELVIN, WARNING_TEMPERATURE
from vfio_model.devices.nvme.regs import Command, Status

SELECT = regs.Bits(8, 3)
"""Get Features, dword 10: which value."""
CURRENT, DEFAULT, SAVED, CAPABILITIES = 0, 1, 2, 3
SAVE = 1 << 31
"""Set Features, dword 10: keep it over a power cycle."""
NS_PER_MS = 1_000_000
TIMESTAMP_MASK = (1 << 48) - 1
TIMESTAMP_ORIGIN_SET = 1 << 49
"""Bits 51:49, 001b: the host has set it since the last reset; the low 48 bits are milliseconds."""


def _named(controller: Controller, command: Command) -> Feature | Status:
    """The feature that ``command`` names, of a subject and a namespace that exist."""
    feature = FEATURES.get(command.cdw10 & 0xFF)
    if feature is None:
        return Status.INVALID_FIELD
    if feature.namespaced and command.nsid not in (*controller.namespaces, regs.BROADCAST_NSID):
        return Status.INVALID_NAMESPACE
    if command.cdw10 & 0xFF == FeatureId.INTERRUPT_VECTOR:
        known = features.VECTOR_SUBJECT.of(command.cdw11) < controller.limits.vectors
        return feature if known else Status.INVALID_FIELD
    return feature


# -- Get Features


def get_features(controller: Controller, command: Command) -> int:
    """Section 5.13, "Get Features command"."""
    feature = _named(controller, command)
    if isinstance(feature, Status):
        return feature
    fid, select = command.cdw10 & 0xFF, SELECT.of(command.cdw10)
    subject = feature.subject.of(command.cdw11)
    if select == CAPABILITIES:
        namespaced = features.CAPABILITY_NAMESPACED if feature.namespaced else 0
        return result(features.CAPABILITY_CHANGEABLE | namespaced)
    if select > CAPABILITIES:
        return Status.INVALID_FIELD
    if fid == FeatureId.TIMESTAMP:
        return controller.memory.to_host(command, _timestamp(controller).to_bytes(8, "little"))
    values = controller.features
    value = values.get(fid, subject) if select == CURRENT else values.default(fid, subject)
    # Only interrupt vector configuration repeats its subject.
    return result(value | subject if fid == FeatureId.INTERRUPT_VECTOR else value)


def _timestamp(controller: Controller) -> int:
    now = controller.timestamp_base + controller.clock.now_ns // NS_PER_MS
    return now & TIMESTAMP_MASK | (TIMESTAMP_ORIGIN_SET if controller.timestamp_set else 0)


# -- Set Features


def set_features(controller: Controller, command: Command) -> int:
    """Section 5.21, "Set Features command"."""
    if command.cdw10 & SAVE:
        return Status.FEATURE_NOT_SAVEABLE
    feature = _named(controller, command)
    if isinstance(feature, Status):
        return feature
    fid = command.cdw10 & 0xFF
    if not feature.namespaced and command.nsid not in (0, regs.BROADCAST_NSID):
        return Status.FEATURE_NOT_NAMESPACE_SPECIFIC
    setter = _SETTERS.get(fid)
    if setter is not None:
        return setter(controller, command)
    controller.features.set(fid, command.cdw11, feature.subject.of(command.cdw11))
    return 0


def _set_power(controller: Controller, command: Command) -> int:
    if features.POWER_STATE.of(command.cdw11):
        return Status.INVALID_FIELD
    controller.features.set(FeatureId.POWER_MANAGEMENT, command.cdw11)
    return 0


def _set_error_recovery(controller: Controller, command: Command) -> int:
    if command.cdw11 & features.DEALLOCATED_BLOCK_ERROR:
        return Status.INVALID_FIELD
    controller.features.set(FeatureId.ERROR_RECOVERY, command.cdw11)
    return 0


def _set_write_cache(controller: Controller, command: Command) -> int:
    enable = bool(command.cdw11 & features.WRITE_CACHE_ENABLE)
    try:
        for namespace in controller.namespaces.values():
            if not enable:
                namespace.disk.flush()
            namespace.write_cache = enable
    except OSError:
        return Status.INTERNAL_ERROR
    controller.features.set(FeatureId.VOLATILE_WRITE_CACHE, command.cdw11)
    return 0


def _set_queues(controller: Controller, command: Command) -> int:
    wanted = [bits.of(command.cdw11) for bits in (features.QUEUES_SUBMISSION, features.QUEUES_COMPLETION)]
    if 0xFFFF in wanted:
        return Status.INVALID_FIELD
    if controller.queues.any_io:
        return Status.COMMAND_SEQUENCE_ERROR
    # As many as there are, whatever the host asks for: it may use fewer.
    granted = controller.features.default(FeatureId.NUMBER_OF_QUEUES)
    return result(granted)


def _set_temperature_threshold(controller: Controller, command: Command) -> int:
    subject = features.TEMPERATURE_SUBJECT.of(command.cdw11)
    kind = subject & ~features.ALL_SENSORS
    if kind > features.UNDER_COMPOSITE:
        return Status.INVALID_FIELD
    sensor = subject & features.ALL_SENSORS
    if sensor not in (0, features.ALL_SENSORS):
        return Status.INVALID_FIELD
    controller.features.set(FeatureId.TEMPERATURE_THRESHOLD, command.cdw11, kind)
    _judge_temperature(controller)
    return 0


def _judge_temperature(controller: Controller) -> None:
    values, health = controller.features, controller.health
    over = values.get(FeatureId.TEMPERATURE_THRESHOLD, features.OVER_COMPOSITE)
    under = values.get(FeatureId.TEMPERATURE_THRESHOLD, features.UNDER_COMPOSITE)
    if under < TEMPERATURE_KELVIN < over:
        health.critical_warning &= ~WARNING_TEMPERATURE
        return
    health.critical_warning |= WARNING_TEMPERATURE
    if values.get(FeatureId.ASYNC_EVENTS) & features.EVENT_HEALTH_TEMPERATURE:
        controller.events.raise_(TEMPERATURE)


def _set_timestamp(controller: Controller, command: Command) -> int:
    data = controller.memory.buffer(8)
    status = controller.memory.from_host(command, data)
    if status:
        return status
    value = int.from_bytes(data, "little") & TIMESTAMP_MASK
    controller.timestamp_base, controller.timestamp_set = value - controller.clock.now_ns // NS_PER_MS, True
    return 0


_SETTERS: Mapping[int, Callable[[Controller, Command], int]] = {
    FeatureId.POWER_MANAGEMENT: _set_power,
    FeatureId.TEMPERATURE_THRESHOLD: _set_temperature_threshold,
    FeatureId.ERROR_RECOVERY: _set_error_recovery,
    FeatureId.VOLATILE_WRITE_CACHE: _set_write_cache,
    FeatureId.NUMBER_OF_QUEUES: _set_queues,
    FeatureId.TIMESTAMP: _set_timestamp,
}
"""Features whose setting does more than keep a value, or may fail."""
