"""PCI addresses as people write them."""

from __future__ import annotations

import pytest

from vfio_model.errors import ConfigError
from vfio_model.pci.address import PCIAddress


@pytest.mark.parametrize(
    ("text", "devfn", "requester_id", "shown"),
    [
        ("02.0", 0x10, 0x0010, "0000:00:02.0"),
        ("2", 0x10, 0x0010, "0000:00:02.0"),
        ("1f.7", 0xFF, 0x00FF, "0000:00:1f.7"),
        ("01:00.1", 0x01, 0x0101, "0000:01:00.1"),
        ("0001:FF:1F.7", 0xFF, 0xFFFF, "0001:ff:1f.7"),
    ],
)
def test_parse(text: str, devfn: int, requester_id: int, shown: str) -> None:
    address = PCIAddress.parse(text)
    assert (address.devfn, address.requester_id, str(address)) == (devfn, requester_id, shown)
    assert PCIAddress.parse(shown) == address
    assert PCIAddress.of(address.bus, devfn, address.domain) == address


@pytest.mark.parametrize("text", ["", "edu", "20.0", "02.8", "02.", "1:2:3:4.0", "-1.0", "02.0.0", "0x2.0"])
def test_what_is_not_an_address_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError, match=r"-device edu,addr="):
        PCIAddress.parse(text, where="-device edu,addr=")
