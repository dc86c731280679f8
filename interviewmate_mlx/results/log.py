"""metrics.jsonl while a run goes on, summary.json and a model card when it ends.

A line of metrics holds what an event of `training.loop` says. What depends on
the clock stands under `timing`, so that the rest of two equal runs is equal.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interviewmate_mlx import __version__
from interviewmate_mlx.config import RunConfig
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.training.events import Event, Finished, Saving, Started, Stepped, Validated
from interviewmate_mlx.weights.names import is_hub_id, shipped_base

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# A single step's loss depends on its few rows; first and final loss are means over
# this share of the steps.
_LOSS_WINDOW = 0.05


@dataclass(frozen=True)
class Summary:
    """What a run came to. Losses are nats a predicted token, weighted by tokens."""

    run: str
    base: str
    steps: int
    epochs: float
    first_loss: float  # training loss over the first steps
    final_loss: float  # over the last
    loss_window_steps: int
    base_valid_loss: float | None  # before the first step
    best_valid_loss: float | None
    best_step: int | None  # whose adapter was kept; None: the last one's
    stopped_early: bool
    train_rows: int
    valid_rows: int
    trainable_parameters: int
    total_parameters: int
    training_s: float  # steps alone, without loading and validation
    samples_per_s: float
    tokens_per_s: float  # real tokens, without padding
    peak_gb: float
    package_version: str

    @property
    def reduction(self) -> float:
        """Share of the first training loss that is gone."""
        return 1 - self.final_loss / self.first_loss

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.total_parameters


def record(events: Iterator[Event], run: RunConfig, out: Path) -> Iterator[Event | Summary]:
    """Pass a run's events on, writing each to `out/metrics.jsonl`, and a `Summary` at the end.

    A run that goes on keeps the lines up to where it goes on. An interrupted run
    has a summary and a model card too, of what is done, but yields no `Summary`.

    Raises:
        TrainingError: the lines of earlier steps are damaged or not there.
    """
    path = out / METRICS_FILE
    started, finished, summary = None, None, None
    for event in events:
        if isinstance(event, Started):
            started = event
            kept = _lines_until(path, event.step) if event.step else []
            with atomic_file(path) as temporary:
                temporary.write_text("".join(map(_line, kept)), "utf-8")
        elif isinstance(event, Stepped | Validated):
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(_as_dict(event)))
        elif isinstance(event, Saving):
            # A checkpoint must not be there without the lines that led to it.
            with path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        elif isinstance(event, Finished) and started:
            finished = event
            summary = summarise(run, started, event, read_metrics(path))
            with atomic_file(out / SUMMARY_FILE) as temporary:
                temporary.write_text(json.dumps(asdict(summary), indent=2) + "\n", "utf-8")
            write_card(out, run, summary)
        yield event
    if summary and finished and not finished.interrupted:
        yield summary


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file. A torn last line is left out."""
    lines, fault = _read_lines(path)
    if fault:
        raise TrainingError(
            f"{path} is damaged: {fault}\nRestore it, or train anew with another --out."
        )
    return lines


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines before the first that is damaged, and what is wrong with that one."""
    if not path.exists():
        return [], ""
    lines: list[dict[str, Any]] = []
    # Bytes: what a power cut leaves at the end need not be text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not {"event", "step"} <= value.keys():
                raise ValueError("it tells of no step")
        except (ValueError, RecursionError) as error:
            return lines, f"line {number}: {error}"
        lines.append(value)
    return lines, ""


def _lines_until(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of the steps up to one; what comes after, damaged or not, is given up."""
    lines, fault = _read_lines(path)
    kept = [line for line in lines if line["step"] <= last_step]
    found = [line["step"] for line in kept if line["event"] == "step"]
    if found != list(range(1, last_step + 1)):
        damage = f"; it is damaged at {fault}" if fault else ""
        raise TrainingError(
            f"{path}: got {len(found)} of the {last_step} steps before this one{damage}.\n"
            "Restore it, or train anew with another --out."
        )
    return kept


def summarise(
    run: RunConfig, started: Started, finished: Finished, metrics: list[dict[str, Any]]
) -> Summary:
    """Compute a run's summary from its metrics, earlier sessions included."""
    steps = [line for line in metrics if line["event"] == "step"]
    valid = [line for line in metrics if line["event"] == "validation"]
    window = max(1, round(_LOSS_WINDOW * len(steps)))
    seconds = sum(line["timing"]["elapsed_s"] for line in steps)
    losses = {line["step"]: line["loss"] for line in valid}
    return Summary(
        run=run.name,
        base=run.model.base,
        steps=finished.step,
        epochs=finished.step / started.steps_per_epoch,
        first_loss=_mean_loss(steps[:window]),
        final_loss=_mean_loss(steps[-window:]),
        loss_window_steps=window,
        base_valid_loss=losses.get(0),
        best_valid_loss=None if finished.best_step is None else losses[finished.best_step],
        best_step=finished.best_step,
        stopped_early=finished.stopped_early,
        train_rows=started.num_train_rows,
        valid_rows=started.num_valid_rows,
        trainable_parameters=started.num_trainable,
        total_parameters=started.num_parameters,
        training_s=seconds,
        samples_per_s=sum(line["num_rows"] for line in steps) / seconds,
        tokens_per_s=sum(line["num_tokens"] for line in steps) / seconds,
        peak_gb=max(line["timing"]["peak_bytes"] for line in steps) / 1e9,
        package_version=__version__,
    )


def write_card(out: Path, run: RunConfig, summary: Summary) -> None:
    """Write the adapter's model card, README.md, as the Hub shows it."""
    base = run.model.base
    header = ["library_name: peft", "tags: [lora, mlx, interviewmate]"]
    if is_hub_id(base):
        header.append(f"base_model: {base}")
    # A shipped base has its name here alone: transformers needs its folder.
    where, hint = base, ""
    if shipped_base(base):
        where, hint = (
            f"models/{base}",
            f"# The base is shipped: `imate-mlx convert {base}` first.\n",
        )
    valid = ""
    if summary.base_valid_loss is not None and summary.best_valid_loss is not None:
        valid = (
            f"| validation loss, base | {summary.base_valid_loss:.4f} |\n"
            f"| validation loss, adapter (step {summary.best_step}) "
            f"| {summary.best_valid_loss:.4f} |\n"
        )
    lora = run.lora
    text = f"""---
{chr(10).join(header)}
---

# {run.name}: a LoRA adapter for {base}

Trained with InterviewMate (`interviewmate_mlx` {summary.package_version}) on {summary.train_rows} \
question-and-answer rows ({run.data.path}). `run.toml` beside this page repeats the run.

| | |
|---|---|
| targets | {", ".join(lora.targets)} |
| rank, alpha, dropout | {lora.rank}, {lora.alpha:g}, {lora.dropout:g} |
| trainable parameters | {summary.trainable_parameters:,} ({summary.trainable_share:.2%}) |
| steps, epochs | {summary.steps}, {summary.epochs:.2f} |
| training loss, first and last {_steps(summary.loss_window_steps)} \
| {summary.first_loss:.4f}, {summary.final_loss:.4f} |
{valid}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{hint}base = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
model = PeftModel.from_pretrained(base, "PATH_OR_HUB_ID_OF_THIS_FOLDER")
prompt = tokenizer("Question: What is overfitting?\\nAnswer:", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0]))
```

A small model: it may be wrong with confidence. Check what it says before an interview.
"""
    with atomic_file(out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _mean_loss(steps: list[dict[str, Any]]) -> float:
    tokens = sum(line["num_predicted"] for line in steps)
    return sum(line["loss"] * line["num_predicted"] for line in steps) / tokens


def _as_dict(event: Stepped | Validated) -> dict[str, Any]:
    line = asdict(event)
    timing = {key: line.pop(key) for key in ("elapsed_s", "peak_bytes") if key in line}
    return {
        "event": "step" if isinstance(event, Stepped) else "validation",
        **line,
        "timing": timing,
    }


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"
