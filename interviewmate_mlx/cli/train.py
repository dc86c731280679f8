"""imate-mlx train"""

import json
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from interviewmate_mlx.cli.main import INTERRUPTED
from interviewmate_mlx.cli.options import (
    UserPath,
    json_option,
    load_named_run,
    make_console,
    model_option,
    prepared,
    run_option,
    set_option,
)
from interviewmate_mlx.cli.signals import StopOnSignal


@click.command("train")
@run_option
@set_option
@model_option
@click.option("--out", type=UserPath(), help="Adapter folder; adapters/run_A.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in the adapter folder; --resume --out FOLDER is enough.",
)
@click.option("--force", is_flag=True, help="Replace the run in the adapter folder.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    run_name: str,
    overrides: tuple[str, ...],
    model: str | None,
    out: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train a run's LoRA adapter and write it as a PEFT folder.

    Ctrl-C ends the step, saves, and says how to go on.

    \b
    Example: imate-mlx train --run A --set data.path=my_questions --out adapters/mine
    """
    if resume and force:
        raise click.UsageError("--resume goes on with a run, --force replaces it: choose one.")
    with prepared():
        from interviewmate_mlx.results.terminal import byte_bar, show, summary_table
        from interviewmate_mlx.training.events import Finished, Started
        from interviewmate_mlx.training.folder import read_run
        from interviewmate_mlx.training.loop import train

        named = ctx.get_parameter_source("run_name") != ParameterSource.DEFAULT
        if resume and out and not (named or overrides or model):
            run = read_run(out)
        else:
            run = load_named_run(run_name, overrides, model)
        out = out or Path("adapters") / run.name
        console, stop, finished = make_console(), StopOnSignal(), None
        with byte_bar(f"fetching {run.model.base}", console) as progress, ExitStack() as stack:
            events = train(
                run,
                out,
                resume=resume,
                replace=force,
                stop=lambda: stop.wanted,
                progress=progress,
            )
            for event in show(events, console):
                if isinstance(event, Started):  # until then there is nothing to save
                    stack.enter_context(stop)
                if isinstance(event, Finished):
                    finished = event
        assert finished
        if finished.interrupted:
            console.print(f"interrupted after step {finished.step}; everything is saved.")
            console.print(f"Go on with: {_resume_command()}", soft_wrap=True)
            ctx.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps({**asdict(finished.summary), "adapter": str(out)}))
    else:
        make_console(sys.stdout).print(summary_table(finished.summary))
        click.echo(f"adapter: {out}")


def _resume_command() -> str:
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
    return shlex.join(["imate-mlx", *words, "--resume"])
