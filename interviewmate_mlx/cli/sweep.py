"""imate-mlx sweep"""

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
    chosen_overrides,
    json_option,
    make_console,
    override_options,
    prepared,
)
from interviewmate_mlx.cli.signals import StopOnSignal

if TYPE_CHECKING:
    from interviewmate_mlx.results.sweep import Outcome


@click.command("sweep")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@override_options
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, help="Of each run, so many.")
@click.option("--out", type=UserPath(), help="Folder for all runs; by default sweeps/NAME.")
@click.option("--prune", is_flag=True, help="Stop what is clearly worse than the best so far.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    runs: tuple[str, ...],
    seeds: int,
    out: Path | None,
    prune: bool,
    as_json: bool,
    **_: object,
) -> None:
    """Train several runs one after the other, and compare them.

    A RUN is A, B, C, mini, alpaca, dpo or a .toml file. A file with a [sweep] table is trained with
    each of its values. The same command goes on with a sweep that was interrupted.

    \b
    Example: imate-mlx sweep A B C --seeds 3
    """
    with prepared():
        from interviewmate_mlx.config import load_sweep
        from interviewmate_mlx.results.sweep import (
            Space,
            check_trials,
            settings_of,
            sweep,
            trials_of_runs,
            trials_of_space,
        )

        overrides = chosen_overrides(ctx)
        loaded = [load_sweep(run, overrides) for run in runs]
        spaces = [(run, table) for run, table in loaded if table is not None]
        space, trials = None, None
        if spaces:
            if len(loaded) > 1 or seeds > 1:
                raise click.UsageError(
                    "A file with a [sweep] table is swept alone, without --seeds."
                )
            ((run, table),) = spaces
            space = Space.read(table, runs[0])
            check_trials(run, space)
            trials = trials_of_space(run, space)
        chosen = [run for run, _ in loaded]
        name = "_".join(dict.fromkeys(run.name for run in chosen))
        out = out or Path("sweeps") / name
        stop = StopOnSignal()
        steps = sweep(
            trials or trials_of_runs(chosen, seeds),
            out,
            settings=settings_of(chosen, seeds, space) | {"prune": prune},
            prune=prune,
            stop=lambda: stop.wanted,
        )
        outcomes = _shown(steps, stop)
        interrupted = outcomes[-1].status == "interrupted"
        _print(outcomes, out, seeds, as_json)
        if interrupted:
            click.echo(f"Go on with: {shlex.join(['imate-mlx', *sys.argv[1:]])}", err=True)
            ctx.exit(INTERRUPTED)


def _shown(steps: Any, stop: StopOnSignal) -> "list[Outcome]":
    """Run the trials while showing them."""
    from interviewmate_mlx.results.sweep import Outcome, Trial
    from interviewmate_mlx.results.terminal import show

    console = make_console()
    outcomes: list[Outcome] = []

    def events() -> Any:
        """Those of one trial; what ends it is kept."""
        for item in steps:
            if isinstance(item, Outcome):
                outcomes.append(item)
                return
            yield item

    with ExitStack() as stack:
        for item in steps:
            assert isinstance(item, Trial)
            values = ", ".join(f"{key} = {value}" for key, value in item.values.items())
            console.print(f"{item.name}{values and ': '}{values}")
            for _ in show(events(), console):
                if not stop.is_set:  # until a run has begun there is nothing to save
                    stack.enter_context(stop)
            outcome = outcomes[-1]
            if outcome.status != "finished":
                console.print(f"{outcome.status}: {outcome.message}", soft_wrap=True)
    return outcomes


def _print(outcomes: "list[Outcome]", out: Path, seeds: int, as_json: bool) -> None:
    from interviewmate_mlx.results.sweep import best_of
    from interviewmate_mlx.results.terminal import spread_table, sweep_table

    best = best_of(outcomes)
    if as_json:
        listed = [
            {
                "trial": outcome.trial.name,
                "values": outcome.trial.values,
                "status": outcome.status,
                "message": outcome.message,
                "summary": asdict(outcome.summary) if outcome.summary else None,
            }
            for outcome in outcomes
        ]
        name = best.trial.name if best else None
        click.echo(json.dumps({"out": str(out), "best": name, "trials": listed}))
        return
    console = make_console(sys.stdout)
    console.print(sweep_table(outcomes))
    if seeds > 1:
        console.print(spread_table(outcomes))
    if best:
        click.echo(f"best: {out / best.trial.name}")
