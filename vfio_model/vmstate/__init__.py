"""What migrates, and how it is framed (QEMU's ``docs/devel/migration/main.rst``, "VMState").

A migration stream is *frames* (:mod:`~vfio_model.vmstate.stream`): a header, RAM in passes
(:mod:`~vfio_model.vmstate.ram`), one section per object, an end. A section's bytes are *described*
(:mod:`~vfio_model.vmstate.fields`): fields with the version that brought them, arrays with their count, subsections
that are there only when needed.

Nothing here opens, waits or knows a machine; :mod:`vfio_model.machine.migration` says which objects make a machine.
"""
