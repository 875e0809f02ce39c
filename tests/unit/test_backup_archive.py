"""The file of a backup: what was altered, cut off or made up is refused, whatever it says."""

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.operator.archive import BadArchive, Reader, Writer

LINES = b'["pump-17",1]\n["pump-18",2]\n'


def archive(**files: bytes) -> bytes:
    file = io.BytesIO()
    writer = Writer(file)
    for name, content in (files or {"tables/devices.ndjson": LINES, "state/keys/tokens.json": b"{}"}).items():
        writer.add(name, [content[:5], content[5:]])
    writer.close({"schema": "0001"})
    return file.getvalue()


GOOD = archive()


def test_what_was_written_is_read() -> None:
    reader = Reader(io.BytesIO(GOOD))
    assert reader.manifest["schema"] == "0001"
    assert reader.names("tables") == ["tables/devices.ndjson"]
    assert b"".join(reader.lines("tables/devices.ndjson", 100)) == LINES
    assert reader.content("state/keys/tokens.json") == b"{}"
    with pytest.raises(ValueError, match="too long"):
        list(reader.lines("tables/devices.ndjson", 5))


@given(st.integers(0, len(GOOD) - 1))
def test_one_that_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(BadArchive):
        Reader(io.BytesIO(GOOD[:length]))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_one_that_was_altered_is_refused_or_says_the_same(at: int, by: int) -> None:
    """Headers have fields that nobody reads, and a manifest says things that are checked later."""
    altered = bytearray(GOOD)
    altered[at] ^= by
    try:
        reader = Reader(io.BytesIO(bytes(altered)))
    except BadArchive:
        return
    assert b"".join(reader.lines("tables/devices.ndjson", 100)) == LINES
    assert reader.content("state/keys/tokens.json") == b"{}"


@given(st.binary(max_size=3_000))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(BadArchive):
        Reader(io.BytesIO(content))


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "state/../x", "state/./x", "state/.ssh/x", "tables/a/b.ndjson", "tables/x.json", "state/"],
)
def test_no_other_names_are_understood(name: str) -> None:
    with pytest.raises(BadArchive, match="no backup has"):
        Reader(io.BytesIO(archive(**{name: b""})))


def with_header(change: Callable[[tarfile.TarInfo], None]) -> bytes:
    header = tarfile.TarInfo.frombuf(GOOD[:512], "ascii", "strict")
    change(header)
    return header.tobuf(tarfile.GNU_FORMAT)[-512:] + GOOD[512:]


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.XHDTYPE])
def test_only_plain_files_are_understood(type: bytes) -> None:
    with pytest.raises(BadArchive, match="no backup has"):
        Reader(io.BytesIO(with_header(lambda header: setattr(header, "type", type))))


@pytest.mark.parametrize("size", [2**40, 2**60])
def test_a_size_that_is_not_there_costs_nothing(size: int) -> None:
    with pytest.raises(BadArchive, match="cut off"):
        Reader(io.BytesIO(with_header(lambda header: setattr(header, "size", size))))


def test_a_file_is_there_once() -> None:
    file = io.BytesIO()
    writer = Writer(file)
    for _ in range(2):
        writer.add("tables/devices.ndjson", [LINES])
    writer.close({})
    with pytest.raises(BadArchive, match="twice"):
        Reader(io.BytesIO(file.getvalue()))


def test_nothing_follows_the_end() -> None:
    with pytest.raises(BadArchive, match="behind its end"):
        Reader(io.BytesIO(GOOD + bytes(512)))
