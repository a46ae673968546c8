"""The userspace side of VFIO: containers, windows, listeners and assigned devices of a guest machine.

It talks to a host through one seam, :mod:`vfio_model.vfio.ioctl`, and to a device through another,
:mod:`vfio_model.vfio.region`.
"""
