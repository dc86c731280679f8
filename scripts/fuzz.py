"""Feed broken files to the readers until the time is up; print how many, and what went wrong.

    python scripts/fuzz.py --minutes 10 --target torch

A reader may refuse a file with an error of this package or read it. Anything else is a
fault and ends the run with exit code 1: another exception, more memory than `--memory-mb`
beyond what the process had, or more than `--seconds` of CPU time for one file. The file is then
written to the current folder.
"""

import argparse
import itertools
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX

# isort: split
from fuzzing import TARGETS, is_refused, make_target
from hypothesis import HealthCheck, Phase, given, seed, settings

BATCH = 200  # examples between two looks at the clock


class TooSlowError(Exception):
    """One file took too long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    parser.add_argument("--minutes", type=float, help="for each target")
    parser.add_argument("--examples", type=int, help="for each target, the same ones every time")
    parser.add_argument("--seed", type=int, help="random by default")
    parser.add_argument("--seconds", type=float, default=20, help="of CPU time, for one file")
    parser.add_argument("--memory-mb", type=int, default=1024, help="for all files together")
    options = parser.parse_args()
    if (options.minutes is None) == (options.examples is None):
        parser.error("give --minutes or --examples")
    limit_memory(options.memory_mb << 20)
    signal.signal(signal.SIGPROF, give_up)
    for name in options.target or TARGETS:
        first = options.seed or (0 if options.examples else int.from_bytes(os.urandom(6), "big"))
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder), options, first)


def limit_memory(more: int) -> None:
    """No more address space than now and `more` bytes; a larger wish is then a MemoryError."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere the system does not hold a process to it
        pages = int(statm.read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def give_up(number: int, frame: FrameType | None) -> None:
    raise TooSlowError


def run(name: str, folder: Path, options: argparse.Namespace, first_seed: int) -> None:
    target = make_target(name, folder)
    counts = {"read": 0, "refused": 0}
    slowest, last = 0.0, b""
    start = time.monotonic()

    def check(content: bytes) -> None:
        nonlocal slowest, last
        last, began = content, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, options.seconds)
        try:
            counts["refused" if is_refused(target, content, folder) else "read"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - began)
        if slowest > options.seconds:  # the signal came where exceptions are swallowed
            raise TooSlowError

    for batch in itertools.count():
        done = sum(counts.values())
        left = BATCH if options.examples is None else min(BATCH, options.examples - done)
        elapsed = time.monotonic() - start
        if left <= 0 or (options.minutes and elapsed > options.minutes * 60):
            break
        examples = settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            seed(first_seed + batch)(examples(given(target.contents)(check)))()
        except BaseException:
            Path(f"fuzz-{name}.bin").write_bytes(last)
            print(f"{name}: a fault after {done} files; its file is fuzz-{name}.bin", flush=True)
            raise
    print(
        f"{name}: {sum(counts.values())} files in {elapsed:.0f} s, "
        f"{counts['read']} read, {counts['refused']} refused, slowest {slowest:.2f} s "
        f"(seed {first_seed})",
        flush=True,
    )


if __name__ == "__main__":
    main()
