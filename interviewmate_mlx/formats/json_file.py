"""Reads JSON: the files of a model or adapter folder, and objects without repeated keys."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import InterviewMateError, ModelError, brief
from interviewmate_mlx.files import read_bounded

# The largest tokenizer.json of a public model is 33 MB. Parsed JSON takes up to 20 times that.
_MAX_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a model folder that holds a JSON object.

    Raises:
        ModelError: it cannot be read, is too large, or is not a JSON object.
    """
    return parse_json(path, read_file(path))


def read_file(path: Path) -> bytes:
    """Read the bytes of a JSON or text file of a model folder.

    Raises:
        ModelError: it cannot be read, or is too large.
    """
    try:
        return read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise ModelError(
            f"Cannot read {path}: {error.strerror}.\nCheck the path and its permissions."
        ) from error


def parse_json(
    path: Path,
    data: bytes,
    error_type: type[InterviewMateError] = ModelError,
    hint: str = "Download it again.",
) -> dict[str, Any]:
    """Parse the content of a file that holds a JSON object.

    Args:
        path: for messages only.
        data: the content, in UTF-8.
        error_type: the error to raise.
        hint: what to do; the last line of a message.

    Raises:
        InterviewMateError: of type `error_type`; `data` is not a JSON object.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise error_type(f"{path} is not JSON: {fault}\n{hint}") from error
    if not isinstance(value, dict):
        raise error_type(f"{path}: got a JSON {type(value).__name__}, expected an object.\n{hint}")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys: JSON does not define which of them counts.

    For the argument `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key stands there more than once.
    """
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"got the key {brief(repeated)} more than once, expected each key once")
    return unique
