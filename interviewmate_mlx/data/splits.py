"""Rows into train, valid and test: stratified, seeded, and for good.

A row that a split holds stays there. New rows are lined up by category and
difficulty, within these by a hash of their id, and dealt out along the line so
that each stretch of it gets its share of each split.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.records import read_records, split_files
from interviewmate_mlx.data.rows import read_rows
from interviewmate_mlx.errors import DataError, list_faults
from interviewmate_mlx.files import atomic_file

SPLITS = ("train", "valid", "test")
SHARES = (0.70, 0.15, 0.15)


@dataclass(frozen=True)
class SplitReport:
    """What a split came to, in rows."""

    rows: dict[str, int]  # by split, all that it holds now
    added: dict[str, int]  # by split, those that it did not hold before
    updated: int  # replaced where they were, by a row with the same id
    unchanged: int  # held before, and as they were


def split_rows(
    sources: list[Path], out: Path, seed: int = 42, shares: tuple[float, float, float] = SHARES
) -> SplitReport:
    """Put the rows of `sources` into `out/{train,valid,test}.jsonl`.

    Rows keep their keys. A row whose id `out` holds replaces that row where it
    is; the others are dealt out. Doing it again changes nothing. From three rows
    on, a split whose share is above 0 gets one at least; a split without rows
    has no file.

    Args:
        sources: .jsonl or .json files, or folders of splits; may be empty.
        out: the folder of the three files.
        seed: of the hash that orders the rows.
        shares: of train, valid and test; they sum to 1.

    Raises:
        DataError: no such shares, no rows at all, or some that cannot be read or have
            no id of their own; nothing is written.
    """
    if not (all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) <= 1e-6):
        raise DataError(f"Shares: got {shares}, expected three from 0 to 1 that sum to 1.")
    files = {split: out / f"{split}.jsonl" for split in SPLITS}
    kept = {split: _read(path) if _has_rows(path) else {} for split, path in files.items()}
    held = {row_id: split for split, rows in kept.items() for row_id in rows}
    new: dict[str, dict[str, Any]] = {}
    num_updated = 0
    for source in _files(sources):
        for row_id, row in _read(source).items():
            if row_id in new:
                raise DataError(f"{source}: id {row_id!r} is in another source too.\nRename one.")
            if row_id in held:
                num_updated += kept[held[row_id]][row_id] != row
                kept[held[row_id]][row_id] = row
            else:
                new[row_id] = row
    if not new and not held:
        raise DataError(f"Nothing to split: {out} holds no rows.\nName the files that do.")
    num_held = {split: len(rows) for split, rows in kept.items()}
    line = sorted(new, key=lambda row_id: _place(new[row_id], row_id, seed))
    for row_id, split in zip(
        line, _deal([len(kept[s]) for s in SPLITS], len(new), shares), strict=True
    ):
        kept[split][row_id] = new[row_id]
    for split, rows in kept.items():
        text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows))
        path = files[split]
        if not rows:
            path.unlink(missing_ok=True)  # it was empty
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return SplitReport(
        rows={split: len(rows) for split, rows in kept.items()},
        added={split: len(rows) - num_held[split] for split, rows in kept.items()},
        updated=num_updated,
        unchanged=len(held) - num_updated,
    )


def _has_rows(path: Path) -> bool:
    return path.is_file() and bool(path.read_bytes().strip())


def _files(sources: list[Path]) -> list[Path]:
    """The sources, a folder replaced by the files of its splits."""
    return [
        file
        for source in sources
        for file in (split_files(source).values() if source.is_dir() else [source])
    ]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file as they are, by id."""
    records = read_records(path)  # all faults of the rows
    rows = [row.value for row in read_rows(path)]
    faults = [f"{record.source}: no id" for record in records if not record.id]
    if faults:
        raise DataError(
            f"{path}: rows need ids, so that each stays in its split for good:\n"
            f"{list_faults(faults)}\n"
            'Give each row an "id" of its own that never changes, such as a running number.'
        )
    return {record.id: row for record, row in zip(records, rows, strict=True)}


def _place(row: dict[str, Any], row_id: str, seed: int) -> tuple[str, str, str]:
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()
    return str(row.get("category", "")), str(row.get("difficulty", "")), digest


def _deal(held: list[int], num_new: int, shares: tuple[float, float, float]) -> list[str]:
    """The split of each new row in line, so that all rows together come out at the shares."""
    total = sum(held) + num_new
    targets = [int(total * share + 1e-9) for share in shares]
    last = max(i for i in range(3) if shares[i] > 0)
    targets[last] += total - sum(targets)
    for i in range(3):
        if total >= 3 and shares[i] > 0 and not targets[i]:
            targets[targets.index(max(targets))] -= 1
            targets[i] = 1
    wanted = [max(0, target - count) for target, count in zip(targets, held, strict=True)]
    wanted[0] += num_new - sum(wanted)  # only where `out` was far from the shares
    dealt, result = [0, 0, 0], []
    for position in range(1, num_new + 1):
        behind = [wanted[i] * position / num_new - dealt[i] for i in range(3)]
        chosen = behind.index(max(behind))
        dealt[chosen] += 1
        result.append(SPLITS[chosen])
    return result
