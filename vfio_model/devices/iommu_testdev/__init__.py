"""iommu-testdev: QEMU's device for testing IOMMUs."""
