"""imate-mlx evaluate"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from interviewmate_mlx.cli.options import (
    UserPath,
    chosen_sampling,
    dtype_option,
    hosts_option,
    json_option,
    make_console,
    model_option,
    prepared,
    refuse_sampling,
    sampling_options,
)
from interviewmate_mlx.hosts.launch import is_first_rank


@click.command("evaluate")
@click.argument("adapters", nargs=-1, type=UserPath(), metavar="[ADAPTER]...")
@model_option
@click.option("--data", metavar="DATA", help="By default the adapters' own; see train.")
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Of rows: only the first ones.")
@click.option("--no-answers", is_flag=True, help="Losses only; nothing is generated.")
@sampling_options
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-eval to run as well.")
@click.option("--tasks-from", type=UserPath(), help="Folder with tasks of your own, for lm-eval.")
@click.option("--out", type=UserPath(), help="Folder for the numbers of a base without an adapter.")
@dtype_option
@hosts_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    adapters: tuple[Path, ...],
    model: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    no_answers: bool,
    tasks: str | None,
    tasks_from: Path | None,
    out: Path | None,
    dtype: str,
    as_json: bool,
    **_: object,
) -> None:
    """Compare adapters with their base, on rows that none of them was trained on.

    The numbers go into each adapter's folder: evaluation.json, answers.jsonl and its card.

    \b
    Example: imate-mlx evaluate adapters/run_A adapters/run_B
    """
    if not adapters and not model:
        raise click.UsageError("Name an adapter's folder, or a base with --model.")
    if out and adapters:
        raise click.UsageError("--out is for a base; an adapter's numbers go into its own folder.")
    if tasks_from and not tasks:
        raise click.UsageError("--tasks-from is for --tasks.")
    if len({path.resolve() for path in adapters}) < len(adapters):
        raise click.UsageError("An adapter is named twice.")
    if no_answers:
        refuse_sampling(ctx, "--no-answers")
    given = chosen_sampling(ctx)
    with prepared():
        from interviewmate_mlx.coach.sampling import Sampling
        from interviewmate_mlx.evaluation.evaluate import evaluate, write_evaluation
        from interviewmate_mlx.results.terminal import byte_bar, evaluation_tables, work_bar

        sampling = None if no_answers else Sampling(**given)
        console = make_console()
        with byte_bar("fetching", console) as fetching, work_bar(console) as progress:
            asked, found = evaluate(
                adapters,
                model,
                data=data,
                split=split,
                limit=limit or 0,
                sampling=sampling,
                tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
                tasks_from=tasks_from,
                dtype=dtype,
                fetching=fetching,
                progress=progress,
            )
        if not is_first_rank():
            return  # the first writes and prints
        base, *others = found
        for folder, own in zip(adapters, others, strict=True):
            write_evaluation(folder, asked, sampling, base, own)
        if out:
            write_evaluation(out, asked, sampling, base, None)
        if as_json:
            facts = {
                "data": asked.data,
                "split": asked.split,
                "rows": len(asked.examples),
                "sampling": asdict(sampling) if sampling else None,
                "evaluations": [evaluation.facts() for evaluation in found],
            }
            click.echo(json.dumps(facts))
            return
        import sys

        shown = make_console(sys.stdout)
        for part in evaluation_tables(asked, found):
            shown.print(part)
        for folder in [*adapters, *([out] if out else [])]:
            console.print(f"written: {folder}/evaluation.json")
