"""Live processes whose guest has a terabyte of memory, or memory on huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import run, runtime_dir, shipped
from tests.acceleration import kvm

pytestmark = pytest.mark.machine

RAM = "machine: {{ram: {ram}, page_size: {backing}}}"
NIC = """
devices:
  - {id: nic, model: edu, attach: assigned, addr: 02.0, group: 26, props: {dma_mask: 0xffffffffffffffff}}
"""
BUS = 1 << 59
DEFAULT_TABLE = 64
"""Host pages of the default window's table."""


def passes(text: str, folder: Path) -> None:
    path = folder / "huge.yaml"
    path.write_text(text)
    chosen = shipped.load_scenario(str(path))
    chosen.machine.kvm = kvm()
    verdict = run.run(chosen, folder, folder / "report", lambda *_: None)
    assert verdict.passed, verdict.reason
    assert verdict.leftovers == [] and list(runtime_dir.find_runs()) == []


@pytest.mark.parametrize(("backing", "table"), [("16M", 16), ("2M", 128)])
def test_a_terabyte_on_huge_pages_is_mapped_and_reached_to_its_end(backing: str, table: int, tmp_path: Path) -> None:
    in_kernel = 33 if kvm() else 0  # the default window's table; one of a terabyte stays with the guest
    locked = (1 << 24) + DEFAULT_TABLE + table + in_kernel
    last = (1 << 40) - 4096
    text = f"""
name: huge
description: all of the memory through one window
{RAM.format(ram="1TiB", backing=backing)}
host: {{pgsizes: [4K, 64K, {backing}]}}
{NIC}
steps:
  - hcall: {{name: H_GET_TCE, args: [0x80000000, 0]}}
  - linux_ddw: {{device: nic, page_size: 16M}}
  - dma: {{device: nic, iova: {BUS + last}, gpa: {last}}}
  - dma: {{device: nic, iova: {BUS + (1 << 39)}, gpa: {1 << 39}, direction: read}}
  - expect: {{role: hostd, key: locked_vm, equals: {locked}}}
"""
    passes(text, tmp_path)


def test_one_large_page_of_the_guest_is_many_of_the_host_where_ram_is_not_backed_by_such(tmp_path: Path) -> None:
    window = 30
    in_kernel = 33 + 2 if kvm() else 0  # both windows' tables
    create = [0, 0x0800_0000, 0x2000_0000, 24, window]
    text = f"""
name: small-backing
description: 16 MiB pages of the guest over 64 KiB pages of the host
{RAM.format(ram="1GiB", backing="64K")}
{NIC}
steps:
  - rtas: {{name: "ibm,create-pe-dma-window", args: {create}, nret: 4}}
  - map: {{iova: {BUS}, gpa: 0x2000000, page_size: 16M, liobn: 0x80000001}}
  - dma: {{device: nic, iova: {BUS + 0xFF_F000}, gpa: 0x2fff000}}
  - dma: {{device: nic, iova: {BUS + 0x100_0000}, gpa: 0x3000000, expect: refused}}
  - expect: {{role: hostd, key: locked_vm, equals: {(1 << 14) + DEFAULT_TABLE + 4 + in_kernel}}}
"""
    passes(text, tmp_path)
