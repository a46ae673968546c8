"""How the host translates a device's bus address, read from the live tables as the device would read them."""

from __future__ import annotations

from vfio_model.host.group import HostDevice
from vfio_model.host.host import Host
from vfio_model.host.layout import PE_BUS_MASTER, PE_STATE, PE_WINDOW0, PE_WINDOWS, TCE_PERM, TCE_READ, TCE_WRITE
from vfio_model.host.walk import Window, decode

Step = dict[str, object]


class _Walk:
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def see(self, what: str, value: str = "", ok: bool = True) -> bool:
        """Note a step; returns ``ok``."""
        self.steps.append({"what": what, "value": value, "ok": ok})
        return ok

    def end(self, result: int | None = None, perm: str = "") -> dict[str, object]:
        return {"steps": self.steps, "result": result, "perm": perm}


def explain(host: Host, name: str, iova: int) -> dict[str, object]:
    """The steps for device ``name`` at ``iova``: ``{"steps": [{"what", "value", "ok"}], "result": hpa or null,
    "perm"}``.

    :raise KeyError: when the host has no such device.
    """
    device = {key: device for group in host.groups.values() for key, device in group.devices.items()}[name]
    walk = _Walk()
    if not _reaches_tables(walk, device):
        return walk.end()
    container = device.group.container
    if container is None or container.driver is None:
        walk.see("container", f"group {device.group.id} is in no container", False)
        return walk.end()
    domain = container.driver.domain_words
    window = _window(walk, device, domain, iova)
    tce = 0 if window is None else _tce(walk, domain, window, iova)
    if window is None or not tce:
        return walk.end()
    page = 1 << window.page_shift
    hpa = (tce & -page & ~TCE_PERM) + (iova & page - 1)
    perm = ("r" if tce & TCE_READ else "-") + ("w" if tce & TCE_WRITE else "-")
    _segment(walk, host, hpa)
    return walk.end(hpa, perm)


def _reaches_tables(walk: _Walk, device: HostDevice) -> bool:
    words = device.pe.words
    opened = walk.see(f"device {device.name}", "open" if device.open_count else "not open", bool(device.open_count))
    normal = walk.see("PE state", "frozen" if words[PE_STATE] else "normal", not words[PE_STATE])
    master = walk.see("PE bus master", "on" if words[PE_BUS_MASTER] else "off", bool(words[PE_BUS_MASTER]))
    return opened and normal and master


def _window(walk: _Walk, device: HostDevice, domain: memoryview, iova: int) -> Window | None:
    for slot in range(PE_WINDOWS):
        record = device.pe.words[PE_WINDOW0 + slot]
        if not record:
            walk.see(f"window slot {slot}", "empty")
            continue
        window = decode(domain, PE_WINDOW0 + slot, record)
        inside = window.start <= iova <= window.last
        where = f"{window.start:#x}..{window.last:#x}, {1 << window.page_shift:#x}-byte pages, levels {window.levels}"
        walk.see(f"window slot {slot}", f"{where}: {'holds' if inside else 'does not hold'} {iova:#x}")
        if inside:
            return window
    walk.see("window", f"none holds {iova:#x}", False)
    return None


def _tce(walk: _Walk, domain: memoryview, window: Window, iova: int) -> int:
    index = (iova - window.start) >> window.page_shift
    table, shift = window.table, window.level_shift
    for level in range(window.levels - 1, -1, -1):
        at = index >> shift * level
        place = table + (at & (1 << shift) - 1 if window.levels > 1 else at)
        entry: int = domain[place]
        what = f"TCE {index:#x}" if level == 0 else f"level {level} entry {at & (1 << shift) - 1:#x}"
        good = bool(entry & TCE_PERM)
        text = f"{entry:#018x} at byte {place * 8:#x} of the domain"
        if not walk.see(what, text if good else f"{text}: not mapped", good):
            return 0
        if level == 0:
            return entry
        table = (entry & ~TCE_PERM) >> 3
    return 0


def _segment(walk: _Walk, host: Host, hpa: int) -> None:
    for segment in host.segments:
        offset = segment.hpa.to_offset(hpa)
        if 0 <= offset < segment.length:
            walk.see("host memory", f"{hpa:#x} is segment {segment.id}, byte {offset:#x}")
            return
    walk.see("host memory", f"{hpa:#x} belongs to no segment", False)
