"""H_PUT_TCE_INDIRECT of pages in order is one MAP_DMA; of pages that only seem so, as many as there are pages."""

from __future__ import annotations

import pytest

from tests.vfio.direct_chain import LIOBN0, MIB, Chain
from vfio_model.iommu.spapr.regs import HCall
from vfio_model.uapi.vfio import Ioctl

COUNT = 32
PAGE = 4096
MAP = int(Ioctl.VFIO_IOMMU_MAP_DMA)


@pytest.fixture
def chain() -> Chain:
    return Chain(kvm=False)  # the host would answer without an ioctl


def indirect(chain: Chain, pages: list[int]) -> tuple[int, list[int]]:
    """The return code for TCEs of ``pages``, and how many structures each MAP_DMA had."""
    before = len(chain.port.calls)
    ret = chain.indirect(0, [page | 3 for page in pages])
    return ret, [count for cmd, count in chain.port.calls[before:] if cmd == MAP]


def mapped(chain: Chain) -> list[int]:
    """What the guest's table says of the first pages."""
    return [chain.machine.hcall(HCall.H_GET_TCE, LIOBN0, n * PAGE)[1][0] for n in range(COUNT)]


def test_pages_in_order_are_one_structure(chain: Chain) -> None:
    pages = [2 * MIB + n * PAGE for n in range(COUNT)]
    assert indirect(chain, pages) == (0, [1])
    assert mapped(chain) == [page | 3 for page in pages]


@pytest.mark.parametrize("order", ["descending", "swapped", "gap", "same"])
def test_pages_out_of_order_are_one_structure_each(chain: Chain, order: str) -> None:
    pages = [2 * MIB + n * PAGE for n in range(COUNT)]
    if order == "descending":
        pages.reverse()
    elif order == "swapped":
        pages[1], pages[2] = pages[2], pages[1]
    elif order == "gap":
        pages[-1] += PAGE
    else:
        pages = [2 * MIB] * COUNT
    assert indirect(chain, pages) == (0, [COUNT])
    assert mapped(chain) == [page | 3 for page in pages]


def test_an_order_that_leaves_memory_is_mapped_as_far_as_there_is_memory(chain: Chain) -> None:
    end = 32 * MIB
    pages = [end - 8 * PAGE + n * PAGE for n in range(COUNT)]
    ret, maps = indirect(chain, pages)
    assert (ret, sum(maps)) == (0, 8)


def test_an_order_around_the_end_of_addresses_is_no_run_of_memory(chain: Chain) -> None:
    pages = [(n - 8) * PAGE % (1 << 64) for n in range(COUNT)]
    ret, maps = indirect(chain, pages)
    assert (ret, sum(maps)) == (0, COUNT - 8)
