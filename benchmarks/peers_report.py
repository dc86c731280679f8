"""What the rounds of `peers.py` come to: medians, shares and tables."""

import argparse
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from contender import CONTENDERS, Result, Row, shape_of

Rounds = list[dict[int, Result]]  # a result of each contender, a round


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
        "load_average": os.getloadavg()[0],
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
    limits = [best_products(round_, one) for round_ in rounds]
    # A row's last token is only ever a target.
    needed = [products_s(limit, shape, tokens - rows, predicted) for limit in limits]
    as_run = [products_s(limit, shape, one.padded_tokens, one.head_tokens) for limit in limits]
    process = max(result.peak_process_bytes for result in results)
    device = max((result.peak_device_bytes or 0) for result in results) or None
    facts: dict[str, Any] = {
        "device": one.device,
        "dtype": one.dtype,
        "samples_per_s": rows / median(seconds),
        "samples_per_s_range": [rows / max(seconds), rows / min(seconds)],
        "tokens_per_s": tokens / median(seconds),
        # A GPU's memory is no part of the process's, a framework on a CPU may not count its own.
        "peak_bytes": process if on_cpu(one) else device,
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


def best_products(round_: dict[int, Result], like: Result) -> dict[str, float]:
    """Seconds a token of each product, the best of those measured in a result's dtype and place."""
    measured = [
        result.products
        for result in round_.values()
        if result.dtype == like.dtype and on_cpu(result) == on_cpu(like)
    ]
    return {name: min(of[name] for of in measured) for name in like.products}


def on_cpu(result: Result) -> bool:
    return result.device.startswith("cpu")


def products_s(limit: dict[str, float], shape: dict[str, int], tokens: int, head: int) -> float:
    """Seconds of all matrix products of so many tokens at the machine's own speed.

    Those of the layers and the head, forward and backward; the products of
    queries, keys and values and of the LoRA (some 2 %) are left out. The first
    layer's `query_key_value` hands no gradient on.
    """
    in_layers = tokens * (shape["layers"] * layer_s(limit) - limit["qkv'"])
    return in_layers + head * (limit["head"] + limit["head'"])


def layer_s(limit: dict[str, float]) -> float:
    """Seconds a token of one layer's products, forward and backward."""
    return sum(seconds for name, seconds in limit.items() if not name.startswith("head"))


def product_gflops(limits: list[dict[str, float]], shape: dict[str, int]) -> float:
    """The machine's speed in one layer's products."""
    C, F = shape["C"], shape["F"]
    flops = 2 * 2 * (4 * C * C + 2 * C * F)  # a token, forward and backward
    return flops / 1e9 / median(map(layer_s, limits))


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
