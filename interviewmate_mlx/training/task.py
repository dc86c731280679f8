"""A run with all that it works on, loaded and checked before the first step."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from interviewmate_mlx import backend
from interviewmate_mlx.config import RunConfig, parse_run
from interviewmate_mlx.data.batches import padded_width, steps_per_epoch
from interviewmate_mlx.data.prompts import Example, encode_records
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import BackendError, DataError, TrainingError, list_faults
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.model.lora import add_lora, count_parameters
from interviewmate_mlx.training.checkpoint import KEEP, checkpoints
from interviewmate_mlx.training.memory import token_budget
from interviewmate_mlx.weights.base import find_base, fingerprint, load_base
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
    token_budget: int
    fingerprint: dict[str, str]

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train), self.run.train.effective_batch)

    @property
    def total_steps(self) -> int:
        return self.run.train.epochs * self.steps_per_epoch


def prepare(run: RunConfig, progress: Progress | None = None) -> Task:
    """Load and check the base and the data of a run, and put the LoRA on.

    Raises:
        InterviewMateError: any of it is missing or faulty.
    """
    splits = load_splits(find_data(run.data.path, progress))
    folder = find_base(run.model.base, progress)
    dtype = backend.resolve_dtype(run.model.dtype)
    model, tokenizer = load_base(folder, dtype)
    data = run.data
    encoded = {
        split: encode_records(tokenizer, splits.get(split, []), data.max_length, data.train_on)
        for split in ("train", "valid")
    }
    (train_rows, train_dropped), (valid_rows, valid_dropped) = encoded.values()
    if not train_rows:
        raise DataError(
            f"{data.path}: of {len(train_dropped)} rows none has a token left to learn from after "
            f"{data.max_length} tokens.\nRaise data.max_length."
        )
    mx.random.seed(run.train.seed)
    lora = run.lora
    add_lora(model, lora.targets, lora.rank, lora.alpha, lora.dropout, rslora=lora.rslora)
    if backend.machine().device == "cpu" and dtype == mx.float32:
        use_cpu_kernels(model)
    widest = padded_width(max(map(len, train_rows + valid_rows)))
    return Task(
        run=run,
        model=model,
        train=train_rows,
        valid=valid_rows,
        num_cut_rows=sum(example.num_cut > 0 for example in train_rows + valid_rows),
        num_dropped_rows=len(train_dropped) + len(valid_dropped),
        token_budget=token_budget(
            model, model.args, widest, dtype.size, backend.machine().memory_bytes
        ),
        fingerprint={
            "base": fingerprint(folder),
            "data": _hash_examples(train_rows + valid_rows),
        },
    )


def check_out(out: Path, resume: bool, replace: bool = False) -> None:
    """Refuse to mix a new run with an old one, and to replace what is no run.

    Raises:
        TrainingError: `out` holds something already, or, to resume, nothing.
    """
    if resume and not checkpoints(out):
        raise TrainingError(f"Nothing to resume in {out}: it holds no checkpoint.\nTrain anew.")
    if resume or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise TrainingError(
            f"{out} is {'not empty' if out.is_dir() else 'a file'}.\n"
            "Go on with --resume, replace it with --force, or choose another --out."
        )
    if not (out / "run.toml").is_file():
        raise TrainingError(
            f"{out} holds no run of this package, so it is not replaced.\n"
            "Remove it yourself, or choose another --out."
        )


def read_run(out: Path) -> RunConfig:
    """The run that began in a folder, by the folder's name.

    Raises:
        TrainingError: the folder holds no `run.toml`.
    """
    try:
        return parse_run(out.name, (out / "run.toml").read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(
            f"Cannot read {out}/run.toml: {error.strerror}.\nTrain anew with another --out."
        ) from error


def check_same_run(run: RunConfig, out: Path) -> None:
    """Refuse to go on with other settings than those the run began with.

    Raises:
        TrainingError: keys that differ from `out/run.toml`, all of them.
    """
    began = read_run(out)
    tables = {"got": asdict(run), "expected": asdict(began)}
    faults = [
        f"{table}.{key}: got {value!r}, expected {tables['expected'][table][key]!r}"
        for table, keys in tables["got"].items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value != tables["expected"][table][key]
    ]
    if faults:
        raise TrainingError(
            f"{out} began as another run:\n{list_faults(faults)}\n"
            "Resume with what it began with, or train anew with another --out."
        )


def check_disk(task: Task, out: Path) -> None:
    """Refuse to start where the checkpoints will not fit.

    Raises:
        BackendError: less free than a run writes.
    """
    folder = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    # A checkpoint holds the adapter, two moments and the best adapter, float32 each; one more
    # than is kept lies there while it is written.
    needed = 4 * 4 * count_parameters(task.model)[0] * (KEEP + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BackendError(
            f"{folder}: {free / 1e6:.0f} MB are free, the run writes up to {needed / 1e6:.0f}.\n"
            "Make room, or choose an --out on another disk."
        )


def _hash_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + example.learn.tobytes())
    return digest.hexdigest()
