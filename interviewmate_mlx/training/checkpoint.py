"""The exact state of a run, in one file.

`checkpoints/step-000053.safetensors` holds the adapter (or all weights, where these are
trained), the optimizer's moments and the best adapter so far as tensors. The rest is JSON in
the file's metadata, with a hash over everything. A save is one file, so it exists whole or
not at all.

No random state is saved: the order of an epoch and the dropout of a row follow
from the seed, the step and its tokens alone.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map_with_path

from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import TrainingError, WeightsError, list_faults
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.formats.safetensors_file import save_tensors
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.optimizer import num_single
from interviewmate_mlx.training.ranks import Ranks

FOLDER = "checkpoints"
PATTERN = "step-*.safetensors"


@dataclass
class State:
    """Where a run stands after `step` updates."""

    run: str  # TOML, every key resolved
    step: int = 0
    best_step: int = 0
    best_loss: float | None = None  # validation loss at best_step
    bad_validations: int = 0  # in a row, without a new best
    token_budget: int = 0  # of the memory plan; a resumed run must split its steps alike
    fingerprint: dict[str, str] = field(default_factory=dict)  # of base and data
    versions: dict[str, str] = field(default_factory=dict)  # of what the bytes depend on


Tensors = dict[str, dict[str, mx.array]]  # by group: adapter, optimizer, best


@dataclass(frozen=True)
class Saved:
    """A run as it was last saved."""

    state: State
    tensors: Tensors
    damaged: dict[Path, str]  # newer checkpoints that are damaged, and how


def save_checkpoint(out: Path, state: State, tensors: Tensors, keep: int) -> Path:
    """Write one checkpoint, then remove all but the newest `keep`.

    Raises:
        StorageError: it cannot be written; earlier ones stay.
    """
    path = out / FOLDER / f"step-{state.step:06d}.safetensors"
    flat = _flat(tensors)
    text = json.dumps(asdict(state))
    with atomic_file(path) as temporary:
        save_tensors(temporary, flat, {"state": text, "sha256": _hash(text, flat)})
    prune(out, keep)
    return path


def disk_bytes(run: RunConfig, model: Network) -> int:
    """Bytes that a run takes on the disk.

    Each checkpoint holds what is trained and two moments in float32, and the best so far; weights
    narrower than float32 are two in place of one: they and their masters, with the best as narrow.
    One more than is kept exists while it is written. So do two models, where that is what is
    written.
    """
    trained = named_arrays(model.trainable_parameters()).values()
    num_trained = sum(array.size for array in trained)
    written = 2 * sum(array.nbytes for array in trained) if run.train.weights == "all" else 0
    numbers = 4 * num_trained - num_single(run.train.optimizer, model)
    return 4 * numbers * (run.train.keep_checkpoints + 1) + written


def prune(out: Path, keep: int) -> None:
    """Remove all checkpoints but the newest few."""
    for old in checkpoints(out)[:-keep]:
        old.unlink()


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    return sorted((out / FOLDER).glob(PATTERN))


def load_newest(out: Path) -> Saved | None:
    """Read the newest checkpoint that is whole; None where there are none at all.

    Raises:
        TrainingError: all are damaged, or another version of this package wrote it.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(out)):
        try:
            state, tensors = load_checkpoint(path)
        except WeightsError as error:
            damaged[path] = str(error)
        else:
            return Saved(state, tensors, damaged)
    if damaged:
        faults = [f"{path.name}: {fault}" for path, fault in damaged.items()]
        raise TrainingError(
            f"{out / FOLDER} holds no checkpoint that is whole:\n{list_faults(faults)}\n"
            "Restore one, or train again into another folder.",
            "out",
        )
    return None


def load_checkpoint(path: Path) -> tuple[State, Tensors]:
    """Read one checkpoint.

    Raises:
        WeightsError: it is damaged.
        TrainingError: it is whole, and of another version of this package.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        flat, metadata = loaded
        mx.eval(flat)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"damaged: {error}") from error
    if not {"state", "sha256"} <= metadata.keys():
        raise WeightsError("damaged: it says neither the run's state nor its hash")
    text = metadata["state"]
    if _hash(text, flat) != metadata["sha256"]:
        raise WeightsError("damaged: its bytes are not those that were written")
    try:
        return State(**json.loads(text)), _grouped(flat)
    except (TypeError, KeyError) as error:
        raise TrainingError(
            f"{path} was written by another version of this package: {error}\n"
            "Use that version, or train again into another folder.",
            "out",
        ) from error


def saved_of_first(ranks: Ranks, saved: Saved | None) -> Saved | None:
    """What the first rank has read, on all ranks; it alone knows of damaged files."""
    state = ranks.from_first(asdict(saved.state) if saved else None)
    if state is None:
        return None
    tensors = ranks.tensors_from_first(_flat(saved.tensors) if saved else {})
    return saved or Saved(State(**state), _grouped(tensors), {})


def _flat(tensors: Tensors) -> dict[str, mx.array]:
    return {f"{group}/{name}": a for group, arrays in tensors.items() for name, a in arrays.items()}


def _grouped(flat: dict[str, mx.array]) -> Tensors:
    tensors: Tensors = {"adapter": {}, "optimizer": {}, "best": {}}
    for key, array in flat.items():
        group, _, name = key.partition("/")
        tensors[group][name] = array
    return tensors


def restore(saved: Saved, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """Put a checkpoint's numbers into model and optimizer, in place.

    Returns:
        The best adapter so far, in the model's order; empty if there is none yet.
    """
    best = saved.tensors["best"]
    put_numbers(model, optimizer, saved.tensors["adapter"], saved.tensors["optimizer"])
    # The order decides the bytes of the adapter's file.
    names = named_arrays(model.trainable_parameters())
    saved.tensors.clear()  # all weights of a base, and their moments, would stay twice
    return {name: best[name] for name in names if name in best}


def put_numbers(
    model: nn.Module,
    optimizer: optim.Optimizer,
    trained: dict[str, mx.array],
    moments: dict[str, mx.array],
) -> None:
    """Put what is trained into a model, and an optimizer's state into it, in place."""
    model.load_weights(list(trained.items()), strict=False)
    optimizer.state.update(tree_map_with_path(lambda name, _: moments[name], optimizer.state))


def set_aside(damaged: dict[Path, str]) -> list[str]:
    """Rename damaged checkpoints, so that none is taken for the newest; say so of each."""
    notes = []
    for path, fault in damaged.items():
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        notes.append(f"{path} is {fault}; it was set aside as {aside.name}")
    return notes


def _hash(state: str, tensors: dict[str, mx.array]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        # numpy has no bfloat16.
        array = np.asarray(tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
