"""A run up to its first step, and how long the rest will take."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.files import Progress
from interviewmate_mlx.training.events import Started, Stepped
from interviewmate_mlx.training.loop import is_validation, opened, run_steps
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import Task, choose_optimizer

_TIMED_STEPS = 4
_TIMED_SECONDS = 10.0  # after which no other step is begun
# A validated token goes forward alone. So does each product of a frozen layer in training, and
# once more for the gradient of its input.
_VALIDATION_SHARE = 0.5


@dataclass(frozen=True)
class Forecast:
    """What is left of a run, at the speed that was measured."""

    timed_steps: int  # after one to compile
    tokens_per_s: float  # real tokens, without padding
    training_s: float
    validation_s: float
    num_validations: int


def rehearse(
    run: RunConfig | None,
    out: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Iterator[Started | Forecast]:
    """Do all that `train` does before its first step, then time some steps. Writes nothing.

    Args:
        run, out, resume, replace, progress: as for `train`.

    Yields:
        `Started`; then, unless nothing is left to do, a `Forecast`.

    Raises:
        InterviewMateError: the run cannot start or go on.
    """
    with opened(run, out, resume, replace, progress) as (task, saved):
        first = saved.state.step if saved else 0
        if saved:
            saved.tensors.clear()  # how long a step takes does not depend on them
        yield task.describe(first, [])
        if first < task.total_steps:
            with task.memory_limits(), task.executor.opened():
                yield forecast(task, first)


def forecast(task: Task, first: int) -> Forecast:
    """Time some steps from `first` on."""
    optimizer, limit = choose_optimizer(task.run, task.model), task.run.train.max_grad_norm
    step = Step(task.model, optimizer, limit, task.executor, task.objective.loss)
    last = min(first + 1 + _TIMED_STEPS, task.total_steps)
    end = time.monotonic() + _TIMED_SECONDS
    stop = task.ranks.agreed_stop(lambda: step.num_updates > 1 and time.monotonic() > end)
    events: list[Stepped] = list(run_steps(task, step, first, last, stop))
    timed = events[1:] or events
    seconds = sum(event.elapsed_s for event in timed)
    tokens_per_s = sum(event.num_tokens for event in timed) / seconds
    train_tokens, valid_tokens = (
        sum(map(len, rows)) for rows in (task.rows.train, task.rows.valid)
    )
    epochs = (task.total_steps - first) / task.steps_per_epoch
    validated = range(first + 1, task.total_steps + 1)
    num_validations = sum(is_validation(task, step) for step in validated) + (first == 0)
    if not valid_tokens:
        num_validations = 0
    return Forecast(
        timed_steps=len(timed),
        tokens_per_s=tokens_per_s,
        training_s=epochs * train_tokens / tokens_per_s,
        validation_s=_VALIDATION_SHARE * num_validations * valid_tokens / tokens_per_s,
        num_validations=num_validations,
    )
