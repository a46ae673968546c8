"""The same qtest programs on stock QEMU's ``intel-iommu`` and on this project's: every answer must be equal."""
