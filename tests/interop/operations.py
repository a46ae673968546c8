"""What programs are made of. An operation is data, means the same on every peer, and prints as it can be typed."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.iommu.spapr.regs import HCall


@dataclass(frozen=True)
class Call:
    """A hypercall with its arguments in registers."""

    nr: int
    args: tuple[int, ...]

    def __repr__(self) -> str:
        name = HCall(self.nr).name if self.nr in set(HCall) else f"{self.nr:#x}"
        return f"{name}({', '.join(f'{arg:#x}' for arg in self.args)})"


@dataclass(frozen=True)
class Indirect:
    """H_PUT_TCE_INDIRECT of ``npages`` from a list that holds ``tces``; the list lies ``skew`` bytes beyond a page."""

    liobn: int
    ioba: int
    tces: tuple[int, ...]
    npages: int
    skew: int = 0

    def __repr__(self) -> str:
        few = ", ".join(f"{tce:#x}" for tce in self.tces[:3]) + (", ..." if len(self.tces) > 3 else "")
        return f"INDIRECT({self.liobn:#x}, {self.ioba:#x}, [{few}] of {len(self.tces)}, {self.npages}, +{self.skew})"


@dataclass(frozen=True)
class Rtas:
    """An RTAS call by H_RTAS; ``above`` are the topmost four bits of the address that it is given. ``nargs``: how many
    arguments it is told of, if not as many as there are; its return cells begin behind those.
    """

    token: int
    args: tuple[int, ...]
    nret: int
    above: int = 0
    nargs: int | None = None

    @property
    def told(self) -> int:
        """How many arguments the call is told of."""
        return len(self.args) if self.nargs is None else self.nargs

    def __repr__(self) -> str:
        told = "" if self.nargs is None else f", told of {self.nargs}"
        return f"RTAS({self.token:#x}, [{', '.join(f'{arg:#x}' for arg in self.args)}], {self.nret}{told})"


@dataclass(frozen=True)
class Edu:
    """A DMA of the edu of ``phb``: ``length`` bytes between its buffer at ``offset`` and ``iova``; with ``interrupt``
    when it is done.
    """

    phb: int
    to_ram: bool
    iova: int
    length: int
    offset: int
    interrupt: bool = False

    def __repr__(self) -> str:
        way = "->" if self.to_ram else "<-"
        return f"edu{self.phb}: buffer[{self.offset:#x}:+{self.length:#x}] {way} {self.iova:#x}"


@dataclass(frozen=True)
class DeviceTest:
    """A DMA of the iommu-testdev of ``phb``: it writes at ``iova`` and looks at ``gpa``. ``armed``: whether it is."""

    phb: int
    iova: int
    length: int
    gpa: int
    attributes: int = 0
    armed: bool = True

    def __repr__(self) -> str:
        return f"testdev{self.phb}: {self.iova:#x} +{self.length:#x}, seen at {self.gpa:#x}"


@dataclass(frozen=True)
class Register:
    """A load (``value`` None) or store of ``size`` bytes in BAR 0 of ``device`` (edu, testdev) of ``phb``."""

    phb: int
    device: str
    offset: int
    size: int
    value: int | None = None

    def __repr__(self) -> str:
        what = "" if self.value is None else f" = {self.value:#x}"
        return f"{self.device}{self.phb}.bar0[{self.offset:#x}].{self.size}{what}"


@dataclass(frozen=True)
class Fill:
    """The CPU stores ``data``, repeated ``times``, at ``gpa``."""

    gpa: int
    data: bytes
    times: int = 1

    def __repr__(self) -> str:
        return f"ram[{self.gpa:#x}] = {self.data[:8].hex()}... x {self.times}"


@dataclass(frozen=True)
class QtestRtas:
    """An RTAS call by name, as qtest's ``rtas`` makes it; with ``below``, its return cells begin so far below the
    end of RAM, in bytes.
    """

    name: str
    args: tuple[int, ...]
    nret: int
    below: int = 0

    def __repr__(self) -> str:
        where = f" {self.below} below the end of RAM" if self.below else ""
        return f"rtas {self.name} [{', '.join(f'{arg:#x}' for arg in self.args)}], {self.nret}{where}"


@dataclass(frozen=True)
class Switched:
    """While the command register of the edu of ``phb`` is ``command``: loads, stores, and a DMA from ``iova``."""

    phb: int
    command: int
    iova: int

    def __repr__(self) -> str:
        return f"edu{self.phb}: registers and DMA from {self.iova:#x} with command {self.command:#x}"


@dataclass(frozen=True)
class Reset:
    """A system reset; the firmware's configuration of the bus is repeated after it."""

    def __repr__(self) -> str:
        return "system_reset"


Operation = Call | Indirect | Rtas | Edu | DeviceTest | Register | Fill | QtestRtas | Switched | Reset
Program = tuple[Operation, ...]
