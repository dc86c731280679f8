"""imate-mlx data check | split | preview"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from interviewmate_mlx.cli.options import (
    Finite,
    UserPath,
    json_option,
    load_tokenizer,
    make_console,
    model_option,
    prepared,
)
from interviewmate_mlx.errors import ConfigError


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
@json_option
def check(path: str, model: str | None, max_length: int | None, as_json: bool) -> None:
    """Check a file or folder: its rows, its ids, and near-duplicates within and between splits.

    All faults come at once, with file and line. With --model rows are counted in its tokens.

    \b
    Example: imate-mlx data check my_questions/
    """
    if max_length and not model:
        raise click.UsageError("--max-length needs a --model, whose tokens it counts.")
    with prepared():
        from interviewmate_mlx.config import DataConfig
        from interviewmate_mlx.data.check import check_data
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar, data_tables

        with byte_bar(f"fetching {path}", make_console()) as progress:
            folder = fetch_data(path, progress)
        tokenizer = load_tokenizer(model) if model else None
        report = check_data(folder, tokenizer, max_length or DataConfig.max_length)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        console = make_console(sys.stdout)
        for part in data_tables(report):
            console.print(part, no_wrap=True, overflow="ellipsis")


@command.command()
@click.argument("sources", nargs=-1, type=UserPath())
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
    sources: tuple[Path, ...], out: Path, seed: int, shares: tuple[float, float, float]
) -> None:
    """Deal the rows of SOURCES out to train, valid and test.

    By category and difficulty. Rows that OUT holds already stay in their split;
    doing it again changes nothing.

    \b
    Example: imate-mlx data split rows.jsonl --out my_questions
    """
    with prepared():
        from interviewmate_mlx.data.splits import split_rows

        report = split_rows(list(sources), out, seed, shares)
    for name, count in report.rows.items():
        click.echo(f"{out}/{name}.jsonl: {count} rows, {report.added[name]} of them new")
    click.echo(
        f"{sum(report.added.values())} rows added, {report.updated} updated in their split, "
        f"{report.unchanged} left as they were"
    )


@command.command()
@click.argument("path")
@model_option
@click.option("--row", type=click.IntRange(1), default=1, show_default=True)
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="train")
@click.option(
    "--max-length", type=click.IntRange(8), help="Tokens to keep; as in a run by default."
)
@click.option("--train-on", type=click.Choice(["answer", "all"]), help="As in a run by default.")
def preview(
    path: str,
    model: str | None,
    row: int,
    split: str,
    max_length: int | None,
    train_on: str | None,
) -> None:
    """Show a row's tokens, and which of them carry loss.

    \b
    Example: imate-mlx data preview my_questions/ --row 3
    """
    with prepared():
        from interviewmate_mlx.config import DataConfig, ModelConfig
        from interviewmate_mlx.data.prompts import encode_record
        from interviewmate_mlx.data.records import load_splits
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import preview_text

        splits = load_splits(fetch_data(path))
        if split not in splits:
            raise ConfigError(
                f"{path} has no {split} rows, expected --split {' or '.join(splits)}."
            )
        records = splits[split]
        if row > len(records):
            raise ConfigError(f"--row: got {row}, expected at most {len(records)} ({split}).")
        tokenizer = load_tokenizer(model or ModelConfig.base)
        example = encode_record(
            tokenizer,
            records[row - 1],
            max_length or DataConfig.max_length,
            train_on or DataConfig.train_on,
        )
        make_console(sys.stdout).print(preview_text(tokenizer, example), soft_wrap=True)
