"""The whole job in a minute, with no network: train Run A on `mini`, ask it, find the adapter.

`mini` is the base that comes with the package: Falcon-RW's architecture at a hundredth of its
size, trained on texts about machine learning. It learns how an answer sounds, not what is true.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.records import load_splits

RUN, ADAPTER = "A", Path("adapters/demo")
QUESTIONS = (0, 1)  # of the test split: no run has seen them
SAMPLING = ("--max-tokens", "64")
WIDTH = 80


def imate(*words: str, quiet: bool = False) -> str:
    """Run an `imate-mlx` command in a process of its own, and show it."""
    print(f"\n$ imate-mlx {subprocess.list2cmdline(words)}", flush=True)
    program = Path(sys.executable).with_name("imate-mlx")
    stdout = subprocess.PIPE if quiet else None
    return subprocess.run([str(program), *words], check=True, stdout=stdout, text=True).stdout


def ask(question: str, *words: str) -> str:
    said = imate("generate", question, *words, *SAMPLING, "--json", quiet=True)
    return json.loads(said)["answer"]


def main() -> None:
    imate("train", "--run", RUN, "--model", "mini", "--out", str(ADAPTER), "--force")
    rows = load_splits(shipped("data/interview"))["test"]
    for number in QUESTIONS:
        question, own = (message.content for message in rows[number].messages)
        answers = [ask(question, "--model", "mini"), ask(question, "--adapter", str(ADAPTER))]
        shown = Table(title=f"\n{question}", title_justify="left", box=box.SIMPLE, width=WIDTH)
        for name in ("mini", f"mini with {ADAPTER}", "the answer in the data"):
            shown.add_column(name, ratio=1)
        shown.add_row(*answers, own)
        Console(width=WIDTH).print(shown)
    print(
        f"""
The adapter is in {ADAPTER}, a PEFT folder. `mini` is too small to know what is true;
these five commands do the same with Falcon-RW-1B:

    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx bench --run A
    imate-mlx export adapters/run_A --push you/interview-coach"""
    )


if __name__ == "__main__":
    main()
