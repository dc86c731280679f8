"""Training speed of a run on this machine."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import mlx.core as mx

from interviewmate_mlx import backend
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.files import Progress
from interviewmate_mlx.model.lora import LORA_NAMES, linear_paths, shape_of
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import agree, rows_of_steps, run_of_first, run_steps
from interviewmate_mlx.training.ranks import ALONE, join
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import Task, choose_objective, choose_optimizer, prepare

# The project that this one comes from: PyTorch on Apple Silicon, float32, rows padded to 256.
SEED_SAMPLES_PER_S = {"run_A": 0.664, "run_B": 0.657, "run_C": 0.653}
_PRODUCT_SECONDS = 0.5  # of timing each shape of a matrix product
_SWAPPED_BYTES = 50_000_000  # less is some other program's, woken up
_STOLEN_SHARE = 0.05  # of the cores' time; less is lost in the spread


@dataclass(frozen=True)
class RankShare:
    """One rank's part of the timed steps.

    Attributes:
        name: its number and host.
        rows, tokens: that it computed.
        sums_seconds: that it spent in sums, waiting for slower ranks included.
        alone_samples_per_s: of the same steps, on its machine alone.
    """

    name: str
    rows: int
    tokens: int
    sums_seconds: float
    alone_samples_per_s: float


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
    samples_per_s_slowest: float  # of a step
    samples_per_s_fastest: float
    tokens_per_s: float
    peak_gb: float
    products_share: float  # of the time, if the needed matrix products ran at the BLAS's own speed
    products_gflops: float  # that speed, measured after the steps
    whole_run_s: float  # all steps at this speed, without validation
    seed_samples_per_s: float | None  # the report this project comes from, on a Mac of its own
    slowdowns: list[str]  # what made it slower than the machine could be
    ranks: list[RankShare]  # that shared the steps; none for one machine alone
    sum_bytes: int  # of a step's message

    @property
    def efficiency(self) -> float:
        """The ranks' speed together, as a share of what they do alone, added up."""
        return self.samples_per_s / sum(rank.alone_samples_per_s for rank in self.ranks)


def bench(
    run: RunConfig | None, steps: int = 10, warmup: int = 3, progress: Progress | None = None
) -> BenchResult:
    """Time `steps` optimizer updates of a run after `warmup` untimed ones. Writes nothing.

    Each step is a real one, on the run's own rows in the order of its seed. What has a shape that
    was not met before runs once untimed: most steps of a run meet no new ones.

    Where a launcher has started several processes, they share the steps, and then each does them
    alone.
    """
    slowdowns, ranks = backend.slowdowns(), join()
    with ExitStack() as stack:
        stack.enter_context(ranks.working())
        run = run_of_first(ranks, run)
        with ranks.together():
            task = prepare(run, progress=progress, ranks=ranks)
        agree(task)
        stack.enter_context(task.memory_limits())
        stack.enter_context(task.executor.opened())
        optimizer = choose_optimizer(run, task.model)
        step = Step(
            task.model, optimizer, run.train.max_grad_norm, task.executor, task.objective.loss
        )
        warm_up(task, step, steps, warmup)
        mx.reset_peak_memory()
        swapped_bytes, stolen_s = backend.swapped_bytes(), backend.stolen_seconds()
        sums_s = ranks.sum_seconds
        events, seconds = timed(task, step, warmup, warmup + steps)
        sums_s = ranks.sum_seconds - sums_s
        peak_bytes, sum_bytes = mx.get_peak_memory(), ranks.sum_bytes
        of_ranks = shares(task, step, steps, warmup, sums_s) if ranks.size > 1 else []
    swapped_bytes = backend.swapped_bytes() - swapped_bytes
    stolen_share = (backend.stolen_seconds() - stolen_s) / seconds
    if stolen_share > _STOLEN_SHARE:
        slowdowns.append(f"other machines on its host took {stolen_share:.0%} of the cores' time")
    if swapped_bytes > _SWAPPED_BYTES:
        slowdowns.append(
            f"the system swapped {swapped_bytes / 1e9:.1f} GB meanwhile: close other programs, or "
            "lower train.memory_gb"
        )
    rows, tokens = sum(e.num_rows for e in events), sum(e.num_tokens for e in events)
    predicted = sum(event.num_predicted for event in events)
    products_s, gflops = needed_products(task.model, tokens, predicted, steps)
    speeds = [e.num_rows / e.elapsed_s for e in events]
    return BenchResult(
        run=run.name,
        base=run.model.base,
        device=backend.machine().device_name,
        dtype=str(task.model.dtype).removeprefix("mlx.core."),
        steps=steps,
        warmup_steps=warmup,
        rows=rows,
        tokens=tokens,
        seconds=seconds,
        samples_per_s=rows / seconds,
        samples_per_s_slowest=min(speeds),
        samples_per_s_fastest=max(speeds),
        tokens_per_s=tokens / seconds,
        peak_gb=peak_bytes / 1e9,
        products_share=products_s / seconds,
        products_gflops=gflops,
        whole_run_s=task.total_steps / task.steps_per_epoch * len(task.rows.train) * seconds / rows,
        seed_samples_per_s=SEED_SAMPLES_PER_S.get(run.name),
        slowdowns=slowdowns,
        ranks=of_ranks,
        sum_bytes=sum_bytes,
    )


def timed(task: Task, step: Step, first: int, last: int) -> tuple[list[Stepped], float]:
    """Run the steps from `first` to before `last`; and the seconds that they took."""
    start = time.perf_counter()
    events = list(run_steps(task, step, first, last, lambda: False))
    return events, time.perf_counter() - start


def warm_up(task: Task, step: Step, steps: int, warmup: int) -> None:
    """Run the `warmup` first steps, and those of the next `steps` that meet new shapes."""
    timed(task, step, 0, warmup)
    # All ranks run what is new to one of them.
    for number in sorted(set().union(*task.ranks.gather(new_shapes(task, warmup, steps)))):
        timed(task, step, number, number + 1)


def shares(task: Task, step: Step, steps: int, warmup: int, sums_s: float) -> list[RankShare]:
    """Each rank's part of the timed steps, and how fast it is alone."""
    ranks = task.ranks
    objective = choose_objective(
        task.run, task.model, task.executor, task.memory.token_budget, ALONE
    )
    alone = replace(task, ranks=ALONE, objective=objective)
    mine = [
        row
        for _, rows in rows_of_steps(task, warmup, warmup + steps)
        for row in ranks.share(rows).rows
    ]
    tokens = sum(len(side) for row in mine for side in row.sides)
    warm_up(alone, step, steps, warmup)
    events, seconds = timed(alone, step, warmup, warmup + steps)
    speed = sum(event.num_rows for event in events) / seconds
    found = ranks.gather([ranks.name(ranks.rank), len(mine), tokens, sums_s, speed])
    return [RankShare(*of_rank) for of_rank in found]


def new_shapes(task: Task, warmup: int, steps: int) -> list[int]:
    """Those of the `steps` after a warm-up that meet a shape that no step before them has met."""
    met: set[tuple[int, ...]] = set()
    new = []
    for number, rows in rows_of_steps(task, 0, warmup + steps):
        mine = task.ranks.share(rows).rows
        groups = task.executor.split(mine, task.memory.token_budget)
        microbatches = task.objective.collate(groups, rows)
        shapes = {(*m.inputs.shape, *m.positions.shape) for m in microbatches}
        if number >= warmup and not shapes <= met:
            new.append(number)
        met |= shapes
    return new


def needed_products(
    model: Network, num_tokens: int, num_predicted: int, steps: int
) -> tuple[float, float]:
    """Seconds that training's matrix products would take at the machine's speed, and that speed.

    Of each linear layer of the base the forward product and the input's gradient; of the
    head the same at predicted tokens. A frozen base has no more; attention and LoRA, some
    2 %, are left out. The speed is that of a mean step's tokens in one product.

    Args:
        model: with or without LoRA.
        num_tokens: that go through the blocks.
        num_predicted: tokens with a loss.
        steps: that they came in.

    Returns:
        Seconds, and GFLOP/s.
    """
    modules = dict(model.named_modules())
    shapes = [shape_of(modules[p]) for p in linear_paths(model) if is_of_base(p)]
    work = [(out, into, num_tokens) for out, into in shapes]
    work.append((model.args.vocab_size, model.args.hidden_size, num_predicted))
    speed = {
        product: backend.matmul_gflops(
            rows=max(1, product[2] // steps),
            inner=product[1],
            columns=product[0],
            seconds=_PRODUCT_SECONDS,
            dtype=model.dtype,
        )
        for product in set(work)
    }
    gigaflops = {(out, into, count): 4 * out * into * count / 1e9 for out, into, count in speed}
    seconds = sum(gigaflops[product] / speed[product] for product in work)
    return seconds, sum(gigaflops[product] for product in work) / seconds


def is_of_base(path: str) -> bool:
    """Whether a linear layer is the base's, and not an adapter's or an untied head."""
    return not path.endswith((*LORA_NAMES, "lm_head"))
