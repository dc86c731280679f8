"""Reads the rows of a Parquet file, in a process of its own.

Arrow's reader is large, and a file of a stranger may name any sizes. So it runs in a process
whose memory and time are limited; it sends rows as JSON, and if it dies, that is a message.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

MAX_COLUMNS = 1000
_MAX_MEMORY = 3 << 30  # of the reading process, with all that it maps
_MAX_SECONDS = 600  # of computing
_BATCH_ROWS = 64
_MAX_ROW_CHARS = 1 << 20
_MAX_REPLY_BYTES = 128 << 20


class ParquetFault(Exception):  # noqa: N818  a value's reason
    """Why a file, or the rest of it, cannot be read; and what to do."""


def read_parquet(path: Path) -> Generator[tuple[str, Any], None, None]:
    """The place and the content of each row: `group 0 row 1`, as row groups are counted.

    A content is a dictionary, or a text that says why the row cannot be read.

    Raises:
        ParquetFault: pyarrow is not installed, or the file is damaged or too large to read.
    """
    if find_spec("pyarrow") is None:
        raise ParquetFault(
            "Parquet needs pyarrow, which is not installed",
            'Install it: pip install "interviewmate-mlx[parquet]".',
        )
    # By its file, which needs nothing of this package: it may not be installed, only be found.
    words = [sys.executable, "-P", __file__, str(path.resolve())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield from _receive(process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _receive(replies: IO[bytes]) -> Iterator[tuple[str, Any]]:
    advice = "Download or write it again."
    while reply := replies.readline(_MAX_REPLY_BYTES):
        if not reply.endswith(b"\n"):
            break
        what, *rest = json.loads(reply)
        if what == "end":
            return
        if what == "fault":
            raise ParquetFault(*rest, advice)
        group, first, rows = rest
        for number, row in enumerate(rows, start=first):
            yield f"group {group} row {number}", row
    raise ParquetFault(
        f"the reader of Parquet died: the file is damaged, or needs more than "
        f"{_MAX_MEMORY >> 30} GB of memory to read",
        advice,
    )


# What follows runs in the reading process.


def _serve(path: str) -> None:
    _limit()
    try:
        _send_rows(path)
    except Exception as error:  # whatever Arrow says of a damaged file
        _send("fault", f"damaged Parquet: {' '.join(str(error).split())[:300]}")


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_AS, _MAX_MEMORY),
        (resource.RLIMIT_CPU, _MAX_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has no limit on memory
            resource.setrlimit(what, (most, most))


def _send_rows(path: str) -> None:
    from pyarrow import parquet, types  # noqa: PLC0415  only in the reading process

    file = parquet.ParquetFile(path)
    schema = file.schema_arrow
    if len(schema.names) > MAX_COLUMNS:
        _send("fault", f"it has {len(schema.names)} columns, at most {MAX_COLUMNS} are read")
        return
    if len(set(schema.names)) < len(schema.names):
        _send("fault", "two of its columns have the same name")
        return
    # Pictures and sounds are bytes within a structure, and large: they are named, not read.
    unread = [f.name for f in schema if types.is_nested(f.type) and "binary" in str(f.type)]
    columns = [name for name in schema.names if name not in unread]
    for group in range(file.num_row_groups):
        number = 1
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        for batch in batches:
            rows = [_as_json(row, unread) for row in batch.to_pylist()]
            _write(f'["rows", {group}, {number}, [{", ".join(rows)}]]')
            number += len(rows)
        if number - 1 != file.metadata.row_group(group).num_rows:
            said = file.metadata.row_group(group).num_rows
            _send("fault", f"row group {group} says {said} rows and holds {number - 1}")
            return
    _send("end")


def _as_json(row: dict[str, Any], unread: list[str]) -> str:
    row |= dict.fromkeys(unread, "<binary>")
    text = json.dumps(row, default=_as_text)
    if len(text) > _MAX_ROW_CHARS:
        return json.dumps(f"got {len(text)} characters, expected at most {_MAX_ROW_CHARS} in a row")
    return text


def _as_text(value: Any) -> str:
    """What JSON does not have: bytes, which old writers make of text, dates, decimals."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "<binary>"
    return str(value)


def _send(*reply: Any) -> None:
    _write(json.dumps(reply))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
