"""imate-mlx train"""

import json
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from interviewmate_mlx.cli.main import INTERRUPTED
from interviewmate_mlx.cli.options import (
    UserPath,
    board_option,
    chosen_run,
    harmless,
    hosts_option,
    json_option,
    make_console,
    prepared,
    run_options,
)
from interviewmate_mlx.cli.signals import StopOnSignal
from interviewmate_mlx.hosts.launch import is_first_rank

if TYPE_CHECKING:
    from interviewmate_mlx.config import RunConfig


@click.command("train")
@run_options
@click.option(
    "--out", type=UserPath(), help="By default adapters/NAME; models/NAME-trained for all weights."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in the adapter folder; --resume --out FOLDER is enough.",
)
@click.option("--force", is_flag=True, help="Replace the run in the adapter folder.")
@board_option
@hosts_option
@click.option(
    "--dry-run", is_flag=True, help="Check everything, time some steps, write nothing, and stop."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    out: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Train a run's LoRA adapter and write it as a PEFT folder.

    With --set train.weights=all every weight of the base is trained, and a model is written.

    Ctrl-C ends the step, saves, and says how to go on.

    \b
    Example: imate-mlx train --run A --data my_questions --out adapters/mine
    """
    if resume and force:
        raise click.UsageError("--resume goes on with a run, --force replaces it: choose one.")
    with prepared():
        run = chosen_run(ctx, out if resume else None) if is_first_rank() else None
        do = _rehearse if dry_run else _train
        do(ctx, run, out or (run.folder if run else Path()), resume, force, as_json)


def _rehearse(
    ctx: click.Context, run: "RunConfig | None", out: Path, resume: bool, force: bool, as_json: bool
) -> None:
    from interviewmate_mlx.results.dry_run import rehearse
    from interviewmate_mlx.results.terminal import byte_bar, forecast_text, show_start
    from interviewmate_mlx.training.events import Started

    console, forecast = make_console(), None
    facts: dict[str, Any] = {}
    with byte_bar("fetching the base", console) as progress:
        for event in rehearse(run, out, resume=resume, replace=force, progress=progress):
            facts |= asdict(event)
            if isinstance(event, Started):
                show_start(event, make_console(sys.stderr if as_json else sys.stdout))
                console.print("timing some steps")
            else:
                forecast = event
    click.echo(json.dumps(facts) if as_json else forecast_text(forecast))


def _train(
    ctx: click.Context, run: "RunConfig | None", out: Path, resume: bool, force: bool, as_json: bool
) -> None:
    from interviewmate_mlx.results.loggers import check_installed, logged
    from interviewmate_mlx.results.terminal import byte_bar, show, summary_table
    from interviewmate_mlx.training.events import Finished, Started
    from interviewmate_mlx.training.loop import train
    from interviewmate_mlx.training.metrics import loss_curves

    if run:
        check_installed(run)
    console, stop, finished = make_console(), StopOnSignal(), None
    with byte_bar("fetching the base", console) as progress, ExitStack() as stack:
        events = train(
            run,
            out,
            resume=resume,
            replace=force,
            stop=lambda: stop.wanted,
            progress=progress,
        )

        def report(fault: str) -> None:
            console.print(f"warning: {harmless(fault)}", soft_wrap=True)

        logged_events = logged(events, run, out, report) if run else events
        for event in show(logged_events, console):
            if isinstance(event, Started):  # until then there is nothing to save
                stack.enter_context(stop)
            if isinstance(event, Finished):
                finished = event
    assert finished
    if not run:
        return  # the first rank says what it came to
    if finished.interrupted:
        console.print(f"interrupted after step {finished.step}; everything is saved.")
        console.print(f"Go on with: {_resume_command()}", soft_wrap=True)
        ctx.exit(INTERRUPTED)
    kind = "model" if run.train.weights == "all" else "adapter"
    if as_json:
        click.echo(json.dumps({**asdict(finished.summary), kind: str(out)}))
    else:
        shown = make_console(sys.stdout)
        curves = loss_curves(out) if "utf" in shown.encoding else ()
        shown.print(summary_table(finished.summary, *curves))
        click.echo(f"{kind}: {out}")


def _resume_command() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
    return shlex.join(["imate-mlx", *words, "--resume"])
