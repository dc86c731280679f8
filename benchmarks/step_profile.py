"""Where the time of a training step goes on an NVIDIA GPU: its kernels by kind.

    python benchmarks/step_profile.py --model FOLDER --data interview-1000 --batch 32

Run A's steps are timed as `imate-mlx bench` times them, then profiled by torch's profiler, which
sees the kernels of the whole process. Kernels run side by side, so their sum exceeds the step.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from interviewmate_mlx import backend  # its BLAS must be loaded before MLX

# isort: split
import mlx.core as mx

from interviewmate_mlx.config import load_run
from interviewmate_mlx.results.bench import needed_products, timed, warm_up
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import choose_optimizer, prepare

# What the name of a kernel holds, by what it does; the first that fits.
KINDS = {
    "products": r"nvjet|gemm|splitK|cutlass",
    "attention": r"cudnn|sdpa",
    "copies": r"copy_",
    "norms": r"layer_norm|rms_norm",
    "sums over tokens": r"col_reduce",
    "GELU": r"f4IErf",
    "dropout": r"u4I.*IRightShift",
    "cross-entropy": r"cross_entropy",
    "sums of two": r"binary_vv<mlx::core::cu::Add",
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini", help="folder of a base")
    parser.add_argument("--data", default="interview", help="folder of the rows")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=6, help="steps not timed")
    parser.add_argument("--kernels", type=int, default=0, help="print so many by name, too")
    asked = parser.parse_args(words)
    if backend.machine().device != "cuda":
        print("step_profile.py reads NVIDIA's counters, and MLX sees no such GPU.", file=sys.stderr)
        return 2
    settings = [f"model.base={asked.model}", f"data.path={asked.data}"]
    settings += [f"train.batch_size={asked.batch}", "train.grad_accumulation=1"]
    run = load_run("A", settings)
    task = prepare(run)
    with task.memory_limits(), task.executor.opened():
        optimizer = choose_optimizer(run, task.model)
        step = Step(
            task.model, optimizer, run.train.max_grad_norm, task.executor, task.objective.loss
        )
        warm_up(task, step, asked.steps, asked.warmup)
        last = asked.warmup + asked.steps
        events, seconds = timed(task, step, asked.warmup, last)
        tokens, predicted = (
            sum(getattr(event, name) for event in events)
            for name in ("num_tokens", "num_predicted")
        )
        rows = sum(event.num_rows for event in events)
        products, gflops = needed_products(task.model, tokens, predicted, asked.steps)
        print(
            f"{rows / seconds:.0f} samples/s, {1e3 * seconds / asked.steps:.1f} ms a step; "
            f"products need {products / seconds:.0%} of it at {gflops / 1e3:.0f} TFLOP/s"
        )
        kernels = profiled(lambda: timed(task, step, asked.warmup, last))
    print("\n".join(table(kernels, asked.steps, asked.kernels)))
    return 0


def profiled(work: Callable[[], object]) -> list[tuple[str, float]]:
    """The name and the microseconds of each kernel of some work."""
    # Here, since torch may be missing, and on CUDA brings its own libraries.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        mx.synchronize()
    return [
        (event.name, event.device_time)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def table(kernels: Iterable[tuple[str, float]], steps: int, by_name: int = 0) -> list[str]:
    """Lines: milliseconds a step, kernels a step, and their kind; then the same by name."""
    times, counts = (Counter[tuple[str, str]]() for _ in range(2))
    for name, microseconds in kernels:
        for key in (("kind", kind_of(name)), ("name", name)):
            times[key] += microseconds
            counts[key] += 1
    lines = [f"{'ms a step':>10} {'kernels':>8}"]
    for what, most in (("kind", None), ("name", by_name)):
        of_it = [key for key, _ in times.most_common() if key[0] == what][:most]
        lines += [
            f"{1e-3 * times[key] / steps:>10.2f} {counts[key] / steps:>8.1f} {key[1][:120]}"
            for key in of_it
        ]
    return lines


def kind_of(name: str) -> str:
    """What a kernel does, from its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name))
    return next(found, "all else")


if __name__ == "__main__":
    sys.exit(main())
