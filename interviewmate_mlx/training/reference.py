"""What a model gave its preferences before training; computed once, kept beside the run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.formats.safetensors_file import save_tensors
from interviewmate_mlx.training.preference import WITH_REFERENCE, log_probabilities
from interviewmate_mlx.training.task import Task

REFERENCE_FILE = "reference.safetensors"
_TENSOR = "log_probabilities"


def with_references(task: Task, out: Path) -> Task:
    """A task whose rows know what the model gives them as it stands; others stay as they are.

    The model must be as the run begins. A fresh LoRA changes nothing, so that is the base; a
    run that starts from an adapter is compared with that one. A file that is there already is
    taken if it is of the same base, start and rows.

    Raises:
        StorageError: the file cannot be written.
    """
    if task.run.train.method not in WITH_REFERENCE:
        return task
    found = _read(out, task.fingerprint)
    if found is None:
        answers = [answer for row in task.rows.all for answer in row.compared]
        found = log_probabilities(task.model, answers, task.executor, task.memory.step_tokens)
        _write(out, found, task.fingerprint)
    values = iter(found.reshape(-1, 2).tolist())
    train, valid = (
        [row.with_references(next(values)) for row in rows]
        for rows in (task.rows.train, task.rows.valid)
    )
    return replace(task, rows=replace(task.rows, train=train, valid=valid))


def _write(out: Path, found: np.ndarray, fingerprint: dict[str, str]) -> None:
    metadata = {"of": json.dumps(fingerprint), "sha256": _hash(found)}
    with atomic_file(out / REFERENCE_FILE) as temporary:
        save_tensors(temporary, {_TENSOR: mx.array(found)}, metadata)


def _read(out: Path, fingerprint: dict[str, str]) -> np.ndarray | None:
    """What was kept; None if there is nothing, or it is damaged or of another run."""
    path = out / REFERENCE_FILE
    if not path.is_file():
        return None
    try:
        read: Any = mx.load(str(path), return_metadata=True)
        loaded, metadata = read
        found = np.array(loaded[_TENSOR])
        is_ours = json.loads(metadata["of"]) == fingerprint and metadata["sha256"] == _hash(found)
    except (RuntimeError, ValueError, KeyError):
        return None
    return found if is_ours else None


def _hash(found: np.ndarray) -> str:
    return hashlib.sha256(found.tobytes()).hexdigest()
