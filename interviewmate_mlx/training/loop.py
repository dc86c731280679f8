"""Training, told as a sequence of events.

`train` is a generator: it yields what happened (a step, a validation), and
whoever iterates over it prints, logs or draws.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from interviewmate_mlx import backend
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.data.batches import collate, epoch_steps, in_order, split_step
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.falcon import Model
from interviewmate_mlx.model.lora import count_parameters
from interviewmate_mlx.training.checkpoint import (
    Saved,
    State,
    load_newest,
    prune,
    save_checkpoint,
    set_aside,
)
from interviewmate_mlx.training.events import (
    Event,
    Finished,
    Saving,
    Started,
    Stepped,
    Validated,
)
from interviewmate_mlx.training.folder import (
    check_out,
    check_same_run,
    clear,
    hold,
    write_run,
)
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import (
    AddMicrobatches,
    TotalLoss,
    Update,
    compile_loss,
    compile_step,
)
from interviewmate_mlx.training.task import Task, changed_versions, prepare, versions
from interviewmate_mlx.weights.adapter_config import AdapterConfig
from interviewmate_mlx.weights.names import local_path, shipped_base
from interviewmate_mlx.weights.peft import adapter_weights, save_adapter


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
        resume: go on from the newest whole checkpoint in `out`.
        replace: remove the run in `out`, once all that the new one needs is there.
        stop: asked after each step; true saves the state and ends.
        progress: bytes done and in all, while a base is pulled and converted.

    Yields:
        `Started`, then `Stepped` and `Validated` as they happen, then `Finished`.

    Raises:
        InterviewMateError: the run cannot start or go on. What was saved stays.
    """
    with hold(out):
        check_out(out, resume, replace)
        saved = None
        if resume:
            check_same_run(run, out)
            saved = load_newest(out)
        kept = (saved.state.fingerprint, saved.state.token_budget) if saved else ()
        task = prepare(run, progress, out, *kept)
        if replace and not resume:
            clear(out)
        most_streams = task.memory.most_streams
        with backend.memory_limits(), backend.cpu_streams(most_streams) as streams:
            yield from run_task(task, out, saved, streams, stop)


def run_task(
    task: Task,
    out: Path,
    saved: Saved | None,
    streams: Sequence[mx.Stream],
    stop: Callable[[], bool],
) -> Iterator[Event]:
    """Train, from the start or from what was saved; see `train`."""
    run, model, patience = task.run, task.model, task.run.validate.early_stop_patience
    optimizer = adamw(run.train.weight_decay)
    compiled_step = compile_step(model, optimizer, run.train.max_grad_norm, streams)
    total_loss = compile_loss(model, streams)
    best: dict[str, mx.array] = {}
    budget = task.memory.token_budget
    state = State(token_budget=budget, fingerprint=task.fingerprint, versions=versions())
    notes: list[str] = []
    if saved:
        notes = set_aside(saved.damaged) + changed_versions(saved.state.versions)
        state, best = restore(saved, model, optimizer)
        # What a save does after its checkpoint; the run may have been killed before that.
        prune(out, run.train.keep_checkpoints)
        save_adapter(out, best or adapter_weights(model), adapter_config(run), task.base_hash)
    else:
        write_run(run, out)
    yield started(task, state.step, notes)

    def is_over() -> bool:
        return state.step == task.total_steps or 0 < patience <= state.bad_validations

    def save() -> Iterator[Event]:
        yield Saving(state.step)
        adapter = adapter_weights(model)
        moments = dict(tree_flatten(optimizer.state))
        tensors = {"adapter": adapter, "optimizer": moments, "best": best}
        save_checkpoint(out, state, tensors, run.train.keep_checkpoints)
        save_adapter(out, best or adapter, adapter_config(run), task.base_hash)

    if state.step == 0 and task.valid:
        loss, elapsed_s = validate(task, total_loss, len(streams))
        yield Validated(0, loss, is_best=False, elapsed_s=elapsed_s)
    while not is_over():
        until = next_pause(task, state.step)
        try:
            for event in run_steps(task, compiled_step, state.step, until, len(streams), stop):
                state.step = event.step
                yield event
        except TrainingError as error:
            yield from save()  # the last good state: what was not finite was not applied
            where = f"The state after step {state.step} is saved in {out}."
            raise TrainingError(f"{error}\n{where}") from error
        if task.valid and state.step == until and is_validation(task, until):
            loss, elapsed_s = validate(task, total_loss, len(streams))
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
        yield from save()
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
    compiled_step: tuple[AddMicrobatches, Update],
    first: int,
    last: int,
    num_streams: int,
    stop: Callable[[], bool],
) -> Iterator[Stepped]:
    """Run the steps from `first` to before `last`, or until `stop`.

    A step's numbers are read when the next step has been handed to the device,
    which so never waits for them.

    Raises:
        TrainingError: a loss or gradient was not finite. From that step on nothing was
            applied.
    """
    add_microbatches, update = compiled_step
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
                "Look at those rows, or train anew with a lower train.learning_rate."
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
        groups = split_step(rows, task.memory.token_budget, num_streams)
        # Dropout depends on the seed and the step alone, so a resumed run repeats it.
        add_microbatches([collate(group) for group in groups], [settings.seed, step])
        numbers = update(mx.array(learning_rate))
        mx.async_eval(numbers, task.model.trainable_parameters())
        if pending:
            yield read()
        pending = step, rows, learning_rate, numbers
        if num_streams:  # who have done the step: there is no device to keep busy
            yield read()
            pending = None
        if stop():
            break
    if pending:
        yield read()


def validate(task: Task, total_loss: TotalLoss, num_streams: int) -> tuple[float, float]:
    """Mean loss over the whole validation set, in its own order, without dropout; and seconds."""
    start = time.perf_counter()
    task.model.eval()
    # In parts of about a step, so that it takes no more memory than training.
    tokens = task.memory.step_tokens // max(1, num_streams)
    loss_sum, num_tokens = total_loss(in_order(task.valid, tokens))
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


def started(task: Task, step: int, notes: Sequence[str]) -> Started:
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
        peak_bytes=task.memory.peak_bytes,
        notes=tuple(notes),
    )


def adapter_config(run: RunConfig) -> AdapterConfig:
    """What the adapter's folder says of it."""
    lora, base = run.lora, run.model.base
    # A folder by its whole path: the adapter is loaded from elsewhere too.
    if not shipped_base(base) and local_path(base).exists():
        base = str(local_path(base).resolve())
    return AdapterConfig(base, lora.rank, lora.alpha, lora.dropout, lora.targets, lora.rslora)


def restore(
    saved: Saved, model: Model, optimizer: optim.Optimizer
) -> tuple[State, dict[str, mx.array]]:
    """Put a checkpoint's numbers into model and optimizer, in place.

    Returns:
        The state and the best adapter so far (empty if none was validated).
    """
    model.load_weights(list(saved.tensors["adapter"].items()), strict=False)
    moments = saved.tensors["optimizer"]
    optimizer.state.update(tree_map_with_path(lambda name, _: moments[name], optimizer.state))
    # In the model's order, for a file's bytes follow from it.
    best = saved.tensors["best"]
    in_order = {name: best[name] for name in adapter_weights(model) if name in best}
    return dataclasses.replace(saved.state, versions=versions()), in_order


def _number(scalar: mx.array) -> float:
    value: Any = scalar.item()  # waits for the device
    return float(value)
