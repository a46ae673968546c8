"""Scenarios of a PC."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deploy import run, shipped, yaml_lines
from deploy.assemble import guest_config
from deploy.scenario import Scenario
from deploy.scenario_machine import Q35, Pseries
from guestd.config import GuestConfig
from guestd.machine_config import Q35Config
from vfio_model.errors import ConfigError

PC = """\
name: pc
machine:
  type: q35
  ram: 64MiB
  iommu: {caching-mode: true, aw-bits: 39}
  bridges:
    - {driver: pcie-root-port, id: rp1, addr: 01.0, props: {chassis: 1}}
    - {driver: pxb-pcie, id: far, addr: 05.0, props: {bus_nr: 32, bypass_iommu: true}}
    - {driver: pcie-root-port, id: rp2, bus: far, addr: 00.0, props: {chassis: 2}}
devices:
  - {id: near, model: edu, addr: 02.0}
  - {id: behind, model: edu, bus: rp1, addr: 00.0}
  - {id: beyond, model: edu, bus: rp2, addr: 00.0}
  - {id: elsewhere, model: edu, addr: 03.0, attach: remote}
  - {id: asking, model: edu, addr: 04.0, attach: remote, dma: message}
  - {id: given, model: edu, addr: 06.0, attach: assigned, group: 7}
steps:
  - dma: {device: near, iova: 0x10000, gpa: 0x10000}
  - dma: {device: behind, iova: 0x20000, gpa: 0x20000, direction: read}
  - dma: {device: beyond, iova: 0x30000, gpa: 0x30000}
  - dma: {device: elsewhere, iova: 0x40000, gpa: 0x40000}
  - dma: {device: asking, iova: 0x50000, gpa: 0x50000}
  - dma: {device: given, iova: 0x60000, gpa: 0x60000}
  - explain: {device: given, iova: 0x60000}
  - expect: {role: guestd, key: devices_lost, equals: 0}
"""


def parsed(text: str) -> Scenario:
    return yaml_lines.parse(text, "pc.yaml", Scenario)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "processes"])
def test_devices_move_data_behind_every_bridge(inline: bool, tmp_path: Path) -> None:
    verdict = run.run(parsed(PC), tmp_path, None, lambda *_: None, inline=inline)
    assert verdict.passed, verdict.reason


def test_assigned_devices_behind_vt_d_with_processes(tmp_path: Path) -> None:
    verdict = run.run(shipped.load_scenario("vtd-passthrough"), Path(), tmp_path, lambda *_: None)
    assert verdict.last_line == "PASS vtd-passthrough" and verdict.leftovers == [], verdict.reason


def test_a_pcs_host_is_a_pcs() -> None:
    host = parsed(PC).host
    assert (host.page_size, host.containers) == (4096, ["type1v2", "type1"])
    assert parsed(PC.replace("steps:", "host: {page_size: 64K}\nsteps:")).host.page_size == 65536
    assert parsed("name: a").host.containers == ["spapr-v2", "spapr-v1"]


def test_guestd_is_told_the_same() -> None:
    config = msgspec.convert(guest_config(parsed(PC), Path("/tmp")), GuestConfig)
    assert isinstance(config.machine, Q35Config) and config.machine.iommu is not None
    assert config.machine.iommu.options().aw_bits == 39 and config.machine.iommu.caching_mode
    assert [bridge.bus_below for bridge in config.machine.bridges] == ["rp1", "far", "rp2"]


def test_a_machine_without_a_type_is_a_pseries() -> None:
    assert isinstance(parsed("name: a").machine, Pseries) and isinstance(
        parsed("name: a\nmachine: {}").machine, Pseries
    )
    assert isinstance(parsed("name: a\nmachine: {type: q35}").machine, Q35)


VTD = """\
name: refusals
machine: {type: q35, ram: 64MiB, iommu: {caching-mode: true}}
devices:
  - {id: given, model: edu, addr: 02.0, attach: assigned, group: 7}
"""
CONVENTIONAL = """\
name: aliases
machine:
  type: q35
  ram: 64MiB
  iommu: {caching-mode: true}
  bridges:
    - {driver: pcie-pci-bridge, id: pb, addr: 01.0}
devices:
  - {id: one, model: edu, bus: pb, addr: 01.0, attach: assigned, group: 7}
  - {id: two, model: edu, bus: pb, addr: 02.0, attach: assigned, group: 7}
steps:
  - expect: {role: hostd, key: locked_vm, at_least: 16000, at_most: 16384}
  - vtd: {do: start, queue: false}
  - map: {device: one, iova: 0x100000, gpa: 0x2000000}
  - expect: {role: hostd, key: locked_vm, equals: 1}
  - dma: {device: two, iova: 0x100000, gpa: 0x2000000}
  - dma: {device: one, iova: 0x100000, gpa: 0x2000000}
  - domain: {device: two, to: none}
  - domain: {device: two}
  - unmap: {device: two, iova: 0x100000}
  - dma: {device: one, iova: 0x100000, gpa: 0x2000000, expect: refused}
"""


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "processes"])
def test_functions_of_one_requester_share_a_container(inline: bool, tmp_path: Path) -> None:
    verdict = run.run(parsed(CONVENTIONAL), tmp_path, None, lambda *_: None, inline=inline)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{caching-mode: true}",
            "{}",
            "Device assignment is not allowed without enabling caching-mode=on",
        ),
        ("caching-mode: true", "caching-mode: true, snoop-control: true", "Snoop Control with vhost or VFIO is not"),
        ("{caching-mode: true}", "{caching-mode: true, scalable-mode: true, fsts: true}", "Need IOMMUFD backend when"),
        ("group: 7}", "group: 7}\n  - {id: b, model: edu, addr: 03.0, attach: assigned, group: 7}", "group 7 used in"),
    ],
)
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "processes"])
def test_assigned_devices_that_the_guests_iommu_cannot_have(
    inline: bool, old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in VTD
    text = VTD.replace(old, new) + f"start_fails: {{role: guestd, message: '{message}'}}\n"
    verdict = run.run(parsed(text), tmp_path, None, lambda *_: None, inline=inline)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("map: {iova: 0, gpa: 0}", "steps[0].map: a q35 needs a device"),
        ("map: {device: given, iova: 0, gpa: 0, page_size: 64K}", "VT-d has pages of 4K, 2M and 1G"),
        ("unmap: {device: given, iova: 0x1000, page_size: 2M}", "addresses are multiples of the page size"),
        ("map: {device: given, iova: 0, gpa: 0x1000, page_size: 2M}", "addresses are multiples of the page size"),
        ("domain: {device: given, to: elsewhere}", "steps[0].domain: no device has the id elsewhere"),
    ],
)
def test_steps_that_cannot_be(step: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(f"{VTD}steps:\n  - {step}\n")
    assert message in str(refused.value)


def test_steps_of_the_other_machine() -> None:
    for step in ("vtd: {do: start}", "domain: {device: e}", "map: {device: e, iova: 0, gpa: 0}"):
        with pytest.raises(ConfigError, match="q35"):
            parsed(f"name: a\ndevices:\n  - {{id: e, model: edu, addr: 02.0}}\nsteps:\n  - {step}\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "aw-bits: 39",
            "aw-bits: 40",
            "pc.yaml:5: machine: iommu: Legacy mode: supported values for aw-bits are: 39, 48",
        ),
        ("aw-bits: 39", "awbits: 39", "pc.yaml:5: machine: iommu: there is no property awbits; known: aw-bits, "),
        ("aw-bits: 39", "aw-bits: wide", "pc.yaml:5: machine: iommu: aw-bits expects int, got str"),
        (
            "driver: pxb-pcie",
            "driver: pxb",
            "pc.yaml:8: machine.bridges[1].driver: Invalid enum value 'pxb' (known: i82",
        ),
        (
            "bus_nr: 32",
            "busnr: 32",
            "pc.yaml:8: machine.bridges[1]: props: pxb-pcie has no property busnr; known: bus_nr,",
        ),
        ("aw-bits: 39", "quirks: [none]", "pc.yaml:5: machine: iommu: no quirk 'none' can be selected; known: qemu, "),
        ("bus: far, addr: 00.0, props", "bus: away, addr: 00.0, props", "there is no bus away before it"),
        ("bus: rp1", "bus: rp3", "pc.yaml:12: devices[1].bus: there is no bus rp3, only pcie.0, rp1, far, rp2"),
        ("bus: rp1, addr: 00.0", "addr: 02.0", "pc.yaml:10: devices: two have the addr 02.0"),
        (
            "steps:",
            "host: {containers: [spapr-v2]}\nsteps:",
            "pc.yaml:17: host: a q35's assigned devices need a type 1",
        ),
        ("type: q35", "type: i440fx", "pc.yaml:3: machine.type: Invalid value 'i440fx' (known: pseries, q35)"),
        ("ram: 64MiB", "ram: 64MiB\n  ddw: false", "pc.yaml:5: machine: Object contains unknown field ddw"),
        ("expect: {role: guestd, key: devices_lost, equals: 0}", "linux_ddw: {device: near}", "only a pseries machine"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, message: str) -> None:
    assert old in PC
    with pytest.raises(ConfigError) as refused:
        parsed(PC.replace(old, new))
    assert message in str(refused.value)
