"""A random life of a guest whose processes share their address spaces with a device.

Two processes take turns at the device. Free memory is filled, and looked at: an access by what was taken away is found
there. What a process has is compared with a model of it.
"""

from __future__ import annotations

import random

from vfio_model.devices.svm import regs
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.guest_drivers.svm_kernel import SvmKernel
from vfio_model.guest_drivers.svm_process import Process
from vfio_model.pci.iommu_ops import Atc, AtcOutcome, AtsRequest, PageRequest

PAGE = 4096
PLACES = [0x7E00_0000_0000 + number * 16 * PAGE for number in range(6)]
MOST_PAGES = 12
SLICE_NS = 1000
"""After so long the device has done one more step."""
MOST_TURNS = 100_000


class Model:
    """A process and what each of its bytes is to be; areas by their start: (pages, writable)."""

    def __init__(self, kernel: SvmKernel) -> None:
        self.process = Process(kernel.cpu, kernel.frames, kernel.driver)
        self.areas: dict[int, tuple[int, bool]] = {}
        self.bytes: dict[int, bytearray] = {}

    def page(self, address: int) -> bytearray | None:
        """What the page at ``address`` holds."""
        return self.bytes.get(address & -PAGE)

    def reachable(self, address: int, size: int, *, write: bool) -> bool:
        """Whether an access goes through."""
        for page in range(address & -PAGE, address + size, PAGE):
            area = next((area for start, area in self.areas.items() if start <= page < start + area[0] * PAGE), None)
            if area is None or (write and not area[1]):
                return False
        return True

    def store(self, address: int, data: bytes) -> None:
        """``data`` is there now."""
        for offset, byte in enumerate(data):
            page = self.bytes.setdefault(address + offset & -PAGE, bytearray(PAGE))
            page[(address + offset) % PAGE] = byte

    def load(self, address: int, size: int) -> bytes:
        """What is there."""
        empty = bytes(PAGE)
        pages = range(address & -PAGE, address + size, PAGE)
        data = b"".join(bytes(self.bytes.get(page, empty)) for page in pages)
        return data[address % PAGE :][:size]


class Life:
    """One sequence of random steps. ``device`` is the model, where that is in this process."""

    def __init__(self, seed: int, kernel: SvmKernel, device: SvmDevice | None) -> None:
        self.random = random.Random(seed)
        self.kernel, self.model = kernel, device
        self.models = [Model(kernel) for _ in range(2)]
        self.owner: Model | None = None
        self.atc: Atc | None = None
        """A cache of the owner's translations, that is filled at one time and used at another."""
        self.filled: list[int] = []
        self.done: dict[str, int] = {}

    def run(self, steps: int) -> None:
        """Take ``steps``, then look at everything."""
        weights = {self.map: 5, self.unmap: 1, self.page_out: 1, self.store: 4, self.turn: 1, self.device: 4}
        weights[self.remap_under] = 1
        if self.model is not None:
            weights |= {self.stray: 1, self.fill: 4, self.use: 8}
        acts = [act for act, weight in weights.items() for _ in range(weight)]
        for _ in range(steps):
            act = self.random.choice(acts)
            if act():
                self.done[act.__name__] = self.done.get(act.__name__, 0) + 1
        for model in self.models:
            for start, (pages, _) in model.areas.items():
                assert model.process.mm.read(start, pages * PAGE) == model.load(start, pages * PAGE)
            model.process.exit()
        self.kernel.frames.check()

    # -- the guest

    def some(self) -> Model:
        return self.random.choice(self.models)

    def map(self) -> bool:
        model, start = self.some(), self.random.choice(PLACES)
        if start in model.areas:
            return False
        pages, writable = self.random.randint(1, MOST_PAGES), self.random.random() < 0.85
        model.process.mm.mmap(pages * PAGE, start, writable=writable)
        model.areas[start] = pages, writable
        return True

    def unmap(self) -> bool:
        model = self.some()
        if not model.areas:
            return False
        start = self.random.choice([*model.areas])
        pages, _ = model.areas.pop(start)
        model.process.mm.munmap(start, pages * PAGE)
        for page in range(pages):
            model.bytes.pop(start + page * PAGE, None)
        return True

    def page_out(self) -> bool:
        model, start = self.some(), self.random.choice(PLACES)
        model.process.mm.pageout(start + self.random.randint(0, 3) * PAGE, self.random.randint(1, MOST_PAGES) * PAGE)
        return True

    def place(self) -> tuple[int, int]:
        """An address and a size that may reach beyond what is mapped."""
        start = self.random.choice(PLACES) + self.random.randrange(4 * PAGE)
        return start, self.random.choice([1, 8, 100, PAGE, 3 * PAGE, 9 * PAGE + 5])

    def store(self) -> bool:
        model = self.some()
        address, size = self.place()
        if not model.reachable(address, size, write=True):
            return False
        data = self.random.randbytes(size)
        model.process.mm.write(address, data)
        model.store(address, data)
        return True

    def turn(self) -> bool:
        """The device is closed, and opened by one of the processes: its PASID is the one before's."""
        if self.owner is not None:
            self.owner.process.close()
            self.no_translation_is_left()
        self.owner = self.some()
        self.owner.process.open()
        if self.model is not None:
            self.kernel.cpu.clock_step(5000)
            self.atc = self.model.open_atc(self.owner.process.file.pasid)
        return True

    def no_translation_is_left(self) -> None:
        """The PASID is nobody's."""
        if self.atc is not None:
            for place in PLACES:
                for page in range(MOST_PAGES):
                    assert self.atc.access(place + page * PAGE, self.word(), True)[1] is not AtcOutcome.OK
            self.atc.close()

    def word(self) -> memoryview:
        return memoryview(bytearray(self.random.randbytes(8)))

    def remap_under(self) -> bool:
        """While the device is somewhere in its buffer, or waits for pages of it, that goes; another one may come."""
        model, address = self.owner, self.random.choice(PLACES)
        if model is None or address not in model.areas or not model.areas[address][1]:
            return False
        (pages, _), mm = model.areas[address], model.process.mm
        if self.random.random() < 0.5:
            mm.pageout(address, pages * PAGE)
        driver = self.kernel.driver
        driver.put(regs.ADDRESS, address)
        driver.put(regs.SIZE, pages * PAGE)
        driver.start(regs.COMMAND_WRITE)
        self.kernel.cpu.clock_step(self.random.randint(1, 3) * SLICE_NS)
        mm.munmap(address, pages * PAGE)
        del model.areas[address]
        for page in range(pages):
            model.bytes.pop(address + page * PAGE, None)
        again = self.random.random() < 0.5
        if again:
            mm.mmap(pages * PAGE, address)
            model.areas[address] = pages, True
        for _ in range(MOST_TURNS):
            if driver.done:
                break
            if not self.kernel.sva.queue.handle():
                self.kernel.cpu.clock_step(SLICE_NS)
        assert driver.done
        if again:
            self.take_what_was_written(model, address, pages)
        return True

    def take_what_was_written(self, model: Model, address: int, pages: int) -> None:
        """A buffer that came while the device wrote: from some page on it has the pattern, and nothing before."""
        found = model.process.mm.read(address, pages * PAGE)
        pattern = regs.pattern(pages * PAGE)
        firsts = [page for page in range(pages + 1) if found == bytes(page * PAGE) + pattern[page * PAGE :]]
        assert firsts
        model.store(address, found)

    # -- the device

    def fill(self) -> bool:
        """Translations of what is there, for :meth:`use`."""
        if self.atc is None:
            return False
        address, size = self.place()
        done = self.atc.fill(AtsRequest(address, size, no_write=self.random.random() < 0.3))
        self.filled += [entry.iova for entry in done.entries if entry.perm]
        return True

    def use(self) -> bool:
        """What was asked for at some time is used only where it is still so."""
        if self.atc is None or self.owner is None:
            return False
        address, write = self.random.choice(self.filled[-6:] or PLACES), self.random.random() < 0.5
        data = self.word()
        moved, outcome = self.atc.access(address, data, write)
        if outcome is not AtcOutcome.OK:
            assert outcome is AtcOutcome.MISS
            return False
        assert moved == 8 and self.owner.reachable(address, 8, write=write)
        if write:
            self.owner.store(address, bytes(data))
            assert self.owner.process.mm.read(address, 8) == data
        else:
            assert bytes(data) == self.owner.load(address, 8)
        return True

    def device(self) -> bool:
        """A write or a read, of what may not all be there."""
        if self.owner is None:
            return False
        model, (address, size), write = self.owner, self.place(), self.random.random() < 0.6
        expected = model.reachable(address, size, write=write)
        if write:
            assert model.process.device_write(address, size) is expected
            if expected:
                model.store(address, regs.pattern(size))
                assert model.process.mm.read(address, size) == regs.pattern(size)
        else:
            crc = regs.crc8(model.load(address, size))
            assert model.process.device_read(address, size, crc) is expected
        return True

    def stray(self) -> bool:
        """Page requests that no command made: groups that end later, or never."""
        if self.owner is None or self.model is None:
            return False
        self.kernel.cpu.clock_step(5000)
        pasid, group = self.owner.process.file.pasid, self.random.randrange(256, 512)
        for _ in range(self.random.randint(1, 6)):
            last = self.random.random() < 0.3
            request = PageRequest(self.random.choice(PLACES), pasid, group, last, True, self.random.random() < 0.5)
            self.model.pri_request_page(request)
        if self.random.random() < 0.5:
            self.kernel.sva.queue.handle()
        return True
