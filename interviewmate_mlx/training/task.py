"""A run with all that it works on, loaded and checked before the first step."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.data.batches import steps_per_epoch
from interviewmate_mlx.data.prompts import Example, encode_records
from interviewmate_mlx.data.records import Record, load_splits
from interviewmate_mlx.errors import (
    BackendError,
    DataError,
    InterviewMateError,
    TrainingError,
    collected,
    raise_together,
)
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.model.lora import add_lora, count_parameters
from interviewmate_mlx.model.recompute import recompute_blocks
from interviewmate_mlx.training.memory import MemoryPlan, plan_memory
from interviewmate_mlx.weights.base import (
    build_base,
    find_base,
    hash_base,
    hash_weights,
    is_here,
    load_base_tokenizer,
    read_weights,
)
from interviewmate_mlx.weights.names import find_data


@dataclass(frozen=True)
class Task:
    """A run with all that it works on, loaded and checked."""

    run: RunConfig
    model: Model
    train: list[Example]
    valid: list[Example]
    num_cut_rows: int
    num_dropped_rows: int
    memory: MemoryPlan
    fingerprint: dict[str, str]
    base_hash: str  # of its weights, for the adapter to tell

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train), self.run.train.effective_batch)

    @property
    def total_steps(self) -> int:
        return self.run.train.epochs * self.steps_per_epoch


def prepare(
    run: RunConfig,
    progress: Progress | None = None,
    out: Path | None = None,
    began: dict[str, str] | None = None,
    token_budget: int | None = None,
) -> Task:
    """Load and check the base and the data of a run, and put the LoRA on.

    Everything is checked before the weights are read, and a base is not pulled for a
    run whose data is at fault.

    Args:
        run: what to train.
        progress: bytes done and in all, while base or data is pulled.
        out: where the run will write; the disk is checked. None: it writes nothing.
        began: the fingerprint of the run that goes on.
        token_budget: of the run that goes on, which splits its steps.

    Raises:
        InterviewMateError: what is missing, faulty or changed, all of it.
    """
    faults: list[InterviewMateError] = []
    splits: dict[str, list[Record]] = {}
    folder, rows, model, memory = None, None, None, None
    with collected(faults):
        splits = load_splits(find_data(run.data.path, progress))
    if splits or is_here(run.model.base):
        with collected(faults):
            folder = find_base(run.model.base, progress)
            tokenizer = load_base_tokenizer(folder)
            if splits:
                rows = encode_rows(run, splits, tokenizer)
    if folder and rows:
        fingerprint = {"base": hash_base(folder), "data": _hash_examples(rows.all)}
        if began:
            check_unchanged(fingerprint, began)
    if folder:
        with collected(faults):
            model = build_model(run, folder)
            if out:
                check_disk(run, model, out)
    if model and rows:
        with collected(faults):
            here = backend.machine()
            memory = plan_memory(
                model,
                rows.all,
                run.train.effective_batch,
                itemsize=backend.resolve_dtype(run.model.dtype).size,
                keeps_scores=not takes_cpu_kernels(run),
                recomputes=run.train.gradient_checkpointing,
                memory_bytes=memory_for(run),
                num_streams=here.cpu_streams,
                token_budget=token_budget,
            )
    if faults or not (folder and rows and model and memory):
        raise_together(faults, f"The run {run.name} cannot start")
    read_weights(model, folder)
    return Task(
        run=run,
        model=model,
        train=rows.train,
        valid=rows.valid,
        num_cut_rows=sum(example.num_cut > 0 for example in rows.all),
        num_dropped_rows=rows.num_dropped,
        memory=memory,
        fingerprint=fingerprint,
        base_hash=hash_weights(folder),
    )


@dataclass(frozen=True)
class Rows:
    """What a run learns from and is validated on."""

    train: list[Example]
    valid: list[Example]
    num_dropped: int

    @property
    def all(self) -> list[Example]:
        return self.train + self.valid


def encode_rows(run: RunConfig, splits: dict[str, list[Record]], tokenizer: Any) -> Rows:
    """Encode a run's rows.

    Raises:
        DataError: none has anything left to learn from.
    """
    data = run.data
    (train, train_dropped), (valid, valid_dropped) = (
        encode_records(tokenizer, splits.get(split, []), data.max_length, data.train_on)
        for split in ("train", "valid")
    )
    if not train:
        raise DataError(
            f"{data.path}: of {len(train_dropped)} rows none has a token left to learn from after "
            f"{data.max_length} tokens.\nRaise data.max_length."
        )
    return Rows(train, valid, len(train_dropped) + len(valid_dropped))


def build_model(run: RunConfig, folder: Path) -> Model:
    """A run's base with the LoRA on, not in memory yet."""
    model = build_base(folder, backend.resolve_dtype(run.model.dtype))
    mx.random.seed(run.train.seed)
    lora = run.lora
    add_lora(model, lora.targets, lora.rank, lora.alpha, lora.dropout, rslora=lora.rslora)
    if takes_cpu_kernels(run):
        use_cpu_kernels(model)
    if run.train.gradient_checkpointing:
        recompute_blocks(model)
    return model


def memory_for(run: RunConfig) -> int:
    """Bytes that a run may plan with: what the machine can give, or less if it says so."""
    given = backend.machine().memory_bytes
    return min(given, int(run.train.memory_gb * 1e9)) if run.train.memory_gb else given


def takes_cpu_kernels(run: RunConfig) -> bool:
    """Whether a run computes with the functions for a CPU, which are for float32 alone."""
    is_float32 = backend.resolve_dtype(run.model.dtype) == mx.float32
    return backend.machine().device == "cpu" and is_float32


def versions() -> dict[str, str]:
    """What a run's bytes depend on beside the run, its base and its data."""
    here = backend.machine()
    return {
        "interviewmate-mlx": __version__,
        "mlx": here.mlx_version,
        "device": here.device_name,
        "BLAS": Path(here.blas or "MLX's own").name,
        "CPU streams": str(here.cpu_streams),
    }


def check_unchanged(fingerprint: dict[str, str], began: dict[str, str]) -> None:
    """Refuse to go on with another base or data than those the run began with.

    Raises:
        TrainingError: what has changed, all of it.
    """
    changed = [name for name, value in fingerprint.items() if began.get(name) != value]
    if changed:
        raise TrainingError(
            f"The run cannot be resumed, for this has changed since: {', '.join(changed)}.\n"
            "Restore it, or train anew with another --out."
        )


def changed_versions(began: dict[str, str]) -> list[str]:
    """Say what else has changed since a run was saved.

    It goes on all the same: the state means the same to every version that can read it, and
    hours of training are worth more than the last bits that another MLX rounds otherwise.
    """
    changed = [
        f"{name} {began.get(name)} -> {value}"
        for name, value in versions().items()
        if began.get(name) != value
    ]
    if not changed:
        return []
    return [
        f"changed since the run was saved: {', '.join(changed)}; "
        "it may end in other last digits than without the change"
    ]


def check_disk(run: RunConfig, model: Model, out: Path) -> None:
    """Refuse to start where the checkpoints will not fit.

    Raises:
        BackendError: less free than a run writes.
    """
    # A checkpoint holds the adapter, two moments and the best adapter, float32 each; one more
    # than is kept lies there while it is written.
    needed = 4 * 4 * count_parameters(model)[0] * (run.train.keep_checkpoints + 1)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise BackendError(
            f"{out}: {free / 1e6:.0f} MB are free, the run writes up to {needed / 1e6:.0f}.\n"
            "Make room, or choose an --out on another disk."
        )


def _hash_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + example.learn.tobytes())
    return digest.hexdigest()
