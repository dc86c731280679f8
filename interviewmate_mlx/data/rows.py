"""Reads the rows of a file: JSON Lines, a JSON list, a table of text, or Parquet.

What a row holds is not checked here. A file's content decides how it is read, because names
are often wrong: a `.json` file may hold JSON Lines, a `.jsonl` file may hold a list or be
packed with gzip. No content is both. All but JSON lists are read row by row, so a file may be
larger than memory.
"""

import errno
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from interviewmate_mlx.data.faults import ROW_ADVICE
from interviewmate_mlx.errors import brief
from interviewmate_mlx.formats.csv_file import TableFault, read_table
from interviewmate_mlx.formats.json_file import without_duplicates
from interviewmate_mlx.formats.parquet_file import ParquetFault, read_parquet

_TABLES = (".csv", ".tsv")
_KINDS_READ = (".jsonl", ".json", *_TABLES, ".parquet")
ENDINGS = (*_KINDS_READ, *(f"{ending}.gz" for ending in _KINDS_READ))
_MAX_UNPACKED = 256 << 20  # bytes, or so many times what they are packed to
_MAX_RATIO = 100
_MAX_LIST_BYTES = 16 << 20  # a list is parsed as a whole: that takes up to 20 times its size
_MAX_ROW_BYTES = 1 << 20
_NUM_LINES_TRIED = 5  # the first line may be the faulty one
_SAMPLE_BYTES = 4 << 20  # in which the encoding is looked at

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_WRAPPERS = ("train", "data")
_MAX_KEYS = 5  # of an object, in a message
_LIST_ADVICE = (
    "Give a list of rows, [{...}, {...}], or JSON Lines: one JSON object a line. pandas writes "
    "these with to_json(path, orient='records', lines=True)."
)
# The first bytes of what is not text, or not rows, and how to make rows of it.
_KINDS = {
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
    """The rows of a file; one row without a place says why it, or its rest, cannot be read."""
    try:
        with _open(path) as file:
            yield from _read_open(path, file)
    except _FileFaultError as error:
        fault, advice = error.args
        yield Row("", None, fault, advice)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Row("", None, f"damaged gzip: {error}", "Pack or download it again.")
    except OSError as error:
        hint = "Split it into several." if error.errno == errno.EFBIG else "Check its permissions."
        yield Row("", None, f"cannot be read: {error.strerror}", hint)


class _FileFaultError(Exception):
    """The file as a whole cannot be read: the fault, and what to do."""


def _open(path: Path) -> IO[bytes]:
    """A file, unpacked as it is read."""
    if not path.name.endswith(ENDINGS):
        kind = path.suffix or "nameless"
        raise _FileFaultError(
            f"got a {kind} file, expected .jsonl or .json, .csv, .tsv or .parquet",
            "Write its rows as JSON Lines, one JSON object a line, or name it so if it holds them.",
        )
    with path.open("rb") as file:
        is_packed = file.read(2) == _GZIP
    return cast("IO[bytes]", _Unpacked(path)) if is_packed else path.open("rb")


class _Unpacked(gzip.GzipFile):
    """A packed file, to a limited size: a small one may stand for terabytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._limit = max(_MAX_UNPACKED, _MAX_RATIO * path.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        if self.tell() > self._limit:
            raise OSError(errno.EFBIG, f"unpacked, it is larger than {self._limit >> 20} MB")
        return data


def _read_open(path: Path, file: IO[bytes]) -> Iterator[Row]:
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    head = file.read(_SAMPLE_BYTES)
    if head.startswith(_PARQUET):
        yield from _read_parquet(path, file)
        return
    _refuse_kind(path, head)
    first = head.lstrip()[:1]
    name = path.name.removesuffix(".gz")
    file.seek(start)
    if name.endswith(_TABLES) and first not in (b"{", b"["):
        _refuse_encoding(path, head)
        yield from _read_table(file, "\t" if name.endswith(".tsv") else "")
        return
    is_lines_by_name = not name.endswith(".json")
    if first and not (is_lines_by_name and first != b"["):
        objects = _parse_list(path, file.read(_MAX_LIST_BYTES + 1), is_lines_by_name)
        if objects is not None:
            yield from (Row(f"row {number}", row) for number, row in enumerate(objects, start=1))
            return
        file.seek(start)
    _refuse_encoding(path, head)
    for number, line, length in _lines(file):
        if line.strip():
            yield _parse_line(f"line {number}", line.rstrip(b"\r\n"), length)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """Each line's number, its first bytes, and its length; no more than a row is kept."""
    number = 0
    while line := file.readline(_MAX_ROW_BYTES + 2):
        number += 1
        length = len(line)
        rest = line
        while not rest.endswith(b"\n") and len(rest) == _MAX_ROW_BYTES + 2:
            rest = file.readline(_MAX_ROW_BYTES + 2)
            length += len(rest)
        yield number, line, length - len(rest[len(rest.rstrip(b"\r\n")) :])


def _read_table(file: IO[bytes], delimiter: str) -> Iterator[Row]:
    try:
        for row in read_table((line for _, line, _ in _lines(file)), delimiter):
            size = sum(len(text) for text in row.cells.values() if text)
            fault = row.fault
            if size > _MAX_ROW_BYTES:
                fault = f"got {size} characters, expected at most {_MAX_ROW_BYTES} in a row"
            yield Row(f"row {row.number}", None if fault else row.cells, fault)
    except TableFault as fault:
        advice = "Correct it, or save the table again as CSV with the names of its columns on top."
        raise _FileFaultError(str(fault), advice) from fault


def _read_parquet(path: Path, file: IO[bytes]) -> Iterator[Row]:
    try:
        with tempfile.NamedTemporaryFile() as unpacked:
            if isinstance(file, _Unpacked):  # a Parquet file is read from its end
                file.seek(0)
                while piece := file.read(1 << 20):
                    unpacked.write(piece)
                unpacked.flush()
                path = Path(unpacked.name)
            with closing(read_parquet(path)) as rows:
                for place, value in rows:
                    is_fault = isinstance(value, str)
                    yield Row(place, None if is_fault else value, value if is_fault else "")
    except ParquetFault as fault:
        raise _FileFaultError(*fault.args) from fault


def _refuse_kind(path: Path, head: bytes) -> None:
    """Refuse what is neither text nor a table."""
    start = head[:64].lstrip().lower()
    for magic, (kind, advice) in _KINDS.items():
        if head.startswith(magic) or (magic.startswith(b"<") and start.startswith(magic)):
            raise _FileFaultError(f"got a {kind} file, expected JSON Lines or a JSON list", advice)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise _encoding_fault(path, "UTF-16 or UTF-32")


def _refuse_encoding(path: Path, head: bytes) -> None:
    """Refuse lines in another encoding all together, instead of with a fault for each."""
    lines = head.splitlines()
    if len(head) == _SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # it may end in the midst of a character
    valid = [_is_utf8_line(line) for line in lines if line.strip()]
    num_bad = valid.count(False)
    if num_bad * 2 > len(valid):
        raise _encoding_fault(path, f"{num_bad} of {len(valid)} lines that are not UTF-8")


def _encoding_fault(path: Path, found: str) -> _FileFaultError:
    return _FileFaultError(f"encoding: got {found}, expected UTF-8", _encoding_advice(path))


def _encoding_advice(path: Path) -> str:
    in_excel = "; Excel calls it CSV UTF-8" if path.name.endswith(_TABLES) else ""
    return f"Save {path.name} as UTF-8{in_excel}."


def _is_utf8_line(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parse_list(path: Path, data: bytes, is_lines_by_name: bool) -> list[Any] | None:
    """The rows of a JSON list; None if the file holds JSON Lines.

    Raises:
        _FileFaultError: it holds neither.
    """
    advice = _LIST_ADVICE
    try:
        if len(data) > _MAX_LIST_BYTES:
            raise ValueError(f"it is larger than {_MAX_LIST_BYTES >> 20} MB, the most for a list")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        fault, advice = f"not UTF-8 at byte {error.start}", _encoding_advice(path)
    except json.JSONDecodeError as error:
        fault = f"not JSON: {error}"
    except (ValueError, RecursionError) as error:
        fault = _reason(error)
    else:
        if isinstance(value, dict) and (rows := _wrapped_rows(value)) is not None:
            return rows
        if isinstance(value, list) and (not is_lines_by_name or _are_objects(value)):
            return value
        fault = f"got {_in_words(value)}, expected a list of rows"
    if (is_lines_by_name or data.lstrip()[:1] == b"{") and _are_lines(data):
        return None
    raise _FileFaultError(fault, advice)


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        keys = [brief(key) for key in value]
        more = ", ..." if len(keys) > _MAX_KEYS else ""
        return f"a JSON object with the keys {', '.join(keys[:_MAX_KEYS]) or '(none)'}{more}"
    kind = "a JSON list" if isinstance(value, list) else "JSON"
    return f"{kind}: {brief(value)}"


def _wrapped_rows(value: dict[str, Any]) -> list[Any] | None:
    """The rows of `{"train": [...]}` or `{"data": [...]}`; None if it is something else.

    Raises:
        _FileFaultError: it holds several lists of rows.
    """
    lists = [key for key, rows in value.items() if isinstance(rows, list) and _are_objects(rows)]
    if not any(key in _WRAPPERS for key in lists):
        return None
    if len(lists) > 1:
        named = ", ".join(brief(key) for key in lists)
        raise _FileFaultError(
            f"got several lists of rows, {named}, expected one",
            "Write each into a file of its own: train.json, valid.json, test.json.",
        )
    rows: list[Any] = value[lists[0]]
    return rows


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _are_lines(data: bytes) -> bool:
    """Whether one of the first lines is a JSON object by itself."""
    lines = (line for line in data.splitlines() if line.strip())
    first = [line for line, _ in zip(lines, range(_NUM_LINES_TRIED), strict=False)]
    return len(first) > 1 and any(
        isinstance(_parse_line("", line.strip()).value, dict) for line in first
    )


def _parse_line(place: str, line: bytes, length: int = 0) -> Row:
    if max(length, len(line)) > _MAX_ROW_BYTES:
        fault = f"got {max(length, len(line))} bytes, expected at most {_MAX_ROW_BYTES} in a row"
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
