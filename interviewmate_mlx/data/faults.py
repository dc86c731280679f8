"""What is wrong with rows and files, as values. They are put into words at the end."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.errors import DataError, list_faults

ROW_ADVICE = "Correct or remove these rows."
MAX_SHOWN = 20  # lines in a message
_NUM_PLACES = 3  # of a fault that many rows have; their number is told
_ROW_PLACE = re.compile(r"(.+) (line|row) (\d+)(?: \(.*\))?", re.DOTALL).fullmatch


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, or that is only odd: a warning.

    Attributes:
        place: `rows.jsonl line 3`, or `rows.jsonl` if it is about the file as a whole.
        message: what is wrong: got, expected.
        advice: what to do, in one sentence.
        kind: what many such faults are called together, if their messages differ.
    """

    place: str
    message: str
    advice: str = ROW_ADVICE
    kind: str = ""


def group_faults(faults: Iterable[Fault], complete: bool = False) -> list[str]:
    """One line for each fault; the same fault in many rows of a file makes one line together.

    Such a line counts the rows and names the first. Many faults of one kind make one line,
    too, with the first of them.

    Args:
        faults: any.
        complete: name every row, and each message.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, Fault]]] = {}
    for fault in faults:
        found = _ROW_PLACE(fault.place)
        file, unit, number = found.groups() if found else (fault.place, "", "")
        name = fault.message if complete or not fault.kind else fault.kind
        groups.setdefault((file, unit, name), []).append((number, fault))
    lines = []
    for (file, unit, name), members in groups.items():
        is_kind = any(fault.message != name for _, fault in members)
        if len(members) == 1 or (is_kind and len(members) <= _NUM_PLACES):
            lines += [f"{fault.place}: {fault.message}" for _, fault in members]
            continue
        num_shown = len(members) if complete else _NUM_PLACES
        places = ", ".join(number for number, _ in members[:num_shown])
        more = ", ..." if len(members) > num_shown else ""
        where = f" ({unit}s {places}{more})" if unit else ""
        first = f"; the first: {members[0][1].message}" if is_kind else ""
        lines.append(f"{file}: {name}: {len(members)} rows{where}{first}")
    return lines


def data_error(path: Path, faults: Sequence[Fault], max_shown: int | None = MAX_SHOWN) -> DataError:
    """The error of a file or folder with faults.

    Args:
        path: the file or folder.
        faults: at least one.
        max_shown: the most lines of faults; None for all, with every row named.
    """
    advice = "\n".join(dict.fromkeys(fault.advice for fault in faults))
    if len(faults) == 1 and faults[0].place == path.name:
        return DataError(f"{path}: {faults[0].message}.\n{advice}")
    lines = group_faults(faults, complete=max_shown is None)
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    listed = list_faults(lines, len(lines) if max_shown is None else max_shown)
    return DataError(f"{path}: {count}:\n{listed}\n{advice}")
