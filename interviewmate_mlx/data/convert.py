"""Writes rows of any form in this package's own: JSON Lines, each row with an id."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.leakage import Seen
from interviewmate_mlx.data.records import (
    MAX_FAULTS,
    Record,
    iterate_records,
    own_row,
    split_files,
)
from interviewmate_mlx.data.splits import content_id
from interviewmate_mlx.errors import DataError
from interviewmate_mlx.files import atomic_file


@dataclass(frozen=True)
class Converted:
    """What `convert_rows` did.

    Attributes:
        rows: how many there are.
        given_ids: those that had no id and got one.
        readings: how many rows were understood in each way.
        left_out: the faults of rows that were left out.
    """

    rows: int
    given_ids: int
    readings: dict[str, int]
    left_out: list[Fault]


def convert_rows(
    source: Path,
    out: Path,
    split: str | None = None,
    replace: bool = False,
    skip_faulty: bool = False,
) -> Converted:
    """Write the rows of a file in this package's own form. One row is in memory at a time.

    A row without an id gets one from its content, which stays the same as long as that does.

    Args:
        source: a file, or a folder of splits.
        out: the new file, `.jsonl`.
        split: which of a folder's, if it has several.
        replace: whether `out` may exist.
        skip_faulty: whether rows are left out that cannot be read or were there before.

    Raises:
        DataError: rows are faulty, a file cannot be read to its end, or `out` may not be
            written. Nothing is written then.
        StorageError: it cannot be written.
    """
    if out.suffix != ".jsonl":
        raise DataError(f"{out}: rows are written as JSON Lines.\nGive a file that ends in .jsonl.")
    if out.exists() and not replace:
        raise DataError(f"{out} exists.\nReplace it, or choose another file.", "replace", "out")
    files = split_files(source)
    if split is None and len(files) > 1:
        raise DataError(f"{source} has several splits: {', '.join(files)}.\nName one.", "split")
    chosen = files.get(split or "train")
    if chosen is None:
        raise DataError(f"{source} has no {split} rows, it has {', '.join(files)}.", "split")
    readings: Counter[str] = Counter()
    faults: list[Fault] = []
    num_given = 0
    with atomic_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in _with_ids(iterate_records(*chosen)):
            if isinstance(record, Fault):
                faults.append(record)
                if len(faults) == MAX_FAULTS:
                    break
                continue
            num_given += not record.id
            readings[record.reading] += 1
            row = own_row(record, record.id or content_id(record))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        of_files = {path.name for path in chosen} & {fault.place for fault in faults}
        is_read = bool(readings) and not of_files and len(faults) < MAX_FAULTS
        if faults and not (is_read and skip_faulty):
            error = data_error(source, faults)
            raise DataError(str(error), *(["skip_faulty"] if is_read else []))
        if not readings:
            raise DataError(f"{source}: no rows.\nAdd some.")
    return Converted(readings.total(), num_given, dict(readings), faults)


def _with_ids(found: Iterable[Record | Fault]) -> Iterator[Record | Fault]:
    """Records with an id or content of their own, and the faults of the others."""
    with Seen() as ids:
        for each in found:
            if isinstance(each, Fault):
                yield each
                continue
            first = ids.first(each.id or content_id(each), each.source)
            if not first:
                yield each
            elif not each.id:  # of an id that is taken there is a fault already
                fault = f"the same question and answer as {first}, and no id"
                yield Fault(each.source, fault, "Remove one of them.")
