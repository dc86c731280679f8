"""imate-mlx bench"""

import json
from dataclasses import asdict

import click

from interviewmate_mlx.cli.options import (
    chosen_run,
    hosts_option,
    json_option,
    make_console,
    prepared,
    run_options,
)
from interviewmate_mlx.hosts.launch import is_first_rank


@click.command("bench")
@run_options
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--warmup", type=click.IntRange(0), default=3, show_default=True, help="Steps not timed."
)
@hosts_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    steps: int,
    warmup: int,
    as_json: bool,
    **_: object,
) -> None:
    """Time some training steps of a run on this machine. Writes nothing.

    \b
    Example: imate-mlx bench --run A --steps 20
    """
    with prepared():
        from interviewmate_mlx.results.bench import bench
        from interviewmate_mlx.results.terminal import bench_text, byte_bar

        run = chosen_run(ctx) if is_first_rank() else None
        console = make_console()
        console.print(f"timing {steps} steps after {warmup} to warm up")
        with byte_bar("fetching the base", console) as progress:
            result = bench(run, steps, warmup, progress)
        for slowdown in result.slowdowns:
            console.print(f"slower than it could be: {slowdown}")
        click.echo(json.dumps(asdict(result)) if as_json else bench_text(result))
