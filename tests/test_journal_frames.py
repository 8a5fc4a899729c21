"""The bytes of the journal: what is written is frozen, what is read back is every whole frame and nothing else."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent_runtime.journal
from agent_runtime import JournalError
from agent_runtime.errors import JournalCorrupt, JournalMismatch
from agent_runtime.journal import Damage, Directory, Frame, Gap, Header, read_directory
from agent_runtime.journal.frames import encode_frame, scan, seed_of
from agent_runtime.journal.headers import decode_headers, encode_headers, segment_name
from journal_rig import Image

JOURNAL = "0192f0c1-2345-7abc-8def-0123456789ab"
DATABASE = "0192f0c1-0000-7abc-8def-0123456789ab"
SEED = seed_of(JOURNAL)


def header(segment: int = 1, first: int = 1, **fields: object) -> Header:
    plain = Header(
        journal=JOURNAL,
        generation=1,
        database=DATABASE,
        partition=0,
        segment=segment,
        first=first,
        identity="fe01:42",
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    return msgspec.structs.replace(plain, **fields)


def segment_bytes(sequences: Sequence[int], *, segment: int = 1, first: int | None = None, **fields: object) -> bytes:
    first = min(sequences) if first is None else first
    frames = [encode_frame(sequence, b'{"n":%d}' % sequence, SEED) for sequence in sequences]
    return encode_headers(header(segment, first, **fields)) + b"".join(frames)


def image(*segments: bytes) -> Image:
    return Image({segment_name(number): data for number, data in enumerate(segments, 1)})


def read(directory: Directory, after: int = 0) -> tuple[list[int], list[Gap]]:
    """The sequences of all frames, which hold what they should, and the gaps."""
    items = list(directory.frames(after))
    frames = [item for item in items if isinstance(item, Frame)]
    for frame in frames:
        assert frame.payload == b'{"n":%d}' % frame.sequence
    return [frame.sequence for frame in frames], [item for item in items if isinstance(item, Gap)]


# Golden bytes


def test_golden_frame() -> None:
    assert encode_frame(57, b'{"sequence":57}', SEED) == b'0000000f c4c718c5 0000000000000039 {"sequence":57}\n'


def test_golden_header() -> None:
    data = encode_headers(header(segment=7, first=101, voids=((99, 100),)))
    golden = (
        b'000001dc 1ecc5285 0000000000000000 {"format":1,"journal":"0192f0c1-2345-7abc-8def-0123456789ab","generation":1,'
        b'"database":"0192f0c1-0000-7abc-8def-0123456789ab","partition":0,"segment":7,"first":101,"voids":[[99,100]],'
        b'"identity":"fe01:42","created_at":"2026-01-02T03:04:05Z"}'
    )
    assert data == (golden.ljust(511) + b"\n") * 2


def test_the_documented_journal_is_a_real_one() -> None:
    page = Path(agent_runtime.journal.__file__).with_name("README.md").read_text(encoding="utf-8")
    example = page.split("```text\n")[1].split("```")[0].splitlines()
    change = b'{"sequence":%d,"previous":%d,"session_id":"s1"}'
    data = encode_headers(header(segment=7, first=101))
    data += b"".join(encode_frame(sequence, change % (sequence, sequence - 1), SEED) for sequence in (101, 102))
    assert [line.rstrip() for line in data.decode().splitlines()] == example


# Round trips

documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab\n"', max_size=4), inner, max_size=4),
    max_leaves=8,
).map(msgspec.json.encode)
noise = st.binary(max_size=60) | st.text("0123456789abcdef \n{", max_size=80).map(str.encode)


@given(st.lists(documents, max_size=12), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_what_goes_in_comes_out(payloads: list[bytes], seed: int) -> None:
    frames = [encode_frame(sequence, payload, seed) for sequence, payload in enumerate(payloads, 1)]
    found = list(scan(io.BytesIO(b"".join(frames)), seed))
    assert found == [
        Frame(sequence, payload, end - len(frame), end)
        for (sequence, payload), frame, end in zip(enumerate(payloads, 1), frames, ends(frames), strict=True)
    ]


def ends(parts: Sequence[bytes]) -> Iterator[int]:
    position = 0
    for part in parts:
        position += len(part)
        yield position


@given(st.lists(st.tuples(noise, documents), min_size=1, max_size=8), noise, st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_every_frame_is_found_whatever_lies_between(parts: list[tuple[bytes, bytes]], rest: bytes, seed: int) -> None:
    frames = [encode_frame(sequence, payload, seed) for sequence, (_, payload) in enumerate(parts, 1)]
    data = b"".join(between + frame for (between, _), frame in zip(parts, frames, strict=True)) + rest
    found = list(scan(io.BytesIO(data), seed))
    assert [data[item.start : item.end] for item in found if isinstance(item, Frame)] == frames
    for before, behind in pairwise([(0, 0), *((item.start, item.end) for item in found), (len(data), 0)]):
        assert before[1] == behind[0]  # every byte belongs to one of them
    torn = [item for item in found if isinstance(item, Damage) and item.torn]
    assert [item.end for item in torn] == ([len(data)] if rest else [])


@pytest.mark.parametrize("size", [256 * 1024 - 37, 256 * 1024 - 36, 256 * 1024, 3_000_000])
@pytest.mark.parametrize("broken", [False, True])
def test_frames_larger_than_what_is_read_at_once(size: int, broken: bool) -> None:
    frames = [encode_frame(1, b"a" * 100, SEED), encode_frame(2, b"b" * size, SEED), encode_frame(3, b"c", SEED)]
    if broken:
        frames[1] = frames[1].replace(b"b", b"x", 1)
    found = [type(item) for item in scan(io.BytesIO(b"".join(frames)), SEED)]
    assert found == [Frame, Damage if broken else Frame, Frame]


def test_many_frames_over_the_edges_of_what_is_read_at_once() -> None:
    frames = [encode_frame(sequence, b"d" * (sequence % 977), SEED) for sequence in range(1, 3000)]
    assert [item.sequence for item in scan(io.BytesIO(b"".join(frames)), SEED) if isinstance(item, Frame)] == [
        *range(1, 3000)
    ]


def test_a_damaged_length_costs_only_its_own_frame() -> None:
    frames = [encode_frame(sequence, b'{"n":1}', SEED) for sequence in (1, 2, 3, 4)]
    for length in (
        b"00000000",
        b"00000006",
        b"00000032",
        b"0000005d",
        b"ffffffff",
        b"-0000001",
        b"0x000007",
        b"  000007",
    ):
        data = frames[0] + length + frames[1][8:] + frames[2] + frames[3]
        found = [item.sequence for item in scan(io.BytesIO(data), SEED) if isinstance(item, Frame)]
        assert found == [1, 3, 4]


def test_neighbours_that_lost_their_newlines() -> None:
    """Nothing leads from one frame to the next any more, and still the third, whole, is found."""
    frames = [bytearray(encode_frame(sequence, b'{"n":1}', SEED)) for sequence in (1, 2, 3)]
    frames[0][-1] = frames[1][-1] = 0x0B
    frames[0][3] = frames[1][3] = ord("f")
    found = [item.sequence for item in scan(io.BytesIO(b"".join(frames)), SEED) if isinstance(item, Frame)]
    assert found == [3]


def test_upper_case_digits_are_damage() -> None:
    frame = encode_frame(1, b"x" * 0xAB, SEED)
    assert frame.startswith(b"000000ab")
    assert [type(item) for item in scan(io.BytesIO(frame.replace(b"000000ab", b"000000AB")), SEED)] == [Damage]


# Every truncation and every flipped bit

SEQUENCES = (5, 6, 7, 8)
SMALL = segment_bytes(SEQUENCES)
FRAMES_AT = 1024
FRAME = 43
ENDS = [FRAMES_AT + index * FRAME for index in range(5)]


def whole_up_to(size: int) -> list[int]:
    return [sequence for sequence, end in zip(SEQUENCES, ENDS[1:], strict=True) if end <= size]


def test_the_small_journal_is_as_the_tests_think() -> None:
    assert len(SMALL) == ENDS[-1] == FRAMES_AT + 4 * FRAME
    assert read(read_directory(image(SMALL)), 4) == ([*SEQUENCES], [])


@pytest.mark.anyio
async def test_every_truncation() -> None:
    for size in range(len(SMALL)):
        files = image(SMALL[:size])
        directory = read_directory(files)
        whole = whole_up_to(size)
        assert read(directory, 4) == (whole, [])
        assert directory.end == (whole[-1] if whole else 4 if size >= 512 else 0)
        kept = await directory.cut_torn_tails()
        again = read_directory(files)
        assert read(again, 4) == (whole, [])
        if size < 512:
            assert not again.segments
            assert not again.unreadable
            assert [files.contents[name] for name in kept] == ([SMALL[:size]] if size else [])
        elif size >= FRAMES_AT:
            good = max(end for end in ENDS if end <= size)
            assert not again.damage
            assert files.contents[segment_name(1)] == SMALL[:good]
            assert [files.contents[name] for name in kept] == ([SMALL[good:size]] if size > good else [])
        assert not await again.cut_torn_tails()


def test_every_flipped_bit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # each is told of, at length
    for position in range(len(SMALL)):
        for bit in range(8):
            data = bytearray(SMALL)
            data[position] ^= 1 << bit
            directory = read_directory(image(bytes(data)))
            sequences, gaps = read(directory, 4)
            assert directory.header == header(1, 5)
            (damage,) = directory.damage.values()
            if position < FRAMES_AT:
                assert (sequences, gaps) == ([*SEQUENCES], [])
                assert (damage.start, damage.end) == (position // 512 * 512, position // 512 * 512 + 512)
            else:
                hit = (position - FRAMES_AT) // FRAME
                lost = SEQUENCES[hit]
                assert sequences == [sequence for sequence in SEQUENCES if sequence != lost]
                assert gaps == ([] if lost == SEQUENCES[-1] else [Gap(lost, lost)])
                assert damage == Damage(ENDS[hit], ENDS[hit + 1], torn=lost == SEQUENCES[-1])


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=200)), min_size=1, max_size=4))
@settings(max_examples=200)
def test_overwritten_pieces(pieces: list[tuple[int, bytes]]) -> None:
    """Frames that are still as they were are found, and no other; known by the database, the journal needs no header."""
    data = bytearray(SMALL)
    for position, piece in pieces:
        data[position : position + len(piece)] = piece[: len(SMALL) - position]
    intact = [
        sequence
        for sequence, (start, end) in zip(SEQUENCES, pairwise(ENDS), strict=True)
        if data[start:end] == SMALL[start:end]
    ]
    assert read(read_directory(image(bytes(data)), JOURNAL), 4)[0] == intact


# Imitations


def test_a_message_can_not_imitate_frames() -> None:
    """The author knows everything but the journal's id. Each piece of damage lays the message bare."""
    forged = encode_frame(900, b'{"n":900}', 0) + encode_frame(901, b'{"n":901}', seed_of(DATABASE))
    forged += encode_headers(header(segment=9, first=900))
    payload = msgspec.json.encode({"content": forged.decode()})
    raw = b'{"n":6}\n' + forged  # a document never holds a newline, and if it did
    frames = [encode_frame(5, b'{"n":5}', SEED), encode_frame(6, payload, SEED), encode_frame(6, raw, SEED)]
    data = b"".join([*frames, encode_frame(7, b'{"n":7}', SEED)])
    middle = range(len(frames[0]), len(frames[0]) + len(frames[1]) + len(frames[2]))
    for position in [
        *range(middle.start, middle.start + 80),
        *range(middle.start + len(frames[1]) - 5, middle.stop, 7),
    ]:
        broken = bytearray(data)
        broken[position] ^= 1
        found = [item for item in scan(io.BytesIO(bytes(broken)), SEED) if isinstance(item, Frame)]
        assert {item.sequence for item in found} <= {5, 6, 7}
        assert (found[0].sequence, found[-1].sequence) == (5, 7)
    for size in middle:
        assert {item.sequence for item in scan(io.BytesIO(data[:size]), SEED) if isinstance(item, Frame)} <= {5, 6}


def test_a_pasted_frame_is_no_frame() -> None:
    """Even this journal's own bytes, pasted into a message: inside a document their quotes are written otherwise."""
    pasted = encode_frame(900, b'{"n":900}', SEED).decode()
    data = encode_frame(5, msgspec.json.encode({"content": pasted}), SEED)
    assert [type(item) for item in scan(io.BytesIO(data[:-1]), SEED)] == [Damage]


def test_a_message_can_not_imitate_a_header() -> None:
    """Both copies are gone, and a message is what a second copy would be, in the right place, up to its newline."""
    at = 3 * 512
    before = FRAMES_AT + 35 + len(b'{"content":"')
    rest = b"z" * (at - 38) + b'"}'
    forged = encode_frame(0, rest, 0)
    assert len(forged) == at
    payload = b'{"content":"' + b" " * (at - before) + forged[:-1]
    data = b"\0" * FRAMES_AT + encode_frame(5, payload, SEED)
    assert data[at:] == forged
    assert decode_headers(data, "it").header is None


# Several segments


def test_segments_are_read_in_the_order_of_the_log() -> None:
    directory = read_directory(
        image(segment_bytes((1, 2)), segment_bytes((3,), segment=2), segment_bytes((4, 5), segment=3))
    )
    assert read(directory) == ([1, 2, 3, 4, 5], [])
    assert read(directory, 3) == ([4, 5], [])
    assert read(directory, 9) == ([], [])
    assert (directory.end, directory.first_retained, directory.journal_id) == (5, 1, JOURNAL)
    assert directory.bytes == 3 * FRAMES_AT + 5 * FRAME


def test_repeats_are_read_once() -> None:
    """As after a failed sync: the third repeats the end of the first and the second, which itself lacks nothing."""
    directory = read_directory(
        image(
            segment_bytes((1, 2, 3)), segment_bytes((4, 5, 8), segment=2), segment_bytes((2, 3, 4, 5, 6, 7), segment=3)
        )
    )
    assert read(directory) == ([1, 2, 3, 4, 5, 6, 7, 8], [])


@given(st.data())
@settings(max_examples=100)
def test_any_overlap_is_merged(data: st.DataObject) -> None:
    held = [
        sorted(data.draw(st.sets(st.integers(1, 30), min_size=1)))
        for _ in range(data.draw(st.integers(1, 5), label="segments"))
    ]
    after = data.draw(st.integers(0, 31), label="after")
    directory = read_directory(image(*(segment_bytes(s, segment=number) for number, s in enumerate(held, 1))))
    sequences, gaps = read(directory, after)
    assert sequences == sorted({sequence for part in held for sequence in part if sequence > after})
    missing = {sequence for gap in gaps for sequence in range(gap.first, gap.last + 1)}
    assert sorted(missing | set(sequences)) == [*range(after + 1, directory.end + 1)]
    assert not missing & set(sequences)


def test_voids_are_neither_frames_nor_gaps() -> None:
    """The second failed and could not be undone; its sequence, and one of which nothing was written, are void."""
    directory = read_directory(
        image(segment_bytes((1, 2)), segment_bytes((4, 6), segment=2, voids=((2, 3),))), journal_id=None
    )
    assert read(directory) == ([1, 4, 6], [Gap(5, 5)])
    assert directory.voids == ((2, 3),)


def test_voids_at_the_end_are_used_up() -> None:
    directory = read_directory(image(segment_bytes((1, 2)), segment_bytes((), segment=2, first=5, voids=((3, 4),))))
    assert (directory.end, read(directory)) == (4, ([1, 2], []))


def test_a_header_tells_that_more_was_written() -> None:
    """The end of the first was never synced, and the second is the only trace of it."""
    directory = read_directory(image(segment_bytes((1, 2)), segment_bytes((), segment=2, first=6)))
    assert (directory.end, read(directory)) == (5, ([1, 2], [Gap(3, 5)]))


def test_what_was_cut_is_a_gap_only_for_who_asks_from_below() -> None:
    directory = read_directory(image(segment_bytes((7, 8))))
    assert directory.first_retained == 7
    assert read(directory, 6) == ([7, 8], [])
    assert read(directory, 4) == ([7, 8], [Gap(5, 6)])


def test_without_a_header_the_others_tell_whose_the_frames_are() -> None:
    headless = b"\0" * FRAMES_AT + segment_bytes((1, 2))[FRAMES_AT:]
    directory = read_directory(image(headless, segment_bytes((3,), segment=2)))
    assert read(directory) == ([1, 2, 3], [])
    assert [segment.header is None for segment in directory.segments] == [True, False]
    alone = read_directory(image(headless))
    assert (alone.unreadable, alone.end) == ((segment_name(1),), 0)
    assert read(read_directory(image(headless), JOURNAL)) == ([1, 2], [])


@pytest.mark.anyio
async def test_a_journal_that_nobody_knows_is_not_thrown_away() -> None:
    directory = read_directory(image(b"\0" * FRAMES_AT + SMALL[FRAMES_AT:]))
    with pytest.raises(JournalCorrupt, match="no whole header"):
        await directory.cut_torn_tails()


@pytest.mark.anyio
async def test_an_unreadable_segment_in_the_middle_stays() -> None:
    files = image(segment_bytes((1, 2)), b"\0" * 1500, segment_bytes((5,), segment=3))
    directory = read_directory(files)
    assert directory.unreadable == (segment_name(2),)
    assert read(directory) == ([1, 2, 5], [Gap(3, 4)])
    assert not await directory.cut_torn_tails()
    assert segment_name(2) in files.contents


def test_the_newest_header_speaks_for_the_journal() -> None:
    directory = read_directory(
        image(segment_bytes((1,)), segment_bytes((2,), segment=2, generation=4, database="d2", identity="i2"))
    )
    assert (directory.generation, directory.database_id, directory.identity, directory.partition) == (4, "d2", "i2", 0)


def test_nothing() -> None:
    directory = read_directory(Image({"lock": b"", "notes.txt": b"x"}))
    assert (directory.end, directory.generation, directory.journal_id, directory.first_retained) == (0, 0, None, None)
    assert read(directory) == ([], [])


# What is refused


def test_a_later_format_is_refused() -> None:
    with pytest.raises(JournalError, match=r"format 2.*the version that wrote it"):
        read_directory(image(segment_bytes((1,), format=2)))


def test_two_journals_in_one_directory_are_refused() -> None:
    with pytest.raises(JournalMismatch, match="several journals"):
        read_directory(image(segment_bytes((1,)), segment_bytes((2,), segment=2, journal="another")))


def test_a_renamed_segment_is_refused() -> None:
    with pytest.raises(JournalCorrupt, match=r"0000000002\.segment.*0000000007\.segment"):
        read_directory(image(segment_bytes((1,)), segment_bytes((2,), segment=7)))


def test_more_voids_than_a_header_holds_are_refused() -> None:
    with pytest.raises(JournalError, match="more than a header can name"):
        encode_headers(header(voids=tuple((2**60 + n, 2**60 + n) for n in range(3000))))
