"""Reads the rows of a JSON Lines file or a JSON list. What a row holds is not checked here.

A file's content decides how it is read, because names are often wrong: a `.json` file may
hold JSON Lines, a `.jsonl` file may hold a list or be packed with gzip. No content is both.
"""

import errno
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.faults import ROW_ADVICE
from interviewmate_mlx.files import read_bounded
from interviewmate_mlx.formats.json_file import without_duplicates

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_MAX_BYTES = 256 << 20
_MAX_LIST_BYTES = 16 << 20  # a list is parsed as a whole: that takes up to 20 times its size
_MAX_ROW_BYTES = 1 << 20
_NUM_LINES_TRIED = 5  # the first line may be the faulty one

_GZIP = b"\x1f\x8b"
# The first bytes of what is not text, or not rows, and how to make rows of it.
_KINDS = {
    b"PAR1": ("Parquet", "Write its rows as JSON Lines: one JSON object a line."),
    b"ARROW1": ("Arrow", "Write its rows as JSON Lines: one JSON object a line."),
    b"SQLite format 3": ("SQLite", "Write its rows as JSON Lines: one JSON object a line."),
    b"PK\x03\x04": ("zip or Excel", "Unpack it, or write its rows as JSON Lines."),
    b"\xd0\xcf\x11\xe0": ("Excel or Word", "Write its rows as JSON Lines: one object a line."),
    b"%PDF": ("PDF", "Write its questions and answers as JSON Lines: one JSON object a line."),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "Unpack it."),
    b"BZh": ("bzip2", "Unpack it."),
    b"\xfd7zXZ": ("xz", "Unpack it."),
    b"7z\xbc\xaf": ("7z", "Unpack it."),
    b"\x80\x02": ("Python pickle", "Write its rows as JSON Lines: one JSON object a line."),
    b"\x80\x03": ("Python pickle", "Write its rows as JSON Lines: one JSON object a line."),
    b"\x80\x04": ("Python pickle", "Write its rows as JSON Lines: one JSON object a line."),
    b"\x80\x05": ("Python pickle", "Write its rows as JSON Lines: one JSON object a line."),
    b"version https://git-lfs": ("Git LFS pointer", "Run git lfs pull to get the file itself."),
    b"<!doctype html": ("web page", "Download the file itself, not the page that shows it."),
    b"<html": ("web page", "Download the file itself, not the page that shows it."),
}


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: its place in the file, for messages: `line 3`, `row 3`. Empty if the file as
            a whole cannot be read; then it is the only row.
        value: the parsed JSON; None if there is a fault.
        fault: why it cannot be parsed; empty if it can.
        advice: what to do about the fault.
    """

    place: str
    value: Any
    fault: str = ""
    advice: str = ROW_ADVICE


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, or one row without a place that says why the file cannot be read."""
    try:
        data = _read_bytes(path)
        objects = _parse_list(path, data)
        if objects is None:
            _refuse_encoding(path, data)
    except _FileFaultError as error:
        fault, advice = error.args
        yield Row("", None, fault, advice)
        return
    if objects is not None:
        yield from (Row(f"row {number}", row) for number, row in enumerate(objects, start=1))
        return
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            yield _parse_line(f"line {number}", line.rstrip(b"\r\n"))


class _FileFaultError(Exception):
    """The file as a whole cannot be read: the fault, and what to do."""


def _read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked, without a byte order mark."""
    if not path.name.endswith(ENDINGS):
        kind = path.suffix or "nameless"
        raise _FileFaultError(
            f"got a {kind} file, expected .jsonl or .json",
            "Write its rows as JSON Lines, one JSON object a line, or name it so if it holds them.",
        )
    try:
        data = read_bounded(path, _MAX_BYTES)
        if data.startswith(_GZIP):
            data = _unpack(data)
    except OSError as error:
        hint = "Split it into several." if error.errno == errno.EFBIG else "Check its permissions."
        raise _FileFaultError(f"cannot be read: {error.strerror}", hint) from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    start = data[:64].lstrip().lower()
    for magic, (kind, advice) in _KINDS.items():
        if data.startswith(magic) or (magic.startswith(b"<") and start.startswith(magic)):
            raise _FileFaultError(f"got a {kind} file, expected JSON Lines or a JSON list", advice)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise _encoding_fault(path, "UTF-16 or UTF-32")
    return data


def _unpack(data: bytes) -> bytes:
    """Unpack gzip, to a limited size: a small file may stand for terabytes."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(_MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _FileFaultError(f"damaged gzip: {error}", "Pack or download it again.") from error
    if len(unpacked) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"unpacked, it is larger than {_MAX_BYTES >> 20} MB")
    return unpacked


def _refuse_encoding(path: Path, data: bytes) -> None:
    """Refuse lines in another encoding all together, instead of with a fault for each."""
    valid = [_is_utf8_line(line) for line in io.BytesIO(data) if line.strip()]
    num_bad = valid.count(False)
    if num_bad * 2 > len(valid):
        raise _encoding_fault(path, f"{num_bad} of {len(valid)} lines that are not UTF-8")


def _encoding_fault(path: Path, found: str) -> _FileFaultError:
    return _FileFaultError(f"encoding: got {found}, expected UTF-8", f"Save {path.name} as UTF-8.")


def _is_utf8_line(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parse_list(path: Path, data: bytes) -> list[Any] | None:
    """The rows of a JSON list; None if the file holds JSON Lines.

    Raises:
        _FileFaultError: it holds neither.
    """
    is_lines_by_name = path.name.removesuffix(".gz").endswith(".jsonl")
    found = re.search(rb"\S", data)
    first = found[0] if found else b""
    if not first or (is_lines_by_name and first != b"["):
        return None
    advice = "Give a list of rows, [{...}, {...}], or JSON Lines: one JSON object a line."
    try:
        if len(data) > _MAX_LIST_BYTES:
            raise ValueError(f"it is larger than {_MAX_LIST_BYTES >> 20} MB, the most for a list")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        fault, advice = f"not UTF-8 at byte {error.start}", f"Save {path.name} as UTF-8."
    except json.JSONDecodeError as error:
        fault = f"not JSON: {error}"
    except (ValueError, RecursionError) as error:
        fault = _reason(error)
    else:
        if isinstance(value, list) and (not is_lines_by_name or _are_objects(value)):
            return value
        fault = f"got a JSON {type(value).__name__}, expected a list of rows"
    if (is_lines_by_name or first == b"{") and _are_lines(data):
        return None
    raise _FileFaultError(fault, advice)


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _are_lines(data: bytes) -> bool:
    """Whether one of the first lines is a JSON object by itself."""
    lines = (line for line in io.BytesIO(data) if line.strip())
    first = [line for line, _ in zip(lines, range(_NUM_LINES_TRIED), strict=False)]
    return len(first) > 1 and any(
        isinstance(_parse_line("", line.strip()).value, dict) for line in first
    )


def _parse_line(place: str, line: bytes) -> Row:
    if len(line) > _MAX_ROW_BYTES:
        fault = f"got {len(line)} bytes, expected at most {_MAX_ROW_BYTES} in a row"
        return Row(place, None, fault)
    try:
        return Row(place, json.loads(line.decode("utf-8"), object_pairs_hook=without_duplicates))
    except UnicodeDecodeError as error:
        return Row(place, None, f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Row(place, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        # A repeated key, or a number with too many digits.
        return Row(place, None, _reason(error))


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
