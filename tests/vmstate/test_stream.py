"""Frames in whatever pieces they come; RAM runs; what is out of order."""

from __future__ import annotations

import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.errors import VMStateError
from vfio_model.vmstate.ram import CHUNK, RamReceiver, RamSender, RamView, runs
from vfio_model.vmstate.stream import Frame, FrameKind, FrameReader, FrameWriter, Section


def stream() -> bytes:
    writer = FrameWriter()
    sections = [writer.section(Section(name, instance, 1, b"data")) for name, instance in (("a", 0), ("b", 7))]
    return b"".join((writer.header("pseries"), *sections, writer.end()))


def ordered() -> bytes:
    writer = FrameWriter()
    parts = [writer.header("pseries")]
    parts += [writer.section(Section(name, at, 2, b"data")) for at, name in enumerate(("a", "b"))]
    return b"".join((*parts, writer.end()))


@given(st.lists(st.integers(1, 40), min_size=1))
def test_pieces_do_not_matter(sizes: list[int]) -> None:
    data, at, found, reader = ordered(), 0, [], FrameReader("pseries")
    for size in [*sizes, len(ordered())]:
        found += [frame.kind for frame in reader.feed(data[at : at + size])]
        at += size
    assert found == [FrameKind.HEADER, FrameKind.SECTION, FrameKind.SECTION, FrameKind.END]
    assert reader.ended
    reader.close()


def test_sections_come_back() -> None:
    frames = list(FrameReader("pseries").feed(ordered()))
    assert [Section.unpack(frame) for frame in frames[1:3]] == [
        Section("a", 0, 2, b"data"),
        Section("b", 1, 2, b"data"),
    ]
    with pytest.raises(VMStateError, match="too short for a section"):
        Section.unpack(Frame(FrameKind.SECTION, b"\x05name", 0))


def test_a_frame_in_the_wrong_order_breaks_the_chain() -> None:
    with pytest.raises(VMStateError, match="the checksum is wrong"):
        list(FrameReader("pseries").feed(stream()))


def chained(*frames: tuple[int, bytes]) -> bytes:
    """Frames with right checksums, whatever their order."""
    out, crc = bytearray(), 0
    for kind, payload in frames:
        head = bytes((kind,)) + len(payload).to_bytes(4, "big") + payload
        crc = zlib.crc32(head, crc)
        out += head + crc.to_bytes(4, "big")
    return bytes(out)


HEADER = b"vfio-model migration\0\0\0\1pseries"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (chained((7, bytes(4))), "begins with one header"),
        (chained((1, HEADER), (1, HEADER)), "begins with one header"),
        (chained((1, b"QEVM")), "not a migration stream"),
        (chained((1, HEADER[:23] + b"\3pseries")), "format 3; 1 to 2 can be read"),
        (chained((1, HEADER[:-7] + b"q35")), "a q35 machine's; this is a pseries"),
        (chained((1, HEADER), (9, b"")), "kind 0x9 is not known"),
        (chained((1, HEADER), (7, b"\0\0\0\1")), "0 sections came"),
        (chained((1, HEADER), (6, b"\1a" + bytes(8)), (5, bytes(5))), "RAM comes before the sections"),
        (chained((1, HEADER), (7, bytes(4))) + b"x", "1 bytes behind the end"),
        (b"\1\xff\xff\xff\xff", "1000 are the most"),
    ],
)
def test_what_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(VMStateError, match=says):
        list(FrameReader("pseries", max_payload=1000).feed(data))


def test_a_cut_stream_says_so_at_its_end() -> None:
    reader = FrameReader("pseries")
    list(reader.feed(ordered()[:-3]))
    with pytest.raises(VMStateError, match="the stream ends without its end, 10 bytes into a frame"):
        reader.close()


# -- RAM -------------------------------------------------------------------------------------------------------------


def view(size: int, name: str = "ram") -> RamView:
    return RamView(name, memoryview(bytearray(size)), 4096)


def frames_of(sender_frames: bytes) -> list[Frame]:
    return [frame for frame in FrameReader("pseries").feed(sender_frames) if frame.kind is not FrameKind.HEADER]


def test_zeros_travel_without_data_and_still_overwrite() -> None:
    here, there = view(3 * CHUNK), view(3 * CHUNK)
    here.view[CHUNK + 5], there.view[7] = 1, 9
    writer = FrameWriter()
    sender, receiver = RamSender(writer, [here]), RamReceiver([there])
    parts = [writer.header("pseries"), sender.blocks(), *sender.everything(), sender.end_pass(final=True)]
    found = frames_of(b"".join(parts))
    kinds = [frame.kind for frame in found]
    assert kinds[1:4] == [FrameKind.RAM_ZERO, FrameKind.RAM_DATA, FrameKind.RAM_ZERO]
    assert sender.sent == CHUNK
    for frame in found:
        receiver.take(frame)
    assert there.view == here.view and receiver.final


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (Frame(FrameKind.RAM_DATA, b"\0\1" + bytes(8) + b"x", 0), "of block 1 are not there"),
        (Frame(FrameKind.RAM_DATA, b"\0\0" + (8191).to_bytes(8, "big") + b"xy", 0), "2 bytes at 0x1fff"),
        (Frame(FrameKind.RAM_ZERO, bytes(10) + (1 << 40).to_bytes(8, "big"), 0), "of block 0 are not there"),
        (Frame(FrameKind.RAM_ZERO, bytes(17), 0), "17 bytes of payload"),
        (Frame(FrameKind.RAM_PASS, b"\0\0\0\2\0", 0), "pass 2 where 1 ends"),
        (Frame(FrameKind.RAM_BLOCKS, bytes(2), 0), "the RAM is not this machine's: ram 0x2000/0x1000"),
    ],
)
def test_ram_that_is_not_there(frame: Frame, says: str) -> None:
    here, there = view(8192), view(8192)
    writer = FrameWriter()
    receiver = RamReceiver([there])
    receiver.take(frames_of(writer.header("pseries") + RamSender(writer, [here]).blocks())[0])
    with pytest.raises(VMStateError, match=says):
        receiver.take(frame)
    assert not any(there.view)


def test_ram_before_its_list_and_after_its_end() -> None:
    receiver = RamReceiver([view(8192)])
    with pytest.raises(VMStateError, match="before the list"):
        receiver.take(Frame(FrameKind.RAM_ZERO, bytes(18), 0))
    receiver.final = True
    with pytest.raises(VMStateError, match="after the final pass"):
        receiver.take(Frame(FrameKind.RAM_ZERO, bytes(18), 0))


@given(st.sets(st.integers(0, 40)))
def test_runs_cover_exactly_the_pages(pages: set[int]) -> None:
    found = list(runs(sorted(pages), 4096))
    assert [offset // 4096 + each for offset, size in found for each in range(size // 4096)] == sorted(pages)
    assert all(one[0] + one[1] < two[0] for one, two in itertools.pairwise(found))
