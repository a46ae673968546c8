"""Bytes of any kind for the vfio-user code: `make fuzz`, and parts of it by hypothesis in `make test`."""
