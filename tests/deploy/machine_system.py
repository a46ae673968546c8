"""A :class:`deploy.system.System` in one process: a pseries machine with emulated edu devices, and no daemons."""

from __future__ import annotations

import mmap
import signal

from deploy import dma_drivers
from deploy.events import Log, Record
from deploy.explain import DeviceInfo, ExplainStep, Explanation, Stage
from deploy.scenario import Scenario
from deploy.scenario_steps import At, Migrate, Wait
from deploy.system import DmaDriver
from tests.acceleration import accelerated
from vfio_model.devices import DEVICES
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.guest_drivers.pci import MmioWindow, bring_up
from vfio_model.iommu.spapr import regs
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.pci.address import PCIAddress
from vfio_model.ranges import Hva


class LogTrace:
    """A trace that keeps records as the merged log has them; ``ns`` counts."""

    def __init__(self) -> None:
        self.enabled = True
        self.cause = 0
        self.log = Log([])

    def __call__(self, event: str, **fields: object) -> None:
        number = len(self.log.records) + 1
        self.log.records.append(Record(number, 1, number, self.cause, event, fields, "operator"))


class MachineSystem:
    """The devices of ``scenario`` on a machine in this process, whatever their ``attach``."""

    def __init__(self, scenario: Scenario) -> None:
        machine = scenario.machine
        options = regs.DmaOptions(ddw=machine.ddw, pgsz=sum(machine.pgsz))
        block = RAMBlock("ram", memoryview(mmap.mmap(-1, machine.ram)), page_size=machine.page_size, hva=Hva(1 << 40))
        self.machine = accelerated(PseriesMachine([block], PseriesOptions(dma=options)), [block])
        self.cpu = DirectCpu(self.machine)
        self.trace = LogTrace()
        self.signals: list[tuple[At, signal.Signals]] = []
        self.armed = self.moves = 0
        self.state: dict[str, object] = {"locked_vm": 7, "windows": {"open": 2}}
        self._scenario = scenario
        self._drivers: dict[str, DmaDriver] = {}
        for device in scenario.devices:
            devfn = PCIAddress.parse(device.addr).devfn
            self.machine.phb().bus.plug(DEVICES[device.model], devfn, **device.props)
        self._window = MmioWindow.pseries()
        self._functions = {each.devfn: each for each in bring_up(self.cpu, regs.phb_buid(0), self._window)}

    def devices(self) -> list[DeviceInfo]:
        return [DeviceInfo(each.id, each.model, each.addr, each.attach) for each in self._scenario.devices]

    def driver(self, device: str) -> DmaDriver:
        if device not in self._drivers:
            config = next(each for each in self._scenario.devices if each.id == device)
            function = self._functions[PCIAddress.parse(config.addr).devfn]
            self._drivers[device] = dma_drivers.bind(self.cpu, device, config.model, function, self._window.to_cpu)
        return self._drivers[device]

    def burst(self, device: str) -> DmaBurstDriver:
        config = next(each for each in self._scenario.devices if each.id == device)
        function = self._functions[PCIAddress.parse(config.addr).devfn]
        return DmaBurstDriver(self.cpu, self._window.to_cpu(function.bars[0].address))

    def migrate(self, wanted: Migrate) -> tuple[bool, str]:
        self.moves += 1
        return self.moves == 1, f"move {self.moves}"

    def status(self, role: str) -> dict[str, object]:
        return self.state

    def explain(self, device: str, iova: int) -> Explanation:
        liobn = regs.pci_liobn(0, 0)
        translated, perm, _ = self.cpu.translate(liobn, iova)
        step = ExplainStep("TCE", f"{translated | perm:#x}", perm != 0)
        fails = "none" if perm else "stage-1"
        return Explanation(device, iova, Stage([step], translated if perm else None), None, fails, step.what)

    def signal(self, target: At, number: signal.Signals) -> str:
        self.signals.append((target, number))
        return str(target.role or target.device)

    def wait(self, wait: Wait) -> bool:
        return wait.role != "notifier"

    def arm(self) -> None:
        self.armed += 1

    def log(self) -> Log:
        return self.trace.log
