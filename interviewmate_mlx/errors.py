"""The errors a user can meet.

    InterviewMateError
    ├── ConfigError      a run's TOML, or an option, is wrong
    ├── BackendError     this machine cannot do what was asked
    ├── StorageError     a file cannot be written, or a disk is too small
    ├── ModelError       a model folder is missing or not supported
    │   └── WeightsError a weights file is damaged, unsafe, or does not fit
    ├── DataError        rows that cannot be trained on
    ├── AdapterError     an adapter folder that does not fit
    ├── HubError         the Hugging Face Hub did not give or take what was asked
    └── TrainingError    a run that cannot start, go on, or resume
        └── DivergedError  a loss or gradient was not finite

A message says what is wrong, where, what was got and what was expected, and
in its last line what to do. The command line prints it and exits with 1.
Any other exception is a bug in this package.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
_FAILED = object()


class InterviewMateError(Exception):
    """The root: catch this to catch everything this package raises on purpose.

    Attributes:
        arguments: names of the arguments that would avoid the error, if there are any; the
            command line says which options they are.
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments


class ConfigError(InterviewMateError):
    """A run's TOML, or an option, is wrong."""


class BackendError(InterviewMateError):
    """This machine cannot do what was asked."""


class StorageError(InterviewMateError):
    """A file or folder cannot be written, or its disk is too small."""


class ModelError(InterviewMateError):
    """A model folder is missing or not supported."""


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


class DivergedError(TrainingError):
    """A loss, a gradient or an updated parameter was not finite."""


def brief(value: object, max_chars: int = 80) -> str:
    """A value's repr for a message, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python shows, or too deeply nested
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def one_line(error: BaseException, max_chars: int = 500) -> str:
    """An error's text for a message, on one line, shortened if it is long."""
    text = " ".join(str(error).split())
    return f"{text[:max_chars]}{'...' if len(text) > max_chars else ''}"


def list_faults(faults: Sequence[str], max_shown: int = 10) -> str:
    """Several faults of one kind, one indented line each; those above the limit are counted."""
    lines = [f"  {fault}" for fault in faults[:max_shown]]
    if len(faults) > max_shown:
        lines.append(f"  ... and {len(faults) - max_shown} more")
    return "\n".join(lines)


def redact_secrets(text: str) -> str:
    """Replace what looks like a Hub token, or like a password in an address, by `***`."""
    text = re.sub(r"\b(hf|api)_\w{6,}", "***", text)
    return re.sub(r"://[^/@\s]+@", "://***@", text)


class Checks:
    """Runs steps that need each other's results, and raises all their errors together.

    A step is left out if one that it needs has failed:

        checks = Checks("The run cannot start")
        rows = checks.run(read_rows, path)
        model = checks.run(build_model, config)
        plan = checks.run(plan_memory, model, rows)
        checks.raise_faults()  # from here on all three are values
    """

    def __init__(self, what: str) -> None:
        """
        Args:
            what: the first words of the message if several steps fail.
        """
        self._what = what
        self._faults: list[InterviewMateError] = []

    def run(self, step: Callable[..., Result], *needed: Any) -> Result:
        """Call a step with what it needs, some of it perhaps from earlier steps."""
        failed: Any = _FAILED
        if any(value is _FAILED for value in needed):
            return failed
        try:
            return step(*needed)
        except InterviewMateError as error:
            self._faults.append(error)
            return failed

    def raise_faults(self) -> None:
        """Raise the only error as it is, or several as one `TrainingError`; none: do nothing."""
        if len(self._faults) == 1:
            raise self._faults[0]
        if self._faults:
            listed = "\n\n".join(f"{type(fault).__name__}: {fault}" for fault in self._faults)
            raise TrainingError(f"{self._what}, for {len(self._faults)} reasons:\n\n{listed}")
