"""Training, told as a sequence of events.

`train` is a generator: it yields what happened (a step, a validation), and
whoever iterates over it prints, logs or draws. It writes the adapter's folder
itself, metrics and model card included.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from interviewmate_mlx.adapter.folder import save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import RunConfig, parse_run, to_toml
from interviewmate_mlx.data.batches import Row, by_width, epoch_steps
from interviewmate_mlx.data.templates import end_ids, text_beside
from interviewmate_mlx.errors import DivergedError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.starts import as_plain, take_out
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.checkpoint import (
    Saved,
    State,
    load_newest,
    prune,
    put_numbers,
    restore,
    save_checkpoint,
    saved_of_first,
    set_aside,
)
from interviewmate_mlx.training.events import Event, Finished, Stepped, Summary, Validated
from interviewmate_mlx.training.folder import (
    changed_settings,
    check_out,
    check_same_run,
    clear,
    lock_run,
    read_run,
    write_run,
    write_run_card,
)
from interviewmate_mlx.training.metrics import (
    append_metrics,
    start_metrics,
    sync_metrics,
    write_summary,
)
from interviewmate_mlx.training.optimizer import learning_rate_at
from interviewmate_mlx.training.ranks import Ranks, join
from interviewmate_mlx.training.step import Step, total_of
from interviewmate_mlx.training.task import (
    Task,
    changed_versions,
    choose_optimizer,
    prepare,
    versions,
)
from interviewmate_mlx.training.whole import write_model

# What to tell of a run that has lost a rank.
_WHEN_LOST = "The run stops here. What it has saved is whole: resume it once all are back."

Item = TypeVar("Item")
Measured = TypeVar("Measured", Stepped, Validated)


def train(
    run: RunConfig | None,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    replace: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    base: Base | None = None,
) -> Iterator[Event]:
    """Train a run's adapter into a PEFT folder.

    Where a launcher has started several processes, they train it together; the first one alone
    writes.

    Args:
        run: what to train; the first rank's counts, and others may give None.
        out: the folder, made here; by default `adapters/NAME` after the run, or
            `models/NAME-trained` if all weights are trained.
        resume: go on from the newest whole checkpoint in the folder.
        replace: remove the run in the folder, once all that the new one needs is there.
        stop: asked after each step; true saves the state and ends. Leaving the loop saves
            too, unless this is true then.
        progress: called with bytes done and bytes in all, while a base is pulled and converted.
        base: the run's, if it is open already.

    Yields:
        `Started`, then `Stepped` and `Validated` as they happen, then `Finished`.

    Raises:
        InterviewMateError: the run cannot start or go on. What was saved stays.
    """
    out = Path(out or (run.folder if run else ""))
    with opened(run, out, resume, replace, progress, base) as (task, saved):
        folder = out if task.ranks.is_first else None
        if folder and replace and not resume:
            clear(folder)
        with task.memory_limits(), task.executor.opened():
            yield from run_task(task, folder, saved, task.ranks.agreed_stop(stop))


@contextmanager
def opened(
    run: RunConfig | None,
    out: Path,
    resume: bool,
    replace: bool,
    progress: Progress | None,
    base: Base | None = None,
) -> Iterator[tuple[Task, Saved | None]]:
    """Lock a run's folder and check all that a run needs; what is there stays. See `train`.

    Yields:
        The run, ready to begin or go on, and, to go on, what was saved.
    """
    ranks, saved = join(), None
    with ExitStack() as stack:
        stack.enter_context(ranks.working(_WHEN_LOST))
        with ranks.together():
            if run and ranks.is_first:
                stack.enter_context(lock_run(out))
                check_out(out, resume, replace)
                saved = load_newest(out) if resume else None
                if resume:
                    began = parse_run(out.name, saved.state.run) if saved else read_run(out)
                    check_same_run(run, began, out)
                    run = dataclasses.replace(run, name=began.name)
        run = run_of_first(ranks, run)
        saved = saved_of_first(ranks, saved)
        folder = out if ranks.is_first else None
        with ranks.together():
            task = prepare(run, folder, saved.state if saved else None, progress, base, ranks)
        agree(task)
        yield task, saved


def run_of_first(ranks: Ranks, run: RunConfig | None) -> RunConfig:
    """The first rank's run, on all ranks."""
    if ranks.size > 1:
        run = parse_run(*ranks.from_first([run.name, to_toml(run)] if run else None))
    assert run
    return run


def agree(task: Task) -> None:
    """Begin alike on all ranks.

    Raises:
        TrainingError: they do not have the same base, data or versions.
    """
    if task.ranks.size == 1:
        return
    facts = {name: value[:12] for name, value in task.fingerprint.items()}
    task.ranks.check_same({**facts, "model.dtype": str(task.model.dtype)})
    # The first values are random, and may be computed by other hardware.
    first = task.ranks.aligned(trained_weights(task.model))
    task.model.load_weights(list(first.items()), strict=False)
    if task.run.lora.init != "default" and not task.ranks.is_first:
        untouched = task.base.build(task.model.dtype)
        take_out(task.model, named_arrays(untouched.parameters()))


def align(task: Task, optimizer: optim.Optimizer) -> None:
    """Give all ranks the first's numbers, where other hardware has rounded its own otherwise."""
    if task.ranks.size > 1:
        trained = task.ranks.aligned(trained_weights(task.model))
        moments = task.ranks.aligned(named_arrays(optimizer.state))
        put_numbers(task.model, optimizer, trained, moments)


def run_task(
    task: Task, out: Path | None, saved: Saved | None, stop: Callable[[], bool]
) -> Iterator[Event]:
    """Train, from the start or from what was saved; see `train`. Without `out`, write nothing."""
    run, model = task.run, task.model
    if out:
        write_run(run, out)
    task = task.with_references(out)  # of the model as the run begins
    optimizer = choose_optimizer(run, model)
    step = Step(model, optimizer, run.train.max_grad_norm, task.executor, task.objective.loss)
    loss_of = total_of(model, task.objective.loss, task.executor)
    state = State(
        to_toml(run),
        token_budget=task.memory.token_budget,
        fingerprint=task.fingerprint,
        versions=versions(),
    )
    best: dict[str, mx.array] = {}
    notes: list[str] = []
    if saved:
        began = parse_run(run.name, saved.state.run)
        notes = set_aside(saved.damaged)
        notes += changed_settings(run, began) + changed_versions(saved.state.versions)
        best = restore(saved, model, optimizer)
        state = dataclasses.replace(saved.state, run=state.run, versions=state.versions)
        if out:
            # What a save does after its checkpoint: the run may have been killed before that.
            prune(out, run.train.keep_checkpoints)
            write_trained(task, out, best or trained_weights(model))
    if out:
        notes += start_metrics(out, state.step)
    started = task.describe(state.step, notes)
    yield started
    if state.step == 0 and task.rows.valid:
        yield record(out, validate(task, state.step, loss_of))
    has_left = False

    def is_stopping() -> bool:
        return has_left or stop()

    while not is_over(task, state):
        until = next_pause(task, state.step)
        steps = run_steps(task, step, state.step, until, is_stopping)
        try:
            for event in steps:
                state.step = event.step
                yield record(out, event)
        except DivergedError as error:
            # The last good state: what was not finite was not applied.
            save(task, out, state, optimizer, best)
            where = f"\nThe state after step {state.step} is saved in {out}." if out else ""
            raise DivergedError(f"{error}{where}") from error
        except GeneratorExit:
            # Whoever iterated has left. The device may be a step ahead of the last event.
            has_left = True
            if not stop():
                with suppress(DivergedError):  # what is not finite was not applied
                    for event in steps:
                        state.step = event.step
                        record(out, event)
                is_due = task.rows.valid and is_validation(task, state.step)
                if is_due and task.ranks.size == 1:  # others may not have left
                    record(out, judge(task, state, best, loss_of))
                save(task, out, state, optimizer, best)
            raise
        align(task, optimizer)
        is_due = task.rows.valid and state.step == until and is_validation(task, until)
        judged = [record(out, judge(task, state, best, loss_of))] if is_due else []
        save(task, out, state, optimizer, best)
        yield from judged
        if stop():
            break
    best_step = state.best_step if best else None
    stopped_early = is_over(task, state) and state.step < task.total_steps
    summary = None
    if out:
        summary = write_summary(out, run, started, state.step, best_step, stopped_early)
        template = task.rows.template
        ends = end_ids(template, task.base.tokenizer)
        config = None if run.train.weights == "all" else task.adapter_config
        write_run_card(out, run, config, summary, template, ends if len(ends) > 1 else ())
    summary = Summary(**task.ranks.from_first(summary and asdict(summary)))
    yield Finished(state.step, best_step, not is_over(task, state), stopped_early, summary)


def is_over(task: Task, state: State) -> bool:
    """Whether all steps are done, or the validation loss has stopped falling."""
    patience = task.run.validate.early_stop_patience
    return state.step == task.total_steps or 0 < patience <= state.bad_validations


def judge(
    task: Task,
    state: State,
    best: dict[str, mx.array],
    loss_of: Callable[..., Any],
) -> Validated:
    """Validate after a step, and note in place whether its adapter is the best so far.

    Raises:
        DivergedError: the loss is not finite.
    """
    found = validate(task, state.step, loss_of)
    if not math.isfinite(found.loss):
        raise DivergedError(
            f"The validation loss after step {state.step} is {found.loss}.\n"
            "The last checkpoint stays. Train again with a lower train.learning_rate."
        )
    is_best = state.best_loss is None or found.loss < state.best_loss
    if is_best:
        best.update(trained_weights(task.model))
        state.best_loss, state.best_step, state.bad_validations = found.loss, state.step, 0
    else:
        state.bad_validations += 1
    return dataclasses.replace(found, is_best=is_best)


def record(out: Path | None, event: Measured) -> Measured:
    """Write an event to the metrics, and give it back."""
    if out:
        append_metrics(out, event)
    return event


def save(
    task: Task,
    out: Path | None,
    state: State,
    optimizer: optim.Optimizer,
    best: dict[str, mx.array],
) -> None:
    """Save the run's state, and the adapter: the best one so far, or else the last."""
    if not out:
        return
    sync_metrics(out)
    trained = trained_weights(task.model)
    moments = named_arrays(optimizer.state)
    tensors = {"adapter": trained, "optimizer": moments, "best": best}
    save_checkpoint(out, state, tensors, task.run.train.keep_checkpoints)
    write_trained(task, out, best or trained)


def trained_weights(model: nn.Module) -> dict[str, mx.array]:
    """What training changes, by parameter path, in the model's order."""
    return named_arrays(model.trainable_parameters())


def write_trained(task: Task, out: Path, weights: dict[str, mx.array]) -> None:
    """Write the adapter in PEFT's format, with what it was trained on and how it was asked.

    Or the model, if all its weights are trained.
    """
    template = task.rows.template
    beside = text_beside(template, task.base.tokenizer)
    if task.run.train.weights == "all":
        write_model(out, task.base, weights, beside)
        return
    plain = as_plain(task.model, weights)
    save_adapter(out, plain, task.adapter_config, task.base.weights_hash, template, beside)


class Dispatched(NamedTuple):
    """A step that was handed to the device; its numbers may not be computed yet."""

    number: int  # from 1
    rows: list[Row]
    learning_rate: float
    numbers: dict[str, Any]


def run_steps(
    task: Task, step: Step, first: int, last: int, stop: Callable[[], bool]
) -> Iterator[Stepped]:
    """Run the steps from `first` to before `last`, or until `stop`.

    A step's numbers are read after the next step has been dispatched, so the device
    never waits for that.

    Raises:
        DivergedError: a loss or gradient was not finite. From that step on nothing was
            applied.
    """
    task.model.train()
    clock = time.perf_counter()
    steps = dispatch_steps(task, step, first, last, stop)
    # Ranks wait for each other in every step.
    steps_ahead = task.executor.steps_ahead if task.ranks.size == 1 else 0
    for dispatched in delayed(steps, steps_ahead):
        numbers = tree_map(lambda array: array.item(), dispatched.numbers)
        sides = [side for row in dispatched.rows for side in row.sides]
        elapsed_s, clock = time.perf_counter() - clock, time.perf_counter()
        if not numbers["is_finite"]:
            rows = ", ".join(row.record.source for row in dispatched.rows)
            raise DivergedError(
                f"Step {dispatched.number}: the loss, a gradient or an updated parameter is not "
                f"finite (loss {numbers['loss']}); the step was not applied.\n"
                f"Its rows: {rows}\n"
                "Look at those rows, or train again with a lower train.learning_rate."
            )
        yield Stepped(
            step=dispatched.number,
            epoch=(dispatched.number - 1) // task.steps_per_epoch + 1,
            loss=numbers["loss"],
            learning_rate=dispatched.learning_rate,
            grad_norm=numbers["grad_norm"],
            num_rows=len(dispatched.rows),
            num_tokens=sum(map(len, sides)),
            num_predicted=sum(int(side.loss_mask.sum()) for side in sides),
            elapsed_s=elapsed_s,
            peak_bytes=mx.get_peak_memory(),
            measures=means(numbers["measures"]),
        )


def means(measures: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What was measured, from sums and counts; nothing of what there was none of.

    And the margin: by how much the rewards of good answers are above those of bad ones.
    """
    found = {name: total / count for name, (total, count) in measures.items() if count}
    if {"reward_chosen", "reward_rejected"} <= found.keys():
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    return found


def dispatch_steps(
    task: Task, step: Step, first: int, last: int, stop: Callable[[], bool]
) -> Iterator[Dispatched]:
    """Hand the steps from `first` to before `last` to the device, until `stop`."""
    settings = task.run.train
    for number, rows in rows_of_steps(task, first, last):
        learning_rate = learning_rate_at(
            number,
            task.total_steps,
            settings.learning_rate,
            settings.schedule,
            settings.warmup_ratio,
            settings.warmup_steps,
            settings.floor,
        )
        share = task.ranks.share(rows)
        groups = task.executor.split(share.rows, task.memory.token_budget)
        # Dropout follows from the seed, the step and the row alone, so a resumed run repeats it.
        step.accumulate(task.objective.collate(groups, rows), [settings.seed, number])
        numbers = step.update(learning_rate, share.sum)
        yield Dispatched(number + 1, rows, learning_rate, numbers)
        if stop():
            break


def rows_of_steps(task: Task, first: int, last: int) -> Iterator[tuple[int, list[Row]]]:
    """The number and the rows of each step, in the order of the run's seed."""
    settings = task.run.train
    lengths = [len(row) for row in task.rows.train]
    epoch, order = -1, []
    for number in range(first, last):
        if number // task.steps_per_epoch != epoch:
            epoch = number // task.steps_per_epoch
            order = epoch_steps(lengths, settings.effective_batch, settings.seed, epoch)
        yield number, [task.rows.train[row] for row in order[number % task.steps_per_epoch]]


def delayed(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Pass items on, each after `count` later ones have come; the last ones at the end."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def validate(task: Task, step: int, loss_of: Callable[..., Any]) -> Validated:
    """The mean loss over the whole validation set after a step, without dropout."""
    start = time.perf_counter()
    task.model.eval()
    # In microbatches as large as a step's, so that it takes no more memory than training.
    share = task.ranks.share(task.rows.valid)
    groups = [
        group
        for rows in by_width(share.rows)
        for group in task.executor.split(rows, task.memory.step_tokens)
    ]
    sums = share.sum(loss_of(task.objective.collate(groups, task.rows.valid)))
    found = tree_map(lambda array: array.item(), sums)
    loss_sum, count, measures = found
    elapsed_s = time.perf_counter() - start
    return Validated(step, loss_sum / count, False, elapsed_s, means(measures))


def is_validation(task: Task, step: int) -> bool:
    """Whether the validation set is due after so many steps."""
    every = task.run.validate.every or task.steps_per_epoch
    return step % every == 0 or step == task.total_steps


def next_pause(task: Task, step: int) -> int:
    """The next step after which something is validated or saved."""
    later = range(step + 1, task.total_steps + 1)
    save_every = task.run.train.save_every
    return next(s for s in later if is_validation(task, s) or (save_every and s % save_every == 0))
