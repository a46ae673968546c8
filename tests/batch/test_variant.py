"""Which variant does the batches, and that what it makes is the same."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from tests.host.rig import Rig
from vfio_model.batch import variant
from vfio_model.batch.tables import translate_each_reference, translate_reference
from vfio_model.batch.variant import Variant, choose
from vfio_model.errors import ConfigError
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.lane import SECTION_BYTES
from vfio_model.memory.types import MemTxResult

BUILT: list[Variant] = ["reference", "numpy", *(["compiled"] if variant.compiled else [])]  # type: ignore[list-item]


@pytest.fixture(params=BUILT)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    monkeypatch.setattr(variant, "chosen", request.param)
    answer: Variant = request.param
    return answer


def test_the_compiled_one_if_it_was_built_else_numpy() -> None:
    assert (choose(None, True), choose("", False)) == ("compiled", "numpy")
    assert [choose(name, True) for name in ("reference", "numpy", "compiled")] == ["reference", "numpy", "compiled"]


def test_a_variant_that_cannot_be_forced_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"VFIO_MODEL_BATCH: .*not built \(install again where a C compiler"):
        choose("compiled", False)
    with pytest.raises(ConfigError, match=r"no variant 'fast'.*reference, numpy, compiled"):
        choose("fast", True)


def test_every_variant_translates_alike(chosen: Variant) -> None:
    table, iovas = [0x7003, 0, 0x9001], [0x10008, 0x12FFF, 0x10000]
    translator = variant.table_translator(array("Q", table), 0x10000, 12)
    out = np.empty(3, dtype=np.uint64)
    expected = translate_reference(table, 0x10000, 12, iovas)
    assert translator.translate(np.array(iovas, dtype=np.uint64), out) == expected[1:]
    assert out.tolist() == expected[0]
    each = translator.translate_each(np.array([*iovas, 5], dtype=np.uint64))
    assert tuple(map(list, each)) == translate_each_reference(table, 0x10000, 12, [*iovas, 5])
    assert translator.translate(np.array([5], dtype=np.uint64), out[:1]) == (False, 0)


def test_a_translator_sees_changes_of_a_shared_table(chosen: Variant) -> None:
    words, iovas, out = array("Q", [0]), array("Q", [4]), array("Q", [0])
    translator = variant.table_translator(words, 0, 12)
    assert translator.translate(np.frombuffer(iovas, dtype=np.uint64), np.frombuffer(out, dtype=np.uint64)) == (True, 0)
    words[0] = 0x7001
    assert translator.translate(np.frombuffer(iovas, dtype=np.uint64), np.frombuffer(out, dtype=np.uint64)) == (True, 1)
    assert out[0] == 0x7004


@pytest.mark.parametrize("kind", ["list", "array", "u64", "i64", "strided", "unaligned"])
def test_pieces_of_assigned_dma(chosen: Variant, kind: str) -> None:
    """Across two segments, a read-only page, a hole, and pieces that cross into the next page."""
    rig = Rig(blocks=2)
    dma = DMASpace(rig.impl())
    for page in range(16):
        rig.map(page * 4096, (15 - page) * 4096, block=page % 8 == 7, flags=1 if page == 12 else 3)
    plain = [page * 4096 + page * 40 for page in range(12)] + [4096 - 100]
    for iovas, result, good in (
        (plain * 3, MemTxResult.OK, 39),
        ([*plain, 12 * 4096, 0], MemTxResult.DECODE_ERROR, 13),
    ):
        for block in rig.blocks:
            block.view[:] = bytes(block.size)
        data = bytes(n % 255 + 1 for n in range(len(iovas) * 256))
        assert dma.write_many(_as(kind, iovas), 256, data) == result
        expected = bytearray(16 * 4096)
        for number, iova in enumerate(iovas[:good]):
            expected[iova : iova + 256] = data[number * 256 : (number + 1) * 256]
        seen = bytearray(16 * 4096)
        assert dma.read_many([page * 4096 for page in range(16)], 4096, seen) == MemTxResult.OK
        assert seen == expected
    out = bytearray(b"x") * 1024
    assert dma.read_many(_as(kind, [4096, 8192, 16 * 4096, 0]), 256, out) == MemTxResult.DECODE_ERROR
    assert out[:512] == seen[4096:4352] + seen[8192:8448] and out[512:] == bytes(512)
    assert not rig.lane.inside


def test_addresses_that_are_none_fail_like_single_ones(chosen: Variant) -> None:
    rig = Rig()
    dma = DMASpace(rig.impl())
    rig.map(0, 0, 64 * 4096)
    for bad in (-8, 1 << 64, (1 << 64) + 5):
        iovas = [page * 4096 for page in range(20)] + [bad] + [0] * 20
        assert dma.write_many(iovas, 8, b"abcdefgh" * len(iovas)) == MemTxResult.DECODE_ERROR
        assert rig.ram[19 * 4096 : 19 * 4096 + 8] == b"abcdefgh"


def test_no_section_copies_more_than_its_measure(chosen: Variant) -> None:
    rig = Rig()
    dma = DMASpace(rig.impl())
    rig.map(0, 0, 1 << 20)
    before = rig.lane.words[rig.lane.slot]
    assert dma.write_many([page * 4096 for page in range(256)], 4096, bytes(1 << 20)) == MemTxResult.OK
    sections = (rig.lane.words[rig.lane.slot] - before) // 2
    assert sections >= (1 << 20) // SECTION_BYTES


def _as(kind: str, iovas: list[int]) -> object:
    if kind == "list":
        return iovas
    if kind == "array":
        return array("Q", iovas)
    if kind == "strided":
        return np.repeat(np.array(iovas, dtype=np.uint64), 2)[::2]
    if kind == "unaligned":
        odd = np.frombuffer(bytearray(len(iovas) * 8 + 1), dtype=np.uint64, offset=1)
        odd[:] = iovas
        return odd
    return np.array(iovas, dtype=np.uint64 if kind == "u64" else np.int64)
