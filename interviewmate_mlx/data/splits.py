"""Divides rows into train, valid and test: stratified, seeded and permanent.

A row stays in its split for ever. New rows are sorted by category and difficulty, and
within these by a hash of their id. They are then dealt out in this order, so that each
part of it is divided by the same shares.

A row is known again by its id. A row without one gets an id from its question and answer.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.records import Record, read_records, split_files
from interviewmate_mlx.data.rows import read_rows
from interviewmate_mlx.errors import DataError
from interviewmate_mlx.files import atomic_file

SPLITS = ("train", "valid", "test")
SHARES = (0.70, 0.15, 0.15)
_ID_CHARS = 12  # of a hash: among a million rows, a collision has a chance of 1 in 500


@dataclass(frozen=True)
class SplitReport:
    """What `split_rows` did, in numbers of rows."""

    rows: dict[str, int]  # by split, all rows now
    added: dict[str, int]  # by split, new rows
    updated: int  # replaced by a row with the same id, in the same split
    unchanged: int  # there before, and not replaced
    given_ids: int  # rows that had no id and got one


def split_rows(
    sources: list[Path], out: Path, seed: int = 42, shares: tuple[float, float, float] = SHARES
) -> SplitReport:
    """Put the rows of `sources` into `out/{train,valid,test}.jsonl`.

    Rows keep their keys. A row without an id gets one from its question and answer. If a
    row's id is in `out` already, the row replaces the old one in its split. The other rows
    are dealt out. A second call changes nothing. With three rows or more, every split with
    a share above 0 gets at least one. A split without rows has no file.

    Args:
        sources: .jsonl or .json files, or folders of splits; may be empty.
        out: the folder of the three files.
        seed: for the hash that orders the rows.
        shares: of train, valid and test; they sum to 1.

    Raises:
        DataError: the shares are wrong, there are no rows, rows cannot be read, or two
            have the same id or, without ids, the same content. Nothing is written then.
        StorageError: a file cannot be written.
    """
    if not (all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) <= 1e-6):
        raise DataError(f"Shares: got {shares}, expected three from 0 to 1 that sum to 1.")
    files = {split: out / f"{split}.jsonl" for split in SPLITS}
    num_given = 0
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    held: dict[str, str] = {}
    for split, path in files.items():
        kept[split], given = _read(path) if _has_rows(path) else ({}, 0)
        num_given += given
        if shared := held.keys() & kept[split].keys():
            row_id = min(shared)
            raise DataError(
                f"{out}: id {row_id!r} is in {held[row_id]}.jsonl and in {path.name}.\n"
                "Remove it from one of them."
            )
        held |= dict.fromkeys(kept[split], split)
    new: dict[str, dict[str, Any]] = {}
    num_updated = 0
    for source in _files(sources):
        rows, given = _read(source)
        num_given += given
        for row_id, row in rows.items():
            if row_id in new:
                raise DataError(f"{source}: id {row_id!r} is in another source too.\nRename one.")
            if row_id in held:
                num_updated += kept[held[row_id]][row_id] != row
                kept[held[row_id]][row_id] = row
            else:
                new[row_id] = row
    if not new and not held:
        raise DataError(f"Nothing to split: {out} holds no rows.\nGive files with rows.")
    num_held = {split: len(rows) for split, rows in kept.items()}
    in_order = sorted(new, key=lambda row_id: _sort_key(new[row_id], row_id, seed))
    for row_id, split in zip(
        in_order, _deal([len(kept[s]) for s in SPLITS], len(new), shares), strict=True
    ):
        kept[split][row_id] = new[row_id]
    for split, rows in kept.items():
        text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(rows))
        path = files[split]
        if not rows:
            path.unlink(missing_ok=True)  # an empty file may be there
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return SplitReport(
        rows={split: len(rows) for split, rows in kept.items()},
        added={split: len(rows) - num_held[split] for split, rows in kept.items()},
        updated=num_updated,
        unchanged=len(held) - num_updated,
        given_ids=num_given,
    )


def _has_rows(path: Path) -> bool:
    return path.is_file() and bool(path.read_bytes().strip())


def _files(sources: list[Path]) -> list[Path]:
    """The sources, with each folder replaced by the files of its splits."""
    return [file for source in sources for files in split_files(source).values() for file in files]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The rows of a file by id, and how many of them got their id here."""
    records = read_records(path)  # raises all faults of the rows
    rows: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    faults = []
    for record, row in zip(records, read_rows(path), strict=True):
        row_id = record.id or content_id(record)
        if row_id in rows:
            fault = f"the same question and answer as {sources[row_id]}, and no id"
            faults.append(Fault(record.source, fault, "Remove one of them."))
        sources[row_id] = record.source
        rows[row_id] = row.value if record.id else {"id": row_id} | _without_id(row.value)
    if faults:
        raise data_error(path, faults)
    return rows, sum(not record.id for record in records)


def _without_id(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "id"}  # it may be null


def content_id(record: Record) -> str:
    """An id that stays the same as long as a row's question and answer do.

    White space around a text, the order of the keys, and labels do not matter.
    """
    turns = [[message.role, message.content.strip()] for message in record.messages]
    content = turns or [["prompt", record.prompt], ["completion", record.completion]]
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARS]


def _sort_key(row: dict[str, Any], row_id: str, seed: int) -> tuple[str, str, str]:
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()
    by_name = {key.strip().casefold(): value for key, value in row.items()}
    return str(by_name.get("category") or ""), str(by_name.get("difficulty") or ""), digest


def _deal(held: list[int], num_new: int, shares: tuple[float, float, float]) -> list[str]:
    """The split of each new row in order, so that old and new rows together fit the shares.

    Args:
        held: rows that each split has already.
        num_new: new rows.
        shares: of each split.
    """
    total = sum(held) + num_new
    targets = [int(total * share + 1e-9) for share in shares]
    last = max(i for i in range(3) if shares[i] > 0)
    targets[last] += total - sum(targets)
    for i in range(3):
        if total >= 3 and shares[i] > 0 and not targets[i]:
            targets[targets.index(max(targets))] -= 1
            targets[i] = 1
    missing = [max(0, target - count) for target, count in zip(targets, held, strict=True)]
    missing[0] += num_new - sum(missing)  # a change only if `held` is far from the shares
    dealt, result = [0, 0, 0], []
    for position in range(1, num_new + 1):
        deficits = [missing[i] * position / num_new - dealt[i] for i in range(3)]
        chosen = deficits.index(max(deficits))
        dealt[chosen] += 1
        result.append(SPLITS[chosen])
    return result
