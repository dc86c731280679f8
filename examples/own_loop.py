"""A training loop of your own: your stop condition, your live line, and then on to the end.

    python examples/own_loop.py                 # in a temporary folder, which is removed
    python examples/own_loop.py --out my_loop   # in a new folder, which stays

`train` yields events. Whoever iterates over it decides what to show and when to stop; it
writes checkpoints, metrics and the adapter by itself. There is no Trainer class to configure
and no callback to register.

It trains on `mini`, the small base that comes along, so it needs no network. On a Linux CPU
the first run on a machine takes longer than later ones, because MLX compiles its kernels then.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from interviewmate_mlx.config import RunConfig, load_run
from interviewmate_mlx.training.events import Event, Finished, Started, Stepped, Validated
from interviewmate_mlx.training.loop import train

GOOD_ENOUGH = 2.0  # nats a token
SMOOTHING = 0.7  # of the loss: one step sees four rows, and so jumps


def write_questions(path: Path) -> None:
    """Sums with small numbers: a task whose form is learned in a few steps."""
    numbers = [(first, second) for first in range(2, 8) for second in range(2, 8)]
    lines = [
        json.dumps({"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}."})
        for a, b in numbers
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class SmoothLoss:
    """A mean of the last losses that forgets the old ones."""

    value: float | None = None

    def add(self, loss: float) -> None:
        before = loss if self.value is None else self.value
        self.value = SMOOTHING * before + (1 - SMOOTHING) * loss

    def is_good_enough(self) -> bool:
        return self.value is not None and self.value < GOOD_ENOUGH


def watch(events: Iterator[Event], loss: SmoothLoss) -> Finished:
    """Show a run on one line, keep its smoothed loss, and give its last event back."""
    total, finished = 0, None
    for event in events:
        if isinstance(event, Started):
            total = event.total_steps
            print(f"from step {event.step} of {total}")
        elif isinstance(event, Stepped):
            loss.add(event.loss)
            bar = ("#" * (20 * event.step // total)).ljust(20, ".")
            show(f"[{bar}] step {event.step}/{total}  loss {loss.value:.2f}")
        elif isinstance(event, Validated):
            show(f"validation loss {event.loss:.3f} after step {event.step}")
        elif isinstance(event, Finished):
            finished = event
    if sys.stdout.isatty():
        print()
    assert finished
    return finished


def show(text: str) -> None:
    """Write over the last line on a terminal, below it elsewhere."""
    end = "" if sys.stdout.isatty() else "\n"
    print(f"\r{text:<60}" if end == "" else text, end=end, flush=True)


def main(folder: Path) -> None:
    data = folder / "sums.jsonl"
    write_questions(data)
    # Large steps and no warmup: so short a run has no steps to lose.
    settings = {"epochs": 2, "warmup_ratio": 0.0, "learning_rate": 5e-3}
    run: RunConfig = load_run("mini").replace("sums", data={"path": str(data)}, train=settings)
    adapter = folder / "adapter"

    # `stop` is asked after each step. True ends the step, saves the state, and ends the run.
    # (To leave the loop with `break` saves too, as soon as the generator is closed.)
    loss = SmoothLoss()
    finished = watch(train(run, adapter, stop=loss.is_good_enough), loss)
    if finished.interrupted:
        print(f"good enough after step {finished.step}: a loss of {loss.value:.2f}")
        # The same run goes on from there, as if it had never been interrupted.
        finished = watch(train(run, adapter, resume=True), SmoothLoss())
    summary = finished.summary
    print(
        f"{summary.steps} steps: training loss {summary.first_loss:.2f} -> {summary.final_loss:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a new folder to write to")
    out = parser.parse_args().out
    if out:
        out.mkdir(parents=True)
        main(out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
