"""The control sockets of all roles (``<role>.ctl``): one request, one response, ZeroMQ, one frame each.

Whoever operates or tests the processes speaks here. Guest commands act on guestd only: they are what a CPU would do
(hypercall, RTAS call, memory, MMIO), the virtual clock, and questions (translate, explain, devices). A :class:`Batch`
carries many commands and stops at the first that fails. Guest-side outcomes (``ret`` of a hypercall, an RTAS status)
are values in the answer; :class:`Failed` means that the command itself could not be carried out.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from protocols.codec import Codec
from protocols.fields import U8, U32, U64, Message, Name, Pid, Text

MAX_BATCH = 4096
MAX_DATA = 512 << 10
"""Bytes of guest memory in one command."""
MAX_WORDS = 16

Words = Annotated[list[U64], Meta(max_length=MAX_WORDS)]
Cells = Annotated[list[U32], Meta(max_length=MAX_WORDS)]
Data = Annotated[bytes, Meta(max_length=MAX_DATA)]
Size = Annotated[int, Meta(ge=0, le=MAX_DATA)]
AccessSize = Annotated[int, Meta(ge=1, le=8)]
Port = Annotated[int, Meta(ge=0, le=0xFFFF)]
PortSize = Annotated[int, Meta(ge=1, le=4)]
Json = Annotated[bytes, Meta(max_length=1 << 20)]
"""A JSON document: what a person or a script reads, without a schema of its own on the wire."""


class Hello(Message, tag="hello", frozen=True):
    """Who are you?"""


class Status(Message, tag="status", frozen=True):
    """State and counters, as JSON."""


class Ping(Message, tag="ping", frozen=True):
    """Is the main loop alive?"""


class Quit(Message, tag="quit", frozen=True):
    """Close everything and exit with 0."""


class Interpose(Message, tag="interpose", frozen=True):
    """Replace the interposer's rules by those in ``rules`` (JSON, a list of :class:`protocols.interpose.Rule`)."""

    rules: Json


class Hcall(Message, tag="hcall", frozen=True):
    """A hypercall; answered by :class:`HcallDone`."""

    nr: U64
    args: Words


class Rtas(Message, tag="rtas", frozen=True):
    """An RTAS call with ``nret`` return cells, the status first; answered by :class:`RtasDone`."""

    token: U32
    args: Cells
    nret: Annotated[int, Meta(ge=1, le=MAX_WORDS)]


class ReadMemory(Message, tag="read-memory", frozen=True):
    """``size`` bytes of guest-physical memory; answered by :class:`Bytes`."""

    gpa: U64
    size: Size


class WriteMemory(Message, tag="write-memory", frozen=True):
    """Store ``data`` at ``gpa``."""

    gpa: U64
    data: Data


class MmioRead(Message, tag="mmio-read", frozen=True):
    """A load of ``size`` bytes; answered by :class:`Value`."""

    gpa: U64
    size: AccessSize


class MmioWrite(Message, tag="mmio-write", frozen=True):
    """A store of ``size`` bytes."""

    gpa: U64
    size: AccessSize
    value: U64


class PortRead(Message, tag="port-read", frozen=True):
    """A load from I/O port ``port``; answered by :class:`Value`."""

    port: Port
    size: PortSize


class PortWrite(Message, tag="port-write", frozen=True):
    """A store to one."""

    port: Port
    size: PortSize
    value: U64


class ConfigRead(Message, tag="config-read", frozen=True):
    """A configuration read of function ``address`` (``bus:dev.fn``); answered by :class:`Value`."""

    address: Name
    offset: U32
    size: AccessSize


class ConfigWrite(Message, tag="config-write", frozen=True):
    """A configuration write."""

    address: Name
    offset: U32
    size: AccessSize
    value: U32


class ClockStep(Message, tag="clock-step", frozen=True):
    """Advance the virtual clock by ``ns``, or to the next timer when 0; answered by the new time as :class:`Value`."""

    ns: U64


class Translate(Message, tag="translate", frozen=True):
    """What the vIOMMU window ``liobn`` makes of bus address ``ioba``; answered by :class:`Translation`."""

    liobn: U64
    ioba: U64


class Explain(Message, tag="explain", frozen=True):
    """How ``iova`` of function ``address`` is translated, step by step; answered by JSON."""

    address: Name
    iova: U64


class DeviceList(Message, tag="device-list", frozen=True):
    """The guest's devices, as JSON."""


class DeviceAdd(Message, tag="device-add", frozen=True):
    """Plug a device; ``config`` is JSON, of the shape that the guest's configuration has."""

    config: Json


class DeviceDel(Message, tag="device-del", frozen=True):
    """Unplug the device with that id."""

    id: Name


class Reset(Message, tag="reset", frozen=True):
    """Reset the machine (enter, hold, exit)."""


class Qmp(Message, tag="qmp", frozen=True):
    """A command of QMP's table (:mod:`protocols.monitor.commands`) with its arguments, a JSON object; answered by what
    it returns as JSON. A refusal's kind is the QMP error class.
    """

    execute: Name
    arguments: Json = b"{}"


Command = (
    Hello
    | Status
    | Ping
    | Quit
    | Interpose
    | Hcall
    | Rtas
    | ReadMemory
    | WriteMemory
    | MmioRead
    | MmioWrite
    | PortRead
    | PortWrite
    | ConfigRead
    | ConfigWrite
    | ClockStep
    | Translate
    | Explain
    | DeviceList
    | DeviceAdd
    | DeviceDel
    | Reset
    | Qmp
)


class Batch(Message, tag="batch", frozen=True):
    """``commands`` in order, up to the first :class:`Failed`; answered by :class:`BatchDone`."""

    commands: Annotated[list[Command], Meta(max_length=MAX_BATCH)]


class Welcome(Message, tag="welcome", frozen=True):
    """Answer to :class:`Hello`: the role, its process and the version of the program."""

    role: Name
    pid: Pid
    version: Name


class Ok(Message, tag="ok", frozen=True):
    """Done; there is nothing to say."""


class HcallDone(Message, tag="hcall-done", frozen=True):
    """``ret`` is the signed return code (H_SUCCESS 0), ``outs`` what registers r4 and up hold."""

    ret: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
    outs: Words


class RtasDone(Message, tag="rtas-done", frozen=True):
    """The return cells, the status (32 bits, unsigned) first."""

    rets: Cells


class Bytes(Message, tag="bytes", frozen=True):
    """Guest memory; ``result`` is the MemTxResult (0: OK)."""

    result: U8
    data: Data


class Value(Message, tag="value", frozen=True):
    """A number."""

    value: U64


class Translation(Message, tag="translation", frozen=True):
    """An IOMMUTLBEntry: page address, address mask, permission bits (1 read, 2 write; 0: fault)."""

    translated: U64
    mask: U64
    perm: U8


class Document(Message, tag="document", frozen=True):
    """JSON."""

    json: Json


class Failed(Message, tag="failed", frozen=True):
    """The command could not be carried out; ``kind`` is the error's class name."""

    kind: Name
    reason: Text


Answer = Welcome | Ok | HcallDone | RtasDone | Bytes | Value | Translation | Document | Failed


class BatchDone(Message, tag="batch-done", frozen=True):
    """One answer for each command that was tried; shorter than the batch when the last one failed.

    ``elapsed_ns`` has, for each, the time the daemon spent on it: what a benchmark reads.
    """

    answers: Annotated[list[Answer], Meta(max_length=MAX_BATCH)]
    elapsed_ns: Annotated[list[U64], Meta(max_length=MAX_BATCH)] = []


class Request(Message, tag="request", frozen=True):
    """``cause`` is the cause id of everything that follows from it; 0: the role chooses one."""

    seq: U64
    cause: U64
    command: Command | Batch


class Response(Message, tag="response", frozen=True):
    """Answer to request ``seq``."""

    seq: U64
    answer: Answer | BatchDone


class Refused(Message, tag="refused", frozen=True):
    """Sent once to a peer that broke the protocol; whatever it sends afterwards is ignored."""

    reason: Text


ToRole = Request
FromRole = Response | Refused

REQUESTS: Codec[ToRole] = Codec(ToRole, "control request", max_bytes=1 << 20)
RESPONSES: Codec[FromRole] = Codec(FromRole, "control response", max_bytes=1 << 20)
