"""VIO devices on QEMU's command line."""

from __future__ import annotations

import pytest

from guestd.cmdline import parse
from vfio_model.errors import ConfigError


def test_vio_devices_have_the_units_that_qemu_gives_them() -> None:
    words = ["-device", "spapr-vscsi", "-device", "spapr-vlan,reg=0x2000,id=net", "-device", "spapr-vty,chardev=c"]
    found = [(each.kind, each.reg) for each in parse(words).config.machine.vio]
    assert found == [("vscsi", 0x7100_0001), ("llan", 0x2000), ("vty", 0x7100_0002)]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["-device", "spapr-vlan,foo=1"], "Property 'spapr-vlan.foo' not found"),
        (
            ["-device", "spapr-vlan,reg=1", "-device", "spapr-vscsi,reg=1"],
            "spapr-vscsi devices conflict at address 0x1",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_option(words: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        parse(words)
    assert error.value.where is not None and error.value.where.startswith("-device")
