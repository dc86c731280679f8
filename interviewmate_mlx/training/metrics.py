"""metrics.jsonl while a run goes on; summary.json when it ends or is interrupted.

A line of metrics holds one event of `training.loop`. What depends on the clock
stands under `timing`, so the rest of two equal runs is equal.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import append_text, atomic_file
from interviewmate_mlx.training.events import Started, Stepped, Summary, Validated

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# A single step's loss depends on its few rows; first and final loss are means over
# this share of the steps.
_LOSS_WINDOW = 0.05


def start_metrics(out: Path, step: int) -> list[str]:
    """Start the metrics file of a run; one that goes on keeps the lines up to `step`.

    Returns:
        What to tell the user: steps whose lines are lost. A curve with a gap is no reason
        to give up a whole checkpoint.

    Raises:
        StorageError: it cannot be written.
    """
    path = out / METRICS_FILE
    lines, fault = _read_lines(path) if step else ([], "")
    kept = [line for line in lines if line["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
    found = {line["step"] for line in kept if line["event"] == "step"}
    num_lost = len(set(range(1, step + 1)) - found)
    if not num_lost:
        return []
    damage = f", it is damaged at {fault}" if fault else ""
    return [
        f"{path} lacks {num_lost} of the {step} steps before this one{damage}: the curve has a gap"
    ]


def append_metrics(out: Path, event: Stepped | Validated) -> None:
    """Add the line of an event."""
    content = asdict(event)
    if not content["measures"]:
        del content["measures"]
    timing = {key: content.pop(key) for key in ("elapsed_s", "peak_bytes") if key in content}
    kind = "step" if isinstance(event, Stepped) else "validation"
    append_text(out / METRICS_FILE, _line({"event": kind, **content, "timing": timing}))


def sync_metrics(out: Path) -> None:
    """Bring the lines to the disk: a checkpoint must not exist without those that led to it."""
    append_text(out / METRICS_FILE, "", sync=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file. An incomplete last line is left out.

    Raises:
        TrainingError: a line is damaged.
    """
    lines, fault = _read_lines(path)
    if fault:
        raise TrainingError(
            f"{path} is damaged: {fault}\nRestore it, or train again into another folder.", "out"
        )
    return lines


def loss_curves(out: Path) -> tuple[list[float], list[float]]:
    """The losses of a run's steps, and of its validations, in order.

    Raises:
        TrainingError: the metrics are damaged.
    """
    lines = read_metrics(out / METRICS_FILE)
    steps, validations = (
        [line["loss"] for line in lines if line["event"] == kind] for kind in ("step", "validation")
    )
    return steps, validations


def write_summary(
    out: Path,
    run: RunConfig,
    started: Started,
    step: int,
    best_step: int | None,
    stopped_early: bool,
) -> Summary:
    """Compute a run's summary from its metrics, earlier sessions included, and write it.

    Args:
        out: the run's folder.
        run: what was trained.
        started: of this session.
        step: the last one done.
        best_step: whose adapter was kept; None for the last one's.
        stopped_early: whether the run ended before its last step.
    """
    metrics = read_metrics(out / METRICS_FILE)
    steps = [line for line in metrics if line["event"] == "step"]
    validations = {line["step"]: line for line in metrics if line["event"] == "validation"}
    losses = {step: line["loss"] for step, line in validations.items()}
    measures = {step: line.get("measures", {}) for step, line in validations.items()}
    window = max(1, round(_LOSS_WINDOW * len(steps)))
    here = backend.machine()
    dtype = here.dtype if run.model.dtype == "auto" else run.model.dtype
    seconds = sum(line["timing"]["elapsed_s"] for line in steps)
    summary = Summary(
        run=run.name,
        base=run.model.base,
        steps=step,
        epochs=step / started.steps_per_epoch,
        first_loss=_mean_loss(steps[:window], run.train.method),
        final_loss=_mean_loss(steps[-window:], run.train.method),
        loss_window_steps=window,
        base_valid_loss=losses.get(0),
        best_valid_loss=None if best_step is None else losses.get(best_step),
        best_step=best_step,
        stopped_early=stopped_early,
        train_rows=started.num_train_rows,
        valid_rows=started.num_valid_rows,
        trainable_parameters=started.num_trainable,
        total_parameters=started.num_parameters,
        training_s=seconds,
        samples_per_s=sum(line["num_rows"] for line in steps) / seconds,
        tokens_per_s=sum(line["num_tokens"] for line in steps) / seconds,
        peak_gb=max(line["timing"]["peak_bytes"] for line in steps) / 1e9,
        package_version=__version__,
        machine=f"{here.device_name}, {dtype}, MLX {here.mlx_version}",
        method=run.train.method,
        started_from=run.lora.start_from,
        base_valid_measures=measures.get(0, {}),
        best_valid_measures={} if best_step is None else measures.get(best_step, {}),
    )
    with atomic_file(out / SUMMARY_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines before the first damaged one, and what is wrong with that one."""
    if not path.exists():
        return [], ""
    lines: list[dict[str, Any]] = []
    # As bytes: what a power cut leaves at the end may not be text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not {"event", "step"} <= value.keys():
                raise ValueError("it does not describe a step")
        except (ValueError, RecursionError) as error:
            return lines, f"line {number}: {error}"
        lines.append(value)
    return lines, ""


def _mean_loss(steps: Sequence[dict[str, Any]], method: str) -> float:
    weight = "num_predicted" if method == "sft" else "num_rows"  # what a step's loss is a mean over
    total = sum(line[weight] for line in steps)
    return float(sum(line["loss"] * line[weight] for line in steps) / total)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"
