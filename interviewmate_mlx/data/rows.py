"""Reads the rows of a JSONL or JSON file. What a row holds is not checked here."""

import errno
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import DataError, brief
from interviewmate_mlx.files import read_bounded

# A .json file is parsed as a whole, a .jsonl file row by row.
_MAX_BYTES = {".jsonl": 256 << 20, ".json": 16 << 20}
_MAX_ROW_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: its place in the file, for messages: `line 3`, `row 3`.
        value: the parsed JSON; None if there is a fault.
        fault: why it cannot be parsed; empty if it can.
    """

    place: str
    value: Any
    fault: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .json file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.suffix not in _MAX_BYTES:
        raise DataError(
            f"{path}: got a {path.suffix or 'nameless'} file, expected .jsonl or .json."
        )
    try:
        data = read_bounded(path, _MAX_BYTES[path.suffix])
    except OSError as error:
        hint = "Split it into several." if error.errno == errno.EFBIG else "Check its permissions."
        raise DataError(f"Cannot read {path}: {error.strerror}.\n{hint}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    _refuse_encoding(path, data)
    if path.suffix == ".jsonl":
        for number, line in enumerate(io.BytesIO(data), start=1):
            if line.strip():
                yield _parse_line(f"line {number}", line.rstrip(b"\r\n"))
        return
    try:
        rows = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}.\nSave it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: not JSON: {fault}\nCorrect the file and run again.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of rows.")
    yield from (Row(f"row {number}", row) for number, row in enumerate(rows, start=1))


def _refuse_encoding(path: Path, data: bytes) -> None:
    """Raise one DataError for a file in another encoding, instead of a fault for each line."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        found = "UTF-16 or UTF-32"
    else:
        if path.suffix == ".json":
            return
        valid = [_is_utf8(line) for line in io.BytesIO(data) if line.strip()]
        num_bad = valid.count(False)
        if num_bad * 2 <= len(valid):
            return
        found = f"{num_bad} of {len(valid)} lines that are not UTF-8"
    raise DataError(f"{path}: encoding: got {found}, expected UTF-8.\nSave the file as UTF-8.")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parse_line(place: str, line: bytes) -> Row:
    if len(line) > _MAX_ROW_BYTES:
        fault = f"got {len(line)} bytes, expected at most {_MAX_ROW_BYTES} in a row"
        return Row(place, None, fault)
    try:
        return Row(place, json.loads(line.decode("utf-8"), object_pairs_hook=_without_duplicates))
    except UnicodeDecodeError as error:
        return Row(place, None, f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Row(place, None, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Row(place, None, "nested too deeply")
    except ValueError as error:  # a repeated key, or a number with too many digits
        return Row(place, None, str(error))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys: JSON does not define which of them counts."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"got the key {brief(repeated)} more than once, expected each key once")
    return unique
