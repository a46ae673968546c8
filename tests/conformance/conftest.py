"""Every test that asks for ``adapter`` runs over every implementation of the uapi seam."""

from __future__ import annotations

import pytest

from tests.conformance.adapters import ADAPTERS, Adapter


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """An implementation of the uapi seam."""
    return ADAPTERS[request.param]
