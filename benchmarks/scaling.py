"""How the cost of an update grows with the work: tokens a row by rows an update.

    python benchmarks/scaling.py                  a full-size model with random weights
    python benchmarks/scaling.py --model FOLDER   another base
    python benchmarks/scaling.py --lengths 384 --batches 1 --set train.gradient_checkpointing=true

Rows are all of one length, made of the shipped answers, and trained on as
`imate-mlx train --run A` would; times are medians of the updates. It prints three
tables and one line of JSON; `--plot FILE` draws them (`pip install "interviewmate-mlx[plots]"`).
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from peers import make_base
from peers_report import processor

from interviewmate_mlx import backend

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from interviewmate_mlx.config import load_run, shipped
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import BackendError, InterviewMateError
from interviewmate_mlx.training.loop import run_steps
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import Task, prepare

HERE = Path(__file__).parent
LENGTHS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32)
Cells = list[dict[str, Any]]


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    here = backend.machine()
    try:
        base = make_base(options)
        with tempfile.TemporaryDirectory() as folder:
            rows = write_rows(
                Path(folder, "train.jsonl"), 2 * max(options.batches), max(options.lengths)
            )
            cells = [
                cell for length in options.lengths for cell in measure(options, base, rows, length)
            ]
    except InterviewMateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    weights = max((cell["weight_bytes"] for cell in cells), default=0)
    print(f"{processor()}, {here.device_name}, mlx {here.mlx_version}")
    print(f"{base.name}: {weights / 1e9:.2f} GB of weights\n")
    print(table(cells, "tokens/s", lambda cell: f"{cell['tokens_per_s']:.0f}"))
    print(table(cells, "seconds an update", lambda cell: f"{cell['seconds']:.2f}"))
    print(table(cells, "GB above the weights", above_weights))
    print(json.dumps({"device": here.device_name, "base": base.name, "cells": cells}))
    if options.plot:
        draw(cells, options.plot)
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a base; default: random weights")
    parser.add_argument("--tokenizer", type=Path, help="folder of the random base's tokenizer")
    parser.add_argument("--corpus", type=Path, help="text to train that tokenizer on (.txt, .xz)")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the random base")
    parser.add_argument(
        "--lengths", type=numbers, default=LENGTHS, help="tokens a row, like 64,128"
    )
    parser.add_argument("--batches", type=numbers, default=BATCHES, help="rows an update, like 1,4")
    parser.add_argument("--updates", type=int, default=3, help="timed, of each kind")
    parser.add_argument("--warmup", type=int, default=1, help="untimed, of each kind")
    parser.add_argument("--set", action="append", default=[], help="a key of the run, as in train")
    parser.add_argument("--plot", type=Path, help="file of a picture to draw")
    options = parser.parse_args(words)
    if options.plot and not find_spec("matplotlib"):
        parser.error('--plot needs matplotlib: pip install "interviewmate-mlx[plots]"')
    return options


def write_rows(path: Path, count: int, num_tokens: int) -> Path:
    """Rows of more than so many tokens, no two alike; `data.max_length` cuts them."""
    answers = [record.answer for record in load_splits(shipped("data/interview"))["train"]]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            start = number % len(answers)
            text = " ".join(answers[start:] + answers[:start])[: 10 * num_tokens]
            file.write(json.dumps({"prompt": "Go on: ", "completion": text}) + "\n")
    return path


def measure(options: argparse.Namespace, base: Path, rows: Path, length: int) -> Cells:
    """All batches of one length; none where not even one row fits into memory."""
    mx.clear_cache()
    settings = [
        f"model.base={json.dumps(str(base.resolve()))}",
        f"data.path={json.dumps(str(rows))}",
        f"data.max_length={length}",
        "train.batch_size=1",
        "train.epochs=1000",
        *options.set,
    ]
    try:
        task = prepare(load_run("A", settings))
    except BackendError as error:
        print(f"{length} tokens a row: {error}", file=sys.stderr)
        return []
    with task.memory_limits(), task.executor.opened():
        return [measure_batch(options, task, length, batch) for batch in options.batches]


def measure_batch(options: argparse.Namespace, task: Task, length: int, batch: int) -> dict:
    """Updates of `batch` rows, on the task's model as earlier ones left it."""
    train = dataclasses.replace(task.run.train, grad_accumulation=batch)
    task = dataclasses.replace(task, run=dataclasses.replace(task.run, train=train))
    step = Step(task.model, adamw(), train.max_grad_norm, task.executor)

    mx.reset_peak_memory()
    last = options.warmup + options.updates
    steps = list(run_steps(task, step, 0, last, lambda: False))
    timed = steps[options.warmup :]
    cell = {
        "tokens_per_row": length,
        "rows_per_update": batch,
        "tokens_per_s": median(step.num_tokens / step.elapsed_s for step in timed),
        "seconds": median(step.elapsed_s for step in timed),
        "peak_bytes": mx.get_peak_memory(),
        "weight_bytes": sum(array.nbytes for _, array in tree_flatten(task.model.parameters())),
    }
    print(
        f"{length} tokens a row, {batch} rows: {cell['tokens_per_s']:.0f} tokens/s, "
        f"{above_weights(cell)} GB above the weights",
        file=sys.stderr,
    )
    return cell


def above_weights(cell: dict) -> str:
    """GB at the peak that are not weights."""
    return f"{(cell['peak_bytes'] - cell['weight_bytes']) / 1e9:.2f}"


def table(cells: Cells, name: str, show: Callable[[dict], str]) -> str:
    """Tokens a row downwards, rows an update across."""
    batches = sorted({cell["rows_per_update"] for cell in cells})
    by_place = {(cell["tokens_per_row"], cell["rows_per_update"]): cell for cell in cells}
    lines = [
        f"| {name}: tokens a row | " + " | ".join(f"{batch} rows" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for length in sorted({cell["tokens_per_row"] for cell in cells}):
        row = [show(by_place[length, batch]) for batch in batches]
        lines.append(f"| {length} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw(cells: Cells, path: Path) -> None:
    """Speed by length, and time by the tokens of an update: a straight line is what is wanted."""
    import matplotlib  # an extra: the tables need none of it

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (speed, cost) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for batch in sorted({cell["rows_per_update"] for cell in cells}):
        of_batch = [cell for cell in cells if cell["rows_per_update"] == batch]
        lengths = [cell["tokens_per_row"] for cell in of_batch]
        seconds = [cell["seconds"] for cell in of_batch]
        label = f"{batch} row{'s' if batch > 1 else ''} an update"
        speed.plot(lengths, [cell["tokens_per_s"] for cell in of_batch], "o-", label=label)
        cost.plot([batch * length for length in lengths], seconds, "o-", label=label)
    speed.set(xscale="log", xlabel="tokens a row", ylabel="tokens/s", ylim=(0, None))
    cost.set(yscale="log", xlabel="tokens an update", ylabel="seconds an update")
    all_lengths = sorted({cell["tokens_per_row"] for cell in cells})
    speed.set_xticks(all_lengths, map(str, all_lengths))
    cost.set_xscale("log", base=4)
    cost.xaxis.set_major_formatter("{x:g}")
    cost.yaxis.set_major_formatter("{x:g}")
    cost.yaxis.set_minor_formatter("")
    speed.minorticks_off()
    speed.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Plot: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
