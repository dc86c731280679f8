"""This package beside its peers: the same work, the same machine, the same run.

    python benchmarks/peers.py                    the full-size model with random weights
    python benchmarks/peers.py --model FOLDER     another base
    python benchmarks/peers.py --only 1,4         some of the contenders

The work is Run A's: the shipped questions in the run's own order, its LoRA, its
effective batch and its learning rate. What differs from `imate-mlx train --run A`
differs for all: no dropout and no schedule (so that the losses can be compared),
and a clipping that never bites (mlx-lm's trainer has none).

Each contender runs in a process of its own, a fresh one each round, in an order
that turns with the rounds. Their losses must agree, update by update, before any
time is believed; otherwise the command ends with 1. It prints a table, then one
line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from contender import CONTENDERS, Job, Result, Row
from peers_report import Rounds, describe, heading, loss_table, speed_table
from random_base import random_base

from interviewmate_mlx import backend
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.config import RunConfig, load_run
from interviewmate_mlx.data.batches import epoch_steps
from interviewmate_mlx.data.prompts import Example, encode_records
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import BackendError, DataError, InterviewMateError
from interviewmate_mlx.hub.names import fetch_data
from interviewmate_mlx.model.lora import resolve_targets

HERE = Path(__file__).parent
# Nats by which two losses may differ, both in float32 or one in half precision, and how much more
# for each nat that the losses have moved: half precision rounds part of a small update away.
TOLERANCE = {"float32": (1e-3, 0.01), "half": (1e-2, 0.3)}


class DisagreementError(InterviewMateError):
    """The contenders did not do the same work."""


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        base = make_base(options)
        run = load_run("A", overrides(options, base))
        rows, first = choose_steps(run, base, options.updates)
        print_workload(options, run, rows)
        rounds = measure(options, run, base, rows, first)
    except InterviewMateError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    facts = describe(options, base, rows, rounds)
    text = f"{heading(facts)}\n\n{speed_table(facts)}\n\n{loss_table(rounds)}"
    print(f"{text}\n\n{json.dumps(facts)}")
    if options.write:
        with options.write.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a base; default: random weights")
    parser.add_argument("--data", default="interview", help="folder of the rows")
    parser.add_argument("--tokenizer", type=Path, help="folder of the random base's tokenizer")
    parser.add_argument("--corpus", type=Path, help="text to train that tokenizer on (.txt, .xz)")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the random base")
    parser.add_argument("--only", default="1,2,3,4,5", help="numbers of contenders, like 1,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="timed updates in a round")
    parser.add_argument("--warmup", type=int, default=1, help="of them, run before untimed")
    parser.add_argument("--batch", type=int, default=4, help="rows an update")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of the CPU")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--write", type=Path, help="append the tables to this file")
    options = parser.parse_args(words)
    options.only = [int(number) for number in options.only.split(",") if number.isdigit()]
    if not options.only or not set(options.only) <= set(CONTENDERS):
        parser.error(f"--only: expected numbers of {', '.join(map(str, CONTENDERS))}, like 1,4")
    if not 0 < options.warmup <= options.updates:
        parser.error("--warmup: expected 1 or more, and no more than --updates")
    return options


def num_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_base(options: argparse.Namespace) -> Path:
    """A folder with safetensors, which all contenders read; made once where there is none."""
    if options.model is None:
        print("The random base ...", file=sys.stderr)
        return random_base(options.cache, options.tokenizer, options.corpus)
    if list(options.model.glob("model*.safetensors")):
        return options.model
    return convert(options.model, options.cache / options.model.resolve().name, force=True).path


def overrides(options: argparse.Namespace, base: Path) -> list[str]:
    """Run A with what must be alike for all."""
    return [
        f"model.base={json.dumps(str(base.resolve()))}",
        f"data.path={json.dumps(options.data)}",
        "lora.dropout=0",
        "train.schedule=constant",
        "train.warmup_ratio=0",
        "train.max_grad_norm=1e9",
        "train.batch_size=1",
        f"train.grad_accumulation={options.batch}",
    ]


def choose_steps(run: RunConfig, base: Path, count: int) -> tuple[list[list[Row]], int]:
    """Updates of the first epoch that follow one another, their rows as long as the split's.

    Returns:
        The rows of each update, and the number of the first one.

    Raises:
        DataError: an epoch has fewer whole updates.
    """
    records = load_splits(fetch_data(run.data.path))["train"]
    tokenizer = Base.open(base).tokenizer
    examples, _ = encode_records(tokenizer, records, run.data.max_length, run.data.train_on)
    lengths = [len(example) for example in examples]
    batch = run.train.effective_batch
    steps = epoch_steps(lengths, batch, run.train.seed, epoch=0)
    starts = [
        start
        for start in range(len(steps) - count + 1)
        if all(len(step) == batch for step in steps[start : start + count])
    ]
    if not starts:
        raise DataError(f"{count} whole updates of {batch} rows: an epoch has {len(steps)} in all.")

    def distance(start: int) -> float:
        chosen = [lengths[row] for step in steps[start : start + count] for row in step]
        return abs(sum(chosen) / len(chosen) - sum(lengths) / len(lengths))

    first = min(starts, key=distance)
    chosen = steps[first : first + count]
    return [[as_row(examples[row]) for row in step] for step in chosen], first


def as_row(example: Example) -> Row:
    return Row(example.tokens.tolist(), len(example) - int(example.loss_mask.sum()))


def print_workload(options: argparse.Namespace, run: RunConfig, steps: list[list[Row]]) -> None:
    lengths = [len(row.tokens) for rows in steps for row in rows]
    print(
        f"{len(steps)} updates of {run.train.effective_batch} rows, "
        f"{sum(lengths) / len(lengths):.0f} tokens a row ({min(lengths)} to {max(lengths)}), "
        f"{options.warmup} of them run before as warm-up; {options.rounds} rounds, "
        f"{options.threads} CPU threads",
        file=sys.stderr,
    )
    for slowdown in backend.slowdowns():
        print(f"slower than it could be: {slowdown}", file=sys.stderr)


def measure(
    options: argparse.Namespace, run: RunConfig, base: Path, steps: list[list[Row]], first: int
) -> Rounds:
    """All rounds; each contender in a process of its own.

    Raises:
        DisagreementError: of the losses, found after any round.
        BackendError: a contender did not end well.
    """
    network = Base.open(base).build(backend.resolve_dtype("auto"))
    targets = list(resolve_targets(network, run.lora.targets))
    rounds: Rounds = []
    for number in range(options.rounds):
        turn = number % len(options.only)
        results: dict[int, Result] = {}
        for contender in options.only[turn:] + options.only[:turn]:
            job = Job(
                name=CONTENDERS[contender].name,
                base=str(base.resolve()),
                steps=steps,
                warmup=options.warmup,
                first_step=first,
                overrides=overrides(options, base),
                dtype=CONTENDERS[contender].dtype,
                one_row_padded_to=CONTENDERS[contender].one_row_padded_to,
                device=options.device,
                threads=options.threads,
                rank=run.lora.rank,
                alpha=run.lora.alpha,
                targets=targets,
                learning_rate=run.train.learning_rate,
                result="",
            )
            results[contender] = result = run_contender(job, CONTENDERS[contender].script)
            rows = sum(map(len, steps))
            print(
                f"round {number + 1} of {options.rounds}: {job.name}: "
                f"{rows / result.seconds:.3f} samples/s, losses "
                + " ".join(f"{loss:.4f}" for loss in result.losses),
                file=sys.stderr,
            )
        rounds.append({contender: results[contender] for contender in options.only})
        check_losses(rounds)
    return rounds


def run_contender(job: Job, script: str) -> Result:
    """Run a contender's script on a job, in a new process.

    Raises:
        BackendError: it failed; with the end of what it printed.
    """
    threads = str(job.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {
        **os.environ,
        **dict.fromkeys(names, threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if job.device == "cpu":
        environment["INTERVIEWMATE_DEVICE"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder, "job.json"), Path(folder, "result.json")
        path.write_text(json.dumps(asdict(job) | {"result": str(result)}))
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode or not result.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise BackendError(f"{job.name} ended with {done.returncode}:\n{tail}")
        return Result(**json.loads(result.read_text()))


def check_losses(rounds: Rounds) -> None:
    """Hold every loss of every contender to the same update's of a float32 one.

    Raises:
        DisagreementError: with the table of losses.
    """
    results = [(number, result) for round_ in rounds for number, result in round_.items()]
    # transformers' float32 is the truth where it runs.
    by_trust = sorted(results, key=lambda pair: (pair[1].dtype != "float32", -pair[0]))
    _, reference = by_trust[0]
    moved = max(abs(loss - reference.losses[0]) for loss in reference.losses)
    faults = []
    for number, result in results:
        exact = result.dtype == reference.dtype == "float32"
        tolerance, drift = TOLERANCE["float32" if exact else "half"]
        gaps = [abs(a - b) for a, b in zip(result.losses, reference.losses, strict=True)]
        allowed = [tolerance, *(tolerance + drift * moved for _ in gaps[1:])]
        # Not `>`: a loss that is not a number agrees with nothing.
        faults += [
            f"{CONTENDERS[number].name}, update {update}: off by {gap:.4f}, allowed {most:.4f}"
            for update, (gap, most) in enumerate(zip(gaps, allowed, strict=True), start=1)
            if not gap <= most
        ]
    if faults:
        raise DisagreementError(
            "the losses do not agree, so no time is believed:\n  "
            + "\n  ".join(dict.fromkeys(faults))
            + f"\n\n{loss_table(rounds)}"
        )


if __name__ == "__main__":
    sys.exit(main())
