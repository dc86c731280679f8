"""Writes rows of any form in this package's own: JSON Lines, each row with an id."""

import json
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.leakage import Seen
from interviewmate_mlx.data.records import MAX_FAULTS, iterate_records, own_row, split_files
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
    """

    rows: int
    given_ids: int
    readings: dict[str, int]


def convert_rows(
    source: Path, out: Path, split: str | None = None, replace: bool = False
) -> Converted:
    """Write the rows of a file in this package's own form. One row is in memory at a time.

    A row without an id gets one from its content, which stays the same as long as that does.

    Args:
        source: a file, or a folder of splits.
        out: the new file, `.jsonl`.
        split: which of a folder's, if it has several.
        replace: whether `out` may exist.

    Raises:
        DataError: rows cannot be read, two have the same id or content, or `out` may not be
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
    counts: dict[str, int] = {}
    faults: list[Fault] = []
    num_given = 0
    with atomic_file(out) as temporary, Seen() as ids:
        with temporary.open("w", encoding="utf-8") as file:
            for record in iterate_records(*chosen):
                if isinstance(record, Fault):
                    faults.append(record)
                    continue
                row_id = record.id or content_id(record)
                if first := ids.first(row_id, record.source):
                    fault = f"the same question and answer as {first}, and no id"
                    faults.append(Fault(record.source, fault, "Remove one of them."))
                if len(faults) >= MAX_FAULTS:
                    break
                num_given += not record.id
                counts[record.reading] = counts.get(record.reading, 0) + 1
                file.write(json.dumps(own_row(record, row_id), ensure_ascii=False) + "\n")
        if faults:
            raise data_error(source, faults)
        if not counts:
            raise DataError(f"{source}: no rows.\nAdd some.")
    return Converted(sum(counts.values()), num_given, counts)
