"""Do runs A, B and C learn? Validation loss before and after each, over several seeds.

    python scripts/does_it_learn.py --model mini --rate-scale 2.5

And do they still write as well: `repeats` is the share of `fluency.py`. A table, then one line
of JSON. A run here is the shipped one in all but its base, its seed, and what the options change.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fluency import answers, mean_share

from interviewmate_mlx.coach.generate import load_coach
from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.events import Finished, Summary
from interviewmate_mlx.training.loop import train

# isort: split
from rich.console import Console
from rich.table import Table


def train_once(run_name: str, overrides: Sequence[str]) -> tuple[Summary, float]:
    """Train a run into a folder that is thrown away; and the share of repeats in its answers."""
    run = load_run(run_name, list(overrides))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / run.name
        *_, finished = train(run, out)
        repeats = mean_share(answers(*load_coach(adapter=out)))
    assert isinstance(finished, Finished)
    return finished.summary, repeats


def figures(run_name: str, overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, object]:
    """Mean and spread (largest less smallest) of a run over some seeds."""
    run = load_run(run_name, list(overrides))
    summaries, shares = [], []
    for seed in seeds:
        last, repeats = train_once(run_name, [*overrides, f"train.seed={seed}"])
        summaries.append(last)
        shares.append(repeats)
        print(
            f"{run.name}, seed {seed}: validation {last.base_valid_loss:.4f} -> "
            f"{last.best_valid_loss:.4f} in {last.training_s:.0f} s, repeats {repeats:.1%}",
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
        "repeats": statistics.mean(shares),
    }


def table(base: str, repeats: float, rows: Sequence[dict[str, object]], num_seeds: int) -> Table:
    """The figures for people."""
    title = f"Loss on {base} after each run, mean of {num_seeds} seeds"
    shown = Table(title=title, title_justify="left")
    for name in ("run", "rank", "rate", "validation", "spread", "fall", "training", "repeats"):
        shown.add_column(name, justify="right" if name != "run" else "left")
    start = f"{rows[0]['base_valid_loss']:.4f}"
    shown.add_row("base", "", "", start, "", "", "", f"{repeats:.1%}")
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
            f"{row['repeats']:.1%}",
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
    rows, repeats = [], mean_share(answers(*load_coach(args.model)))
    for name in args.runs:
        rate = args.rate_scale * load_run(name).train.learning_rate
        own = [f"model.base={json.dumps(args.model)}", f"train.learning_rate={rate:g}"]
        rows.append(figures(name, [*own, *args.set], range(args.seeds)))
    Console(width=80).print(table(args.model, repeats, rows, args.seeds))
    print(json.dumps({**vars(args), "repeats": repeats, "figures": rows}))


if __name__ == "__main__":
    main()
