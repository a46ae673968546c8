"""The steps of a scenario: a mapping with exactly one key, the action, for each."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from deploy.quantity import Seconds, Size
from deploy.scenario_machine import Name, Prop
from vfio_model.guest_drivers.svm_program import TESTS
from vfio_model.vfio.kinds import ContainerKind

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Role = Literal["hostd", "notifier", "guestd", "interposer"]


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
