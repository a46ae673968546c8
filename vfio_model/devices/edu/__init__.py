"""edu: QEMU's teaching device."""
