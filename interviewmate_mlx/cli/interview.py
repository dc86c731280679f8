"""imate-mlx interview"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from interviewmate_mlx.cli.options import (
    UserPath,
    harmless,
    json_option,
    make_console,
    model_option,
    prepared,
)
from interviewmate_mlx.cli.typed import EDIT, Typed

if TYPE_CHECKING:
    from rich.console import Console

    from interviewmate_mlx.coach.interview import Deck, Grade, Practice, Question

_NUM_WEEKS = 5  # in the calendar
_SKIP, _QUIT = "/skip", "/quit"
Coach = Callable[[str], str]  # a question -> an answer


@click.command("interview")
@click.option("--category", metavar="NAME", default="", help="Only questions of this category.")
@click.option(
    "--difficulty", type=click.Choice(["beginner", "intermediate", "advanced"]), help="Only these."
)
@click.option(
    "--count", type=click.IntRange(1), default=10, show_default=True, help="Of questions."
)
@click.option(
    "--data", metavar="DATA", default="interview", show_default=True, help="Where they come from."
)
@click.option("--adapter", type=UserPath(), help="A PEFT folder: a coach that answers, too.")
@model_option
@click.option("--progress", is_flag=True, help="Show what was practised, and ask nothing.")
@click.option("--export", is_flag=True, help="Print every answer as a line of JSON.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    category: str,
    difficulty: str | None,
    count: int,
    data: str,
    adapter: Path | None,
    model: str | None,
    progress: bool,
    export: bool,
    as_json: bool,
) -> None:
    """Be asked, answer, and see what was missing.

    What is due is asked first. You grade your own answers, and that decides when a question
    returns. Answers stay on this disk. No model is needed.

    \b
    Example: imate-mlx interview --category statistics --count 5
    """
    _check_usage(ctx, adapter, model, progress, export, as_json)
    from interviewmate_mlx.coach.interview import Practice

    if progress or export:
        with Practice.open() as practice:
            if export:
                for line in practice.export():
                    click.echo(line)
            else:
                _show_progress(practice, as_json)
        return
    deck = _read_deck(data)
    questions = deck.choose(category, difficulty or "")
    coach = _load(model, adapter) if adapter else None
    with Practice.open() as practice:
        chosen = practice.next_questions(questions, count)
        _interview(practice, deck, chosen, coach)


def _check_usage(
    ctx: click.Context,
    adapter: Path | None,
    model: str | None,
    progress: bool,
    export: bool,
    as_json: bool,
) -> None:
    if model and not adapter:
        raise click.UsageError("--model is the base of an --adapter; questions need no model.")
    if progress and export:
        raise click.UsageError("--progress and --export: give one of them.")
    if as_json and not progress:
        raise click.UsageError("--json goes with --progress; --export is JSON anyway.")
    if progress or export:
        for key in ("category", "difficulty", "count", "data", "adapter"):
            if ctx.get_parameter_source(key) != click.core.ParameterSource.DEFAULT:
                shown = "--progress" if progress else "--export"
                raise click.UsageError(f"{shown} is about all answers: leave out --{key}.")


def _read_deck(data: str) -> "Deck":
    from interviewmate_mlx.coach.interview import Deck
    from interviewmate_mlx.config import shipped_data

    path = shipped_data(data) or Path(data).expanduser()
    if not path.exists():  # on the Hub, or nowhere
        with prepared():
            from interviewmate_mlx.hub.names import fetch_data
            from interviewmate_mlx.results.terminal import byte_bar

            with byte_bar(f"fetching {data}", make_console()) as fetching:
                path = fetch_data(data, fetching)
    return Deck.read(path)


def _load(model: str | None, adapter: Path) -> Coach:
    with prepared():
        from interviewmate_mlx.coach.generate import answer, load_coach
        from interviewmate_mlx.results.terminal import byte_bar

        with byte_bar("fetching the base", make_console()) as fetching:
            network, tokenizer = load_coach(model, adapter, progress=fetching)
    return lambda question: answer(network, tokenizer, question)


def _interview(
    practice: "Practice", deck: "Deck", questions: list["Question"], coach: Coach | None
) -> None:
    console = make_console(sys.stdout)
    typed = Typed()
    console.print(
        f"An empty line ends your answer. {EDIT} opens your editor; {_SKIP}; {_QUIT}.", style="dim"
    )
    num_answered = 0
    for number, question in enumerate(questions, start=1):
        labels = [f"Question {number} of {len(questions)}", question.category, question.difficulty]
        console.print()
        console.print(" · ".join(filter(None, labels)), style="dim")
        console.print(harmless(question.text), style="bold")
        try:
            answer = typed.text("> ", (_SKIP, _QUIT))
            if answer == _QUIT:
                break
            if answer in ("", _SKIP):
                continue
            points = deck.compare(question, answer)
            _show_points(console, points)
            console.print("\nThe written answer", style="bold")
            console.print(harmless(question.reference))
            if coach:
                console.print("\nThe coach: a small model, which can be wrong", style="bold")
                console.print(harmless(coach(question.text)))
            follow_up = ""
            if question.follow_up:
                console.print("\nA follow-up", style="bold")
                console.print(harmless(question.follow_up))
                follow_up = typed.text("> ", (_SKIP, _QUIT))
                if follow_up == _QUIT:
                    break
                follow_up = "" if follow_up == _SKIP else follow_up
            grade = _ask_grade(console, typed)
        except EOFError:
            break
        due = practice.grade(question, answer, points, grade, follow_up)
        num_answered += 1
        console.print(f"This question returns in {_in_words(due - datetime.now(UTC))}.")
    console.print(
        f"\n{num_answered} answered and graded. imate-mlx interview --progress shows all of them."
    )


def _show_points(console: "Console", points: list) -> None:
    num_covered = sum(point.is_covered for point in points)
    console.print(f"\nYour answer has {num_covered} of {len(points)} points", style="bold")
    console.print("By the words that it shares with them: overlap, not judgement.", style="dim")
    for point in points:
        mark, style = ("has  ", "green") if point.is_covered else ("lacks", "yellow")
        console.print(f"{mark}  {point.share:4.0%}  {harmless(point.text)}", style=style)


def _ask_grade(console: "Console", typed: Typed) -> "Grade":
    from interviewmate_mlx.coach.interview import Grade

    names = ", ".join(Grade)
    console.print(f"\nHow well did you know it? {names}", style="bold")
    while True:
        word = typed.line("> ").strip().lower()
        found = [grade for grade in Grade if word and grade.startswith(word)]
        if len(found) == 1:
            return found[0]
        console.print(f"Got {harmless(word)!r}, expected one of: {names}.")


def _in_words(span: timedelta) -> str:
    minutes = max(1, round(span.total_seconds() / 60))
    for size, unit in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size:
            number = round(minutes / size)
            return f"{number} {unit}{'s' * (number != 1)}"
    raise AssertionError


def _show_progress(practice: "Practice", as_json: bool) -> None:
    categories, days = practice.progress(), practice.days()
    if as_json:
        facts = {
            "categories": [asdict(category) for category in categories],
            "days": {day.isoformat(): count for day, count in days.items()},
        }
        click.echo(json.dumps(facts))
        return
    if not days:
        click.echo("Nothing was practised yet. Begin with: imate-mlx interview")
        return
    from rich.table import Table

    console = make_console(sys.stdout)
    table = Table(box=None, pad_edge=False)
    table.add_column("category", overflow="fold")
    for name in ("asked", "answers", "known", "points", "due"):
        table.add_column(name, justify="right")
    for entry in categories:
        table.add_row(
            harmless(entry.category) or "(none)",
            str(entry.asked),
            str(entry.reviews),
            f"{entry.known:.0%}",
            f"{entry.covered:.0%}",
            str(entry.due),
        )
    console.print(table)
    console.print()
    console.print(_calendar(days, date.today()), end="")


def _calendar(days: dict[date, int], today: date) -> str:
    """Answers by day: a line a week, the last one ends today."""
    monday = today - timedelta(days=today.weekday())
    lines = ["week of   Mon Tue Wed Thu Fri Sat Sun"]
    for week in range(_NUM_WEEKS - 1, -1, -1):
        start = monday - timedelta(weeks=week)
        dates = [start + timedelta(days=number) for number in range(7)]
        cells = ["" if day > today else str(days.get(day, 0) or ".") for day in dates]
        lines.append(f"{start:%Y-%m-%d}" + "".join(f"{cell:>4}" for cell in cells)[1:])
    return "\n".join(lines) + "\n"
