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
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from contender import Job, Result, Row, shape_of
from random_base import random_base

from interviewmate_mlx.config import RunConfig, load_run
from interviewmate_mlx.data.batches import epoch_steps
from interviewmate_mlx.data.prompts import Example, encode_records
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.errors import BackendError, DataError, InterviewMateError
from interviewmate_mlx.weights.base import load_base_tokenizer
from interviewmate_mlx.weights.convert import convert
from interviewmate_mlx.weights.names import find_data

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contender:
    """A script, and what its job says beside the work."""

    name: str
    script: str
    dtype: str
    one_row_padded_to: int = 0  # 0: all rows of an update in one batch


CONTENDERS = {
    1: Contender("this package", "contender_ours.py", "auto"),
    2: Contender("mlx-lm's trainer", "contender_mlx_lm.py", "auto"),
    3: Contender("PEFT as in the seed, fp32", "contender_peft.py", "float32", 256),
    4: Contender("PEFT tuned, fp32", "contender_peft.py", "float32"),
    5: Contender("PEFT tuned, bf16", "contender_peft.py", "bfloat16"),
}
# Nats by which two losses may differ: both in float32, or one of them in bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
Rounds = list[dict[int, Result]]  # a result of each contender, a round


class DisagreementError(InterviewMateError):
    """The contenders did not do the same work."""


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        base = find_base(options)
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


def find_base(options: argparse.Namespace) -> Path:
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
    records = load_splits(find_data(run.data.path))["train"]
    tokenizer = load_base_tokenizer(base)
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
    return Row(example.tokens.tolist(), len(example) - int(example.learn.sum()))


def print_workload(options: argparse.Namespace, run: RunConfig, steps: list[list[Row]]) -> None:
    lengths = [len(row.tokens) for rows in steps for row in rows]
    print(
        f"{len(steps)} updates of {run.train.effective_batch} rows, "
        f"{sum(lengths) / len(lengths):.0f} tokens a row ({min(lengths)} to {max(lengths)}), "
        f"{options.warmup} of them run before as warm-up; {options.rounds} rounds, "
        f"{options.threads} CPU threads",
        file=sys.stderr,
    )


def measure(
    options: argparse.Namespace, run: RunConfig, base: Path, steps: list[list[Row]], first: int
) -> Rounds:
    """All rounds; each contender in a process of its own.

    Raises:
        DisagreementError: of the losses, found after any round.
        BackendError: a contender did not end well.
    """
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
                targets=list(run.lora.targets),
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
    faults = []
    for number, result in results:
        exact = result.dtype == reference.dtype == "float32"
        tolerance = TOLERANCE["float32" if exact else "bfloat16"]
        gaps = [abs(a - b) for a, b in zip(result.losses, reference.losses, strict=True)]
        # Not `>`: a loss that is not a number agrees with nothing.
        if not all(gap <= tolerance for gap in gaps):
            faults.append(f"{CONTENDERS[number].name}: off by {max(gaps):.4f}, allowed {tolerance}")
    if faults:
        raise DisagreementError(
            "the losses do not agree, so no time is believed:\n  "
            + "\n  ".join(dict.fromkeys(faults))
            + f"\n\n{loss_table(rounds)}"
        )


def describe(
    options: argparse.Namespace, base: Path, steps: list[list[Row]], rounds: Rounds
) -> dict[str, Any]:
    """All that the table shows, and more, as JSON would hold it."""
    tokens = [len(row.tokens) for rows in steps for row in rows]
    predicted = [len(row.tokens) - row.num_prompt for rows in steps for row in rows]
    shape = shape_of(str(base))
    versions = [result.versions for result in rounds[0].values()]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "system": platform.platform(),
        "threads": options.threads,
        "versions": {name: version for of in versions for name, version in of.items()},
        "base": base.name,
        "shape": shape,
        "rounds": options.rounds,
        "updates": options.updates,
        "warmup": options.warmup,
        "rows_per_update": options.batch,
        "tokens": sum(tokens),
        "tokens_with_loss": sum(predicted),
        "contenders": {
            number: {"name": CONTENDERS[number].name}
            | speeds(number, rounds, len(tokens), sum(tokens), sum(predicted), shape)
            for number in options.only
        },
    }


def speeds(
    number: int, rounds: Rounds, rows: int, tokens: int, predicted: int, shape: dict[str, int]
) -> dict[str, Any]:
    """Medians of one contender over the rounds."""
    results = [round_[number] for round_ in rounds]
    one = results[0]
    seconds = [result.seconds for result in results]
    limits = [best_products(round_, one.dtype) for round_ in rounds]
    needed = [products_s(limit, shape, tokens, predicted) for limit in limits]
    as_run = [products_s(limit, shape, one.padded_tokens, one.head_tokens) for limit in limits]
    process = max(result.peak_process_bytes for result in results)
    device = max((result.peak_device_bytes or 0) for result in results) or None
    on_cpu = one.device.startswith("cpu")
    facts: dict[str, Any] = {
        "device": one.device,
        "dtype": one.dtype,
        "samples_per_s": rows / median(seconds),
        "samples_per_s_range": [rows / max(seconds), rows / min(seconds)],
        "tokens_per_s": tokens / median(seconds),
        # A GPU's memory is no part of the process's, a framework on a CPU may not count its own.
        "peak_bytes": process if on_cpu else device,
        "peak_process_bytes": process,
        "peak_device_bytes": device,
        "padded_tokens": one.padded_tokens,
        "head_tokens": one.head_tokens,
        "products_needed_share": median(n / s for n, s in zip(needed, seconds, strict=True)),
        "products_as_run_share": median(n / s for n, s in zip(as_run, seconds, strict=True)),
        "product_gflops": product_gflops(limits, shape),
        "losses": one.losses,
    }
    if 1 in rounds[0]:
        facts["ours_is_faster_by"] = median(r[number].seconds / r[1].seconds for r in rounds)
    return facts


def best_products(round_: dict[int, Result], dtype: str) -> dict[str, float]:
    """Seconds a token of each product in a dtype: the best that a contender's library reached."""
    measured = [result.products for result in round_.values() if result.dtype == dtype]
    return {name: min(of[name] for of in measured) for name in measured[0]}


def products_s(limit: dict[str, float], shape: dict[str, int], tokens: int, head: int) -> float:
    """Seconds of all matrix products of so many tokens at the machine's own speed.

    Those of the layers and the head, forward and backward; the products of
    queries, keys and values and of the LoRA (some 2 %) are left out. The first
    layer's `query_key_value` hands no gradient on.
    """
    blocks = sum(s for name, s in limit.items() if not name.startswith("head"))
    block_tokens = tokens * (shape["layers"] * blocks - limit["qkv'"])
    return block_tokens + head * (limit["head"] + limit["head'"])


def product_gflops(limits: list[dict[str, float]], shape: dict[str, int]) -> float:
    """The machine's speed over one token through the layers' products, forward and backward."""
    C, F = shape["C"], shape["F"]
    flops = 2 * 2 * (4 * C * C + 2 * C * F)
    return (
        flops
        / 1e9
        / median(
            sum(s for name, s in limit.items() if not name.startswith("head")) for limit in limits
        )
    )


def heading(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    devices = dict.fromkeys(of["device"] for of in facts["contenders"].values())
    return (
        f"## {facts['date']}, {facts['machine']}, {facts['threads']} threads\n\n"
        f"{', '.join(devices)}; {facts['system']}; {versions}.\n"
        f"{facts['base']}: {facts['rounds']} rounds of {facts['updates']} updates of "
        f"{facts['rows_per_update']} rows, {facts['tokens']} tokens, "
        f"{facts['tokens_with_loss']} of them with a loss. Peak memory is the process's on a CPU, "
        "and what the framework allocated on a GPU."
    )


def speed_table(facts: dict[str, Any]) -> str:
    """One line a contender. Products are at the machine's own speed in the contender's dtype."""
    lines = [
        "| | dtype | samples/s (range) | tokens/s | peak GB | ours is faster by "
        "| products needed | products as run | GFLOP/s of products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, of in facts["contenders"].items():
        low, high = of["samples_per_s_range"]
        ratio = of.get("ours_is_faster_by")
        lines.append(
            f"| {number} {of['name']} | {of['dtype']} "
            f"| {of['samples_per_s']:.3f} ({low:.3f} to {high:.3f}) | {of['tokens_per_s']:.0f} "
            f"| {of['peak_bytes'] / 1e9:.2f} | {f'{ratio:.2f}x' if ratio else ''} "
            f"| {of['products_needed_share']:.0%} | {of['products_as_run_share']:.0%} "
            f"| {of['product_gflops']:.0f} |"
        )
    return "\n".join(lines)


def loss_table(rounds: Rounds) -> str:
    """The losses of the last round side by side, an update a line, the warm-up first."""
    last = rounds[-1]
    names = " | ".join(f"{number} {CONTENDERS[number].name}" for number in last)
    lines = [f"| loss of update | {names} |", "|---" * (len(last) + 1) + "|"]
    for update, losses in enumerate(_side_by_side(last), start=1):
        lines.append(f"| {update} | " + " | ".join(f"{loss:.5f}" for loss in losses) + " |")
    return "\n".join(lines)


def _side_by_side(round_: dict[int, Result]) -> Iterator[tuple[float, ...]]:
    yield from zip(*(result.losses for result in round_.values()), strict=True)


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
