"""The scenario schema: what ``vfio-model run`` reads.

A scenario is a machine, a host, the devices between them, faults to inject, and steps. A step is a mapping with
exactly one key, its action. Unknown fields and wrong types are errors that name file, line and field. Sizes and
addresses may be written ``64K``, ``1GiB`` or 0x… (see :mod:`deploy.quantity`).

``machine`` and ``devices`` go to guestd in the same shape, as JSON; ``host`` becomes hostd's topology. Nothing in
this file starts anything: :mod:`deploy.launcher` and :mod:`deploy.runner` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from deploy.quantity import UNLIMITED, Limit, Seconds, Size
from protocols.interpose import Rule, errno_number
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.svm_program import TESTS
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.pci.bridges import BRIDGES
from vfio_model.ranges import is_aligned
from vfio_model.uapi.containers import DRIVERS
from vfio_model.vfio.kinds import CONTAINER_KINDS, PREFERENCE, ContainerChoice, ContainerKind

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Prop = int | str | bool
PAGE_SIZES = tuple(Size(1 << shift) for shift in (12, 16, 21, 24))

ROOT_BUS = "pcie.0"
Attach = Literal["assigned", "remote", "emulated"]
Role = Literal["hostd", "notifier", "guestd", "interposer"]


class Phb(Struct, forbid_unknown_fields=True, kw_only=True):
    """One host bridge. What is left out is as the machine says for all of them."""

    index: Annotated[int, Meta(ge=0, le=30)]
    id: Name | None = None
    ddw: bool | None = None
    pgsz: list[Size] | None = None
    dma_win_addr: Size | None = None
    dma_win_size: Size | None = None
    dma64_win_addr: Size | None = None

    @property
    def bus(self) -> str:
        """What a device's ``bus`` calls it."""
        return f"{self.id or ('pci' if self.index == 0 else f'phb{self.index}')}.0"


class Vio(Struct, forbid_unknown_fields=True, kw_only=True):
    """One VIO device: the window that comes with it. ``reg``: its unit address, which is its LIOBN."""

    kind: Literal["llan", "vscsi", "tpm", "vty"]
    reg: Size | None = None


class Pseries(Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="pseries"):
    """A pseries guest, with QEMU's property names and defaults. ``ddw`` to ``dma64_win_addr`` hold for every PHB that
    does not say otherwise.
    """

    ram: Size = Size(1 << 30)
    page_size: Size = Size(1 << 16)
    """The page size that backs guest RAM, as declared to the host; 16M is what hugetlbfs would give."""
    ddw: bool = True
    pgsz: list[Size] = msgspec.field(default_factory=lambda: list(PAGE_SIZES))
    """Page sizes that the guest's PHB offers for dynamic windows."""
    dma_win_addr: Size = Size(0)
    dma_win_size: Size = Size(1 << 30)
    dma64_win_addr: Size = Size(1 << 59)
    multitce: bool = True
    """Whether H_STUFF_TCE and H_PUT_TCE_INDIRECT are there."""
    kvm: bool = False
    """In-kernel acceleration: TCE tables live with the host, which answers their hypercalls itself."""
    phbs: list[Phb] = []
    """The host bridges; none given: one, with index 0."""
    vio: list[Vio] = []
    quirks: list[str] = []
    """Differences from QEMU to give up; ``qemu``: all that can be."""

    @property
    def bridges(self) -> list[Phb]:
        """The host bridges that there are."""
        return self.phbs or [Phb(index=0)]

    def place(self, device: Device) -> str:
        """Where ``device`` is: no other may be there.

        :raise ValueError: there is no such bus.
        """
        index = self.phb_on(device.bus).index
        return f"{device.addr} of PHB {index}" if index else device.addr

    def phb_on(self, bus: str) -> Phb:
        """The bridge whose bus is called so; the first for an empty name.

        :raise ValueError: when there is none.
        """
        for phb in self.bridges:
            if bus in ("", phb.bus):
                return phb
        raise ValueError(f"there is no bus {bus}, only {', '.join(phb.bus for phb in self.bridges)}")

    def end_of_default_window(self, phb: Phb) -> int:
        """The first bus address behind the default window of ``phb``."""
        start = self.dma_win_addr if phb.dma_win_addr is None else phb.dma_win_addr
        return start + (self.dma_win_size if phb.dma_win_size is None else phb.dma_win_size)

    def __post_init__(self) -> None:
        for what in ("index", "bus"):
            if len({getattr(phb, what) for phb in self.bridges}) < len(self.bridges):
                raise ValueError(f"phbs: two have the same {what}")
        _check_sizes(self.ram, self.page_size, self.pgsz)


def _check_sizes(ram: Size, page_size: Size, pgsz: Iterable[Size] = ()) -> None:
    for name, size in (("page_size", page_size), *(("pgsz", size) for size in pgsz)):
        if size < 4096 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two of at least 4K, not {int(size)}")
    if not ram or not is_aligned(ram, page_size):
        raise ValueError(f"ram must be a positive multiple of page_size ({int(page_size)}), not {int(ram)}")


class Bridge(Struct, forbid_unknown_fields=True, kw_only=True):
    """A bridge of a q35. Its bus is called by its ``id``."""

    driver: Literal[
        "pcie-root-port",
        "ioh3420",
        "x3130-upstream",
        "xio3130-downstream",
        "pcie-pci-bridge",
        "i82801b11-bridge",
        "pci-bridge",
        "pxb-pcie",
    ]
    id: Name
    bus: str = ROOT_BUS
    """The bus that it is on."""
    addr: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{1,2}(\.[0-7])?$")]
    props: dict[str, Prop] = {}
    """QEMU's properties of it."""

    def __post_init__(self) -> None:
        known = sorted({*BRIDGES[self.driver].PROPS} - {"id"})
        for name in self.props:
            if name not in known:
                raise ValueError(f"props: {self.driver} has no property {name}; known: {', '.join(known) or 'none'}")


class Q35(Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="q35"):
    """A PC with PCI Express."""

    ram: Size = Size(1 << 30)
    page_size: Size = Size(1 << 12)
    """The page size that backs guest RAM, as declared to the host."""
    iommu: dict[str, Prop | list[str]] | None = None
    """Properties of ``intel-iommu`` that differ from QEMU's defaults; None: no IOMMU."""
    default_bus_bypass_iommu: bool = False
    """Whether functions behind ``pcie.0`` reach memory past the IOMMU."""
    bridges: list[Bridge] = []

    def place(self, device: Device) -> str:
        """Where ``device`` is: no other may be there.

        :raise ValueError: there is no such bus.
        """
        self.check_bus(device.bus)
        return device.addr if device.bus in ("", ROOT_BUS) else f"{device.addr} of bus {device.bus}"

    def check_bus(self, bus: str) -> None:
        """:raise ValueError: no bus is called so."""
        names = [ROOT_BUS, *(bridge.id for bridge in self.bridges)]
        if bus not in ("", *names):
            raise ValueError(f"there is no bus {bus}, only {', '.join(names)}")

    def __post_init__(self) -> None:
        _check_sizes(self.ram, self.page_size)
        known = [ROOT_BUS]
        for bridge in self.bridges:
            if bridge.bus not in known:
                raise ValueError(f"bridges: {bridge.id}: there is no bus {bridge.bus} before it")
            if bridge.id in known:
                raise ValueError(f"bridges: two have the id {bridge.id}")
            known.append(bridge.id)
        if self.iommu is not None:
            _check_iommu(self.iommu)


def _check_iommu(given: Mapping[str, Prop | list[str]]) -> None:
    own = dataclasses.fields(VtdOptions)
    kinds = {field.name.replace("_", "-"): type(field.default) for field in own if field.name != "dma_drain"}
    options: dict[str, object] = {}
    for name, value in given.items():
        if name == "version" or (name in ("eim", "intremap") and value == "auto"):
            continue
        if name not in kinds:
            raise ValueError(f"iommu: there is no property {name}; known: {', '.join(sorted(kinds))}")
        if name == "quirks":
            value = [value] if isinstance(value, str) else value
        elif type(value) is not kinds[name]:
            raise ValueError(f"iommu: {name} expects {kinds[name].__name__}, got {type(value).__name__}")
        options[name.replace("-", "_")] = value
    try:
        VtdOptions(**options)  # type: ignore[arg-type]  # checked above
    except ConfigError as error:
        raise ValueError(f"iommu: {error.what}" + (f"; {error.hint}" if error.hint else "")) from error


Machine = Pseries | Q35
"""By ``type``, which is pseries where a file does not say."""


class Host(Struct, forbid_unknown_fields=True, kw_only=True):
    """The modelled host: what its kernel and IOMMU can do."""

    page_size: Size = Size(1 << 16)
    memlock: Limit = UNLIMITED
    """RLIMIT_MEMLOCK of the guest's process, in bytes."""
    hpa: Literal["contiguous", "scatter"] = "contiguous"
    pgsizes: list[Size] = msgspec.field(default_factory=lambda: list(PAGE_SIZES))
    """IOMMU page sizes that the host's windows may have."""
    max_windows: Annotated[int, Meta(ge=1, le=2)] = 2
    default_window: Size = Size(1 << 31)
    """Size of the host's 32-bit window in bytes."""
    containers: Annotated[list[ContainerKind], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["spapr-v2", "spapr-v1"]
    )
    """The kinds of VFIO container that it has."""
    on_stuck: Literal["kill", "warn", "stop-guest"] = "kill"
    """What becomes of a device that does not leave its DMA section by the deadline of a revoke."""


class Device(Struct, forbid_unknown_fields=True, kw_only=True):
    """One PCI device. ``group`` is the IOMMU group of an assigned one."""

    id: Name
    model: Name
    attach: Attach = "emulated"
    addr: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{1,2}(\.[0-7])?$")]
    """Slot and function on the PHB's bus, as QEMU writes them: ``02.0``."""
    bus: str = ""
    """The bus, as QEMU names it (``pci.0``, ``pcie.0``, the id of a bridge); empty: the machine's first."""
    group: Annotated[int, Meta(ge=0, le=65535)] | None = None
    dma: Literal["shared", "mapped", "message"] = "shared"
    """How a remote device reaches memory: all of it mapped, with cached translations; what the guest's IOMMU maps, as
    any vfio-user server gets it; or by a message for every access.
    """
    props: dict[str, Prop] = {}

    def __post_init__(self) -> None:
        if self.dma != "shared" and self.attach != "remote":
            raise ValueError(f"dma: {self.dma} is for remote devices; an assigned one walks the host's table itself")


class Fault(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault that the interposer injects into the messages between guestd and hostd; see :mod:`protocols.interpose`.

    One that is not ``armed`` waits for an ``arm`` step.
    """

    iova: Size | None = None
    seconds: Seconds = Seconds(0.1)

    def __post_init__(self) -> None:
        try:
            errno_number(self.errno)
        except ConfigError as error:
            raise ValueError(str(error)) from error


class Probe(Struct, forbid_unknown_fields=True, kw_only=True):
    """DMA by ``device`` through the pages that a replay maps, before and after their unmap."""

    device: Name
    window: Literal["default", "dynamic", "any"] = "any"
    limit: Count = 1 << 20
    """Probe at most this many pages."""


class At(Struct, forbid_unknown_fields=True, kw_only=True):
    """A signal to a process. ``at`` arms it for the moment when the next replay has made that many calls; absent:
    now.
    """

    role: Role | None = None
    device: Name | None = None
    at: Count | None = None

    def __post_init__(self) -> None:
        if (self.role is None) == (self.device is None):
            raise ValueError("give either role or device")


class Replay(Struct, forbid_unknown_fields=True, kw_only=True):
    """Replay a recorded QEMU trace: a shipped recording's name or a path relative to the scenario file."""

    trace: str
    probes: list[Probe] = []
    window: Literal["given", "refused"] = "given"
    """``refused``: the first dynamic window that the recording asks for must be refused, and the replay ends there."""


class LinuxDdw(Struct, forbid_unknown_fields=True, kw_only=True):
    """Linux's sequence for a dynamic window: query, create, map RAM 1:1."""

    device: Name
    expect: Literal["window", "refused"] = "window"
    page_size: Size | None = None
    """The page size that the window is expected to get."""


class Dma(Struct, forbid_unknown_fields=True, kw_only=True):
    """One DMA by ``device`` at bus address ``iova``: a ``write`` to memory or a ``read`` from it.

    ``gpa`` is the guest memory that it reaches when it is not refused: the CPU looks there whether it did.
    """

    device: Name
    iova: Size
    gpa: Size
    direction: Literal["write", "read"] = "write"
    expect: Literal["ok", "refused"] = "ok"


class MapPages(Struct, forbid_unknown_fields=True, kw_only=True):
    """Map ``pages`` pages from ``iova``, to ``gpa`` onwards: H_PUT_TCE for each, or on a PC entries in the domain of
    ``device``, and an invalidation.
    """

    device: str = ""
    iova: Size
    gpa: Size
    pages: Count = 1
    page_size: Size = Size(4096)
    perm: Literal["r", "w", "rw"] = "rw"
    liobn: Size = Size(0x80000000)
    expect: str = "H_SUCCESS"


class UnmapPages(Struct, forbid_unknown_fields=True, kw_only=True):
    """H_STUFF_TCE of zero over ``pages`` entries from ``iova``; on a PC, pages of ``page_size`` go from the domain of
    ``device``.
    """

    device: str = ""
    iova: Size
    pages: Count = 1
    page_size: Size = Size(4096)
    liobn: Size = Size(0x80000000)
    expect: str = "H_SUCCESS"


class Hcall(Struct, forbid_unknown_fields=True, kw_only=True):
    """Any hypercall by name or number."""

    name: str | int
    args: list[Size] = []
    expect: str = "H_SUCCESS"


class Rtas(Struct, forbid_unknown_fields=True, kw_only=True):
    """Any RTAS call by name (``ibm,query-pe-dma-window``) or token."""

    name: str | int
    args: list[Size] = []
    nret: Annotated[int, Meta(ge=1, le=16)] = 1
    expect: int = 0


class Expect(Struct, forbid_unknown_fields=True, kw_only=True):
    """A value that a process reports in its status: ``key`` (dots go into objects) must be ``equals``, or within
    ``at_least`` and ``at_most``.
    """

    role: Role
    key: str
    equals: Prop | None = None
    at_least: int | None = None
    at_most: int | None = None
    within: Seconds = Seconds(0)
    """Look again until it is so, for at most this long."""


class Wait(Struct, forbid_unknown_fields=True, kw_only=True):
    """Wait until ``role`` answers again (``ready``) or has ended (``gone``)."""

    role: Role
    until: Literal["ready", "gone"] = "ready"
    seconds: Seconds = Seconds(10)


class Explain(Struct, forbid_unknown_fields=True, kw_only=True):
    """Explain ``iova`` for ``device`` into the report; ``fails`` is the stage that must refuse it."""

    device: Name
    iova: Size
    fails: Literal["none", "stage-1", "stage-2", "any"] | None = None


class FindLost(Struct, forbid_unknown_fields=True, kw_only=True):
    """Compare the logs of all processes: how many messages were lost between them, and at which hop.

    ``stale_dma``: a DMA that passed at an IOVA which the lost message should have unmapped must be in the logs too.
    """

    expect: Annotated[int, Meta(ge=0)] = 0
    stale_dma: bool = False


class Arm(Struct, forbid_unknown_fields=True, kw_only=True):
    """Let the faults that were not ``armed`` act from now on; all begin to count anew."""


class Burst(Struct, forbid_unknown_fields=True, kw_only=True):
    """Writes without pause by ``device``, a dma-burst: 64 bytes to each of ``pages`` pages of 4 KiB from ``iova``, over
    and over, from ``start`` to ``stop``. Both of the others look whether it has gone on, and nothing was refused.
    """

    device: Name
    do: Literal["start", "goes-on", "stop"] = "start"
    iova: Size = Size(0)
    pages: Count = 1
    seconds: Seconds = Seconds(10)


class Migrate(Struct, forbid_unknown_fields=True, kw_only=True):
    """The guest moves to a guestd that is started for it, within ``seconds``, and runs there."""

    expect: Literal["completed", "failed"] = "completed"
    seconds: Seconds = Seconds(60)


class Vtd(Struct, forbid_unknown_fields=True, kw_only=True):
    """A PC's kernel switches translation on or off. ``queue``: how it invalidates, from the first start on."""

    do: Literal["start", "stop"] = "start"
    queue: bool = True


class Domain(Struct, forbid_unknown_fields=True, kw_only=True):
    """A PC's kernel puts ``device`` into its ``own`` domain, into ``none``, past the IOMMU (``pass-through``), or into
    that of another device.
    """

    device: Name
    to: Name = "own"


class Svm(Struct, forbid_unknown_fields=True, kw_only=True):
    """One of the ten tests of :mod:`vfio_model.guest_drivers.svm_program` with ``device``, an svm."""

    device: Name
    test: str

    def __post_init__(self) -> None:
        if self.test not in TESTS:
            raise ValueError(f"test must be one of {', '.join(TESTS)}, not {self.test}")


class Step(Struct, forbid_unknown_fields=True, kw_only=True):
    """One step: exactly one of these keys, besides ``only``: the kinds of container that it is for, all by default."""

    replay: Replay | UnsetType = UNSET
    linux_ddw: LinuxDdw | UnsetType = UNSET
    dma: Dma | UnsetType = UNSET
    map: MapPages | UnsetType = UNSET
    unmap: UnmapPages | UnsetType = UNSET
    hcall: Hcall | UnsetType = UNSET
    rtas: Rtas | UnsetType = UNSET
    kill: At | UnsetType = UNSET
    stop: At | UnsetType = UNSET
    cont: At | UnsetType = UNSET
    expect: Expect | UnsetType = UNSET
    wait: Wait | UnsetType = UNSET
    explain: Explain | UnsetType = UNSET
    find_lost: FindLost | UnsetType = UNSET
    arm: Arm | UnsetType = UNSET
    burst: Burst | UnsetType = UNSET
    migrate: Migrate | UnsetType = UNSET
    svm: Svm | UnsetType = UNSET
    vtd: Vtd | UnsetType = UNSET
    domain: Domain | UnsetType = UNSET
    only: list[ContainerKind] | UnsetType = UNSET

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if name != "only" and getattr(self, name) is not UNSET]
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            raise ValueError(f"a step has exactly one action, got {got}")

    @property
    def action(self) -> tuple[str, Struct]:
        """The action's name and parameters."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, Struct):
                return name, value
        raise AssertionError("a step always has one action")


PSERIES_STEPS = ("replay", "linux_ddw", "hcall", "rtas")
"""Actions of a guest that knows hypercalls."""
Q35_STEPS = ("vtd", "domain", "svm")
"""Actions of a guest that has a VT-d unit."""
DOMAINS = ("own", "none", "pass-through")
"""Where a ``domain`` step puts a device, besides another one's."""
_VTD_PAGES = (1 << 12, 1 << 21, 1 << 30)


class StartFails(Struct, forbid_unknown_fields=True, kw_only=True):
    """The run is expected to end at start: ``role`` refuses, and says something with ``message`` in it."""

    role: Role
    message: str
    only: list[ContainerKind] = msgspec.field(default_factory=lambda: list(CONTAINER_KINDS))
    """With these kinds of container; with another the run starts."""


class Scenario(Struct, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    name: Name
    description: str = ""
    machine: Machine = msgspec.field(default_factory=Pseries)
    host: Host = msgspec.field(default_factory=Host)
    devices: list[Device] = []
    container: ContainerChoice = "auto"
    """The kind of container that guestd asks for: ``auto`` is the first that the host has, in QEMU's order."""
    notifier: Literal["process", "inline"] = "process"
    restart: Literal["never", "on-failure"] = "never"
    interpose: list[Fault] = []
    timeout: Seconds = Seconds(120)
    start_fails: StartFails | None = None
    steps: list[Step] = []

    def __post_init__(self) -> None:
        self._refuse_doubles("id", [device.id for device in self.devices])
        self._refuse_doubles("addr", [self._place(index, device) for index, device in enumerate(self.devices)])
        known = {device.id for device in self.devices}
        if self.restart != "never" and any(isinstance(step.migrate, Migrate) for step in self.steps):
            raise ValueError("restart: a guest that has moved cannot be started afresh; not with a migrate step")
        for index, step in enumerate(self.steps):
            name, action = step.action
            if name in PSERIES_STEPS and not isinstance(self.machine, Pseries):
                raise ValueError(f"steps[{index}].{name}: only a pseries machine has that")
            if name in Q35_STEPS and not isinstance(self.machine, Q35):
                raise ValueError(f"steps[{index}].{name}: only a q35 machine has that")
            if isinstance(action, MapPages | UnmapPages):
                self._check_pages(f"steps[{index}].{name}", action)
            wanted = [probe.device for probe in action.probes] if isinstance(action, Replay) else []
            wanted.append(getattr(action, "device", None) or "")
            if isinstance(action, Domain) and action.to not in DOMAINS:
                wanted.append(action.to)
            for device in filter(None, wanted):
                if device not in known:
                    raise ValueError(f"steps[{index}].{name}: no device has the id {device}")

    def _place(self, index: int, device: Device) -> str:
        try:
            return self.machine.place(device)
        except ValueError as error:
            raise ValueError(f"devices[{index}].bus: {error}") from error

    def _check_pages(self, where: str, action: MapPages | UnmapPages) -> None:
        if isinstance(self.machine, Pseries) == bool(action.device):
            why = "a device is for a q35: here they share windows" if action.device else "a q35 needs a device"
            raise ValueError(f"{where}: {why}")
        if action.device and action.page_size not in _VTD_PAGES:
            raise ValueError(f"{where}: VT-d has pages of 4K, 2M and 1G")
        if action.device and (action.iova | getattr(action, "gpa", 0)) % action.page_size:
            raise ValueError(f"{where}: addresses are multiples of the page size")

    @classmethod
    def prepare(cls, document: object) -> None:
        """What a file leaves out: the type of the machine, and of a PC's host what is not as a pseries' is."""
        if not isinstance(document, dict):
            return
        machine = document.get("machine")
        if isinstance(machine, dict) and machine.setdefault("type", "pseries") == "q35":
            host = document.setdefault("host", {})
            if isinstance(host, dict):
                host.setdefault("page_size", 4096)
                host.setdefault("containers", ["type1v2", "type1"])

    @property
    def pseries(self) -> Pseries:
        """The machine, for steps of :data:`PSERIES_STEPS`."""
        assert isinstance(self.machine, Pseries), "looked at with the steps"
        return self.machine

    @property
    def kind(self) -> ContainerKind:
        """The kind of container that the assigned devices are in."""
        if self.container != "auto":
            return self.container
        return next(kind for kind in PREFERENCE if kind in self.host.containers)

    def use_container(self, kind: ContainerKind) -> None:
        """Both sides have containers of ``kind``, whatever the file says.

        Type 1 maps no less than a page of the host's, and a pseries guest maps 4 KiB: such a host gets 4 KiB pages.
        """
        self.container, self.host.containers = kind, [kind]
        if DRIVERS[kind] == "type1":
            self.host.page_size = Size(4096)

    @staticmethod
    def _refuse_doubles(what: str, values: list[str]) -> None:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"devices: two have the {what} {value}")
