"""The domain: a model of device passthrough as pure Python.

No sockets, files, clocks or threads live here. RAM and tables are buffers that the caller gives; time is a number that
the caller advances. Imports go down only, see ``docs/architecture.md``.
"""
