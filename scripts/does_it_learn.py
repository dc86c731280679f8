"""Do runs A, B and C learn? Validation loss before and after each, over several seeds.

    python scripts/does_it_learn.py --model mini --rate-scale 25

A table, then one line of JSON. A run here is the shipped one in all but its base, its
seed, and what the options change.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.events import Finished, Summary
from interviewmate_mlx.training.loop import train

# isort: split
from rich.console import Console
from rich.table import Table


def train_once(run_name: str, overrides: Sequence[str]) -> Summary:
    """Train a run into a folder that is thrown away."""
    run = load_run(run_name, list(overrides))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / run.name
        *_, finished = train(run, out)
    assert isinstance(finished, Finished)
    return finished.summary


def figures(run_name: str, overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, object]:
    """Mean and spread (largest less smallest) of a run over some seeds."""
    run = load_run(run_name, list(overrides))
    summaries = []
    for seed in seeds:
        summaries.append(train_once(run_name, [*overrides, f"train.seed={seed}"]))
        last = summaries[-1]
        print(
            f"{run.name}, seed {seed}: validation {last.base_valid_loss:.4f} -> "
            f"{last.best_valid_loss:.4f} in {last.training_s:.0f} s",
            file=sys.stderr,
        )
    losses = [summary.best_valid_loss for summary in summaries]
    return {
        "run": run.name,
        "rank": run.lora.rank,
        "learning_rate": run.train.learning_rate,
        "base_valid_loss": summaries[0].base_valid_loss,
        "valid_loss": statistics.mean(losses),
        "spread": max(losses) - min(losses),
        "training_loss": statistics.mean(summary.final_loss for summary in summaries),
        "training_s": statistics.mean(summary.training_s for summary in summaries),
    }


def table(base: str, rows: Sequence[dict[str, object]], num_seeds: int) -> Table:
    """The figures for people."""
    title = f"Loss on {base} after each run, mean of {num_seeds} seeds"
    shown = Table(title=title, title_justify="left")
    for name in ("run", "rank", "rate", "validation", "spread", "fall", "training"):
        shown.add_column(name, justify="right" if name != "run" else "left")
    shown.add_row("base", "", "", f"{rows[0]['base_valid_loss']:.4f}", "", "", "")
    for row in rows:
        fall = row["base_valid_loss"] - row["valid_loss"]
        shown.add_row(
            row["run"],
            str(row["rank"]),
            f"{row['learning_rate']:g}",
            f"{row['valid_loss']:.4f}",
            f"{row['spread']:.4f}",
            f"{fall:.4f}",
            f"{row['training_loss']:.4f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="the base")
    parser.add_argument("--runs", nargs="+", default=["A", "B", "C"], help="names or files")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="of the learning rates")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    rows = []
    for name in args.runs:
        rate = args.rate_scale * load_run(name).train.learning_rate
        own = [f"model.base={json.dumps(args.model)}", f"train.learning_rate={rate:g}"]
        rows.append(figures(name, [*own, *args.set], range(args.seeds)))
    Console(width=80).print(table(args.model, rows, args.seeds))
    print(json.dumps({**vars(args), "figures": rows}))


if __name__ == "__main__":
    main()
