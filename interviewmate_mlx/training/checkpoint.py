"""The exact state of a run, in one file.

`checkpoints/step-000053.safetensors` holds the adapter, the optimizer's moments
and the best adapter so far as tensors, and all else as JSON in the file's
metadata. One file is there or not; there is no half of a save.

No random state is kept: the order of an epoch and the dropout of a step follow
from the seed and the step alone.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import atomic_file

FOLDER = "checkpoints"
KEEP = 2  # the newest; one more than needed, should the newest be damaged


@dataclass
class State:
    """Where a run stands after `step` updates."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None  # validation loss at best_step
    bad_validations: int = 0  # in a row, without a new best
    token_budget: int = 0  # of a microbatch; kept, so that a resumed run splits steps alike
    fingerprint: dict[str, str] = field(default_factory=dict)  # of base and data


Tensors = dict[str, dict[str, mx.array]]  # by group: adapter, optimizer, best


def save_checkpoint(out: Path, state: State, tensors: Tensors) -> Path:
    """Write one checkpoint, then remove those that are older than the newest few."""
    path = out / FOLDER / f"step-{state.step:06d}.safetensors"
    flat = {f"{group}/{name}": a for group, arrays in tensors.items() for name, a in arrays.items()}
    with atomic_file(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), flat, metadata={"state": json.dumps(asdict(state))})
        except RuntimeError as error:
            raise TrainingError(
                f"Cannot write {path}: {error}\nMake room on the disk, then go on with --resume."
            ) from error
    for old in checkpoints(out)[:-KEEP]:
        old.unlink()
    return path


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    return sorted((out / FOLDER).glob("step-*.safetensors"))


def load_checkpoint(path: Path) -> tuple[State, Tensors]:
    """Read one checkpoint.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        flat, meta = loaded
        state = State(**json.loads(meta["state"]))
        mx.eval(flat)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} is damaged: {error}\nRemove it to resume from the one before."
        ) from error
    tensors: Tensors = {"adapter": {}, "optimizer": {}, "best": {}}
    for key, array in flat.items():
        group, _, name = key.partition("/")
        tensors[group][name] = array
    return state, tensors
