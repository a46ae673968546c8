"""The monitor for a person: what ``info`` prints, and that lines do what QMP's commands do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from guestd.host_status import Mm, own_mm
from protocols.control import messages as control
from protocols.transport.channel import RouterChannel
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.zmq import RouterServer
from tests.acceleration import kvm
from tests.guestd.monitor_rig import Machine
from vfio_model.iommu.spapr.regs import RtasToken, phb_buid
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import U32_MAX

pytestmark = pytest.mark.machine

BAR = 0x8010_0000


def test_info_pci(machine: Machine) -> None:
    machine.config(0x10, 4, BAR)
    machine.config(4, 2, 2)
    assert machine.human("info pci") == (
        "  Bus  0, device   2, function 0:\n"
        "    Class 0255: PCI device 1234:11e8\n"
        "      PCI subsystem 1af4:1100\n"
        "      IRQ 0, pin A\n"
        "      BAR0: 32 bit memory at 0x80100000 [0x801fffff]\n"
        '      id "e0"\n'
    )


def test_info_mtree_shows_trees_and_flat_views(machine: Machine) -> None:
    machine.config(0x10, 4, BAR)
    machine.config(4, 2, 2)
    text = machine.human("info mtree")
    assert text.startswith(
        "address-space: memory\n"
        "  0000000000000000-ffffffffffffffff (prio 0, container): system\n"
        "    0000000000000000-0000000000ffffff (prio 0, ram): ram\n"
    )
    assert "\n      0000000000000000-000000003fffffff (prio 0, i/o): tce-iommu-80000000\n" in text
    assert "mmio32-alias @pci@800000020000000.mmio 0000000080000000-00000000ffffffff\n" in text
    assert "memory-region: pci@800000020000000.mmio\n" in text
    assert "    0000000080100000-00000000801fffff (prio 1, i/o): " in text
    flat = machine.human("info mtree -f")
    assert flat.startswith('FlatView #0\n AS "memory", root: system\n Root memory region: system\n')
    assert "  0000200080100000-00002000801fffff (prio 1, i/o): " in flat


def test_info_windows_and_who_follows_them(machine: Machine) -> None:
    buid = phb_buid(0)
    create = [0, buid >> 32, buid & U32_MAX, 16, 30]
    assert machine.guest.machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, create, 4)[0] == 0
    assert machine.human("info windows") == (
        "LIOBN 80000000: 0000000000000000-000000003fffffff, page size 0x1000, entries 0x40000\n"
        "LIOBN 80000001: 0800000000000000-080000003fffffff, page size 0x10000, entries 0x4000\n"
    )
    region = machine.guest.machine.phb().dma.tables[1].iommu
    assert region is not None
    region.register_notifier(IOMMUNotifier(lambda *_: None, IOMMUNotifierFlag.UNMAP, 0, 0xFFFF))
    text = machine.human("info iommu")
    where = ", in the kernel" if kvm() else ""
    assert f"LIOBN 80000000: 0x40000 entries of 0x1000 bytes, need_vfio off{where}\n" in text
    assert f"0x4000 entries of 0x10000 bytes, need_vfio on{where}\n    followed by function: UNMAP, " in text


def test_a_person_and_a_program_do_the_same(machine: Machine) -> None:
    assert machine.human("stop") == "" and machine.human("info status") == "VM status: paused\n"
    assert machine.human("c") == "" and machine.human("info status") == "VM status: running\n"
    assert machine.human("device_add edu,id=e1,addr=5,dma_mask=0xff") == ""
    assert machine.ask("qom-get", path="e1", property="dma_mask") == 0xFF
    assert 'dev: edu, id "e1"' in machine.human("info qtree")
    assert machine.human("device_del e1") == "" and machine.human("device_del e1") == "Error: Device 'e1' not found\n"
    assert machine.human("device_add nope") == "Error: 'nope' is not a valid device model name\n"
    assert machine.human("nope") == "unknown command: 'nope'\n"
    assert machine.human("info nope") == "unknown command: 'info nope'\n"
    assert machine.human("info status x").startswith("status: extraneous characters at the end of line\n")
    assert machine.human("info mtree -z").startswith("mtree: unsupported option -z\n")
    assert machine.human('"') != "" and machine.human("") == ""
    assert "info windows" in machine.human("info") == machine.human("help info")
    assert machine.human("info locked_vm") == "locked_vm: 0 (no host is connected)\n"
    assert machine.told() == ["STOP", "RESUME", "DEVICE_DELETED"]


def test_the_host_is_asked_what_it_has_locked(runtime_dir: Path, loop: Loop) -> None:
    assert "hostd" in str(own_mm(runtime_dir, loop, seconds=0.01)), "nobody answers"
    lock = RoleLock(runtime_dir, "hostd")
    channel: RouterChannel[Any, Any] = RouterChannel(
        RouterServer(runtime_dir / "hostd.ctl", lock=lock), control.REQUESTS, control.RESPONSES, control.Refused
    )
    mms = [{"pid": 1, "locked_vm": 3, "memlock": 7, "name": "other"}]

    def answer() -> None:
        if (received := channel.receive()) is not None:
            channel.send(received[0], control.Response(1, control.Document(msgspec.json.encode({"mms": mms}))))

    loop.register(channel, answer, served=True)
    assert own_mm(runtime_dir, loop) == "hostd does not know this process"
    mms.append({"pid": os.getpid(), "locked_vm": 5, "memlock": None, "name": "guest"})
    assert own_mm(runtime_dir, loop) == Mm(os.getpid(), 5, None)
    loop.unregister(channel)
    channel.close()
    lock.close()
