"""The migrated state of a VT-d unit: section ``iommu-intel``, and how it is taken from a unit and put into one.

Registers go as they are; what was latched from them (root table, interrupt remapping table, invalidation queue) goes
beside. Caches do not migrate, and a queue that rests does so with its head on the descriptor that it rests on, so that
the target fetches it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.registers import VtdRegisters
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

INTEL_IOMMU = VMStateDescription(
    "iommu-intel",
    1,
    (
        Field("root", Type.U64),
        Field("intr_root", Type.U64),
        Field("iq", Type.U64),
        Field("intr_size"),
        Field("iq_head", Type.U16),
        Field("iq_tail", Type.U16),
        Field("iq_size", Type.U16),
        Field("next_frcd_reg", Type.U16),
        Field("csr", Type.U8, array=regs.SIZE),
        Field("iq_last_desc_type", Type.U8),
        Field("root_scalable", Type.BOOL),
        Field("dmar_enabled", Type.BOOL),
        Field("qi_enabled", Type.BOOL),
        Field("intr_enabled", Type.BOOL),
        Field("intr_eime", Type.BOOL),
    ),
)
_RECORDS = 1


def export_unit(unit: VtdRegisters) -> State:
    """The state of ``unit``."""
    queue, remapping = unit.queue, unit.remapping
    return {
        "root": unit.root,
        "intr_root": remapping.root,
        "iq": queue.base,
        "intr_size": remapping.size,
        "iq_head": queue.head,
        "iq_tail": queue.tail,
        "iq_size": queue.size,
        "next_frcd_reg": unit.faults.next,
        "csr": unit.file.export(),
        "iq_last_desc_type": queue.last_type,
        "root_scalable": unit.scalable,
        "dmar_enabled": unit.enabled,
        "qi_enabled": queue.enabled,
        "intr_enabled": remapping.enabled,
        "intr_eime": remapping.eime,
    }


def check(unit: VtdRegisters, state: Mapping[str, Any], *, where: str) -> None:
    """Whether ``unit`` can have this state.

    :raise VMStateError: it has other capabilities, or the state cannot be.
    """
    for name, offset in (("CAP", regs.CAP), ("ECAP", regs.ECAP)):
        theirs = int.from_bytes(state["csr"][offset : offset + 8], "little")
        if theirs != unit.file.get_quad(offset):
            raise VMStateError(f"{name} {theirs:#x} is not {unit.file.get_quad(offset):#x}", where=where)
    if state["qi_enabled"] and state["iq_head"] >= state["iq_size"]:
        raise VMStateError(f"head {state['iq_head']} of a queue of {state['iq_size']} descriptors", where=where)
    if state["next_frcd_reg"] >= _RECORDS:
        raise VMStateError(f"fault recording register {state['next_frcd_reg']}", where=where)


def import_unit(unit: VtdRegisters, state: Mapping[str, Any]) -> OSError | None:
    """Give ``unit`` a state that :func:`check` found good. Followers hear of every translation anew.

    Returns what a follower answered: the state is taken all the same, and the machine must not run.
    """
    queue, remapping = unit.queue, unit.remapping
    unit.reset()
    unit.file.load(state["csr"])
    queue.address_written()
    queue.base, queue.size, queue.enabled = state["iq"], state["iq_size"], state["qi_enabled"]
    queue.head, queue.tail, queue.last_type = state["iq_head"], state["iq_tail"], state["iq_last_desc_type"]
    remapping.root, remapping.size = state["intr_root"], state["intr_size"]
    remapping.enabled, remapping.eime = state["intr_enabled"], state["intr_eime"]
    unit.faults.next = state["next_frcd_reg"]
    unit.root, unit.scalable, unit.enabled = state["root"], state["root_scalable"], state["dmar_enabled"]
    if unit.root or unit.enabled:
        unit.translator.set_root(unit.root, unit.scalable)
        unit.translator.set_enabled(unit.enabled)
    error = unit.translator.flush()
    queue.resume()
    return error
