"""The whole job in under two minutes, with no network: train Run A on `mini`, then look and ask.

The run is `configs/mini.toml`. On a slow machine it is cut to the steps that a minute has room for.

`mini` is the base that comes with the package: Falcon-RW's architecture at less than a
hundredth of its size, trained on texts about machine learning. It learns how an answer sounds, not
what is true.
"""

import json
import subprocess
import sys
from pathlib import Path

from interviewmate_mlx.coach.generate import answer, load_coach
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.config import load_run, shipped
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import encode_records
from interviewmate_mlx.data.records import load_splits

# isort: split
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from interviewmate_mlx.training.step import total_loss

ADAPTER = Path("adapters/demo")
TRAINING_SECONDS = 60  # at most, so that the demo ends within two minutes
ROWS_AT_ONCE = 8
QUESTIONS = (44, 25)  # of the test split, which no run has seen; two of the shortest
# Not the likeliest token each time: so small a model would soon go round in circles.
SAMPLING = Sampling(max_tokens=60, temperature=0.5, top_p=0.9, seed=5)
WIDTH = 80


def imate(*words: str, stdout: int | None = None) -> str:
    """Run an `imate-mlx` command in a process of its own, and show it."""
    print(f"\n$ imate-mlx {subprocess.list2cmdline(words)}", flush=True)
    program = Path(sys.executable).with_name("imate-mlx")
    done = subprocess.run([str(program), *words], check=True, stdout=stdout, text=True)
    return done.stdout or ""


def choose_length() -> list[str]:
    """The options that keep training within its time on this machine, which is tried first."""
    found = imate("train", "--run", "mini", "--dry-run", "--json", stdout=subprocess.PIPE)
    forecast = json.loads(found)
    seconds, steps = forecast["training_s"] + forecast["validation_s"], forecast["total_steps"]
    if seconds <= TRAINING_SECONDS:
        print(f"Training takes about {seconds:.0f} seconds here.")
        return []
    fewer = max(1, int(steps * TRAINING_SECONDS / seconds))
    print(f"{steps} steps would take about {seconds:.0f} seconds here: this demo takes {fewer}.")
    return ["--max-steps", str(fewer)]


def examine(adapter: Path | None) -> tuple[float, list[str]]:
    """Mean loss on the test questions in nats a token, and the answers to two of them."""
    run, rows = load_run("mini"), load_splits(shipped("data/interview"))["test"]
    model, tokenizer = load_coach("mini", adapter)
    examples, _ = encode_records(tokenizer, rows, run.data.max_length, run.data.train_on)
    examples.sort(key=len)
    groups = [examples[i : i + ROWS_AT_ONCE] for i in range(0, len(examples), ROWS_AT_ONCE)]
    loss_sum, num_tokens = total_loss(model)([collate(group) for group in groups])
    questions = [rows[number].messages[0].content for number in QUESTIONS]
    answers = [answer(model, tokenizer, question, SAMPLING) for question in questions]
    return loss_sum / num_tokens, [" ".join(text.split()) for text in answers]


def main() -> None:
    rows = load_splits(shipped("data/interview"))
    print(
        f"A small language model learns to answer interview questions from {len(rows['train'])} "
        f"examples.\nThen it is asked {len(rows['test'])} questions that it has never seen."
    )
    imate("train", "--run", "mini", *choose_length(), "--out", str(ADAPTER), "--force")
    (before, plain), (after, trained) = examine(None), examine(ADAPTER)
    print(
        f"\nLoss on the {len(rows['test'])} test questions, which it was not trained on (lower is "
        f"better):\n\n    before {before:.3f}    after {after:.3f}\n"
        "\nTwo of them, answered before and after:"
    )
    for number, *answers in zip(QUESTIONS, plain, trained, strict=True):
        title = rows["test"][number].messages[0].content
        shown = Table(title=title, title_justify="left", box=box.SIMPLE, width=WIDTH)
        shown.add_column("mini", ratio=1)
        shown.add_column(f"mini with {ADAPTER}", ratio=1)
        shown.add_row(*map(Text, answers))
        Console(width=WIDTH).print("\n", shown)
    print(
        f"""mini has 9.5 million parameters, Falcon-RW-1B has 1.3 billion. mini has learned how
an answer sounds. It is too small to know what is true, so it coaches nobody. What
was trained, the adapter, is in {ADAPTER}, a PEFT folder.

The same on Falcon-RW-1B (2.6 GB), which does know something:

    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx evaluate adapters/run_A
    imate-mlx export adapters/run_A --push you/interview-coach"""
    )


if __name__ == "__main__":
    main()
