"""The command line of ``guestd-system-x86_64``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from guestd.cmdline import parse
from guestd.cmdline_help import HelpWanted
from guestd.config import GuestConfig, load
from guestd.machine_config import IntelIommuConfig, Q35Config
from guestd.system import arch_of, run
from tests.guestd.q35_options import LAST_DEVICE_REFUSED, REFUSED, TAKEN
from vfio_model.errors import ConfigError


def config(text: str) -> GuestConfig:
    return parse(text.split(), "x86_64").config


def machine(text: str) -> Q35Config:
    found = config(text).machine
    assert isinstance(found, Q35Config)
    return found


def places(text: str) -> dict[str, tuple[str, str]]:
    found = config(text)
    assert isinstance(found.machine, Q35Config)
    own = {each.id: (each.bus, each.addr) for each in found.machine.bridges}
    return own | {each.id: (each.bus, each.addr) for each in found.devices}


@pytest.mark.parametrize("program", ["guestd-system-x86_64", "/usr/bin/qemu-system-x86_64", "my-system-x86_64"])
def test_the_name_says_what_is_emulated(program: str) -> None:
    assert arch_of(program) == "x86_64"
    assert arch_of("guestd-system-ppc64") == arch_of("guestd") == "ppc64"


def test_a_pc_is_a_q35() -> None:
    found = config("")
    assert isinstance(found.machine, Q35Config)
    assert (found.machine.ram, found.machine.page_size, found.machine.iommu) == (512 << 20, 4096, None)
    assert found.host_page == 4096


@pytest.mark.parametrize(("text", "message"), LAST_DEVICE_REFUSED)
def test_what_qemu_says_of_a_device(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(text)
    where = text[text.rindex("-device") :]
    assert str(refused.value).startswith(f"{where}: {message}")


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_qemu_says_of_a_machine(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(text)
    assert refused.value.what == message


@pytest.mark.parametrize("text", TAKEN)
def test_what_qemu_takes(text: str) -> None:
    assert machine(text).ram == 512 << 20


def test_properties_of_the_iommu() -> None:
    text = "-global intel-iommu.caching-mode=on -device intel-iommu,aw-bits=39,intremap=off,quirks=qemu,id=unit"
    iommu = machine(text).iommu
    assert iommu == IntelIommuConfig(id="unit", aw_bits=39, caching_mode=True, intremap=False, quirks=["qemu"])
    options = iommu.options()
    assert (options.aw_bits, options.intremap, options.eim, options.caching_mode) == (39, False, False, True)
    assert options.has("no-fault-on-hit")
    auto = machine("-device intel-iommu").iommu
    assert auto is not None and auto.options().intremap and not auto.options().eim
    with pytest.raises(ConfigError, match=r"'invalidation' does not accept value 'later' \(known: sync\|async\)"):
        config("-device intel-iommu,invalidation=later")
    with pytest.raises(ConfigError, match=r"no quirk 'nonsense' can be selected \(known: qemu, "):
        machine("-device intel-iommu,quirks=nonsense")


def test_devices_go_where_qemu_puts_them() -> None:
    text = (
        "-device pcie-root-port,id=rp -device edu,id=a -device edu,id=b,bus=rp -device edu,id=c,addr=4.0 "
        "-device pcie-pci-bridge,id=pb -device edu,id=d,bus=pb -device edu,id=e -device edu,id=f,addr=1f.4"
    )
    assert places(text) == {
        "rp": ("pcie.0", "01.0"),
        "a": ("pcie.0", "02.0"),
        "b": ("rp", "00.0"),
        "c": ("pcie.0", "04.0"),
        "pb": ("pcie.0", "03.0"),
        "d": ("pb", "00.0"),
        "e": ("pcie.0", "05.0"),
        "f": ("pcie.0", "1f.4"),
    }
    text = "-device pxb-pcie,id=px,bus_nr=32 -device pcie-root-port,id=rp -device edu,id=a,bus=rp"
    assert places(text) == {"px": ("pcie.0", "01.0"), "rp": ("px", "00.0"), "a": ("rp", "00.0")}


def test_bridges_without_an_id() -> None:
    found = machine("-device intel-iommu -device pci-bridge,chassis_nr=1 -device edu,bus=pci.0 -device pcie-root-port")
    assert found.iommu is not None and found.iommu.id == "device[0]"
    assert [(each.id, each.bus_below) for each in found.bridges] == [("device[1]", "pci.0"), ("device[3]", "pcie.1")]


def test_a_machine_that_goes_past_its_iommu() -> None:
    found = machine("-machine q35,default_bus_bypass_iommu=on -device pxb-pcie,id=p,bus_nr=3,bypass_iommu=off")
    assert found.default_bus_bypass_iommu and found.bridges[0].props == {"bus_nr": 3, "bypass_iommu": False}


def test_whether_bridges_gate_dma_is_said() -> None:
    assert machine("-machine q35,x-bridges-gate-dma=on").bridges_gate_dma
    assert not machine("-machine q35,x_bridges_gate_dma=off").bridges_gate_dma
    assert not machine("-machine q35").bridges_gate_dma


def test_help_is_the_binarys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, text in (
        ("-device intel-iommu,help", "aw-bits=<uint8>"),
        ("-device pcie-root-port,help", "chassis=<uint8>"),
        ("-device help", 'name "pxb-pcie"'),
        ("-machine help", "q35"),
        ("-machine q35,help", "default-bus-bypass-iommu=<bool>"),
        ("-help", "usage: guestd-system-x86_64 "),
    ):
        with pytest.raises(HelpWanted, match=text):
            parse(words.split(), "x86_64")
    monkeypatch.setattr(sys, "stdin", None)
    assert run("guestd-system-x86_64", ["-device", "intel-iommu,aw-bits=40"]) == 1
    said = (
        "guestd-system-x86_64: -device intel-iommu,aw-bits=40: Legacy mode: supported values for aw-bits are: 39, 48\n"
    )
    assert capsys.readouterr().err == said


def test_a_warning_for_a_pseries_global() -> None:
    found = parse(["-global", "spapr-pci-host-bridge.ddw=off"], "x86_64")
    assert found.warnings == ("global spapr-pci-host-bridge.ddw has invalid class name",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"machine": {"type": "q35", "iommu": {"aw-bits": 40}}}', "supported values for aw-bits are: 39, 48"),
        ('{"machine": {"type": "q35", "iommu": {"bogus": 1}}}', "bogus"),
        ('{"machine": {"type": "i440fx"}}', "i440fx"),
        ('{"machine": {"type": "q35", "bridges": [{"driver": "pxb", "id": "a", "addr": "1"}]}}', "pxb"),
        (
            '{"machine": {"type": "q35", "bridges": [{"driver": "pxb-pcie", "id": "a", "addr": "1", "bus": "b"}]}}',
            "a: Bus 'b' not found",
        ),
        (
            '{"machine": {"type": "q35"}, "devices": [{"id": "e", "model": "edu", "addr": "2", "bus": "rp"}]}',
            "Bus 'rp' not found",
        ),
        ('{"machine": {"type": "q35", "ddw": false}}', "ddw"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "guestd.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "guestd.json"
    path.write_text('{"machine": {"type": "q35", "ram": 16777216, "iommu": {"caching-mode": true}}}')
    found = load(path).machine
    assert isinstance(found, Q35Config) and found.iommu is not None and found.iommu.caching_mode
