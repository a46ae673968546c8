"""The steps of a scenario that a PC's kernel takes with its VT-d unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploy import scenario_steps as schema
from deploy.scenario import Scenario
from deploy.scenario_machine import Q35
from deploy.system import System
from deploy.vtd_kernel import VtdKernel
from vfio_model.errors import ConfigError

STAGE_IOVA = 0xFFF_F000
"""Where a page is mapped to look into a device's buffer: an edu has 28 bits."""
PAGE = 4096
_PERMS = {"r": 1, "w": 2, "rw": 3}


class VtdSteps:
    """Of ``scenario``, on ``system``. The kernel's driver is there from the first ``vtd`` step on."""

    def __init__(self, scenario: Scenario, system: System) -> None:
        self._scenario, self._system = scenario, system
        self._kernel: VtdKernel | None = None
        self.running = False
        """Whether translation is on."""

    @property
    def kernel(self) -> VtdKernel:
        """:raise ConfigError: there is none yet."""
        if self._kernel is None:
            raise ConfigError("the unit has no driver yet", hint="a step before: vtd: {do: start}")
        return self._kernel

    def vtd(self, step: schema.Vtd) -> str:
        """Start or stop the driver; what was done, in words."""
        if step.do == "stop":
            self.kernel.stop()
            self.running = False
            return "translation is off"
        if self._kernel is None:
            requesters: Mapping[str, int] = {
                device.id: self._system.requester(device.id) for device in self._scenario.devices
            }
            machine = self._scenario.machine
            iommu = machine.iommu if isinstance(machine, Q35) else None
            if iommu is None:
                raise ConfigError("this machine has no VT-d unit", hint="machine: {type: q35, iommu: {}}")
            scalable = bool(iommu.get("scalable-mode"))
            self._kernel = VtdKernel(self._system.cpu, requesters, queue=step.queue, scalable=scalable)
        self.kernel.start()
        self.running = True
        return "translation is on"

    def domain(self, step: schema.Domain) -> str:
        """Move a device."""
        self.kernel.move(step.device, step.to)
        return f"{step.device}: {step.to}"

    def map(self, pages: schema.MapPages) -> str:
        """Pages in a device's domain."""
        self.kernel.map(
            pages.device, int(pages.iova), int(pages.gpa), pages.pages, int(pages.page_size), _PERMS[pages.perm]
        )
        return f"{pages.device}: {pages.pages} page(s) at {pages.iova:#x} to {pages.gpa:#x}"

    def unmap(self, pages: schema.UnmapPages) -> str:
        """They go."""
        gone = self.kernel.unmap(pages.device, int(pages.iova), pages.pages * int(pages.page_size))
        return f"{pages.device}: {gone} bytes at {pages.iova:#x}"

    def with_stage(self, device: str, ram: int, use: Callable[[int, int], bool]) -> bool:
        """Call ``use(iova, gpa)`` with an address at which ``device`` reaches the last page of ``ram`` bytes."""
        gpa = ram - PAGE
        if not self.running or self.kernel.passed_through(device):
            return use(gpa, gpa)
        self.kernel.map(device, STAGE_IOVA, gpa, 1, PAGE, _PERMS["rw"])
        try:
            return use(STAGE_IOVA, gpa)
        finally:
            self.kernel.unmap(device, STAGE_IOVA, PAGE)
