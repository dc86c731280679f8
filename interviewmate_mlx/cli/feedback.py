"""imate-mlx feedback show | export | forget"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from interviewmate_mlx.cli.options import (
    UserPath,
    harmless,
    json_option,
    make_console,
    prepared,
)

_keep_option = click.option(
    "--keep",
    type=UserPath(),
    default=Path("feedback.sqlite"),
    show_default=True,
    metavar="FILE",
    help="The file that was given to serve --keep.",
)


@click.group("feedback")
def command() -> None:
    """Look at what users said of answers, and make training rows of it.

    \b
    Example: imate-mlx feedback show --keep feedback.sqlite
    """


@command.command()
@_keep_option
@click.option("--conversations", is_flag=True, help="List them, with the ids for forget.")
@json_option
def show(keep: Path, conversations: bool, as_json: bool) -> None:
    """Show counts by adapter and category, the share of good answers, and its trend by week.

    \b
    Example: imate-mlx feedback show
    """
    from rich.table import Table

    from interviewmate_mlx.coach.feedback import Feedback

    with Feedback.open(keep, must_exist=True) as feedback:
        groups, weeks = feedback.groups(), feedback.weeks()
        listed = feedback.conversations() if conversations else []
    if as_json:
        facts: dict[str, Any] = {
            "groups": [asdict(group) for group in groups],
            "weeks": {
                day.isoformat(): {"rated": rated, "good": good}
                for day, (rated, good) in weeks.items()
            },
        }
        if conversations:
            keys = ("id", "at", "answers", "question")
            facts["conversations"] = [dict(zip(keys, row, strict=True)) for row in listed]
        click.echo(json.dumps(facts))
        return
    if not groups:
        click.echo(f"{keep} holds no answers yet.")
        return
    console = make_console(sys.stdout)
    table = Table(box=None, pad_edge=False)
    for name in ("adapter", "category"):
        table.add_column(name, overflow="fold")
    for name in ("answers", "rated", "good", "better"):
        table.add_column(name, justify="right")
    for group in groups:
        good = "" if group.good is None else f"{group.good:.0%}"
        names = harmless(group.voice), harmless(group.category) or "(none)"
        table.add_row(*names, str(group.answers), str(group.rated), good, str(group.better))
    console.print(table)
    if weeks:
        console.print("\nweek of     rated  good")
        for day, (rated, good_count) in weeks.items():
            console.print(f"{day}  {rated:5}  {good_count / rated:4.0%}")
    for number, (conversation, at, answers, question) in enumerate(listed):
        if not number:
            console.print("\nconversation  begun             answers  first question")
        text = harmless(question).replace("\n", " ")
        line = f"{conversation[:12]}  {at[:16].replace('T', ' ')}  {answers:7}  {text}"
        console.print(line, no_wrap=True, overflow="ellipsis")


@command.command()
@_keep_option
@click.option(
    "--as",
    "kind",
    type=click.Choice(["pairs", "sft"]),
    required=True,
    help="pairs: preferences, chosen and rejected. sft: questions and good answers.",
)
@click.option("--out", type=UserPath(), required=True, metavar="FILE", help="JSON Lines.")
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.option(
    "--data",
    metavar="DATA",
    default="interview",
    show_default=True,
    help="Whose valid and test rows nothing may come near.",
)
@click.option("--leave-out", is_flag=True, help="Leave rows out that come near; they are named.")
def export(keep: Path, kind: str, out: Path, force: bool, data: str, leave_out: bool) -> None:
    """Write rows to train on: better and liked answers, and what they were preferred to.

    \b
    Example: imate-mlx feedback export --as sft --out liked.jsonl
    """
    from interviewmate_mlx.coach.feedback import (
        Feedback,
        leaking,
        pair_rows,
        refuse_leaks,
        sft_rows,
    )
    from interviewmate_mlx.data.records import load_splits
    from interviewmate_mlx.errors import ConfigError
    from interviewmate_mlx.files import atomic_file
    from interviewmate_mlx.hub.names import fetch_data

    if out.exists() and not force:
        raise ConfigError(f"{out} already exists.\nReplace it, or choose another file.", "force")
    with Feedback.open(keep, must_exist=True) as feedback:
        rated = feedback.rated()
    rows: list[dict[str, Any]] = []
    if kind == "sft":
        rows, num_left_out = sft_rows(rated), 0
    else:
        pairs, num_left_out = pair_rows(rated)
        rows = list(pairs)
    with prepared():
        from interviewmate_mlx.results.terminal import byte_bar

        with byte_bar(f"fetching {data}", make_console()) as progress:
            splits = load_splits(fetch_data(data, progress))
    held_out = [record for name in ("valid", "test") for record in splits.get(name, [])]
    leaks = leaking(rows, held_out)
    if not leave_out:
        refuse_leaks(rows, leaks)
    for index, alike, record in leaks:
        text = harmless(str(rows[index].get("prompt") or rows[index].get("question", "")))
        click.echo(f"left out: {text} (its {alike} is that of {record.source})", err=True)
    dropped = {index for index, _, _ in leaks}
    rows = [row for index, row in enumerate(rows) if index not in dropped]
    if num_left_out:
        text = "have no good one beside them, or belong to a later turn"
        click.echo(f"left out: {num_left_out} bad answers that {text}", err=True)
    if not rows:
        raise ConfigError(
            f"{keep} gives no rows: {len(rated)} answers were rated.\n"
            "Rate more answers, or write better ones."
        )
    with atomic_file(out) as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary.write_text("".join(lines), encoding="utf-8")
    click.echo(f"{out}: {len(rows)} rows")


@command.command()
@click.argument("conversation", required=False)
@_keep_option
@click.option("--all", "everything", is_flag=True, help="Forget every conversation.")
def forget(conversation: str | None, keep: Path, everything: bool) -> None:
    """Delete a conversation, or all. Nothing of it stays in the file.

    \b
    Example: imate-mlx feedback forget 3f2a91
    """
    from interviewmate_mlx.coach.feedback import Feedback

    if bool(conversation) == everything:
        raise click.UsageError("Give the start of a conversation's id, or --all; one of them.")
    with Feedback.open(keep, must_exist=True) as feedback:
        count = feedback.forget(conversation or "")
    click.echo(f"forgotten: {count} answers")
