"""What an author gets wrong about a device class is said in a sentence, when the class or the device is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vfio_model.device_api import (
    BAR_MEMORY_STATE,
    MSIX_STATE,
    PARENT,
    BarSpec,
    BarType,
    ConfigError,
    Doorbell,
    Field,
    MsixSpec,
    PCIDevice,
    Prop,
    State,
    Type,
    VMStateDescription,
    VMStateError,
)
from vfio_model.testing import Bench
from vfio_model.vmstate.fields import encode

PAGE = 4096
IDENTITY = {"VENDOR_ID": 0x1234, "DEVICE_ID": 1}


def stated(**attributes: Any) -> type[PCIDevice]:
    return type("Mine", (PCIDevice,), {**IDENTITY, **attributes})


def described(*fields: Field) -> VMStateDescription:
    return VMStateDescription("mine", 1, fields)


def ignore(*_: object, **__: object) -> None:
    return None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stated(VENDOR_ID="QEMU"), "Mine.VENDOR_ID: 'QEMU' is not 0 to 0xfffe"),
        (lambda: stated(VENDOR_ID=0xFFFF), "Mine.VENDOR_ID: 65535 is not"),
        (lambda: stated(DEVICE_ID=0x10000), "Mine.DEVICE_ID: 65536 is not"),
        (lambda: stated(INTERRUPT_PIN=5), "Mine.INTERRUPT_PIN: 5 is not 0 to 0x4"),
        (lambda: stated(MSI_VECTORS=3), r"Mine.MSI_VECTORS: 3 is not one of \[0, 1, 2, 4, 8, 16, 32\]"),
        (lambda: BarSpec(0, 3000), r"BarSpec\(0\): its size is 3000, no power of two from 16 on"),
        (lambda: BarSpec(0, 2, BarType.IO), "no power of two from 4 on"),
        (lambda: BarSpec(6, PAGE), "index from 0 to 5"),
        (lambda: BarSpec(5, PAGE, BarType.MEM64), "index from 0 to 4"),
        (lambda: BarSpec(0, PAGE, access=(4, 3)), r"access is \(4, 3\)"),
        (lambda: BarSpec(0, 2 * PAGE, mmap=((0x800, PAGE),)), "in pages of 4096"),
        (lambda: BarSpec(0, 4 * PAGE, mmap=((PAGE, PAGE), (0, PAGE))), "begins before the one before it ends"),
        (lambda: BarSpec(0, PAGE, mmap=((0, 2 * PAGE),)), "past the BAR's 0x1000 bytes"),
        (lambda: BarSpec(0, PAGE, BarType.IO, mmap=((0, PAGE),)), "an I/O BAR cannot be mapped"),
        (lambda: stated(BARS=BarSpec(0, PAGE)), r"no tuple of BarSpec \(one is written \(BarSpec\(...\),\)\)"),
        (lambda: stated(BARS=(BarSpec(1, PAGE), BarSpec(1, 16))), "BAR 1 and BAR 1 both need register 1"),
        (lambda: stated(BARS=(BarSpec(0, PAGE, BarType.MEM64), BarSpec(1, 16))), "both need register 1"),
        (lambda: stated(MSIX=4), "Mine.MSIX: 4 is no MsixSpec"),
        (lambda: stated(POWER=True), "Mine.POWER: True is no PowerSpec"),
        (lambda: MsixSpec(0, 0, 0, 2048), "0 vectors; MSI-X has 1 to 2048"),
        (lambda: MsixSpec(4, 0, 4, 2048), "a multiple of 8 bytes"),
        (lambda: stated(DOORBELLS=(Doorbell(0, 0x80),)), "lies in no BAR"),
        (lambda: stated(DOORBELLS=(0x80,)), "no tuple of Doorbell"),
        (lambda: stated(PROPS={"size": 4096}), r"PROPS\['size'\]: 4096 is no Prop"),
        (lambda: stated(PROPS={"size": Prop(bytes, b"", "")}), "no Prop of bool, int, float or str"),
        (lambda: stated(PROPS={"size": Prop(int, "4k", "")}), "the default '4k' is no int"),
        (lambda: stated(VMSTATE=(PARENT,)), "is no VMStateDescription"),
        (lambda: stated(VMSTATE=described(Field("sum"))), r"no field 'parent_obj' \(put PARENT among its fields\)"),
        (lambda: stated(VMSTATE=described(PARENT, Field("sum"))), "'sum', and no export_state gives it"),
        (
            lambda: stated(VMSTATE=described(PARENT, Field("sum")), export_state=ignore),
            "'sum', and no import_state takes it",
        ),
        (
            lambda: stated(BARS=(BarSpec(0, PAGE),), MSIX=MsixSpec(4, 0, 0, 2048), VMSTATE=described(PARENT)),
            r"no field 'msix' \(put MSIX_STATE among its fields\)",
        ),
        (
            lambda: stated(BARS=(BarSpec(0, PAGE, mmap=((0, PAGE),)),), VMSTATE=described(PARENT)),
            r"no field 'bar_memory' \(put BAR_MEMORY_STATE among its fields\)",
        ),
    ],
)
def test_a_class_that_cannot_be_says_why(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("cls", "props", "words"),
    [
        (type("Mine", (PCIDevice,), {"DEVICE_ID": 1}), {}, "Mine: a device needs a VENDOR_ID"),
        (type("Mine", (PCIDevice,), {"VENDOR_ID": 1}), {}, "Mine: a device needs a DEVICE_ID"),
        (stated(), {"size": 1}, r"Mine has no property 'size' \(properties: none\)"),
        (stated(PROPS={"size": Prop(int, 1, "in bytes")}), {"size": "1"}, r"expected int \(in bytes\)"),
        (stated(PROPS={"size": Prop(int, 1, "in bytes")}), {"size": True}, "is True, expected int"),
        (stated(MSIX=MsixSpec(4, 0, 0, 2048)), {}, "in BAR 0, which is no memory BAR"),
        (stated(BARS=(BarSpec(0, 256, BarType.IO),), MSIX=MsixSpec(4, 0, 0, 128)), {}, "no memory BAR"),
        (stated(BARS=(BarSpec(0, PAGE),), MSIX=MsixSpec(4, 0, 0, 8)), {}, "overlap at 0x8"),
        (stated(BARS=(BarSpec(0, PAGE),), MSIX=MsixSpec(4, 0, PAGE, 0)), {}, "it has 0x1000 bytes"),
        (
            stated(BARS=(BarSpec(0, 2 * PAGE, mmap=((0, PAGE),)),), MSIX=MsixSpec(4, 0, 0xFF8, PAGE + 256)),
            {},
            "BAR 0: mmap areas, MSI-X table or pending bits overlap at 0xff8",
        ),
    ],
)
def test_a_device_that_cannot_be_says_why(cls: type[PCIDevice], props: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bench(cls, **props)


def test_an_init_that_forgets_the_base_class_is_told() -> None:
    with pytest.raises(ConfigError, match=r"Mine: __init__ does not call the base class's \(super\(\).__init__"):
        Bench(stated(__init__=ignore))


def test_a_base_class_of_ones_own_may_leave_its_identity_open() -> None:
    family = type("Family", (PCIDevice,), {"VENDOR_ID": 0x1234, "BARS": (BarSpec(0, PAGE),)})
    member = type("Member", (family,), {"DEVICE_ID": 7})
    assert Bench(member).device.config_read(0, 4) == 0x0007_1234


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "mine: the state has no 'sum'"),
        ({"sum": 1 << 32, "list": [1, 2]}, "'sum' is 4294967296, not a U32"),
        ({"sum": None, "list": [1, 2]}, "'sum' is None, not a U32"),
        ({"sum": -1, "list": [1, 2]}, "'sum' is -1"),
        ({"sum": 1, "list": [1, 2, 3]}, r"'list' is \[1, 2, 3\], not 2 elements"),
        ({"sum": 1, "list": 5}, "'list' is 5, not 2 elements"),
    ],
)
def test_a_state_that_does_not_fit_its_description_says_which_field(state: State, words: str) -> None:
    description = described(Field("sum"), Field("list", Type.U16, array=2))
    with pytest.raises(VMStateError, match=words):
        encode(description, state)


def test_what_the_base_class_keeps_needs_no_methods() -> None:
    cls = stated(
        BARS=(BarSpec(0, 2 * PAGE, mmap=((PAGE, PAGE),)),),
        MSIX=MsixSpec(4, 0, 0, 2048),
        VMSTATE=described(PARENT, MSIX_STATE, BAR_MEMORY_STATE),
    )
    bench = Bench(cls)
    bench.enable_msix()
    bench.write(PAGE + 8, 0x1122)
    other = bench.migrate()
    assert other.read(PAGE + 8) == 0x1122
    other.device.raise_irq(3)
    assert other.signals == ["msi 3"]
