"""Training, told as a sequence of events.

`train` is a generator: it yields what happened (a step, a validation), and
whoever iterates over it prints, logs or draws.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from interviewmate_mlx import backend
from interviewmate_mlx.config import RunConfig, parse_run, to_toml
from interviewmate_mlx.data.batches import (
    collate,
    epoch_steps,
    in_order,
    padded_width,
    split_step,
    steps_per_epoch,
)
from interviewmate_mlx.data.prompts import Example, encode_records
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import BackendError, DataError, TrainingError, list_faults
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.model.lora import add_lora, count_parameters
from interviewmate_mlx.training.checkpoint import (
    KEEP,
    State,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from interviewmate_mlx.training.memory import token_budget
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import MicrobatchFunction, compile_loss, compile_step
from interviewmate_mlx.weights.adapter_config import AdapterConfig
from interviewmate_mlx.weights.base import Progress, find_base, fingerprint, load_base
from interviewmate_mlx.weights.names import find_data, local_path
from interviewmate_mlx.weights.peft import adapter_weights, save_adapter


@dataclass(frozen=True)
class Started:
    """Everything is loaded and checked; training begins, or goes on, after `step`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    num_train_rows: int
    num_valid_rows: int
    num_cut_rows: int  # whose answer was longer than max_length allows
    num_dropped_rows: int  # with nothing left to learn from
    num_trainable: int
    num_parameters: int


@dataclass(frozen=True)
class Stepped:
    """One optimizer update."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's predicted tokens, nats
    learning_rate: float
    grad_norm: float  # before clipping
    num_rows: int
    num_tokens: int  # real ones, without padding
    num_predicted: int
    elapsed_s: float
    peak_bytes: int  # of memory, so far in this process


@dataclass(frozen=True)
class Validated:
    """The loss over the whole validation set after `step` updates (0: the base alone)."""

    step: int
    loss: float  # mean over its predicted tokens, nats
    is_best: bool
    elapsed_s: float


@dataclass(frozen=True)
class Finished:
    """The adapter folder is complete, or (`interrupted`) can be resumed."""

    step: int
    best_step: int | None  # whose adapter was kept; None: the last one's
    interrupted: bool
    stopped_early: bool


Event = Started | Stepped | Validated | Finished


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


def train(
    run: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Iterator[Event]:
    """Train a run's adapter into the PEFT folder `out`.

    Args:
        run: what to train.
        out: the adapter's folder, made here.
        resume: go on from the newest checkpoint in `out`.
        replace: remove the run in `out`, once all that the new one needs is there.
        stop: asked after each step; true saves the state and ends.
        progress: bytes done and in all, while a base is pulled and converted.

    Yields:
        `Started`, then `Stepped` and `Validated` as they happen, then `Finished`.

    Raises:
        InterviewMateError: the run cannot start or go on. What was saved stays.
    """
    check_out(out, resume, replace)
    if resume:
        check_same_run(run, out)
    task = prepare(run, progress)
    check_disk(task, out)
    if replace and not resume and out.exists():
        shutil.rmtree(out)
    model, patience = task.model, run.validate.early_stop_patience
    optimizer = adamw(run.train.weight_decay)
    compiled_step = compile_step(model, optimizer, run.train.max_grad_norm)
    compiled_loss = compile_loss(model)
    best: dict[str, mx.array] = {}
    state = State(token_budget=task.token_budget, fingerprint=task.fingerprint)
    if resume:
        state, best = restore(out, task, optimizer)
        # The run may have been killed between its checkpoint and its adapter.
        save_adapter(out, best or adapter_weights(model), adapter_config(run))
    else:
        write_run(run, out)
    yield started(task, state.step)

    def is_over() -> bool:
        return state.step == task.total_steps or 0 < patience <= state.bad_validations

    def save() -> None:
        adapter = adapter_weights(model)
        moments = dict(tree_flatten(optimizer.state))
        save_checkpoint(out, state, {"adapter": adapter, "optimizer": moments, "best": best})
        save_adapter(out, best or adapter, adapter_config(run))

    with backend.memory_limits():
        if state.step == 0 and task.valid:
            loss, elapsed_s = validate(task, compiled_loss, state.token_budget)
            yield Validated(0, loss, is_best=False, elapsed_s=elapsed_s)
        while not is_over():
            until = next_pause(task, state.step)
            try:
                for event in run_steps(
                    task, compiled_step, state.step, until, state.token_budget, stop
                ):
                    state.step = event.step
                    yield event
            except TrainingError:
                save()  # the last good state: what was not finite was not applied
                raise
            if task.valid and state.step == until and is_validation(task, until):
                loss, elapsed_s = validate(task, compiled_loss, state.token_budget)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"The validation loss after step {until} is {loss}.\n"
                        "The last checkpoint stays. Train anew with a lower train.learning_rate."
                    )
                is_best = state.best_loss is None or loss < state.best_loss
                if is_best:
                    best = adapter_weights(model)
                    state.best_loss, state.best_step, state.bad_validations = loss, state.step, 0
                else:
                    state.bad_validations += 1
                yield Validated(state.step, loss, is_best, elapsed_s)
            save()
            if stop():
                break
    yield Finished(
        step=state.step,
        best_step=state.best_step if best else None,
        interrupted=not is_over(),
        stopped_early=is_over() and state.step < task.total_steps,
    )


def run_steps(
    task: Task,
    compiled_step: tuple[MicrobatchFunction, Callable[[mx.array], dict[str, mx.array]]],
    first: int,
    last: int,
    token_budget: int,
    stop: Callable[[], bool],
) -> Iterator[Stepped]:
    """Run the steps from `first` to before `last`, or until `stop`.

    A step's numbers are read when the next step has been handed to the device,
    which so never waits for them.

    Raises:
        TrainingError: a loss or gradient was not finite. From that step on nothing was
            applied.
    """
    add_microbatch, update = compiled_step
    settings = task.run.train
    lengths = [len(example) for example in task.train]
    epoch, order = -1, []
    pending: tuple[int, list[Example], float, dict[str, mx.array]] | None = None
    clock = time.perf_counter()

    def read() -> Stepped:
        nonlocal clock
        assert pending is not None
        step, rows, learning_rate, numbers = pending
        if not numbers["is_finite"].item():
            raise TrainingError(
                f"Step {step + 1}: the loss, a gradient or what it would make of the adapter is "
                f"not finite (loss {numbers['loss'].item()}); it was not applied.\n"
                f"Its rows: {', '.join(example.record.source for example in rows)}\n"
                f"The state after step {step} is saved. Look at those rows, or train anew with a "
                "lower train.learning_rate."
            )
        start, clock = clock, time.perf_counter()
        return Stepped(
            step=step + 1,
            epoch=step // task.steps_per_epoch + 1,
            loss=_number(numbers["loss"]),
            learning_rate=learning_rate,
            grad_norm=_number(numbers["grad_norm"]),
            num_rows=len(rows),
            num_tokens=sum(map(len, rows)),
            num_predicted=sum(int(example.learn.sum()) for example in rows),
            elapsed_s=clock - start,
            peak_bytes=mx.get_peak_memory(),
        )

    task.model.train()
    for step in range(first, last):
        if step // task.steps_per_epoch != epoch:
            epoch = step // task.steps_per_epoch
            order = epoch_steps(lengths, settings.effective_batch, settings.seed, epoch)
        rows = [task.train[row] for row in order[step % task.steps_per_epoch]]
        learning_rate = learning_rate_at(
            step,
            task.total_steps,
            settings.learning_rate,
            settings.schedule,
            settings.warmup_ratio,
        )
        # Dropout depends on the seed and the step alone, so a resumed run repeats it.
        mx.random.seed((settings.seed << 32) | step)
        for group in split_step(rows, token_budget):
            # Gradients too: what is only planned keeps its activations.
            mx.async_eval(add_microbatch(*collate(group).arrays()))
        numbers = update(mx.array(learning_rate))
        mx.async_eval(numbers, task.model.trainable_parameters())
        if pending:
            yield read()
        pending = step, rows, learning_rate, numbers
        if stop():
            break
    if pending:
        yield read()


def validate(
    task: Task, compiled_loss: MicrobatchFunction, token_budget: int
) -> tuple[float, float]:
    """Mean loss over the whole validation set, in its own order, without dropout; and seconds."""
    start = time.perf_counter()
    task.model.eval()
    loss_sum, num_tokens = 0.0, 0
    for microbatch in in_order(task.valid, token_budget):
        loss, tokens = compiled_loss(*microbatch.arrays())
        loss_sum, num_tokens = loss_sum + loss.item(), num_tokens + tokens.item()
    return loss_sum / num_tokens, time.perf_counter() - start


def is_validation(task: Task, step: int) -> bool:
    """Whether the validation set is due after so many steps."""
    every = task.run.validate.every or task.steps_per_epoch
    return step % every == 0 or step == task.total_steps


def next_pause(task: Task, step: int) -> int:
    """The next step after which something is validated or saved."""
    later = range(step + 1, task.total_steps + 1)
    save_every = task.run.train.save_every
    return next(s for s in later if is_validation(task, s) or (save_every and s % save_every == 0))


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


def started(task: Task, step: int) -> Started:
    """What is known before the first step."""
    num_trainable, num_parameters = count_parameters(task.model)
    return Started(
        step=step,
        total_steps=task.total_steps,
        steps_per_epoch=task.steps_per_epoch,
        num_train_rows=len(task.train),
        num_valid_rows=len(task.valid),
        num_cut_rows=task.num_cut_rows,
        num_dropped_rows=task.num_dropped_rows,
        num_trainable=num_trainable,
        num_parameters=num_parameters,
    )


def adapter_config(run: RunConfig) -> AdapterConfig:
    """What the adapter's folder says of it."""
    lora, folder = run.lora, local_path(run.model.base)
    # A folder by its whole path: the adapter is loaded from elsewhere too.
    base = str(folder.resolve()) if folder.exists() else run.model.base
    return AdapterConfig(base, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.rslora)


def write_run(run: RunConfig, out: Path) -> None:
    """Keep the resolved run beside its adapter."""
    with atomic_file(out / "run.toml") as temporary:
        temporary.write_text(to_toml(run), encoding="utf-8")


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


def check_same_run(run: RunConfig, out: Path) -> None:
    """Refuse to go on with other settings than those the run began with.

    Raises:
        TrainingError: keys that differ from `out/run.toml`, all of them.
    """
    try:
        began = parse_run(run.name, (out / "run.toml").read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(
            f"Cannot read {out}/run.toml: {error.strerror}.\nTrain anew with another --out."
        ) from error
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


def restore(out: Path, task: Task, optimizer: optim.Optimizer) -> tuple[State, dict[str, mx.array]]:
    """Put the newest checkpoint's numbers into model and optimizer, in place.

    Returns:
        The state and the best adapter so far (empty if none was validated).

    Raises:
        TrainingError: it is damaged, or of another run, base or data.
    """
    path = checkpoints(out)[-1]
    state, tensors = load_checkpoint(path)
    changed = [name for name, value in task.fingerprint.items() if state.fingerprint[name] != value]
    if changed:
        raise TrainingError(
            f"{path} cannot be resumed, for this has changed since: {', '.join(changed)}.\n"
            "Restore it, or train anew with another --out."
        )
    task.model.load_weights(list(tensors["adapter"].items()), strict=False)
    moments = tensors["optimizer"]
    optimizer.state.update(tree_map_with_path(lambda name, _: moments[name], optimizer.state))
    # In the model's order, for a file's bytes follow from it.
    best = tensors["best"]
    return state, {name: best[name] for name in adapter_weights(task.model) if name in best}


def _hash_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + example.learn.tobytes())
    return digest.hexdigest()


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()  # waits for the device
    return float(value)
