"""Devices of other processes that rest while the machine stands: their migration states, as a stop or a migration moves
them.

::

    stop, migrate:  RUNNING ─► RUNNING_P2P (all devices) ─► STOP          cont:  STOP ─► RUNNING_P2P (all) ─► RUNNING
    migrate:       PRE_COPY ─► PRE_COPY_P2P (all)        ─► STOP_COPY

Emulated devices need none of this: they rest when virtual time does.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"); QEMU's trace event
``vfio_vmstate_change``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from vfio_model.errors import PeerLost, VMStateError
from vfio_model.trace import Trace
from vfio_model.uapi.migration import DeviceState
from vfio_model.vfio.migration import MigratingDevice, migrating, set_state, set_states
from vfio_model.vfio.pci import VFIOPCIDevice

_STOPPING = (DeviceState.RUNNING_P2P, DeviceState.STOP)
_STARTING = (DeviceState.RUNNING_P2P, DeviceState.RUNNING)


class DeviceStates:
    """Of what ``devices()`` returns at the moment."""

    def __init__(self, devices: Callable[[], list[VFIOPCIDevice]], trace: Trace) -> None:
        self._devices, self._trace = devices, trace
        self._stopped = False

    def rest(self) -> None:
        """No device that has migration states does anything by itself from the return on; the others go on. Harmless
        when they rest.
        """
        if not self._stopped:
            self._stopped = True
            self._try(_STOPPING)

    @property
    def resting(self) -> bool:
        """Whether they were told to."""
        return self._stopped

    def stop(self, saving: Collection[MigratingDevice] = ()) -> None:
        """As :meth:`rest`, for all devices; those of ``saving`` go on from PRE_COPY.

        :raise OSError: one refuses. :raise PeerLost: one is gone. :raise VMStateError: one has no such states.
        """
        states = _STOPPING[1:] if self._stopped else _STOPPING
        self._stopped = True
        set_states([migrating(device) for device in self._devices()], *states, saving=saving)

    def hold(self) -> None:
        """They are stopped by loading their states: :meth:`run` has something to do."""
        self._stopped = True

    def joined(self, device: VFIOPCIDevice) -> None:
        """``device`` came back, running: it rests when the others do."""
        if self._stopped:
            self._try(_STOPPING, [device])

    def run(self) -> None:
        """Undo the above; a device that is gone stays so. Harmless when they run."""
        if self._stopped:
            self._stopped = False
            self._try(_STARTING)

    def _try(self, states: tuple[DeviceState, ...], devices: list[VFIOPCIDevice] | None = None) -> None:
        for state in states:
            for device in self._devices() if devices is None else devices:
                try:
                    set_state(migrating(device), state)
                except (OSError, PeerLost, VMStateError) as error:
                    self._trace("vfio_device_refused", name=device.name, what=state.name, reason=str(error))
