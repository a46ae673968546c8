"""All roles of a run in one process, for debugging: ``vfio-model run SCENARIO --inline``.

The parts are those of the processes: the guest machine of guestd, the host and the device regions of hostd, tables,
lanes, PE words, rings and translation caches as they lie in shared memory. What is left out is what is between
processes: sockets, descriptors, signals, starting and dying. A breakpoint anywhere stops everything, a stack trace
goes from the hypercall to the device's copy, and an exception of a device model is not a dead process but an
exception.

Whoever waits for whom is a call here, and one thread does all. So a revoke never finds a lane inside a section; one
that does is a bug, which is said at once instead of waited for.

This package alone may import hostd and guestd.
"""
