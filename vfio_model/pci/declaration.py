"""What a device class states about itself, checked when the class is made: an author's mistake is a sentence.

Every check is about class attributes alone; what lies where in a BAR is checked with the device
(:mod:`vfio_model.pci.parts`), because a device may decide about its MSI-X table by a property.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vfio_model.errors import ConfigError
from vfio_model.pci.bar import BARS, BarSpec, BarType
from vfio_model.pci.doorbell import Doorbell
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.msix import MsixSpec
from vfio_model.pci.power import PowerSpec
from vfio_model.pci.translation_caps import AtsSpec, PasidSpec, PriSpec
from vfio_model.vmstate.fields import VMStateDescription

_NUMBERS = {
    "VENDOR_ID": range(0xFFFF),
    "DEVICE_ID": range(0x10000),
    "REVISION": range(0x100),
    "CLASS_ID": range(0x10000),
    "CLASS_PROG": range(0x100),
    "SUBSYSTEM_VENDOR_ID": range(0x10000),
    "SUBSYSTEM_ID": range(0x10000),
    "INTERRUPT_PIN": range(5),
    "MSI_VECTORS": (0, 1, 2, 4, 8, 16, 32),
}
"""Class attribute -> values. Vendor 0xffff is what an empty slot reads."""
_PROP_TYPES = (bool, int, float, str)
_INHERITED = {"parent_obj": "PARENT", "msix": "MSIX_STATE", "bar_memory": "BAR_MEMORY_STATE"}
"""Field of a description that the base class fills -> its name for authors."""


def fits(value: object, kind: type) -> bool:
    """Whether ``value`` may be a property of type ``kind``; a bool is no number here."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_class(cls: type, base: type) -> None:
    """Check ``cls``, a subclass of ``base``.

    :raise ConfigError: what is wrong, with the attribute as its place.
    """
    for name, values in _NUMBERS.items():
        value = getattr(cls, name, None)
        if name in vars(cls) and value not in values:
            said = f"one of {list(values)}" if isinstance(values, tuple) else f"0 to {values[-1]:#x}"
            raise ConfigError(f"{value!r} is not {said}", where=f"{cls.__name__}.{name}")
    bars = _check_bars(cls)
    msix: MsixSpec | None = _of_type(cls, "MSIX", MsixSpec | None)
    _check_express(cls)
    _of_type(cls, "POWER", PowerSpec | None)
    for doorbell in _tuple_of(cls, "DOORBELLS", Doorbell):
        size = next((bar.size for bar in bars if bar.index == doorbell.bar), 0)
        if not 0 <= doorbell.offset < size:
            raise ConfigError(f"{doorbell} lies in no BAR", where=f"{cls.__name__}.DOORBELLS")
    _check_props(cls)
    description: VMStateDescription | None = _of_type(cls, "VMSTATE", VMStateDescription | None)
    if description is not None:
        wanted = ["parent_obj"]
        wanted += ["msix"] if msix is not None else []
        wanted += ["bar_memory"] if any(bar.mmap for bar in bars) else []
        _check_state(cls, base, description, wanted)


def check_identity(cls: type, device: object) -> None:
    """:raise ConfigError: when ``device``, of class ``cls``, does not say who made it or what it is."""
    for name in ("VENDOR_ID", "DEVICE_ID"):
        if not hasattr(device, name):
            hint = f"a class attribute, for example {name} = 0x1234"
            raise ConfigError(f"a device needs a {name}", where=cls.__name__, hint=hint)


def check_made(cls: type, device: object) -> None:
    """:raise ConfigError: when ``device``, made by ``cls``, was not made by its base class as well."""
    if not hasattr(device, "on_mapping_change"):
        hint = "super().__init__(host, **props) comes first in it"
        raise ConfigError("__init__ does not call the base class's", where=cls.__name__, hint=hint)


def _of_type(cls: type, name: str, kind: Any) -> Any:
    value = getattr(cls, name)
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", None) or str(kind).rsplit(".", 1)[-1]
        raise ConfigError(f"{value!r} is no {wanted}", where=f"{cls.__name__}.{name}")
    return value


def _tuple_of(cls: type, name: str, kind: type) -> tuple[Any, ...]:
    value = getattr(cls, name)
    if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
        hint = f"one is written ({kind.__name__}(...),)"
        raise ConfigError(f"{value!r} is no tuple of {kind.__name__}", where=f"{cls.__name__}.{name}", hint=hint)
    return value


def _check_bars(cls: type) -> tuple[BarSpec, ...]:
    bars: tuple[BarSpec, ...] = _tuple_of(cls, "BARS", BarSpec)
    taken: dict[int, BarSpec] = {}
    for bar in bars:
        for index in (bar.index, bar.index + 1) if bar.type is BarType.MEM64 else (bar.index,):
            other = taken.setdefault(index, bar)
            if other is not bar:
                hint = f"a MEM64 BAR takes two of the {BARS} registers: its own index and the next"
                what = f"BAR {bar.index} and BAR {other.index} both need register {index}"
                raise ConfigError(what, where=f"{cls.__name__}.BARS", hint=hint)
    return bars


def _check_express(cls: type) -> None:
    express = _of_type(cls, "EXPRESS", ExpressSpec | None)
    ats, pri = _of_type(cls, "ATS", AtsSpec | None), _of_type(cls, "PRI", PriSpec | None)
    for name, spec in ("ATS", ats), ("PRI", pri), ("PASID", _of_type(cls, "PASID", PasidSpec | None)):
        if spec is not None and express is None:
            hint = "EXPRESS = ExpressSpec() makes the function PCI Express"
            raise ConfigError("it is an extended capability", where=f"{cls.__name__}.{name}", hint=hint)
    if pri is not None and ats is None:
        hint = "ATS = AtsSpec(); who requests pages caches translations"
        raise ConfigError("page requests need ATS", where=f"{cls.__name__}.PRI", hint=hint)


def _check_props(cls: type) -> None:
    props = _of_type(cls, "PROPS", Mapping)
    for name, prop in props.items():
        where = f"{cls.__name__}.PROPS[{name!r}]"
        kind = getattr(prop, "type", None)
        if kind not in _PROP_TYPES:
            raise ConfigError(f"{prop!r} is no Prop of bool, int, float or str", where=where)
        if not fits(prop.default, kind):
            raise ConfigError(f"the default {prop.default!r} is no {kind.__name__}", where=where)


def _check_state(cls: type, base: type, description: VMStateDescription, wanted: Iterable[str]) -> None:
    where = f"{cls.__name__}.VMSTATE"
    names = [field.name for field in description.fields]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"it has no field {name!r}", where=where, hint=f"put {_INHERITED[name]} among its fields")
    own = [name for name in names if name and name not in _INHERITED]
    for method, does in ("export_state", "gives"), ("import_state", "takes"):
        if own and getattr(cls, method) is getattr(base, method):
            raise ConfigError(f"it has the field {own[0]!r}, and no {method} {does} it", where=where)
