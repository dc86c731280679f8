"""Two ranks of one core each beside one process; and what their sums cost over a network.

    python benchmarks/ranks.py                     speed: mini, and 2 layers of a Falcon-RW-1B
    python benchmarks/ranks.py --rates 400,1000    sums: cables of so many Mbit/s (Linux, as root)

Speed: `imate-mlx bench` of Run A as two ranks, as one process of all cores, and as one of one
core, in turn; medians of the rounds. Sums: two network namespaces with a cable between them, whose
speed is limited to the rate. Each ends with one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from peers_report import processor
from random_base import random_base

HERE = Path(__file__).parent
PORT = 32323
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("imate-0", "imate-1")  # of namespaces, and of the cable's ends
LORA_BYTES = 6_291_456  # Run A's gradients, float32
ALL_BYTES = 5_246_500_864  # all of Falcon-RW-1B's
MESSAGE_BYTES = 64 << 20  # as training.ranks sends them
CORES, ONE_CORE = ("taskset", "-c", "0,1"), ("taskset", "-c", "0")


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    print(processor())
    if options.sum:
        print(json.dumps(time_sums(options.sum)))
    elif options.rates:
        found = [measure_sums(rate) for rate in options.rates]
        print(json.dumps(found))
    else:
        found = [measure_speed(options, name, base) for name, base in bases(options)]
        print(json.dumps(found))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="BASE", help="other bases")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the random base")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed, in each round")
    parser.add_argument("--rates", type=numbers, help="Mbit/s, like 400,1000")
    parser.add_argument("--sum", type=int, help=argparse.SUPPRESS)  # bytes, in a rank
    return parser.parse_args(words)


def bases(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Names and paths."""
    if options.models:
        yield from zip(options.models, options.models, strict=True)
        return
    yield "mini", "mini"
    yield "2 layers of full width", str(random_base(options.cache, None, None, num_layers=2))


def measure_speed(options: argparse.Namespace, name: str, base: str) -> dict[str, Any]:
    """Samples a second of each way to train, and what two ranks come to beside the others."""
    words = ["bench", "--run", "A", "--model", base, "--steps", str(options.steps)]
    words += ["--warmup", "1", "--json"]
    words = [sys.executable, "-m", "interviewmate_mlx", *words]
    ways = {"two ranks": [CORES, CORES], "both cores": [CORES], "one core": [ONE_CORE]}
    rounds = [
        {way: run_ranks(words, before)["samples_per_s"] for way, before in ways.items()}
        for _ in range(options.rounds)
    ]
    found = {way: median(one[way] for one in rounds) for way in ways}
    efficiency = median(one["two ranks"] / one["one core"] / 2 for one in rounds)
    ratio = median(one["two ranks"] / one["both cores"] for one in rounds)
    speeds = ", ".join(f"{way} {speed:.3f}" for way, speed in found.items())
    print(
        f"{name}: samples/s: {speeds}; two ranks are {efficiency:.0%} of twice one core, ", end=""
    )
    print(f"{ratio:.2f} times both cores in one process")
    return {"base": name, **found, "efficiency": efficiency, "ratio": ratio}


def run_ranks(
    words: Sequence[str],
    before: Sequence[Sequence[str]],
    addresses: Sequence[str] = ("127.0.0.1", "127.0.0.1"),
) -> dict[str, Any]:
    """Run a command as ranks of one ring, and return the JSON that the first prints last.

    Args:
        words: of the command.
        before: what comes before it, for each rank.
        addresses: theirs.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[f"{ip}:{PORT + n}"] for n, ip in enumerate(addresses[: len(before)])], hosts)
        hosts.flush()
        ranks = [
            subprocess.Popen(
                [*prefix, *words],
                env=os.environ
                | ({"MLX_RANK": str(n), "MLX_HOSTFILE": hosts.name} if len(before) > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for n, prefix in enumerate(before)
        ]
        said = [rank.communicate() for rank in ranks]
    for rank, (_, stderr) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise SystemExit(f"{' '.join(words)} has failed:\n{stderr}")
    return json.loads(said[0][0].splitlines()[-1])


def measure_sums(rate: int) -> dict[str, float]:
    """Seconds of a LoRA's sum and of all weights' over a cable, beside bytes by speed."""
    found: dict[str, float] = {"megabits_per_s": rate}
    with cable(rate):
        for name, size in (("LoRA", LORA_BYTES), ("all weights", ALL_BYTES)):
            words = [sys.executable, __file__, "--sum", str(size)]
            before = [("ip", "netns", "exec", host) for host in NAMES]
            seconds = run_ranks(words, before, ADDRESSES)["seconds"]
            expected = size * 8 / (rate * 1e6)
            print(f"{rate} Mbit/s, {name}: {seconds:.3f} s; bytes by speed: {expected:.3f} s")
            found |= {name: seconds, f"{name}, bytes by speed": expected}
    return found


def time_sums(size: int) -> dict[str, float]:
    """In a rank: the median time of sums of so many bytes, after one."""
    from interviewmate_mlx.training.ranks import join

    # isort: split
    import mlx.core as mx

    ranks = join()
    whole, rest = divmod(size, MESSAGE_BYTES)
    sizes = [MESSAGE_BYTES] * whole + [rest] * bool(rest)
    messages = {number: mx.ones(number // 4) for number in set(sizes)}
    mx.eval(messages)
    ranks.sum(messages[sizes[-1]])
    times = []
    with ranks.working():
        for _ in range(5 if len(sizes) == 1 else 1):
            start = time.perf_counter()
            for number in sizes:
                ranks.sum(messages[number])
            times.append(time.perf_counter() - start)
    return {"seconds": median(times)}


@contextmanager
def cable(rate: int) -> Iterator[None]:
    """Two network namespaces with a cable of so many Mbit/s in each direction."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", NAMES[0], "type", "veth", "peer", "name", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
            limit = ["rate", f"{rate}mbit", "burst", "256kb", "latency", "50ms"]
            words = ["tc", "-n", name, "qdisc", "add", "dev", name, "root", "tbf", *limit]
            subprocess.run(words, check=True)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    main()
