"""Training speed of a run on this machine."""

import time
from dataclasses import dataclass

import mlx.core as mx

from interviewmate_mlx import backend
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.files import Progress
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import run_steps
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import compile_step
from interviewmate_mlx.training.task import prepare


@dataclass(frozen=True)
class BenchResult:
    """What the timed steps took, without loading, warm-up and validation."""

    run: str
    base: str
    device: str
    dtype: str
    steps: int
    warmup_steps: int
    rows: int
    tokens: int  # real ones, without padding
    seconds: float
    samples_per_s: float
    tokens_per_s: float
    peak_gb: float


def bench(
    run: RunConfig, steps: int = 10, warmup: int = 3, progress: Progress | None = None
) -> BenchResult:
    """Time `steps` optimizer updates of a run after `warmup` untimed ones. Writes nothing.

    Each step is a true one, on the run's own rows in the order of its seed. A
    width that the warm-up did not meet is compiled within the timed steps, as
    it would be in training.
    """
    task = prepare(run, progress)
    with backend.memory_limits(), backend.cpu_workers() as workers:
        settings = run.train
        compiled_step = compile_step(task.model, adamw(), settings.max_grad_norm, workers)

        def timed(first: int, last: int) -> tuple[list[Stepped], float]:
            start = time.perf_counter()
            events = list(
                run_steps(
                    task, compiled_step, first, last, task.token_budget, len(workers), lambda: False
                )
            )
            return events, time.perf_counter() - start

        timed(0, warmup)
        mx.reset_peak_memory()
        events, seconds = timed(warmup, warmup + steps)
    rows, tokens = sum(e.num_rows for e in events), sum(e.num_tokens for e in events)
    return BenchResult(
        run=run.name,
        base=run.model.base,
        device=backend.machine().device_name,
        dtype=str(task.model.transformer.ln_f.weight.dtype).removeprefix("mlx.core."),
        steps=steps,
        warmup_steps=warmup,
        rows=rows,
        tokens=tokens,
        seconds=seconds,
        samples_per_s=rows / seconds,
        tokens_per_s=tokens / seconds,
        peak_gb=mx.get_peak_memory() / 1e9,
    )
