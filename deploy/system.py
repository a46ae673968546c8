"""What a scenario's steps need of a running system: a CPU in place of the guest's kernel, and the operator's hand on
the processes.

:class:`System` is the seam: the runner knows nothing else, so that its tests run against a fake. The live one is in
:mod:`deploy.live`.
"""

from __future__ import annotations

import signal
from typing import Protocol

from deploy.events import Log
from deploy.explain import DeviceInfo, Explanation
from deploy.scenario_steps import At, Migrate, Wait
from vfio_model.guest_drivers.cpu import PcCpu, PseriesCpu
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.svm_kernel import SvmKernel
from vfio_model.trace import Trace


class GuestCpu(PseriesCpu, PcCpu, Protocol):
    """Of a guest of either type: what the machine has not got is refused with a :class:`VfioModelError`."""


class DmaDriver(Protocol):
    """What a driver can make a device do: move data between guest memory at a bus address and a buffer inside the
    device.

    Neither call says whether the IOMMU refused: a device of this kind does not know. Memory and the buffer tell.
    """

    max_length: int
    """Bytes of one transfer."""

    def load(self, iova: int, length: int) -> bool:
        """Memory to the device's buffer; False when the device did not answer (it has died)."""

    def store(self, iova: int, length: int) -> bool:
        """The device's buffer to memory; False as above."""


class System(Protocol):
    """A running guest, its host, and their processes."""

    @property
    def cpu(self) -> GuestCpu:
        """The guest's processor."""

    @property
    def trace(self) -> Trace:
        """The operator's own log."""

    def devices(self) -> list[DeviceInfo]:
        """The guest's devices."""

    def driver(self, device: str) -> DmaDriver:
        """The DMA driver of ``device``, bound to it at first use. :raise ConfigError: when its model has none."""

    def burst(self, device: str) -> DmaBurstDriver:
        """The driver of ``device``, which writes without pause. :raise ConfigError: when it is no dma-burst."""

    def requester(self, device: str) -> int:
        """The ID that the requests of ``device`` have where they reach a PC's IOMMU. :raise ConfigError: nothing is
        there."""

    def svm(self, device: str) -> SvmKernel:
        """The kernel that drives ``device``, booted at first use. :raise ConfigError: when it is no svm."""

    def migrate(self, wanted: Migrate) -> tuple[bool, str]:
        """Whether the guest has moved to another guestd, and how it ended in words."""

    def status(self, role: str) -> dict[str, object]:
        """What a daemon says of itself."""

    def explain(self, device: str, iova: int) -> Explanation:
        """Both stages of a translation."""

    def signal(self, target: At, number: signal.Signals) -> str:
        """Send a signal to a role or device process; what it was sent to, in words."""

    def wait(self, wait: Wait) -> bool:
        """Whether what is awaited came in time."""

    def arm(self) -> None:
        """Let the interposer's waiting rules act."""

    def log(self) -> Log:
        """Every process's events so far, merged."""
