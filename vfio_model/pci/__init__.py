"""PCI: configuration space, BARs, functions, buses."""
