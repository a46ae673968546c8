"""svm: behaviour.

A device that works on a process's own addresses: it names the process by its PASID, translates by ATS, keeps what it
learns in a cache, and has missing pages brought in by page requests. A command writes a pattern to a buffer or reads
one and compares its CRC; its end is message 0, and its outcome stands in the status register.

Requests in user and in privileged mode have a cache each. Caches hear of invalidations by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from vfio_model.devices.svm import regs
from vfio_model.devices.svm.command import Command, Phase
from vfio_model.errors import VMStateError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.iommu_ops import Atc, PageRequest, PageResponse
from vfio_model.pci.translation_caps import PAGE_REQUEST_GROUPS, AtsSpec, PasidSpec, PriSpec
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription


class SvmDevice(PCIDevice):
    """The demonstration device for shared virtual memory (1234:0b11)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    REVISION = regs.REVISION
    MSI_VECTORS = 1
    BARS = (BarSpec(0, regs.BAR_SIZE),)
    EXPRESS = ExpressSpec(at=regs.EXPRESS_CAPABILITY)
    ATS = AtsSpec(page_aligned=True)
    PRI = PriSpec(max_requests=regs.MAX_PAGE_REQUESTS, pasid_required=True)
    PASID = PasidSpec(width=regs.PASID_WIDTH, exec=False, priv=True)
    VMSTATE = VMStateDescription(
        "svm",
        1,
        (
            PARENT,
            *(Field(each.name, Type.U64) for each in regs.REGISTERS if each.offset in regs.PARAMETERS),
            Field("pasid"),
            Field("status"),
            Field("prgi"),
            Field("command"),
            Field("command_crc", Type.U64),
            Field("command_address", Type.U64),
            Field("command_size", Type.U64),
            Field("command_privileged", Type.BOOL),
            Field("moved", Type.U64),
            Field("crc", Type.U8),
        ),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.prgi = 0
        self._pasid = regs.PASID_DISABLE
        """As it is set."""
        self._joined = regs.PASID_DISABLE
        """The one whose responses are heard and whose translations are cached; what is set, unless that is stale."""
        self._stale = False
        self._caches: dict[bool, Atc] = {}
        """By whether requests are privileged; empty while no PASID is served."""
        self._command: Command | None = None
        self._expected_crc = 0
        self._scheduled = False
        self._clear()

    def _clear(self) -> None:
        self._parameters = dict.fromkeys(regs.PARAMETERS, 0)
        self._status = regs.STATUS_OK

    # -- registers ---------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """The identification and the status; all ones elsewhere."""
        if size == 8 and offset == regs.COMMAND:
            return regs.IDENTIFICATION_VALUE
        if size == 8 and offset == regs.ADDRESS:
            return self._status
        return (1 << size * 8) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A register of that size; ignored where there is none."""
        if size == (8 if offset < regs.PASID else 4):
            if offset in regs.PARAMETERS:
                self._parameters[offset] = value
            elif offset == regs.COMMAND:
                self._start(value)
            elif offset == regs.PASID:
                self._set_pasid(value)
        return MemTxResult.OK

    # -- the address space -------------------------------------------------------------------------------------------

    def _set_pasid(self, pasid: int) -> None:
        """A command that is under way fails. The rest is done in between: it asks others."""
        if pasid > regs.PASID_DISABLE or pasid == self._pasid == regs.PASID_DISABLE:
            return
        if self._command is not None:
            self._command.end()
        self._pasid, self._stale = pasid, True
        self._schedule()

    def _renew(self) -> None:
        """Serve the PASID that is set, and no other. It may be another one, or a reset may have been, when this is
        over; then it is done again.
        """
        self._stale = False
        self._leave()
        pasid = self._pasid
        if pasid != regs.PASID_DISABLE:
            try:
                self._join(pasid)
            except OSError:
                self._leave()
                if self._pasid == pasid:
                    self._pasid = regs.PASID_DISABLE
        self._stale = self._stale or self._pasid != self._joined

    def _join(self, pasid: int) -> None:
        """:raise OSError: the guest has not enabled what it takes, or there is no IOMMU that has it."""
        self._joined = pasid
        self.pri_register_notifier(pasid, self._responded)
        for priv in (False, True):
            self._caches[priv] = self.open_atc(pasid, priv=priv)

    def _leave(self) -> None:
        if self._joined != regs.PASID_DISABLE:
            joined, self._joined = self._joined, regs.PASID_DISABLE
            with contextlib.suppress(OSError):  # an IOMMU that has gone has forgotten it already
                self.pri_unregister_notifier(joined)
        caches, self._caches = self._caches, {}
        for atc in caches.values():
            atc.close()

    # -- commands ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a command is under way."""
        return self._command is not None

    def cache(self, priv: bool) -> Atc | None:
        """The cache of requests with or without privilege, while there is one."""
        return self._caches.get(priv)

    @property
    def cached(self) -> int:
        """Translations in the caches."""
        return sum(atc.entries for atc in self._caches.values())

    def _start(self, command: int) -> None:
        if self._command is not None or command not in (regs.COMMAND_WRITE, regs.COMMAND_READ):
            return
        write, priv = command == regs.COMMAND_WRITE, bool(self._parameters[regs.OPTIONS] & regs.OPTION_PRIVILEGED)
        address, size = self._parameters[regs.ADDRESS], self._parameters[regs.SIZE]
        self._command = Command(self, self._pasid, address, size, write=write, priv=priv)
        self._expected_crc = self._parameters[regs.EXPECTED_CRC]
        self.host.trace("svm_command", pasid=self._pasid, address=address, size=size, write=write, priv=priv)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.run_when_idle(self._slice)

    def _slice(self) -> bool:
        command = self._command
        if self._stale:
            self._renew()
        elif command is not None and not command.over:
            command.advance()
        if command is not None and command is self._command and command.over:
            self._finish(command)
        self._scheduled = self._stale or (self._command is not None and not self._command.waits)
        return self._scheduled

    def _finish(self, command: Command) -> None:
        ok = command.phase is Phase.DONE
        if ok and not command.write:
            ok = command.crc == self._expected_crc
        self._status = regs.STATUS_OK if ok else regs.STATUS_ERROR
        self._command = None
        self.host.trace("svm_done", status=self._status, moved=command.moved, crc=command.crc, cached=self.cached)
        self.raise_irq()

    def pri_request_page(self, request: PageRequest) -> None:
        """See :class:`~vfio_model.pci.services.IommuServices`."""
        super().pri_request_page(request)
        self.host.trace(
            "svm_page_request", pasid=request.pasid, address=request.addr, prgi=request.prgi, last=request.last
        )

    def _responded(self, prgi: int, code: PageResponse) -> None:
        self.host.trace("svm_page_response", prgi=prgi, code=int(code))
        if code == PageResponse.RESPONSE_FAILURE and self.pri is not None:
            self.pri.failed()
        if self._command is not None and self._command.respond(prgi, code):
            self._schedule()
        elif self.pri is not None:
            self.pri.failed(unexpected_group=True)

    # -- life --------------------------------------------------------------------------------------------------------

    def reset_enter(self) -> None:
        """A command ends without a trace; nothing is cached."""
        self._command = None
        self._pasid = self._joined = regs.PASID_DISABLE
        super().reset_enter()
        self._caches = {}

    def reset_hold(self) -> None:
        """Registers go to their reset values."""
        super().reset_hold()
        self._clear()
        self.prgi = 0

    def unrealize(self) -> None:
        """The same when the device is taken out."""
        self._command = None

    # -- migration ---------------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, and the command that is under way: what it has moved, not what it has cached."""
        names = {each.name: self._parameters[each.offset] for each in regs.REGISTERS if each.offset in self._parameters}
        command = self._command
        return {
            **super().export_state(),
            **names,
            "pasid": self._pasid,
            "status": self._status,
            "prgi": self.prgi,
            "command": 0 if command is None else regs.COMMAND_WRITE if command.write else regs.COMMAND_READ,
            "command_crc": self._expected_crc,
            "command_address": 0 if command is None else command.address,
            "command_size": 0 if command is None else command.size,
            "command_privileged": command is not None and command.priv,
            "moved": 0 if command is None else command.moved,
            "crc": 0 if command is None else command.crc,
        }

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """Numbers that a device can have."""
        super().check_state(state, where=where)
        possible = state["pasid"] <= regs.PASID_DISABLE and state["prgi"] < PAGE_REQUEST_GROUPS
        possible &= state["command"] <= regs.COMMAND_READ and state["status"] <= regs.STATUS_ERROR
        if not possible or state["moved"] > state["command_size"]:
            raise VMStateError("a state that no svm device can be in", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same. Translations are asked for, and pages requested, anew: a response that was on its way is another
        group's.
        """
        for each in regs.REGISTERS:
            if each.offset in self._parameters:
                self._parameters[each.offset] = state[each.name]
        self._pasid, self._status = state["pasid"], state["status"]
        self._stale = self._pasid != regs.PASID_DISABLE
        self._expected_crc = state["command_crc"]
        self.prgi = (state["prgi"] + 1) % PAGE_REQUEST_GROUPS
        if state["command"]:
            self._command = Command(
                self,
                self._pasid,
                state["command_address"],
                state["command_size"],
                write=state["command"] == regs.COMMAND_WRITE,
                priv=state["command_privileged"],
            )
            self._command.go_on(state["moved"], state["crc"])
        super().import_state(state)
        self._schedule()
