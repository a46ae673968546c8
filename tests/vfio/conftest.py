"""Every test of the direct chain runs without in-kernel acceleration and with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vfio.direct_chain import KVM

CHAINS = ("test_direct_chain.py", "test_direct_chain_random.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The axis, for the files that make chains."""
    if metafunc.definition.path.name in CHAINS:
        metafunc.fixturenames.append("acceleration")
        metafunc.parametrize("acceleration", (False, True), ids=("user", "kvm"), indirect=True)


@pytest.fixture
def acceleration(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Chains made during the test are accelerated."""
    KVM.on = request.param
    yield request.param
    KVM.on = False
