"""What network devices have in common: checksums of what Ethernet frames carry."""
