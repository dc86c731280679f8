"""Runs as a page to look at: what was trained, how it went, what it came to, which to use.

Everything on it is computed from the runs' folders. The page is one file without scripts that needs
no network; `page.py` writes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from interviewmate_mlx.config import RunConfig, shipped_data
from interviewmate_mlx.data.check import check_data
from interviewmate_mlx.errors import InterviewMateError
from interviewmate_mlx.hub.names import fetch_data, is_hub_data
from interviewmate_mlx.results import findings
from interviewmate_mlx.results.plots import Line, can_plot, line_plot
from interviewmate_mlx.results.runs import Curve, FinishedRun, smoothed

EPOCHS = (0.2, 0.6, 1.0, 2.0)  # at which losses are compared; and at the end
_NONE = "-"
NO_PLOTS = 'Pictures: pip install "interviewmate-mlx[plots]", then make the report again.'
_NUM_QUESTIONS = 3
# The metrics that an evaluation is shown by: name, key, format.
_ANSWER_SCORES = (
    ("ROUGE-L", "rougeL", ".3f"),
    ("chrF", "chrf", ".1f"),
    ("answers that end by themselves", "ended", ".0%"),
    ("four words repeated", "repetition", ".1%"),
    ("words copied, mean", "copied", ".1f"),
)

# What is measured of preferences: name, key, format.
_MEASURES = (
    ("better answers' reward", "reward_chosen", ".4f"),
    ("worse answers' reward", "reward_rejected", ".4f"),
    ("margin", "margin", ".4f"),
    ("better answer ahead", "accuracy", ".1%"),
    ("better answers' log-probability", "logp_chosen", ".2f"),
    ("worse answers' log-probability", "logp_rejected", ".2f"),
    ("divergence", "divergence", ".4f"),
)


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names them."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """A picture with a title that says what is seen, and its numbers."""

    name: str
    title: str
    svg: str  # empty without matplotlib
    numbers: Table


@dataclass(frozen=True)
class Quote:
    """A question, and what each model said."""

    question: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Code:
    """Commands."""

    lines: list[str]


Part = str | Table | Plot | Quote | Code


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    parts: list[Part]


@dataclass(frozen=True)
class Report:
    """A report's sections in their order, and its numbers for programs."""

    title: str
    sections: list[Section]
    facts: dict[str, Any] = field(default_factory=dict)


def build_report(runs: Sequence[FinishedRun], left_out: Sequence[str] = ()) -> Report:
    """The report of some runs.

    Args:
        runs: at least one, each with a name of its own.
        left_out: what to say of runs that are not among them.
    """
    title = f"{runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = [
        Section("Which run to use", [*findings.which_to_use(runs), *findings.seeds_in_words(runs)]),
        Section("Overview", list(_overview(runs))),
        Section("The runs", [_run_table(runs), *left_out]),
        Section("How the loss went", list(_progression(runs))),
        Section("Curves", list(_curves(runs))),
        Section("Which answers they prefer", list(_preferences(runs))),
        Section("Time and memory", [_cost_table(runs)]),
        Section("On rows that were not learned", list(_evaluation(runs))),
        Section("What they answer", list(_answers(runs))),
        Section("What the settings did", list(findings.effects(runs))),
        Section("What to try next", [said for run in runs for said in findings.next_steps(run)]),
        Section("Go on", [_commands(runs)]),
    ]
    return Report(title, [section for section in sections if section.parts], _facts(runs))


def _overview(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    seconds = sum(run.summary.training_s for run in runs)
    bases = dict.fromkeys(run.run.model.base for run in runs)
    rows = [
        ["base", ", ".join(bases)],
        ["method", ", ".join(dict.fromkeys(run.run.train.method for run in runs))],
        ["trained", ", ".join(dict.fromkeys(_kind(run.run) for run in runs))],
        ["machine", ", ".join(dict.fromkeys(run.summary.machine or "not known" for run in runs))],
        ["training, all runs together", _duration(seconds)],
    ]
    for path in dict.fromkeys(run.run.data.path for run in runs):
        rows.append([f"data: {path}", _data_in_words(path)])
    yield Table(["", ""], rows)


def _kind(run: RunConfig) -> str:
    if run.train.weights == "all":
        return "all weights"
    return ("DoRA" if run.lora.dora else "LoRA") + (" (rsLoRA)" if run.lora.rslora else "")


def _data_in_words(path: str) -> str:
    """A data set's splits and whether they are sound, where it is here to be looked at."""
    if is_hub_data(path) and not shipped_data(path):
        return "on the Hub; not looked at again"
    try:
        report = check_data(fetch_data(path))
    except InterviewMateError as error:
        return f"cannot be checked now: {str(error).splitlines()[0]}"
    counts = ", ".join(f"{count} {split}" for split, count in report.rows.items())
    return f"{counts} rows; no faults, no near-duplicates between splits"


def _run_table(runs: Sequence[FinishedRun]) -> Table:
    rows: list[list[str]] = []

    def add(name: str, values: Sequence[str]) -> None:
        rows.append([name, *values])

    loras = [None if run.run.train.weights == "all" else run.run.lora for run in runs]
    if any(loras):
        add("rank, alpha", [f"{lora.rank}, {lora.alpha:g}" if lora else _NONE for lora in loras])
        add("layers with a LoRA", [", ".join(lora.targets) if lora else "all" for lora in loras])
    add("learning rate", [f"{r.run.train.learning_rate:g}" for r in runs])
    add("schedule", [f"{r.run.train.schedule}" for r in runs])
    add("effective batch", [str(r.run.train.effective_batch) for r in runs])
    add(
        "epochs",
        [f"{r.summary.epochs:.2f}{'' if r.is_complete else ', interrupted'}" for r in runs],
    )
    add("seed", [str(r.run.train.seed) for r in runs])
    add(
        "trainable parameters",
        [f"{r.summary.trainable_parameters:,} ({r.summary.trainable_share:.2%})" for r in runs],
    )
    add("training loss, first", [f"{r.summary.first_loss:.4f}" for r in runs])
    add("training loss, last", [f"{r.summary.final_loss:.4f}" for r in runs])
    add("reduction", [f"{r.summary.reduction:.1%}" for r in runs])
    if any(run.run.lora.start_from for run in runs):
        add("started from", [run.run.lora.start_from or "the base" for run in runs])
    add("validation loss, base", [_number(r.summary.base_valid_loss) for r in runs])
    add("validation loss, best", [_number(r.loss) for r in runs])
    add(
        "its step",
        [
            f"{r.summary.best_step}{' (stopped early)' if r.summary.stopped_early else ''}"
            if r.summary.best_step is not None
            else _NONE
            for r in runs
        ],
    )
    return Table(["", *(run.name for run in runs)], rows)


def _progression(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    rows = []
    for epoch in EPOCHS:
        losses = [run.loss_at(epoch) for run in runs]
        if any(loss is not None for loss in losses):
            rows.append([f"epoch {epoch:g}", *map(_number, losses)])
    rows.append(["the end", *(f"{run.summary.final_loss:.4f}" for run in runs)])
    yield "Training loss, smoothed, after the same part of the rows for all."
    yield Table(["", *(run.name for run in runs)], rows)


def _curves(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    if not can_plot():
        yield NO_PLOTS
    losses = []
    for number, run in enumerate(runs):
        curve = run.curve("loss")
        losses += [Line("", curve, number, is_faint=True), Line(run.name, smoothed(curve), number)]
    unit = "nats a token" if all(r.run.train.method == "sft" for r in runs) else "loss"
    yield _plot("loss", findings.curve_title(runs), losses, unit, runs, "loss")
    if any(run.validations for run in runs):
        lines = [
            Line(run.name, run.validation_curve(), number, mark=_best_point(run))
            for number, run in enumerate(runs)
            if run.validations
        ]
        title = findings.validation_title(runs)
        numbers = Table(
            ["", "base", "best", "last"],
            [
                [
                    run.name,
                    _number(run.summary.base_valid_loss),
                    _number(run.loss),
                    _number(run.validations[-1][1] if run.validations else None),
                ]
                for run in runs
            ],
        )
        svg = line_plot("validation", lines, "epoch", unit) if can_plot() else ""
        yield Plot("validation", title, svg, numbers)
    for key, title, label in (
        ("learning_rate", "The learning rate", "learning rate"),
        ("grad_norm", "The size of the gradient before clipping", "norm of the gradient"),
    ):
        lines = [
            Line(run.name, _thinned(run.curve(key), key), number) for number, run in enumerate(runs)
        ]
        yield _plot(key, title, lines, label, runs, key)
    speeds = [Line(run.name, smoothed(run.speed()), number) for number, run in enumerate(runs)]
    svg = line_plot("speed", speeds, "epoch", "rows a second") if can_plot() else ""
    table = Table(["", "mean"], [[run.name, f"{run.summary.samples_per_s:.3f}"] for run in runs])
    yield Plot("speed", "Rows a second", svg, table)


def _preferences(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    """What was measured of preferences on validation rows, and how the margin went."""
    shown = [run for run in runs if run.run.train.method != "sft"]
    if not shown:
        return
    yield (
        "A reward says how far training has raised an answer's log-probability; the margin is by "
        "how much the rewards of better answers lead. On validation rows, of the kept adapter:"
    )
    rows = []
    for name, key, style in _MEASURES:
        found = [run.summary.best_valid_measures.get(key) for run in shown]
        if any(value is not None for value in found):
            rows.append([name, *(_NONE if v is None else format(v, style) for v in found)])
    yield Table(["", *(run.name for run in shown)], rows)
    lines, numbers = [], []
    for number, run in enumerate(shown):
        if curve := smoothed(run.measured("margin")):
            lines.append(Line(run.name, curve, number))
            numbers.append([run.name, _short(curve[0][1]), _short(curve[-1][1])])
    if lines:
        svg = line_plot("margin", lines, "epoch", "margin of rewards") if can_plot() else ""
        table = Table(["", "first", "last"], numbers)
        yield Plot("margin", "The margin on training rows", svg, table)


def _thinned(curve: Curve, key: str) -> Curve:
    """A schedule is drawn as it is, what jitters is smoothed."""
    return curve if key == "learning_rate" else smoothed(curve)


def _best_point(run: FinishedRun) -> tuple[float, float] | None:
    if run.summary.best_step is None or run.loss is None:
        return None
    return run.summary.best_step / run.steps_per_epoch, run.loss


def _plot(
    name: str, title: str, lines: list[Line], label: str, runs: Sequence[FinishedRun], key: str
) -> Plot:
    """A plot of a number of each step, with what it was at the epochs that are compared."""
    rows = []
    for run in runs:
        curve = smoothed(run.curve(key))
        places = [round(epoch * run.steps_per_epoch) for epoch in EPOCHS]
        found = [curve[place - 1][1] if 1 <= place <= len(curve) else None for place in places]
        rows.append([run.name, *map(_short, found), _short(curve[-1][1])])
    numbers = Table(["", *(f"epoch {epoch:g}" for epoch in EPOCHS), "the end"], rows)
    return Plot(name, title, line_plot(name, lines, "epoch", label) if can_plot() else "", numbers)


def _cost_table(runs: Sequence[FinishedRun]) -> Table:
    rows = [
        ["training", *(_duration(run.summary.training_s) for run in runs)],
        ["rows a second", *(f"{run.summary.samples_per_s:.3f}" for run in runs)],
        ["tokens a second", *(f"{run.summary.tokens_per_s:.0f}" for run in runs)],
        ["peak memory", *(f"{run.summary.peak_gb:.2f} GB" for run in runs)],
        [
            "rows to learn, to validate",
            *(f"{r.summary.train_rows}, {r.summary.valid_rows}" for r in runs),
        ],
    ]
    return Table(["", *(run.name for run in runs)], rows)


def _evaluation(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    evaluated = [(run, run.evaluation) for run in runs if run.evaluation]
    if not evaluated:
        yield "Not evaluated yet. This adds it:"
        adapters = [str(run.folder) for run in runs if run.run.train.weights == "lora"]
        models = [str(run.folder) for run in runs if run.run.train.weights == "all"]
        lines = [f"imate-mlx evaluate {' '.join(adapters)}"] if adapters else []
        yield Code([*lines, *(f"imate-mlx evaluate --model {m} --out {m}" for m in models)])
        return
    asked = dict.fromkeys(f"{e['rows']} {e['split']} rows of {e['data']}" for _, e in evaluated)
    if len(asked) > 1:
        yield "These were evaluated on different rows, so they cannot be compared: " + "; ".join(
            asked
        )
    else:
        yield f"On {next(iter(asked))}."
    base = evaluated[0][1]["base"]
    columns = ["", "base", *(run.name for run, _ in evaluated)]
    everyone = [base, *(e["adapter"] for _, e in evaluated)]
    rows = [
        ["loss", *(f"{e['loss']['loss']:.4f}" for e in everyone)],
        ["perplexity", *(f"{e['loss']['perplexity']:.2f}" for e in everyone)],
        ["tokens foreseen", *(f"{e['loss']['accuracy']:.1%}" for e in everyone)],
    ]
    for name, key, style in _ANSWER_SCORES:
        if all(e["answers"] for e in everyone):
            rows.append([name, *(format(e["answers"][key], style) for e in everyone)])
    yield Table(columns, rows)
    for run, evaluation in evaluated:
        found = evaluation["adapter"]["difference"]
        sure = "" if found["is_significant"] else "; not significant"
        yield (
            f"{run.name}: loss {found['loss']:+.4f} against its base, 95 % interval "
            f"{found['low']:+.4f} to {found['high']:+.4f}{sure}; better on "
            f"{found['rows_better']} of {found['rows']} rows."
        )
    for key, labels in base["by_label"].items():
        everywhere = [
            label for label in labels if all(label in e["by_label"].get(key, {}) for e in everyone)
        ]
        yield f"Loss by {key}:"
        yield Table(
            columns,
            [
                [
                    f"{label} ({labels[label]['rows']})",
                    *(f"{e['by_label'][key][label]['loss']:.4f}" for e in everyone),
                ]
                for label in everywhere
            ],
        )


def _answers(runs: Sequence[FinishedRun]) -> Iterator[Part]:
    answered = [run for run in runs if run.answers]
    if not answered:
        return
    asked = [q for q in answered[0].answers if all(q in run.answers for run in answered)]
    for question in asked[:_NUM_QUESTIONS]:
        first = answered[0].answers[question]
        yield Quote(
            question,
            {
                "as written": first["written"],
                "base": first["base"],
                **{run.name: run.answers[question]["adapter"] for run in answered},
            },
        )


def _commands(runs: Sequence[FinishedRun]) -> Code:
    best = findings.best_run(runs) or runs[0]
    if best.run.train.weights == "all":
        return Code(
            [
                f'imate-mlx generate "What is overfitting?" --model {best.folder}',
                f"imate-mlx evaluate --model {best.folder} --data {best.run.data.path}",
            ]
        )
    adapters = [str(run.folder) for run in runs if run.run.train.weights == "lora"]
    return Code(
        [
            f'imate-mlx generate "What is overfitting?" --adapter {best.folder}',
            f"imate-mlx evaluate {' '.join(adapters)}",
            f"imate-mlx export {best.folder} --out {best.name}-export",
        ]
    )


def _facts(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    best = findings.best_run(runs)
    return {
        "best": best.name if best else None,
        "comparable": not findings.are_comparable(runs),
        "findings": {
            "which": findings.which_to_use(runs),
            "seeds": findings.seeds_in_words(runs),
            "effects": findings.effects(runs),
            "next": [said for run in runs for said in findings.next_steps(run)],
        },
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "complete": run.is_complete,
                "settings": run.settings(),
                "first_loss": run.summary.first_loss,
                "final_loss": run.summary.final_loss,
                "base_valid_loss": run.summary.base_valid_loss,
                "best_valid_loss": run.loss,
                "best_step": run.summary.best_step,
                "loss_at_epoch": {f"{epoch:g}": run.loss_at(epoch) for epoch in EPOCHS},
                "training_s": run.summary.training_s,
                "samples_per_s": run.summary.samples_per_s,
                "peak_gb": run.summary.peak_gb,
                "evaluation": run.evaluation,
            }
            for run in runs
        ],
    }


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _short(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
