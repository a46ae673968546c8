"""How the host translates a device's bus address, as the control socket gives it.

The walk over the live tables is :func:`vfio_model.host.explain.explain`; here its steps become JSON.
"""

from __future__ import annotations

from vfio_model.host.explain import Step
from vfio_model.host.group import HostDevice
from vfio_model.host.host import Host
from vfio_model.host.layout import TCE_READ, TCE_WRITE
from vfio_model.host.walk import find_window, page_shift_at


def explain(host: Host, name: str, iova: int) -> dict[str, object]:
    """The steps for device ``name`` at ``iova``: ``{"steps": [{"what", "value", "ok"}], "result": hpa or null, "perm",
    "page_size": of the host's page or window in bytes, or 0}``.

    :raise KeyError: when the host has no such device.
    """
    device = {key: device for group in host.groups.values() for key, device in group.devices.items()}[name]
    steps = host.explain(device, iova)
    end = steps[-1]
    reached = end.what == "memory" and end.verdict == "ok"
    granted = next((step.value for step in steps if step.what == "permission"), 0) if reached else 0
    perm = ("r" if granted & TCE_READ else "-") + ("w" if granted & TCE_WRITE else "-")
    return {
        "steps": [{"what": step.what, "value": _words(step), "ok": step.verdict == "ok"} for step in steps],
        "result": end.value if reached else None,
        "perm": perm if reached else "",
        "page_size": _page_size(device, iova),
    }


def _words(step: Step) -> str:
    return f"{step.value:#x} at {step.where}: {step.meaning}"


def _page_size(device: HostDevice, iova: int) -> int:
    container = device.group.container
    if container is None or container.driver is None:
        return 0
    domain = container.driver.domain_words
    window = find_window(device.pe.words, domain, iova, {})
    return 0 if window is None else 1 << page_shift_at(domain, window, iova)
