"""guestd as a client of a server of this project: the three ways to memory, interrupts, mapped BARs, a server that is
started again, and a machine whose device migrates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.dirty_ram import DirtyRam
from guestd.migration_state import incoming, outgoing
from guestd.remote import VfioUserDevice
from hostd.serve import ServedDevice, device_server
from tests.hostd import probe_device as probe
from tests.peers.rig import DEVFN, Dma, PeerGuest
from vfio_model.errors import VMStateError
from vfio_model.iommu.spapr import regs
from vfio_model.pci.config_space import COMMAND
from vfio_model.pci.msix import CONTROL_ENABLE, ENTRY_SIZE
from vfio_model.vmstate.fields import State

pytestmark = pytest.mark.machine

GPA = 1 << 20
PAGE = 4096
BUSY = 0x7777
WAYS: list[Dma] = ["shared", "mapped", "message"]


class Driver:
    """Of a probe in ``guest``."""

    def __init__(self, guest: PeerGuest) -> None:
        self.guest = guest

    def get(self, register: int) -> int:
        return self.guest.read(register, 8)

    def set(self, register: int, value: int) -> None:
        self.guest.write(register, value, 8)

    def dma(self, command: int, iova: int, length: int, data: int = 0) -> int:
        """0, or a MemTxResult. What goes by message may take a while: a load passes it."""
        self.set(probe.IOVA, iova)
        self.set(probe.LENGTH, length)
        if data:
            self.set(probe.DATA, data)
        self.set(probe.RESULT, BUSY)
        self.set(probe.COMMAND, command)
        self.guest.until("it is done", lambda: self.get(probe.RESULT) != BUSY)
        return self.get(probe.RESULT)


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[ServedDevice]:
    with device_server(probe.ProbeDevice, socket=runtime_dir / "probe.sock") as served:
        yield served


@pytest.fixture
def guests(runtime_dir: Path) -> Iterator[list[PeerGuest]]:
    found: list[PeerGuest] = []
    yield found
    for guest in found:
        guest.close()


def attach(guests: list[PeerGuest], path: str | Path, dma: Dma = "shared") -> tuple[PeerGuest, Driver]:
    directory = Path(path).parent / f"guest{len(guests)}"
    directory.mkdir(mode=0o700)
    guests.append(PeerGuest(Path(path), directory, dma=dma))
    return guests[-1], Driver(guests[-1])


@pytest.mark.parametrize("dma", WAYS)
def test_every_way_to_memory(server: ServedDevice, guests: list[PeerGuest], dma: Dma) -> None:
    guest, driver = attach(guests, server.path, dma)
    guest.window.map_pages(0x10000, [GPA, GPA + 8 * PAGE])
    guest.window.map(0x12000, GPA + 4 * PAGE, PAGE, regs.TcePerm.READ)
    assert driver.dma(probe.WRITE, 0x10FFC, 8, 0x1122_3344_5566_7788) == 0
    assert guest.cpu.read_memory(GPA + PAGE - 4, 4) == bytes.fromhex("88776655")
    assert guest.cpu.read_memory(GPA + 8 * PAGE, 4) == bytes.fromhex("44332211")
    assert driver.dma(probe.READ, 0x10FFC, 8) == 0 and driver.get(probe.DATA) == 0x1122_3344_5566_7788
    assert driver.dma(probe.READ, 0x12000, 8) == 0
    assert driver.dma(probe.WRITE, 0x12000, 8, 5) != 0, "it may be read only"
    guest.window.unmap(0x11000, PAGE)
    assert driver.dma(probe.WRITE, 0x11000, 8, 7) != 0
    assert guest.cpu.read_memory(GPA + 8 * PAGE, 4) == bytes.fromhex("44332211")


@pytest.mark.parametrize("dma", WAYS)
def test_a_mapping_in_place_ends_with_its_page(server: ServedDevice, guests: list[PeerGuest], dma: Dma) -> None:
    guest, driver = attach(guests, server.path, dma)
    guest.window.map(0, GPA, PAGE)
    assert driver.dma(probe.MAP, 0, 64) & 0xFFFF_FFFF == 64
    driver.set(probe.DATA, 0xAA)
    driver.set(probe.COMMAND, probe.STORE)
    driver.get(probe.RESULT)
    guest.window.unmap(0, PAGE)
    guest.window.map(0, GPA + PAGE, PAGE)
    assert guest.cpu.read_memory(GPA + PAGE, 8) == bytes(8)
    assert guest.state == "running"


def test_a_bar_is_mapped_and_messages_arrive(server: ServedDevice, guests: list[PeerGuest]) -> None:
    guest, driver = attach(guests, server.path, "mapped")
    assert [(part.offset, part.size) for part in guest.device.bar_parts(2)] == [probe.AREA]
    guest.write(probe.AREA[0], 0xABCD, bar=2)
    assert guest.device.connection.region_read(2, probe.AREA[0], 2) == b"\xcd\xab"
    block = guest.guest.machine.phb().msi.give(DEVFN << 8, 4)
    assert block is not None and guest.device.msix is not None
    for vector in range(4):
        guest.write(vector * ENTRY_SIZE + 4, regs.MSI_WINDOW >> 32, bar=4)
        guest.write(vector * ENTRY_SIZE + 8, block.first + vector, bar=4)
        guest.write(vector * ENTRY_SIZE + 12, 0, bar=4)
    guest.pci.write(DEVFN, guest.device.msix.offset + 2, 2, CONTROL_ENABLE)
    driver.set(probe.DATA, 3)
    driver.set(probe.COMMAND, probe.IRQ)
    guest.until("vector 3 comes", lambda: guest.raised(block.first + 3) == 1)


@pytest.mark.parametrize("dma", WAYS)
def test_a_server_that_is_started_again(runtime_dir: Path, guests: list[PeerGuest], dma: Dma) -> None:
    path = runtime_dir / "probe.sock"
    with device_server(probe.ProbeDevice, socket=path) as served:
        guest, driver = attach(guests, path, dma)
        guest.window.map(0, GPA, PAGE)
        driver.set(probe.SCRATCH, 0x5555)
        command = guest.pci.read(DEVFN, COMMAND, 2)
        served.kill()
        guest.until("it is lost", lambda: guest.state == "lost")
        assert driver.get(probe.ID) == (1 << 64) - 1
        guest.window.map(PAGE, GPA + 3 * PAGE, PAGE)
    with device_server(probe.ProbeDevice, socket=path):
        guest.until("it is back", lambda: guest.state == "running")
        assert driver.get(probe.SCRATCH) == 7 and guest.pci.read(DEVFN, COMMAND, 2) == command
        for page in range(2):
            assert driver.dma(probe.WRITE, page * PAGE, 8, 1 + page) == 0
        assert guest.cpu.read_memory(GPA + 3 * PAGE, 1) == b"\x02"
        assert driver.dma(probe.WRITE, 2 * PAGE, 8, 9) != 0
        guest.close()
        guests.clear()


@pytest.mark.parametrize("dma", WAYS)
def test_what_a_device_writes_while_the_machine_migrates_is_known(
    server: ServedDevice, guests: list[PeerGuest], dma: Dma
) -> None:
    guest, driver = attach(guests, server.path, dma)
    guest.window.map_pages(0, [GPA, GPA + 2 * PAGE, GPA + 4 * PAGE])
    dirty = DirtyRam(guest.guest, guest.trace)
    dirty.start()
    dirty.sync()
    list(dirty.take())
    assert driver.dma(probe.WRITE, PAGE, 8, 7) == 0
    dirty.sync()
    written = {at for _, first, size in dirty.take() for at in range(first, first + size, PAGE)}
    assert GPA + 2 * PAGE in written
    if dma == "mapped":
        assert GPA + 4 * PAGE not in written, "the device keeps a log"
        (source,) = guest.trace.named("migration_dirty_source")
        assert source["source"] == "DeviceDirty"
    dirty.stop()
    assert driver.dma(probe.WRITE, 0, 8, 7) == 0


def test_a_device_that_was_lost_in_between_is_no_base_for_a_migration(
    runtime_dir: Path, guests: list[PeerGuest]
) -> None:
    path = runtime_dir / "probe.sock"
    with device_server(probe.ProbeDevice, socket=path) as served:
        guest, _ = attach(guests, path, "mapped")
        dirty = DirtyRam(guest.guest, guest.trace)
        dirty.start()
        served.kill()
        guest.until("it is lost", lambda: guest.state == "lost")
    with pytest.raises(VMStateError, match="lost"):
        dirty.sync()
    dirty.stop()


@pytest.mark.parametrize("dma", WAYS)
def test_a_read_into_a_hole_delivers_what_lies_before_it(
    server: ServedDevice, guests: list[PeerGuest], dma: Dma
) -> None:
    guest, driver = attach(guests, server.path, dma)
    guest.window.map_pages(0, [GPA])
    guest.cpu.write_memory(GPA + PAGE - 8, b"12345678")
    driver.set(probe.DATA, 1)
    assert driver.dma(probe.READ, PAGE - 8, 64) != 0
    assert driver.get(probe.DATA).to_bytes(8, "little") == b"12345678"


def test_doorbells_ring_and_what_comes_after_them_sees_it(server: ServedDevice, guests: list[PeerGuest]) -> None:
    _, driver = attach(guests, server.path, "mapped")
    before = driver.get(probe.RUNG)
    for count in range(1, 40):
        driver.set(probe.BELL + 8, 0x77)
        assert driver.get(probe.RUNG) == before + count
    trace = guests[0].device.connection
    assert isinstance(trace, VfioUserDevice) and not trace._posted, "no message was sent for a ring"
    driver.set(probe.BELL + 8, 0x78)
    assert trace._posted
    assert driver.get(probe.RUNG) == before + 40, "a value that rings nothing is a write"


def test_a_devices_state_moves_to_another_server(runtime_dir: Path, guests: list[PeerGuest]) -> None:
    paths = [runtime_dir / "a.sock", runtime_dir / "b.sock"]
    with device_server(probe.ProbeDevice, socket=paths[0]), device_server(probe.ProbeDevice, socket=paths[1]):
        source, driver = attach(guests, paths[0], "mapped")
        driver.set(probe.SCRATCH, 0xBEEF)
        source.write(probe.AREA[0], 0x77, bar=2)
        target, other = attach(guests, paths[1], "mapped")
        source.guest.states.stop()
        states: list[State] = [entry.export() for entry in outgoing(source.guest)]
        target.guest.states.stop()
        for entry, state in zip(incoming(target.guest), states, strict=True):
            entry.load(state)
        target.guest.states.hold()
        target.guest.states.run()
        assert other.get(probe.SCRATCH) == 0xBEEF and target.read(probe.AREA[0], bar=2) == 0x77
        for guest in guests:
            guest.close()
        guests.clear()
