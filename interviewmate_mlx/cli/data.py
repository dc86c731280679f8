"""imate-mlx data check | split | preview | show | convert"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from interviewmate_mlx.cli.options import (
    Finite,
    UserPath,
    harmless,
    json_option,
    load_tokenizer,
    make_console,
    model_option,
    prepared,
)
from interviewmate_mlx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@click.group("data")
def command() -> None:
    """Look at rows before training on them.

    \b
    Example: imate-mlx data check my_questions/
    """


@command.command()
@click.argument("path")
@model_option
@click.option(
    "--max-length",
    type=click.IntRange(8),
    help="With --model: rows of more tokens are faults; a run's own default otherwise.",
)
@click.option(
    "--template",
    metavar="NAME",
    help="With --model: as data.template of a run; its default is auto.",
)
@click.option("--all", "show_all", is_flag=True, help="Name every faulty row, not only the first.")
@json_option
def check(
    path: str,
    model: str | None,
    max_length: int | None,
    template: str | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Check a file or folder: its rows, its ids, and near-duplicates within and between splits.

    All faults come at once, with file and line; a fault that many rows share takes one line.
    With --model rows are counted in its tokens. With --json faults and warnings are lists of
    place, message and advice.

    \b
    Example: imate-mlx data check my_questions/
    """
    for option, value in (("--max-length", max_length), ("--template", template)):
        if value and not model:
            raise click.UsageError(f"{option} needs a --model, whose tokens are counted.")
    if show_all and as_json:
        raise click.UsageError("--json shows all faults anyway; leave --all out.")
    with prepared():
        from interviewmate_mlx.config import DataConfig
        from interviewmate_mlx.data.check import inspect_data
        from interviewmate_mlx.data.faults import MAX_SHOWN, group_faults
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar, data_tables

        with byte_bar(f"fetching {path}", make_console()) as progress:
            folder = fetch_data(path, progress)
        tokenizer = load_tokenizer(model) if model else None
        found = inspect_data(
            folder,
            tokenizer,
            max_length or DataConfig.max_length,
            template or DataConfig.template,
        )
        if as_json:
            lists = {"faults": found.faults, "warnings": found.warnings}
            rows = {name: [asdict(fault) for fault in faults] for name, faults in lists.items()}
            click.echo(json.dumps((asdict(found.report) if found.report else {}) | rows))
        for warning in group_faults(found.warnings, complete=show_all):
            click.echo(harmless(f"warning: {warning}"), err=True)
        if found.report is None:
            error = found.error(max_shown=None if show_all else MAX_SHOWN)
            num_shown = min(len(group_faults(found.faults)), MAX_SHOWN)
            if num_shown < len(found.faults) and not show_all:
                raise DataError(f"{error}\n--all names every row, --json does it for a program.")
            raise error
    if not as_json:
        console = make_console(sys.stdout)
        for part in data_tables(found.report):
            console.print(part, no_wrap=True, overflow="ellipsis")


@command.command()
@click.argument("sources", nargs=-1)
@click.option("--out", type=UserPath(), required=True, help="Folder of the splits.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True)
@click.option(
    "--shares",
    type=Finite(0, 1),
    nargs=3,
    default=(0.70, 0.15, 0.15),
    show_default=True,
    help="Of train, valid and test.",
)
def split(
    sources: tuple[str, ...], out: Path, seed: int, shares: tuple[float, float, float]
) -> None:
    """Deal the rows of SOURCES out to train, valid and test.

    SOURCES are files, folders, or data sets by name: shipped, or on the Hub. Rows are dealt
    by category and difficulty. Rows that OUT holds already stay in their split; doing it
    again changes nothing. A row without an id gets one from its question and answer.

    \b
    Example: imate-mlx data split rows.jsonl --out my_questions
    """
    with prepared():
        from interviewmate_mlx.config import shipped_data
        from interviewmate_mlx.data.splits import split_rows
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar
        from interviewmate_mlx.results.terminal import count as count_of

        paths = []
        for source in sources:
            with byte_bar(f"fetching {source}", make_console()) as progress:
                paths.append(fetch_data(source, progress))
        report = split_rows(paths, out, seed, shares)
        if shipped_data(str(out)):
            text = f"note: as data, {out} means the rows that are shipped; these are ./{out}"
            click.echo(text, err=True)
    for name, count in report.rows.items():
        click.echo(
            f"{out}/{name}.jsonl: {count_of(count, 'row')}, {report.added[name]} of them new"
        )
    click.echo(
        f"{count_of(sum(report.added.values()), 'row')} added, {report.updated} updated in their "
        f"split, {report.unchanged} left as they were"
    )
    if report.given_ids:
        rows = count_of(report.given_ids, "row")
        click.echo(f"{rows} without an id: it was made from question and answer")


@command.command()
@click.argument("path")
@model_option
@click.option("--row", type=click.IntRange(1), default=1, show_default=True)
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="train")
@click.option(
    "--max-length", type=click.IntRange(8), help="Tokens to keep; as in a run by default."
)
@click.option("--template", metavar="NAME", help="As data.template of a run; auto by default.")
@click.option(
    "--train-on",
    type=click.Choice(["answer", "answers", "last", "all"]),
    help="As in a run by default.",
)
def preview(
    path: str,
    model: str | None,
    row: int,
    split: str,
    max_length: int | None,
    template: str | None,
    train_on: str | None,
) -> None:
    """Show a row's tokens, and which of them carry loss.

    Without --model they are those of the runs' base if it is here, or else of mini.

    \b
    Example: imate-mlx data preview my_questions/ --row 3
    """
    with prepared():
        from interviewmate_mlx.config import DataConfig
        from interviewmate_mlx.data.prompts import encode_record, template_of
        from interviewmate_mlx.data.records import load_splits, readings
        from interviewmate_mlx.data.templates import choose_template
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar, preview_text

        with byte_bar(f"fetching {path}", make_console()) as progress:
            splits = load_splits(fetch_data(path, progress))
        if split not in splits:
            raise ConfigError(
                f"{path} has no {split} rows, expected --split {' or '.join(splits)}."
            )
        records = splits[split]
        if row > len(records):
            raise ConfigError(f"--row: got {row}, expected at most {len(records)} ({split}).")
        tokenizer = _tokenizer_of(model)
        chosen = choose_template(template or DataConfig.template, tokenizer)
        examples = encode_record(
            tokenizer,
            records[row - 1],
            max_length or DataConfig.max_length,
            train_on or DataConfig.train_on,
            chosen,
        )
        for line in readings(records):
            click.echo(harmless(f"{split}: {line}"), err=True)
        asked = template_of([records[row - 1]], chosen)
        click.echo(f"template: {harmless(asked.name)}", err=True)
        for number, example in enumerate(examples, start=1):
            if len(examples) > 1:
                click.echo(f"--- {number} of {len(examples)}: an answer each")
            make_console(sys.stdout).print(preview_text(tokenizer, example), soft_wrap=True)


@command.command()
@click.argument("path")
@model_option
@click.option(
    "--max-length", type=click.IntRange(8), help="Tokens to keep; as in a run by default."
)
@click.option("--template", metavar="NAME", help="As data.template of a run; auto by default.")
@click.option(
    "--train-on",
    type=click.Choice(["answer", "answers", "last", "all"]),
    help="As in a run by default.",
)
@json_option
def show(
    path: str,
    model: str | None,
    max_length: int | None,
    template: str | None,
    train_on: str | None,
    as_json: bool,
) -> None:
    """Show what rows are like: lengths, turns, scripts, and what training would see of them.

    Without --model tokens are those of the runs' base if it is here, or else of mini.

    \b
    Example: imate-mlx data show my_questions/
    """
    with prepared():
        from interviewmate_mlx.config import DataConfig
        from interviewmate_mlx.data.records import load_splits
        from interviewmate_mlx.data.summary import summarize
        from interviewmate_mlx.data.templates import choose_template
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar, rows_table

        with byte_bar(f"fetching {path}", make_console()) as progress:
            splits = load_splits(fetch_data(path, progress))
        tokenizer = _tokenizer_of(model)
        chosen = choose_template(template or DataConfig.template, tokenizer)
        length = max_length or DataConfig.max_length
        found = {
            split: summarize(records, tokenizer, length, train_on or DataConfig.train_on, chosen)
            for split, records in splits.items()
        }
        if as_json:
            click.echo(json.dumps({split: asdict(each) for split, each in found.items()}))
            return
        make_console(sys.stdout).print(rows_table(found, length))


@command.command()
@click.argument("path")
@click.option("--out", type=UserPath(), required=True, help="The new file, .jsonl.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), help="Of a folder's.")
@click.option("--skip-faulty", is_flag=True, help="Leave faulty rows out, and say which.")
@click.option("--force", is_flag=True, help="Replace the file.")
def convert(path: str, out: Path, split: str | None, skip_faulty: bool, force: bool) -> None:
    """Write rows of any form as JSON Lines in this package's own form, each with an id.

    A row without an id gets one from its question and answer. Other columns are left out.

    \b
    Example: imate-mlx data convert answers.csv --out rows.jsonl
    """
    with prepared():
        from interviewmate_mlx.data.convert import convert_rows
        from interviewmate_mlx.data.faults import group_faults
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar
        from interviewmate_mlx.results.terminal import count as count_of

        with byte_bar(f"fetching {path}", make_console()) as progress:
            folder = fetch_data(path, progress)
        done = convert_rows(folder, out, split, force, skip_faulty)
    for fault in group_faults(done.left_out):
        click.echo(harmless(f"left out: {fault}"), err=True)
    click.echo(f"{out}: {count_of(done.rows, 'row')}, {done.given_ids} of them got an id")
    for reading, number in done.readings.items():
        click.echo(harmless(f"{count_of(number, 'row')}: {reading}"))


def _tokenizer_of(model: str | None) -> "TokenizerWrapper":
    """The tokenizer of a base; without one, that of the runs' base or of mini."""
    from interviewmate_mlx.base.base import is_here
    from interviewmate_mlx.config import ModelConfig
    from interviewmate_mlx.hub.names import MINI

    base = model or (ModelConfig.base if is_here(ModelConfig.base) else MINI)
    if not model:
        click.echo(f"in the tokens of {base}; --model takes another base", err=True)
    return load_tokenizer(base)
