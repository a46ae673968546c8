"""The direct adapter of the uapi seam: client and host in one process, revocations driven to their end on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from errno import ENODEV
from typing import TypeVar

from vfio_model.host.host import Host
from vfio_model.host.mm import Mm, Vma
from vfio_model.host.pending import Batch, Pending
from vfio_model.host.segments import Segments
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.revoke import Fence, LaneSet, NoFence, Revoke
from vfio_model.vfio.ioctl import BatchError
from vfio_model.vfio.region import DeviceConnection

T = TypeVar("T")


class DirectPort:
    """A host in this process.

    ``lanes(names)`` gives the lane sets of devices, ``fence`` the barrier that goes with them; ``idle()`` is called
    while a revocation waits for a lane (a test with threads sleeps there). ``devices(token)`` gives what an opened
    device is.
    """

    def __init__(
        self,
        host: Host,
        mm: Mm | None = None,
        *,
        lanes: Callable[[Iterable[str]], Iterable[LaneSet]] = lambda names: (),
        fence: Fence | None = None,
        idle: Callable[[], None] = lambda: None,
        devices: Callable[[int], DeviceConnection] | None = None,
        skip_wait: bool = False,
    ) -> None:
        self.host, self.mm = host, mm or host.create_mm()
        self.segments = Segments()
        """The declared memory by host-physical address: what an assigned device in this process reaches."""
        self._lanes, self._fence, self._idle, self._devices = lanes, fence or NoFence(), idle, devices
        self._skip_wait = skip_wait
        self._views: dict[int, memoryview] = {}
        host.share_memory(self.mm, lambda vma: self._views.get(vma.hva))

    def open(self, path: str) -> int:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        return self.host.open(path, self.mm)

    def close(self, handle: int) -> None:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        self.run(self.host.close(handle))

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        return self.run(self.host.ioctl(self.mm, handle, cmd, arg))

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        outcome: Batch = self.run(self.host.ioctl_many(self.mm, handle, cmd, memoryview(args), count))
        if outcome.errno:
            raise BatchError(outcome.errno, outcome.reason, outcome.done)
        return outcome.done

    def create_spapr_tce(self, vm: int, arg: bytes) -> tuple[int, memoryview]:
        """See :class:`~vfio_model.vfio.kvm.KvmPort`."""
        return self.host.create_spapr_tce(self.mm, vm, arg)

    def unmap_spapr_tce(self, handle: int) -> None:
        """See :class:`~vfio_model.vfio.kvm.KvmPort`; here the memory goes with its last view."""

    def hcall(self, vm: int, nr: int, args: Sequence[int], links: int) -> int:
        """See :class:`~vfio_model.vfio.kvm.KvmPort`."""
        return self.run(self.host.hcall(self.mm, vm, nr, args, links))

    def run(self, outcome: T | Pending[T]) -> T:
        """Drive a pending operation to its end; anything else is returned as it is."""
        if not isinstance(outcome, Pending):
            return outcome
        revoke = Revoke(self._fence, self._lanes(outcome.lane_devices), skip_wait=self._skip_wait)
        over = revoke.start()
        while not over:
            self._idle()
            over = revoke.poll()
        return outcome.finish()

    def declare_memory(self, block: RAMBlock) -> None:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        segment = self.host.place_segment(self._segment_id(block), block.size, block.page_size)
        self.mm.declare(Vma(block.hva, block.size, segment, 0, block.page_size))
        self.segments.add(segment.hpa, block.view)
        self._views[block.hva] = block.view

    def undeclare_memory(self, block: RAMBlock) -> None:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        vma = self.mm.undeclare(block.hva)
        del self._views[block.hva]
        self.host.forget_segment(vma.segment.id)
        self.segments.remove(vma.segment.hpa)

    def _segment_id(self, block: RAMBlock) -> str:
        return f"{self.mm.name}.{block.name}"

    def take_device(self, token: int) -> DeviceConnection:
        """See :class:`~vfio_model.vfio.ioctl.VfioPort`."""
        if self._devices is None:
            raise OSError(ENODEV, "this port was made without devices")
        return self._devices(token)

    def device_closed(self, token: int) -> None:
        """The device with ``token`` was closed or has died."""
        self.run(self.host.device_closed(token))

    def exit(self) -> None:
        """The client ends: whatever it still had open is released."""
        self.run(self.host.mm_gone(self.mm))
