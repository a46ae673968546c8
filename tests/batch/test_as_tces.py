"""Page addresses with permissions become what a TCE table holds."""

from __future__ import annotations

import numpy as np
import pytest

from vfio_model.batch.tces import as_tces


@pytest.mark.parametrize("addresses", [[0x1000, 0x2000, 0], np.array([0x1000, 0x2000, 0], dtype=np.uint64)])
def test_permissions_for_all_or_for_each(addresses: object) -> None:
    assert list(as_tces(addresses, 3)) == [0x1003, 0x2003, 3]
    assert list(as_tces(addresses, [1, 0, 2])) == [0x1001, 0, 2]
    assert list(as_tces(addresses, 0)) == [0, 0, 0]
    assert as_tces(addresses, 1).format == "Q"
