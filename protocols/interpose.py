"""The interposer's rules: which message is dropped, lost, delayed, doubled, failed, or kills somebody.

One object stands on the port, the notifier or vfio-user. It does no I/O: :meth:`Interposer.decide` looks at a message
and says what whoever carries it shall do, in order; a message that no rule concerns is answered by ``[Deliver()]``. A
rule counts the messages that match it and acts on the ``nth`` and then on every ``every``-th, ``count`` times.

- ``drop``: the message is not delivered and the sender is told that it succeeded (the lost unmap);
- ``lose``: it is not delivered and nobody answers (the sender's deadline);
- ``delay``, ``duplicate``: it is delivered later, or twice; only the first answer is passed back;
- ``fail``: it is not delivered and the sender gets ``errno``;
- ``kill``: the process ``role`` is killed first; then it is delivered to whoever is left.
"""

from __future__ import annotations

import errno as errno_module
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from protocols.fields import Message
from protocols.port.messages import Hcall, Ioctl
from protocols.vfio_user.messages import Command
from vfio_model.errors import ConfigError
from vfio_model.uapi import vfio
from vfio_model.uapi.hvcall import HCall, hcall_name

_HCALL = "hcall"
ActionName = Literal["drop", "lose", "delay", "duplicate", "fail", "kill"]
MAX_RULES = 256


class Rule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault. Empty strings match everything; see the module's head for the actions."""

    action: ActionName
    kind: str = ""
    """The message's kind: its tag (``ioctl``, ``invalidate``, ``flush``, …), or ``vfio-user``."""
    ioctl: str = ""
    """Of an ioctl its name, with or without ``VFIO_`` and ``IOMMU_`` before it (``UNMAP_DMA``,
    ``SPAPR_TCE_CREATE``)."""
    command: str = ""
    """Of a vfio-user message its command (``REGION_READ``, ``DMA_UNMAP``, …)."""
    iova: Annotated[int, Meta(ge=0)] | None = None
    """Of a MAP_DMA or UNMAP_DMA: only when one of its structures covers this address."""
    nth: Annotated[int, Meta(ge=1)] = 1
    """The first matching message to act on; the first of all is 1."""
    every: Annotated[int, Meta(ge=1)] = 1
    """After the ``nth``, act on every ``every``-th."""
    count: Annotated[int, Meta(ge=0)] = 1
    """How often to act; 0: without end."""
    errno: str = "EIO"
    seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.1
    role: str = "hostd"
    """Whom ``kill`` kills: a role, or a device's name."""
    armed: bool = True
    """False: neither counts nor acts before :meth:`Interposer.arm`."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Pass the message on, ``delay_ns`` from now."""

    delay_ns: int = 0


@dataclass(frozen=True, slots=True)
class AnswerSuccess:
    """Tell the sender that it succeeded."""


@dataclass(frozen=True, slots=True)
class AnswerError:
    """Tell the sender that it failed with ``errno`` (positive)."""

    errno: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL for ``role``."""

    role: str


@dataclass(frozen=True, slots=True)
class AnswerTooHard:
    """Tell the sender of a hypercall to do it without the host's help: its ioctls are what a rule is about."""


Action = Deliver | AnswerSuccess | AnswerError | AnswerTooHard | Kill
_LARGEST_PAGE_SHIFT = 24


@dataclass(frozen=True, slots=True)
class Seen:
    """What rules look at. ``names`` are those of the ioctl or command; ``ranges`` the IOVAs (first, inclusive last) of
    a MAP_DMA or UNMAP_DMA."""

    kind: str
    names: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def covers(self, iova: int) -> bool:
        """Whether one of :attr:`ranges` contains ``iova``."""
        return any(first <= iova <= last for first, last in self.ranges)


_PREFIXES = ("VFIO_IOMMU_SPAPR_TCE_", "VFIO_IOMMU_SPAPR_", "VFIO_IOMMU_", "VFIO_GROUP_", "VFIO_DEVICE_", "VFIO_", "")


def seen(message: Message) -> Seen:
    """What rules see of a ZeroMQ or SEQPACKET message of ours."""
    tag = str(message.__struct_config__.tag)
    if isinstance(message, Hcall):
        return _seen_hcall(tag, message)
    if not isinstance(message, Ioctl):
        return Seen(tag)
    full = {vfio.ioctl_name(message.cmd, spapr=True), vfio.ioctl_name(message.cmd, spapr=False)}
    names = tuple(sorted({name.removeprefix(prefix) for name in full for prefix in _PREFIXES}))
    return Seen(tag, names, _ranges(message))


_IOVA_AND_SIZE = {
    vfio.Ioctl.VFIO_IOMMU_MAP_DMA: struct.Struct("=16xQQ"),
    vfio.Ioctl.VFIO_IOMMU_UNMAP_DMA: struct.Struct("=8xQQ"),
}
"""Where ``iova`` and ``size`` are in ``struct vfio_iommu_type1_dma_map`` and ``…_dma_unmap``."""


def _seen_hcall(tag: str, message: Hcall) -> Seen:
    """Its names are the opcode's and those of the ioctls that its process would send in its place; its pages are taken
    for the largest ones.
    """
    nr, (_, ioba, value, npages) = message.nr, message.args
    instead = {"MAP", "UNMAP"} if nr == HCall.H_PUT_TCE_INDIRECT else {"MAP" if value & 3 else "UNMAP"}
    names = tuple(f"{prefix}{one}_DMA" for one in instead for prefix in ("", "IOMMU_", "VFIO_IOMMU_"))
    first = ioba & -(1 << _LARGEST_PAGE_SHIFT)
    pages = 1 if nr == HCall.H_PUT_TCE else max(npages, 1)
    return Seen(tag, (hcall_name(nr), *names), ((first, ioba + (pages << _LARGEST_PAGE_SHIFT) - 1),))


def _ranges(message: Ioctl) -> tuple[tuple[int, int], ...]:
    form = next((form for number, form in _IOVA_AND_SIZE.items() if number == message.cmd), None)
    if form is None or len(message.arg) != form.size * message.count:
        return ()
    return tuple((iova, iova + size - 1) for iova, size in form.iter_unpack(message.arg))


def seen_command(command: int) -> Seen:
    """What rules see of a vfio-user command."""
    try:
        return Seen("vfio-user", (Command(command).name,))
    except ValueError:
        return Seen("vfio-user", (f"{command:#x}",))


def errno_number(name: str) -> int:
    """The number of ``EIO``, ``ENOMEM``, …

    :raise ConfigError: when there is no such errno.
    """
    number = getattr(errno_module, name, None)
    if not isinstance(number, int) or not name.startswith("E"):
        raise ConfigError(f"no errno is called {name!r}", hint="for example EIO, ENOMEM, EBUSY")
    return number


class _Armed:
    """A rule and how far it has counted."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.matched, self.acted = rule, 0, 0
        self.armed = rule.armed
        self.errno = errno_number(rule.errno)

    def fires(self, message: Seen) -> bool:
        """Count ``message`` if it matches; whether the rule acts on it."""
        rule = self.rule
        if not self.armed:
            return False
        if (rule.kind and rule.kind != message.kind) or not self._named(message):
            return False
        self.matched += 1
        if (rule.count and self.acted >= rule.count) or self.matched < rule.nth:
            return False
        if (self.matched - rule.nth) % rule.every:
            return False
        self.acted += 1
        return True

    def awaits(self, message: Seen) -> bool:
        """Whether the rule is about ioctls, and may have to act on one that hypercall ``message`` stands for."""
        rule = self.rule
        if (
            not self.armed
            or rule.kind not in ("", "ioctl")
            or rule.command
            or (rule.count and self.acted >= rule.count)
        ):
            return False
        covered = rule.iova is None or message.covers(rule.iova)
        return covered and (not rule.ioctl or rule.ioctl in message.names)

    def _named(self, message: Seen) -> bool:
        rule = self.rule
        if rule.iova is not None and not message.covers(rule.iova):
            return False
        if rule.ioctl and (message.kind != "ioctl" or rule.ioctl not in message.names):
            return False
        return not rule.command or (message.kind == "vfio-user" and rule.command in message.names)

    def apply(self, actions: list[Action]) -> list[Action]:
        """``actions`` as this rule changes them."""
        delivered = [action for action in actions if isinstance(action, Deliver)]
        others: list[Action] = [action for action in actions if not isinstance(action, Deliver)]
        match self.rule.action:
            case "lose":
                return others
            case "drop":
                return [*others, AnswerSuccess()] if delivered else actions
            case "fail":
                return [*others, AnswerError(self.errno)] if delivered else actions
            case "kill":
                return [Kill(self.rule.role), *actions]
            case "duplicate":
                return actions + delivered
            case "delay":
                extra = int(self.rule.seconds * 1e9)
                return others + [Deliver(action.delay_ns + extra) for action in delivered]


class Interposer:
    """Rules and their counters. Replacing :attr:`rules` starts counting anew."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = rules

    @property
    def rules(self) -> list[Rule]:
        """The rules in force."""
        return [armed.rule for armed in self._armed]

    @rules.setter
    def rules(self, rules: Sequence[Rule]) -> None:
        self._armed = [_Armed(rule) for rule in rules]

    @property
    def idle(self) -> bool:
        """Whether there is no rule: the carrier need not ask."""
        return not self._armed

    def decide(self, message: Seen) -> list[Action]:
        """What to do with ``message``, in order. All rules that fire apply, in their order; empty: it is lost.

        A hypercall that the host would answer in place of ioctls that a rule is about is never passed on: so that a
        rule meets the same ioctls with in-kernel acceleration as without.
        """
        actions: list[Action] = [Deliver()]
        if message.kind == _HCALL and any(armed.awaits(message) for armed in self._armed):
            return [AnswerTooHard()]
        for armed in self._armed:
            if armed.fires(message):
                actions = armed.apply(actions)
        return actions

    def arm(self) -> None:
        """Let the rules that are not ``armed`` take part from now on."""
        for armed in self._armed:
            armed.armed = True

    def counters(self) -> list[dict[str, int]]:
        """For a status: how many messages each rule has matched and acted on."""
        return [{"matched": armed.matched, "acted": armed.acted} for armed in self._armed]


_RULES: msgspec.json.Decoder[list[Rule]] = msgspec.json.Decoder(Annotated[list[Rule], Meta(max_length=MAX_RULES)])


def decode_rules(document: bytes) -> list[Rule]:
    """Rules from JSON, as the control message carries them.

    :raise ConfigError: when it is not a list of rules, or an errno does not exist.
    """
    try:
        rules = _RULES.decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(str(error), where="interposer rules") from error
    for rule in rules:
        errno_number(rule.errno)
    return rules
