"""What this machine is, whether it computes rightly, and how fast: a report to paste."""

import json
import math
import os
import shutil
import string
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from interviewmate_mlx import backend
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.config import load_run
from interviewmate_mlx.results.bench import bench
from interviewmate_mlx.results.doctor_checks import (
    CHECKS,
    FIRST,
    ONCE,
    generate_step,
    significant_bits,
)

Facts = dict[str, str | float | int | None]
# Called with what is done next, how many tasks are done, and how many there are.
Progress = Callable[[str, int, int], None]

# Rows, inner size and columns of a product: a token and a row of 256 tokens in layers of
# Falcon-RW-1B, and a square.
_PRODUCTS = ((1, 2048, 8192), (256, 2048, 2048), (1024, 1024, 1024))
_NUM_GENERATED = 64
_WIDTH = 80


@dataclass(frozen=True)
class Check:
    """What was found by one check.

    Attributes:
        name: what was checked.
        dtype: of the weights; empty where it does not matter.
        error: what was found; None if it could not be.
        allowed: the largest error that the arithmetic explains.
        detail: where the error is, or the exception.
    """

    name: str
    dtype: str
    error: float | None
    allowed: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.allowed  # not so for NaN


@dataclass(frozen=True)
class Speed:
    """One speed, in the device's default dtype.

    Attributes:
        name: what was timed.
        value: in `unit`; None if it could not be timed.
        unit: such as tokens/s.
        detail: the exception.
    """

    name: str
    value: float | None
    unit: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.value is not None


@dataclass
class Report:
    """All that `doctor` found.

    Attributes:
        facts: of machine and program, by name.
        slowdowns: what makes the machine slower than it could be.
        notes: what to know about the numbers.
        checks: in the order of `CHECKS`, one for each dtype.
        speeds: of products, training and generation.
        seconds: that all this took.
    """

    facts: Facts = field(default_factory=dict)
    slowdowns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check | Speed]:
        lines: list[Check | Speed] = [*self.checks, *self.speeds]
        return [line for line in lines if not line.passed]


def default_dtypes() -> list[str]:
    """The device's own dtype, and float32."""
    return list(dict.fromkeys([backend.machine().dtype, "float32"]))


def examine(dtypes: Sequence[str] = (), progress: Progress = lambda *_: None) -> Report:
    """Find out about this machine. Whatever fails, the rest is done too.

    Args:
        dtypes: to check in; by default `default_dtypes()`.
        progress: called before each task.
    """
    start, report = time.perf_counter(), Report()
    dtypes = dtypes or default_dtypes()
    tasks = [("reading what this machine is", partial(_read, report))]
    for name in CHECKS:
        for dtype in [""] if name in ONCE else dtypes[:1] if name in FIRST else dtypes:
            title = f"checking {name}{dtype and ', '}{dtype}"
            tasks.append((title, partial(_check, report, name, dtype)))
    for name, measure in SPEEDS.items():
        tasks.append((f"timing {name}", partial(_time, report, name, measure)))
    for done, (title, task) in enumerate(tasks):
        progress(title, done, len(tasks))
        task()
    report.seconds = time.perf_counter() - start
    return report


def _read(report: Report) -> None:
    try:
        report.slowdowns += backend.slowdowns()  # before there is a load of our own
        report.facts |= read_facts()
        if 0 < (bits := significant_bits()) < 24:
            report.notes.append(
                f"float32 products keep {bits} bits (TF32), so more error is allowed; with "
                "MLX_ENABLE_TF32=0 they keep 24"
            )
    except Exception as error:
        report.checks.append(Check("facts", "", None, 0.0, _describe(error)))


def _check(report: Report, name: str, dtype: str) -> None:
    try:
        report.checks.append(Check(name, dtype, *CHECKS[name](dtype)))
    except Exception as error:  # one failure must not hide the others
        report.checks.append(Check(name, dtype, None, 0.0, _describe(error)))


def _time(report: Report, name: str, measure: Callable[[], tuple[float, str]]) -> None:
    try:
        report.speeds.append(Speed(name, *measure()))
    except Exception as error:
        report.speeds.append(Speed(name, None, "", _describe(error)))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def read_facts() -> Facts:
    """`backend.describe()`, and memory and disks as they are now."""
    memory = psutil.virtual_memory()
    return backend.describe() | {
        "driver": backend.nvidia_driver(),
        "memory_gb": round(memory.total / 1e9, 1),
        "free_memory_gb": round(memory.available / 1e9, 1),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "free_temporary_gb": round(shutil.disk_usage(tempfile.gettempdir()).free / 1e9, 1),
        "tf32": os.environ.get("MLX_ENABLE_TF32"),
    }


def _time_product(rows: int, inner: int, columns: int) -> tuple[float, str]:
    return backend.matmul_gflops(rows, inner, columns), "GFLOP/s"


def _time_training() -> tuple[float, str]:
    """Steps of Run A on `mini`, with its rows."""
    result = bench(load_run("A", ["model.base=mini"]), steps=3, warmup=2)
    return result.tokens_per_s, "tokens/s"


def _time_generation() -> tuple[float, str]:
    """Greedy tokens of `mini`, one after the other, after the first."""
    base = Base.open("mini")
    model = base.load(backend.resolve_dtype("auto"))
    prompt = mx.array(base.tokenizer.encode("Question: What is overfitting?\nAnswer:"))
    tokens = generate_step(prompt, model, max_tokens=_NUM_GENERATED + 1)
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - start), "tokens/s"


# By name, in the order of the report.
SPEEDS: dict[str, Callable[[], tuple[float, str]]] = {
    **{
        f"products {' x '.join(map(str, shape))}": partial(_time_product, *shape)
        for shape in _PRODUCTS
    },
    "Run A on mini": _time_training,
    "text of mini": _time_generation,
}


def report_json(report: Report) -> str:
    """The report as one JSON object. A number that is none (NaN, infinity) is null."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def fields_of(line: Check | Speed) -> dict[str, Any]:
        return {"passed": line.passed} | {k: finite(v) for k, v in asdict(line).items()}

    content = asdict(report) | {
        "passed": not report.failed,
        "checks": [fields_of(check) for check in report.checks],
        "speeds": [fields_of(speed) for speed in report.speeds],
    }
    return json.dumps(content, allow_nan=False)


def report_text(report: Report) -> str:
    """The report as a block of at most 80 columns."""
    failed = len(report.failed)
    result = f"{failed} FAILED" if failed else "all ok"
    head = f"imate-mlx doctor: {len(report.checks)} checks, {result} ({report.seconds:.0f} s)"
    return "\n".join([head, *_fact_lines(report), *_check_lines(report), *_speed_lines(report)])


# Facts that have a line of their own; whatever else there is follows them.
_SHOWN = {
    "versions": "interviewmate-mlx {interviewmate-mlx}, MLX {mlx}, Python {python}",
    "system": "{system}",
    "device": "{device}, {device_name}; by default {dtype}",
    "BLAS": "{blas}: {blas_reason}",
    "memory": "{memory_gb} GB, {free_memory_gb} free; {device_memory_gb} for the device, "
    "{planned_memory_gb} to plan with",
    "free disk": "{free_disk_gb} GB here, {free_temporary_gb} GB in the temporary folder",
}
_LEFT_OUT = {"matmul_gflops"}  # the products below say it better


def _fact_lines(report: Report) -> Iterator[str]:
    facts = dict(report.facts)
    if blas := facts.get("blas"):
        facts["blas"] = Path(str(blas)).name  # the path may hold the user's name
    if facts:
        for title, template in _SHOWN.items():
            yield from _wrapped(title, template.format_map(facts))
    consumed = {key for text in _SHOWN.values() for _, key, *_ in string.Formatter().parse(text)}
    for name, value in facts.items():
        if name not in consumed | _LEFT_OUT and value is not None:
            yield from _wrapped(name, str(value))
    for slowdown in report.slowdowns:
        yield from _wrapped("slower by", slowdown)
    for note in report.notes:
        yield from _wrapped("note", note)


def _check_lines(report: Report) -> Iterator[str]:
    """A table: a row for each check, and for each dtype the error and what is allowed."""
    dtypes = list(dict.fromkeys(check.dtype for check in report.checks if check.dtype))
    yield ""
    yield f"{'error of allowed':<18}" + "".join(f"{dtype:<26}" for dtype in dtypes).rstrip()
    for name in dict.fromkeys(check.name for check in report.checks):
        found = {check.dtype: check for check in report.checks if check.name == name}
        columns = [found.get(dtype) for dtype in (dtypes if "" not in found else [""])]
        yield f"{name:<18}" + "".join(f"{_cell(check):<26}" for check in columns).rstrip()
    for line in report.failed:
        title = f"{line.name}, {line.dtype}" if isinstance(line, Check) else line.name
        yield from _wrapped("FAIL", f"{title.removesuffix(', ')}: {line.detail}")


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    result = "ok  " if check.passed else "FAIL"
    if check.error is None:
        return f"{result} see below"
    return f"{result} {check.error:.1e} of {check.allowed:.1e}"


def _speed_lines(report: Report) -> Iterator[str]:
    yield ""
    yield f"speed in {report.facts.get('dtype', 'the default dtype')}"
    for speed in report.speeds:
        found = "FAIL see above" if speed.value is None else f"{speed.value:8.1f} {speed.unit}"
        yield f"{speed.name:<30}{found}"


def _wrapped(title: str, text: str) -> list[str]:
    """A line with its title, and what does not fit below."""
    start = f"{title:<10} "
    text = " ".join(text.split())
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start)
    ) or [start.rstrip()]
