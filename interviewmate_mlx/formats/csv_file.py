"""Reads tables of text: CSV and TSV, row by row, in bounded memory.

What is in a cell is text and nothing else: a formula is not computed.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from interviewmate_mlx.errors import brief

MAX_COLUMNS = 1000
_DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's line above all others
_FAULTS = (  # of Python's reader, by a part of what it says
    ("expected after", 'a quote within a quoted cell, expected two of them: ""'),
    ("new-line character", "a carriage return within a line, expected a quoted cell"),
)


class TableFault(Exception):  # noqa: N818  a value's reason
    """Why a table as a whole, or the rest of it, cannot be read."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        number: as a spreadsheet counts: the names of the columns are row 1.
        cells: text by column; None for a cell that is empty.
        fault: why it cannot be read; "" if it can.
    """

    number: int
    cells: dict[str, str | None]
    fault: str = ""


def read_table(lines: Iterable[bytes], delimiter: str = "") -> Iterator[TableRow]:
    """The rows below the names of the columns.

    Args:
        lines: of the file, with their ends, each of a limited length.
        delimiter: between cells; "" to find it in the first line.

    Raises:
        TableFault: there are no names of columns, or a quote does not close.
    """
    text = _Decoded(lines)
    first = next(iter(text), "")
    if text.fault:
        raise TableFault(text.fault)
    if separator := _SEPARATOR.fullmatch(first):  # a sheet does not show it
        delimiter, first = separator[1], next(iter(text), "")
    if "\r" in _unquoted(first).rstrip("\r\n"):
        raise TableFault("its lines end in carriage returns alone, as those of old Macs")
    delimiter = delimiter or find_delimiter(first)
    text.push(first)
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header = _next(rows, text, 1)
    if header is None or header.fault:
        raise TableFault(header.fault if header else "it has no names of columns in its first row")
    names = [name.strip() for name in header.values]
    while names and not names[-1]:  # as spreadsheets pad rows
        names.pop()
    if len(names) > MAX_COLUMNS:
        raise TableFault(f"it has {len(names)} columns, at most {MAX_COLUMNS} are read")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise TableFault(f"two columns are named {brief(twice[0])}")
    number = 1
    while (row := _next(rows, text, number + 1)) is not None:
        number += 1
        if row.fault:
            yield TableRow(number, {}, row.fault)
        elif any(value.strip() for value in row.values):
            yield _as_row(number, names, row.values)


def find_delimiter(header: str) -> str:
    """What separates the cells of a header: the sign that it has most, outside quotes.

    Raises:
        TableFault: it has two of them equally often.
    """
    plain = _unquoted(header)
    most, second = sorted(_DELIMITERS, key=plain.count, reverse=True)[:2]
    if 0 < plain.count(most) == plain.count(second):
        raise TableFault(
            f"its first row can be read in two ways: as columns between {most!r} or {second!r}"
        )
    return most


def _unquoted(line: str) -> str:
    return "".join(line.split('"')[::2])


@dataclass
class _Values:
    values: list[str]
    fault: str = ""


def _next(rows: Iterator[list[str]], text: "_Decoded", number: int) -> _Values | None:
    """The values of the next row; None at the end."""
    text.fault = ""
    limit = csv.field_size_limit(1 << 20)
    try:
        values = next(rows, None)
    except csv.Error as error:
        if "limit" in str(error):
            raise TableFault(
                f"row {number} holds a cell of more than 1 MB, or a quote that does not close"
            ) from error
        if text.is_over:
            raise TableFault(f"a quote that opens in row {number} does not close") from error
        said = (words for part, words in _FAULTS if part in str(error))
        return _Values([], next(said, str(error)))
    finally:
        csv.field_size_limit(limit)
    if text.fault:
        return _Values([], text.fault)
    return None if values is None else _Values(values)


def _as_row(number: int, names: list[str], values: list[str]) -> TableRow:
    while len(values) > len(names) and not values[-1].strip():
        values.pop()
    if len(values) != len(names):
        got, expected = (f"{count} cell{'' if count == 1 else 's'}" for count in
                         (len(values), len(names)))  # fmt: skip
        columns = brief(", ".join(names))
        return TableRow(number, {}, f"got {got}, expected {expected}, as in row 1: {columns}")
    pairs = zip(names, values, strict=True)
    return TableRow(number, {name: text if text.strip() else None for name, text in pairs if name})


class _Decoded:
    """Lines as text; a line that is not UTF-8 leaves a fault."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self._pushed: list[str] = []
        self.is_over = False
        self.fault = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def push(self, line: str) -> None:
        """Give a line back, to be read again."""
        if line:
            self._pushed.append(line)

    def __next__(self) -> str:
        if self._pushed:
            return self._pushed.pop()
        try:
            line = next(self._lines)
        except StopIteration:
            self.is_over = True
            raise
        if b"\0" in line:
            self.fault = f"a zero byte, at byte {line.index(0)} of the line"
            line = line.replace(b"\0", b"")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = f"not UTF-8 at byte {error.start} of the line"
            return line.decode("utf-8", "replace")
