"""What stands behind a device: a disk's bytes, a network's other end. In memory, unless a host has more."""
