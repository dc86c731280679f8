"""imate-mlx report"""

import json
from pathlib import Path

import click

from interviewmate_mlx.cli.options import UserPath, json_option, prepared


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=UserPath(), metavar="RUN...")
@click.option(
    "--out", type=UserPath(), default="report", show_default=True, help="Folder for the pages."
)
@json_option
def command(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write a page about runs: curves, costs, what they answer, and which to use.

    A RUN is the folder of a run, or of a sweep. The folder gets report.html, which is one file,
    report.md with its pictures, and report.json.

    \b
    Example: imate-mlx report adapters/run_A adapters/run_B
    """
    with prepared():
        from interviewmate_mlx.results.page import PAGE_FILE, write_report
        from interviewmate_mlx.results.plots import can_plot
        from interviewmate_mlx.results.report import NO_PLOTS, build_report
        from interviewmate_mlx.results.runs import left_out_trials, read_runs

        report = build_report(read_runs(runs), left_out_trials(runs))
        write_report(report, out)
        if not can_plot():
            click.echo(NO_PLOTS, err=True)
        click.echo(json.dumps(report.facts) if as_json else str(out / PAGE_FILE))
