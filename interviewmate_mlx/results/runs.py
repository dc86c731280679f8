"""Finished runs as they lie in their folders, for who wants to compare them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from interviewmate_mlx.adapter.folder import WEIGHTS_FILE
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.evaluation.evaluate import ANSWERS_FILE, EVALUATION_FILE, file_hash
from interviewmate_mlx.formats.json_file import read_json
from interviewmate_mlx.results.sweep import SWEEP_FILE
from interviewmate_mlx.training.events import Summary
from interviewmate_mlx.training.folder import RUN_FILE, read_run
from interviewmate_mlx.training.metrics import METRICS_FILE, SUMMARY_FILE, read_metrics

# A single step's loss depends on its few rows; a smoothed one is the mean of this share of all.
SMOOTHING = 0.05

Curve = list[tuple[float, float]]  # (epoch, number)


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read.

    Attributes:
        folder: as the user gave it.
        run: its settings.
        summary: what it came to.
        steps: its lines of metrics, one a step.
        validations: (step, loss), 0 for the base.
        evaluation: the content of `evaluation.json`; None if there is none for this adapter.
        answers: the lines of `answers.jsonl`, by question.
    """

    folder: Path
    run: RunConfig
    summary: Summary
    steps: list[dict[str, Any]]
    validations: list[tuple[int, float]]
    evaluation: dict[str, Any] | None
    answers: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def steps_per_epoch(self) -> float:
        return self.summary.steps / self.summary.epochs

    @property
    def total_steps(self) -> int:
        return self.run.train.total_steps(round(self.steps_per_epoch))

    @property
    def is_complete(self) -> bool:
        return self.summary.stopped_early or self.summary.steps >= self.total_steps

    @property
    def loss(self) -> float | None:
        """The best validation loss."""
        return self.summary.best_valid_loss

    def curve(self, key: str) -> Curve:
        """A number of each step, by epoch."""
        return [(line["step"] / self.steps_per_epoch, line[key]) for line in self.steps]

    def measured(self, key: str) -> Curve:
        """What a method measures of each step beside its loss, by epoch, where there was any."""
        found = ((line["step"], line.get("measures", {}).get(key)) for line in self.steps)
        return [(step / self.steps_per_epoch, value) for step, value in found if value is not None]

    def speed(self) -> Curve:
        """Rows a second of each step, by epoch."""
        return [
            (line["step"] / self.steps_per_epoch, line["num_rows"] / line["timing"]["elapsed_s"])
            for line in self.steps
        ]

    def validation_curve(self) -> Curve:
        return [(step / self.steps_per_epoch, loss) for step, loss in self.validations]

    def loss_at(self, epoch: float) -> float | None:
        """The smoothed training loss after so many epochs; None if it did not get there."""
        step = round(epoch * self.steps_per_epoch)
        if not 1 <= step <= len(self.steps):
            return None
        return smoothed(self.curve("loss"))[step - 1][1]

    def settings(self) -> dict[str, Any]:
        """Its settings by key, without names and boards."""
        tables = {k: v for k, v in asdict(self.run).items() if isinstance(v, dict) and k != "log"}
        return {
            f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()
        }


def smoothed(curve: Curve) -> Curve:
    """Each number as the mean of those around it."""
    half = max(1, round(SMOOTHING * len(curve))) // 2
    found = []
    for place, (epoch, _) in enumerate(curve):
        near = [number for _, number in curve[max(0, place - half) : place + half + 1]]
        found.append((epoch, sum(near) / len(near)))
    return found


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read runs' folders; a sweep's folder counts as those of its runs.

    Raises:
        TrainingError: a folder holds no run, or what it holds cannot be read; all are named.
    """
    found, faults = [], []
    for folder in run_folders(folders):
        try:
            found.append(read_finished(folder))
        except TrainingError as error:
            faults.append(str(error))
    if faults:
        raise TrainingError("\n".join(faults))
    if not found:
        raise TrainingError("No trial of these sweeps has trained to an end yet.")
    names = [run.name for run in found]
    if len(set(names)) < len(names):  # the folders tell them apart
        found = [
            FinishedRun(**{**_fields(run), "run": run.run.replace(run.folder.name)})
            for run in found
        ]
    return found


def _fields(run: FinishedRun) -> dict[str, Any]:
    return {field.name: getattr(run, field.name) for field in fields(run)}


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs among folders of runs and sweeps."""
    found: list[Path] = []
    for folder in folders:
        if (folder / SWEEP_FILE).is_file():
            names = read_json(folder / SWEEP_FILE).get("trials", {})
            trials = [folder / name for name in names]
            found += [trial for trial in trials if (trial / SUMMARY_FILE).is_file()]
        else:
            found.append(folder)
    return found


def left_out_trials(folders: Sequence[Path]) -> list[str]:
    """What to say of the trials of sweeps that have no result."""
    return [
        f"Left out: {name}, {trial.get('status')} ({trial.get('message')})."
        for folder in folders
        if (folder / SWEEP_FILE).is_file()
        for name, trial in read_json(folder / SWEEP_FILE).get("trials", {}).items()
        if not (folder / name / SUMMARY_FILE).is_file()
    ]


def read_finished(folder: Path) -> FinishedRun:
    """Read a run's folder.

    Raises:
        TrainingError: it holds no run that has trained, or its metrics are damaged.
    """
    if not (folder / RUN_FILE).is_file():
        raise TrainingError(f"No run in {folder}: it has no {RUN_FILE}.")
    if not (folder / SUMMARY_FILE).is_file():
        raise TrainingError(
            f"The run in {folder} has no {SUMMARY_FILE}: it was killed, or trains just now.\n"
            "Let it end, or resume it."
        )
    summary = _summary(folder)
    lines = read_metrics(folder / METRICS_FILE)
    steps = [line for line in lines if line["event"] == "step"]
    if not steps:
        raise TrainingError(f"{folder / METRICS_FILE} holds no steps, so there is nothing to show.")
    validations = [(line["step"], line["loss"]) for line in lines if line["event"] == "validation"]
    evaluation = _evaluation(folder)
    answers = _answers(folder) if evaluation else {}
    return FinishedRun(folder, read_run(folder), summary, steps, validations, evaluation, answers)


def _summary(folder: Path) -> Summary:
    content = read_json(folder / SUMMARY_FILE)
    known = {field.name for field in fields(Summary)}
    try:
        if unknown := content.keys() - known:
            raise TypeError(f"it has {', '.join(sorted(unknown))}")
        return Summary(**content)
    except (TypeError, AttributeError) as error:
        raise TrainingError(
            f"{folder / SUMMARY_FILE} is not one that this version reads: {error}.\n"
            "Update the package, or train again."
        ) from error


def _evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    if "adapter" not in content:
        return None
    # Of the adapter that lies there now, and not of one before it.
    is_current = content.get("adapter_sha256") == file_hash(folder / WEIGHTS_FILE)
    return content if is_current else None


def _answers(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["question"]: line for line in lines}
