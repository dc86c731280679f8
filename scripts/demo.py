"""The whole job in two minutes, with no network: train Run A on `mini`, then ask it.

The run is `configs/mini.toml`, Run A at a learning rate for so small a model, and one of its
three epochs, so that it takes a third of the time.

`mini` is the base that comes with the package: Falcon-RW's architecture at less than a
hundredth of its size, trained on texts about machine learning. It learns how an answer sounds, not
what is true.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.records import load_splits

ADAPTER = Path("adapters/demo")
QUESTIONS = (44, 25)  # of the test split, which no run has seen; two of the shortest
# Not the likeliest token each time: so small a model would soon go round in circles.
SAMPLING = ("--max-tokens", "80", "--temperature", "0.6", "--top-p", "0.9", "--seed", "1")
WIDTH = 80


def imate(*words: str, stdout: int | None = None) -> str:
    """Run an `imate-mlx` command in a process of its own, and show it."""
    print(f"\n$ imate-mlx {subprocess.list2cmdline(words)}", flush=True)
    program = Path(sys.executable).with_name("imate-mlx")
    done = subprocess.run([str(program), *words], check=True, stdout=stdout, text=True)
    return done.stdout or ""


def ask(question: str, *words: str) -> str:
    """The answer, in one paragraph."""
    said = imate("generate", question, *words, *SAMPLING, "--json", stdout=subprocess.PIPE)
    return " ".join(json.loads(said)["answer"].split())


def main() -> None:
    one_epoch = ("--set", "train.epochs=1")
    imate("train", "--run", "mini", *one_epoch, "--out", str(ADAPTER), "--force")
    rows = load_splits(shipped("data/interview"))["test"]
    for number in QUESTIONS:
        question = rows[number].messages[0].content
        answers = [ask(question, "--model", "mini"), ask(question, "--adapter", str(ADAPTER))]
        shown = Table(title=question, title_justify="left", box=box.SIMPLE, width=WIDTH)
        shown.add_column("mini", ratio=1)
        shown.add_column(f"mini with {ADAPTER}", ratio=1)
        shown.add_row(*map(Text, answers))
        Console(width=WIDTH).print("\n", shown)
    print(
        f"""
The adapter is in {ADAPTER}, a PEFT folder. mini learned how an answer sounds; it is
too small to know what is true. The same on Falcon-RW-1B (2.6 GB) in five commands:

    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx bench --run A
    imate-mlx export adapters/run_A --push you/interview-coach"""
    )


if __name__ == "__main__":
    main()
