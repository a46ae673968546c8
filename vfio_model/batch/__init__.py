"""Arrays: translation through tables, gather and scatter of RAM.

Every operation has a plain-Python reference and faster variants with the same results, tested against each other:
numpy, which costs 200 ms of import in every process and is imported at the first batch that needs it, and for the
hottest ones one optional C file. :mod:`vfio_model.batch.variant` chooses.
"""
