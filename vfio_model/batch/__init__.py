"""Arrays: translation through tables, gather and scatter of RAM.

Every operation has a plain-Python reference and a numpy variant with the same results, tested against each other.
numpy costs 200 ms of import in every process, so it is imported at the first batch.
"""
