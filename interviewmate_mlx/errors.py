"""The errors a user can meet.

    InterviewMateError
    ├── ConfigError      a run's TOML, or an option, is wrong
    ├── BackendError     this machine cannot do what was asked
    ├── ModelError       a model folder is missing, or is no Falcon-RW
    │   └── WeightsError a weights file is damaged, unsafe, or does not fit
    ├── DataError        rows that cannot be trained on
    ├── AdapterError     an adapter folder that does not fit
    ├── HubError         the Hugging Face Hub did not give or take what was asked
    └── TrainingError    a run that cannot start, go on, or resume

A message says what is wrong, where, what was got and what was expected, and
in its last line what to do. The command line prints it and exits with 1;
anything that is not an InterviewMateError is a bug.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


class InterviewMateError(Exception):
    """The root: catch this to catch everything this package raises on purpose."""


class ConfigError(InterviewMateError):
    """A run's TOML, or an option, is wrong."""


class BackendError(InterviewMateError):
    """This machine cannot do what was asked."""


class ModelError(InterviewMateError):
    """A model folder is missing, or is no Falcon-RW."""


class WeightsError(ModelError):
    """A weights file is damaged, unsafe, or does not fit its model."""


class DataError(InterviewMateError):
    """Rows that cannot be trained on."""


class AdapterError(InterviewMateError):
    """An adapter folder that cannot be read, or does not fit the model."""


class HubError(InterviewMateError):
    """The Hugging Face Hub did not give or take what was asked."""


class TrainingError(InterviewMateError):
    """A run that cannot start, go on, or resume."""


def brief(value: object, most: int = 80) -> str:
    """A value as it is written, for a message; cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python shows, or too deeply nested
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def list_faults(faults: Sequence[str], most: int = 10) -> str:
    """Lay out several faults of one kind, one an indented line, the rest counted."""
    lines = [f"  {fault}" for fault in faults[:most]]
    if len(faults) > most:
        lines.append(f"  ... and {len(faults) - most} more")
    return "\n".join(lines)


@contextmanager
def collected(faults: list[InterviewMateError]) -> Iterator[None]:
    """Put the error that ends the block on a list, for `raise_together`."""
    try:
        yield
    except InterviewMateError as error:
        faults.append(error)


def raise_together(faults: Sequence[InterviewMateError], what: str) -> NoReturn:
    """Raise collected errors: a single one as it is, more as a `TrainingError` that holds all."""
    if len(faults) == 1:
        raise faults[0]
    listed = "\n\n".join(f"{type(fault).__name__}: {fault}" for fault in faults)
    raise TrainingError(f"{what}, for {len(faults)} reasons:\n\n{listed}")
