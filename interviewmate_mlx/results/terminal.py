"""A run on the terminal: a bar on stderr, plain lines if stderr is not a terminal."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import numpy as np
from rich import filesize
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from interviewmate_mlx.data.check import DataReport
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.summary import Lengths, SplitSummary
from interviewmate_mlx.evaluation.evaluate import Evaluation, Questions, in_words
from interviewmate_mlx.files import Progress as ByteProgress
from interviewmate_mlx.results.bench import BenchResult
from interviewmate_mlx.results.dry_run import Forecast
from interviewmate_mlx.results.sweep import Outcome, best_of
from interviewmate_mlx.training.events import (
    Event,
    Finished,
    Started,
    Stepped,
    Summary,
    Validated,
)

# Without a terminal: a line each time so many parts of the run are done.
_PLAIN_LINES = 20
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 32  # characters
# Columns of an evaluation beside the base's: 80 characters have room for no more.
_MODELS_BESIDE = 3


def show(events: Iterator[Event], console: Console) -> Iterator[Event]:
    """Pass a run's events on while showing them: a bar with its time, the numbers below it."""
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    status = Text("compiling", no_wrap=True, overflow="ellipsis")
    live = Live(Group(bar, status), console=console, transient=True)
    total, task, so_far = 1, bar.add_task("", total=None, visible=False), _Speed()
    has_bar = console.is_terminal and not console.is_dumb_terminal
    with live if has_bar else nullcontext():
        for event in events:
            if isinstance(event, Started):
                total = event.total_steps
                show_start(event, console)
                bar.update(task, total=total, completed=event.step, visible=True)
            elif isinstance(event, Stepped):
                so_far.add(event)
                numbers = _numbers(event, so_far)
                bar.update(task, completed=event.step)
                status.plain = numbers
                is_plain_line = event.step % max(1, total // _PLAIN_LINES) == 0
                if not has_bar and (is_plain_line or event.step == total):
                    console.print(f"step {event.step}/{total}  {numbers}")
            elif isinstance(event, Validated):
                mark = "  best so far" if event.is_best else ""
                measured = f"validation loss {event.loss:.4f}{_measures(event.measures)}"
                console.print(f"step {event.step}/{total}  {measured}{mark}")
            elif isinstance(event, Finished) and event.stopped_early:
                console.print(f"stopped early: no better validation loss since {event.best_step}")
            yield event


@contextmanager
def byte_bar(description: str, console: Console) -> Iterator[ByteProgress]:
    """A bar over bytes, shown from the first call on."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal or console.is_dumb_terminal,
    )
    with bar:
        task = bar.add_task(description, total=None, visible=False)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield update


@contextmanager
def work_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over tasks that come one after the other; without a terminal, a line for each."""
    has_bar = console.is_terminal and not console.is_dumb_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(compact=True),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not has_bar) as bar:

        def update(title: str, done: int, total: int) -> None:
            if title not in tasks:
                for earlier in tasks.values():
                    bar.remove_task(earlier)
                tasks.clear()
                tasks[title] = bar.add_task(title, total=total)
                if not has_bar:
                    console.print(title)
            bar.update(tasks[title], completed=done, total=total)

        yield update


def evaluation_tables(asked: Questions, found: Sequence[Evaluation]) -> Iterator[Table | Text]:
    """What was found about models: a column each, at most three beside the base in a table."""
    base, *others = found
    for start in range(0, max(1, len(others)), _MODELS_BESIDE):
        yield _evaluation_table(asked, [base, *others[start : start + _MODELS_BESIDE]])
    for other in others:
        if other.difference:
            yield Text(f"{other.name}: loss {in_words(other.difference)}")
    if asked.num_left_out:
        yield Text(f"left out, no answer within the length: {count(asked.num_left_out, 'row')}")


def _evaluation_table(asked: Questions, shown: Sequence[Evaluation]) -> Table:
    rows = count(len(asked.examples), f"{asked.split} row")
    table = Table(title=f"{rows} of {asked.data}", title_justify="left")
    table.add_column("")
    for evaluation in shown:
        table.add_column(evaluation.name, justify="right", overflow="fold")
    table.add_row("loss", *(f"{e.loss.loss:.4f}" for e in shown))
    table.add_row("perplexity", *(f"{e.loss.perplexity:.2f}" for e in shown))
    table.add_row("tokens foreseen", *(f"{e.loss.accuracy:.1%}" for e in shown))
    for by_label in shown[0].by_label.values():
        table.add_section()
        for label, of_base in by_label.items():
            key = next(k for k, labels in shown[0].by_label.items() if labels is by_label)
            losses = (f"{e.by_label[key][label].loss:.4f}" for e in shown)
            table.add_row(f"loss, {label} ({of_base.rows})", *losses)
    scores = [e.answers for e in shown if e.answers]
    if scores:
        table.add_section()
        table.add_row("ROUGE-1", *(f"{s.rouge1:.3f}" for s in scores))
        table.add_row("ROUGE-2", *(f"{s.rouge2:.3f}" for s in scores))
        table.add_row("ROUGE-L", *(f"{s.rougeL:.3f}" for s in scores))
        table.add_row("chrF", *(f"{s.chrf:.1f}" for s in scores))
        table.add_row("BLEU", *(f"{s.bleu:.1f}" for s in scores))
        table.add_section()
        table.add_row("end by themselves", *(f"{s.ended:.0%}" for s in scores))
        table.add_row("words to the written", *(f"{s.length:.2f}" for s in scores))
        table.add_row("four words repeated", *(f"{s.repetition:.1%}" for s in scores))
        table.add_row("words copied, mean", *(f"{s.copied:.1f}" for s in scores))
        table.add_row("words copied, most", *(f"{s.longest_copy}" for s in scores))
    for task, metrics in shown[0].tasks.items():
        table.add_section()
        for metric in metrics:
            table.add_row(f"{task}, {metric}", *(f"{e.tasks[task][metric]:.4f}" for e in shown))
    return table


def show_start(event: Started, console: Console) -> None:
    """What is known before the first step."""
    rows, steps = count(event.num_train_rows, "row"), count(event.total_steps, "step")
    console.print(f"{rows} to train on, {event.num_valid_rows} to validate on")
    console.print(f"{steps}, {event.steps_per_epoch} an epoch")
    console.print(f"about {_about(event.peak_bytes)} of memory at the peak")
    console.print(f"about {_about(event.disk_bytes)} of disk for checkpoints")
    if event.num_truncated_rows:
        console.print(f"truncated to data.max_length: {count(event.num_truncated_rows, 'row')}")
    if event.num_dropped_rows:
        console.print(f"dropped, nothing left to learn: {count(event.num_dropped_rows, 'row')}")
    for note in event.notes:
        console.print(note, soft_wrap=True)
    if event.step:
        console.print(f"going on after step {event.step}")


def forecast_text(forecast: Forecast | None) -> str:
    """How long a run will take."""
    if not forecast:
        return "nothing left to do: all steps are done"
    parts = [f"{_duration(forecast.training_s)} of training"]
    if forecast.num_validations:
        validations = count(forecast.num_validations, "validation")
        parts.append(f"{_duration(forecast.validation_s)} for {validations}")
    return (
        f"about {' and '.join(parts)}, at {forecast.tokens_per_s:.0f} tokens/s "
        f"(measured over {count(forecast.timed_steps, 'step')})"
    )


def summary_table(
    summary: Summary, losses: Sequence[float] = (), valid_losses: Sequence[float] = ()
) -> Table:
    """The closing table of a run.

    Args:
        summary: of the run.
        losses: of its steps, for a curve; none: no curve.
        valid_losses: of its validations.
    """
    title = f"{summary.run} on {summary.base}"
    table = Table(title=title, show_header=False, title_justify="left", min_width=len(title))
    window = summary.loss_window_steps
    steps = f"{window} steps" if window > 1 else "step"
    rows = [
        (f"training loss, first {steps}", f"{summary.first_loss:.4f}"),
        (f"training loss, last {steps}", f"{summary.final_loss:.4f}"),
        ("reduction", f"{summary.reduction:.1%}"),
    ]
    if summary.base_valid_loss is not None and summary.best_valid_loss is not None:
        rows += [
            (
                f"validation loss, {'start' if summary.started_from else 'base'}",
                f"{summary.base_valid_loss:.4f}",
            ),
            ("validation loss, best", f"{summary.best_valid_loss:.4f} (step {summary.best_step})"),
        ]
    after = summary.best_valid_measures
    if "margin" in after:
        rows.append(("validation margin, best", f"{after['margin']:.4f}"))
    if "accuracy" in after:
        rows.append(("better answer ahead, best", f"{after['accuracy']:.1%}"))
    rows += [
        ("training time", _duration(summary.training_s)),
        ("samples/s", f"{summary.samples_per_s:.3f}"),
        ("tokens/s", f"{summary.tokens_per_s:.0f}"),
        (
            "trainable",
            f"{summary.trainable_parameters:,} of {summary.total_parameters:,} "
            f"({summary.trainable_share:.2%})",
        ),
        ("peak memory", f"{summary.peak_gb:.2f} GB"),
    ]
    curves = {"training loss, all steps": losses, "validation loss": valid_losses}
    rows += [(name, curve(values)) for name, values in curves.items() if len(values) > 1]
    for name, value in rows:
        table.add_row(name, value)
    return table


def sweep_table(outcomes: Sequence[Outcome]) -> Table:
    """The trials of a sweep, in their order, the best one marked."""
    varied = list(dict.fromkeys(key for outcome in outcomes for key in outcome.trial.values))
    best = best_of(outcomes)
    table = Table(title=count(len(outcomes), "trial"), title_justify="left")
    table.add_column("trial")
    for key in varied:
        table.add_column(key.partition(".")[2], justify="right")
    for name in ("first", "last", "reduction", "validation", "step", "time", "samples/s"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        values = [f"{outcome.trial.values.get(key, '')}" for key in varied]
        style = "bold" if outcome is best else None
        table.add_row(outcome.trial.name, *values, *_outcome_cells(outcome), style=style)
    return table


def _outcome_cells(outcome: Outcome) -> list[str]:
    summary = outcome.summary
    if summary is None:
        return [outcome.status, *[""] * 6]
    has_valid = summary.best_valid_loss is not None
    return [
        f"{summary.first_loss:.3f}",
        f"{summary.final_loss:.3f}",
        f"{summary.reduction:.1%}",
        f"{summary.best_valid_loss:.4f}" if has_valid else "",
        f"{summary.best_step}" if has_valid else f"{summary.steps}",
        _duration(summary.training_s),
        f"{summary.samples_per_s:.3f}",
    ]


def spread_table(outcomes: Sequence[Outcome]) -> Table:
    """Mean and spread over seeds of each run, by the loss that trials are compared by."""
    groups: dict[str, list[float]] = {}
    for outcome in outcomes:
        if math.isfinite(outcome.loss):
            name = outcome.trial.name.rpartition("-seed")[0]
            groups.setdefault(name, []).append(outcome.loss)
    table = Table(title="over the seeds", title_justify="left")
    for name in ("run", "seeds", "mean loss", "least", "most"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, losses in groups.items():
        numbers = sum(losses) / len(losses), min(losses), max(losses)
        table.add_row(name, str(len(losses)), *(f"{number:.4f}" for number in numbers))
    return table


def curve(values: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """Numbers as a line of bars, the highest of them full; more than `width` in groups."""
    ends = np.linspace(0, len(values), min(width, len(values)) + 1).round().astype(int)
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * (mean - low) / (high - low or 1))] for mean in means)


def bench_text(result: BenchResult) -> str:
    """What `bench` found, in a few lines."""
    lines = [
        f"{result.run} on {result.base}, {result.device}, {result.dtype}",
        f"{result.steps} steps ({result.rows} rows, {result.tokens} tokens) "
        f"in {result.seconds:.2f} s",
        f"{result.samples_per_s:.3f} samples/s ({result.samples_per_s_slowest:.3f} to "
        f"{result.samples_per_s_fastest:.3f} a step), {result.tokens_per_s:.0f} tokens/s",
        f"peak {result.peak_gb:.2f} GB; {result.products_share:.0%} of the time is what its "
        f"matrix products need at this machine's own {result.products_gflops:.0f} GFLOP/s",
        f"the whole run: {result.whole_run_s / 60:.1f} minutes",
    ]
    if result.seed_samples_per_s:
        lines.append(
            f"the project this one comes from: {result.seed_samples_per_s} samples/s "
            "(falcon-rw-1b, PyTorch on Apple Silicon)"
        )
    for rank in result.ranks:
        lines.append(
            f"{rank.name}: {rank.rows} rows, {rank.tokens} tokens; "
            f"{rank.sums_seconds:.2f} s in sums; alone {rank.alone_samples_per_s:.3f} samples/s"
        )
    if result.ranks:
        lines.append(
            f"together {result.efficiency:.0%} of what they do alone, added up; a sum is "
            f"{result.sum_bytes / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def data_tables(report: DataReport) -> list[Table | Text]:
    """Counts by category and difficulty, and the closest pairs, for a person to judge."""
    counts = Table(title_justify="left")
    counts.add_column("")
    for split in report.rows:
        counts.add_column(split, justify="right")
    groups = [report.categories, report.difficulties, {"rows": report.rows}]
    for group in filter(None, groups):
        for name, numbers in group.items():
            counts.add_row(name, *(str(numbers[split]) for split in report.rows))
        counts.add_section()
    shortest, mean, longest = report.answer_words
    parts: list[Table | Text] = [
        counts,
        *(Text(f"{split}: {line}") for split, lines in report.readings.items() for line in lines),
        Text(f"words an answer: {shortest} to {longest}, mean {mean:.0f}"),
    ]
    if report.token_lengths:
        shortest, median, longest = report.token_lengths
        parts.append(Text(f"tokens a row: {shortest} to {longest}, median {median:.0f}"))
    parts.append(Text("no faults"))
    if report.closest:
        parts.append(Text("the closest pairs, for you to judge, by the word 5-grams they share:"))
    for pair in report.closest:
        places = f"{pair.what}s of {pair.first} and {pair.second}"
        parts.append(Text(f"  {pair.similarity:.0%}  {places}"))
        for text in pair.texts:
            line = "       " + " ".join(text.split())
            parts.append(Text(line, style="dim", no_wrap=True, overflow="ellipsis"))
    return parts


def rows_table(found: dict[str, SplitSummary], max_length: int) -> Table:
    """What the rows of each split are like, a column a split."""
    table = Table(title_justify="left")
    table.add_column("")
    for split in found:
        table.add_column(split, justify="right")

    def add(name: str, show: Callable[[SplitSummary], str]) -> None:
        table.add_row(name, *(show(summary) for summary in found.values()))

    add("rows", lambda s: f"{s.rows:,}")
    for name in sorted({n for s in found.values() for n in s.turns}):
        title = f"with {count(name, 'answer')}" if name else "texts as they stand"
        add(f"  {title}", lambda s, n=name: f"{s.turns.get(n, 0):,}")  # type: ignore[misc]
    for key in ("categories", "difficulties", "scripts"):
        table.add_section()
        for label in dict.fromkeys(n for s in found.values() for n in getattr(s, key)):
            add(label, lambda s, k=key, n=label: f"{getattr(s, k).get(n, 0):,}")  # type: ignore[misc]
    table.add_section()
    for key in ("question_words", "answer_words", "tokens"):
        title = "tokens a row" if key == "tokens" else f"words {_AN[key]}"
        add(title, lambda s, k=key: _lengths(getattr(s, k)))  # type: ignore[misc]
    table.add_section()
    add("shortest", lambda s: s.shortest)
    add("longest", lambda s: s.longest)
    add(f"cut at {max_length} tokens", lambda s: f"{s.num_cut:,}")
    add("nothing left to learn", lambda s: f"{s.num_dropped:,}")
    add("tokens with loss", lambda s: f"{s.loss_share:.0%}")
    table.caption = "\n".join(
        f"{split}: {line}" for split, summary in found.items() for line in summary.readings
    )
    table.caption_justify = "left"
    return table


_AN = {"question_words": "a question", "answer_words": "an answer"}


def _lengths(lengths: Lengths) -> str:
    """As in `3 to 90, median 20, 95 % up to 60`."""
    return (
        f"{lengths.shortest} to {lengths.longest}, median {lengths.median:.0f}, "
        f"95 % up to {lengths.most}"
    )


def preview_text(tokenizer: Any, example: Example) -> Text:
    """A row's tokens, one after the other, those that carry loss marked; then their counts."""
    text = Text()
    for piece, has_loss in _pieces(tokenizer, example):
        piece = piece.replace("\n", "\\n\n")
        text.append(f"[{piece}]" if has_loss else piece, style="green" if has_loss else "dim")
    num_learned = int(example.loss_mask.sum())
    text.append(f"\n\n{len(example)} tokens, {num_learned} of them [with loss]")
    if example.num_truncated:
        text.append(f"; {example.num_truncated} more were truncated")
    if not num_learned:
        text.append("\nnothing is left to learn: training would drop this row")
    return text


def _pieces(tokenizer: Any, example: Example) -> Iterator[tuple[str, bool]]:
    """The text of each token and whether it carries loss.

    Tokens that make up one character only together come as one piece.
    """
    tokens: list[int] = []
    for token, has_loss in zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True):
        tokens.append(token)
        piece = tokenizer.decode(tokens)
        if not piece.endswith("\ufffd"):
            yield piece, has_loss
            tokens = []
    if tokens:  # a row that is truncated within a character
        yield tokenizer.decode(tokens), bool(example.loss_mask[-1])


def count(number: int, noun: str) -> str:
    """A number and its noun, as in `1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _about(num_bytes: int) -> str:
    """Bytes in two digits: an estimate is not known to more."""
    return filesize.decimal(round(num_bytes, 2 - len(str(num_bytes))), precision=0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class _Speed:
    """Rows and tokens a second over all steps so far; a single step's time is noisy."""

    rows = tokens = 0
    seconds = 0.0

    def add(self, event: Stepped) -> None:
        self.rows += event.num_rows
        self.tokens += event.num_tokens
        self.seconds += event.elapsed_s


def _numbers(event: Stepped, so_far: _Speed) -> str:
    return (
        f"loss {event.loss:.3f}{_measures(event.measures)}  lr {event.learning_rate:.1e}  "
        f"{so_far.rows / so_far.seconds:.2f} samples/s  "
        f"{so_far.tokens / so_far.seconds:.0f} tokens/s  "
        f"{mx.get_peak_memory() / 1e9:.1f} GB"
    )


def _measures(measures: dict[str, float]) -> str:
    """The reward margin and how often the better answer has the higher reward, if measured."""
    margin = f"  margin {measures['margin']:.3f}" if "margin" in measures else ""
    return margin + (f"  right {measures['accuracy']:.0%}" if "accuracy" in measures else "")
