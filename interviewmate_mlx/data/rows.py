"""The rows of a JSONL or JSON file, whatever they hold."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import DataError, brief

# What a file may hold, so that reading it takes a bounded share of memory and time. A .json
# file is held as a whole, a .jsonl file row by row.
_MOST_BYTES = {".jsonl": 256 << 20, ".json": 16 << 20}
_MOST_ROW_BYTES = 1 << 20


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row's place, and its parser (.jsonl) or value (.json).

    A parser raises ValueError, or RecursionError where a row is nested too deeply.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"{path}: got a {path.suffix or 'nameless'} file, expected .jsonl or .json."
        )
    most = _MOST_BYTES[path.suffix]
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}.\nCheck the path and who may read it."
        ) from error
    if len(data) > most:
        raise DataError(
            f"{path}: got more than {most >> 20} MB, expected at most that in one file.\n"
            "Split it into several."
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    _refuse_encoding(path, data)
    if path.suffix == ".jsonl":
        for number, line in enumerate(io.BytesIO(data), start=1):
            if line.strip():
                yield f"line {number}", _parser(line.rstrip(b"\r\n"))
        return
    try:
        rows = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}.\nSave it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: not JSON: {fault}\nMend that place and run again.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of rows.")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _refuse_encoding(path: Path, data: bytes) -> None:
    """Raise DataError for a file in another encoding, rather than a fault for each line."""
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


def _parser(line: bytes) -> Callable[[], Any]:
    def parse() -> Any:
        if len(line) > _MOST_ROW_BYTES:
            raise ValueError(f"got {len(line)} bytes, expected at most {_MOST_ROW_BYTES} in a row")
        try:
            return json.loads(line.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error

    return parse


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice JSON does not say which one counts."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"got the key {brief(repeated)} more than once, expected each key once")
    return unique
