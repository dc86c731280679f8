"""imate-mlx doctor"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from interviewmate_mlx.cli.options import harmless, json_option, make_console, prepared

if TYPE_CHECKING:
    from rich.console import Console


@click.command("doctor")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Check in this dtype; may be given several times. By default the device's and float32.",
)
@json_option
def command(dtypes: tuple[str, ...], as_json: bool) -> None:
    """Check that this machine computes rightly, and how fast; for bug reports.

    Needs no network and leaves nothing behind. Takes less than a minute; two or three where kernels
    must be compiled first, as on CUDA. Ends with 1 if a check fails.

    \b
    Example: imate-mlx doctor
    """
    with prepared():
        from interviewmate_mlx.results.doctor import examine, report_json, report_text

        with _bar(make_console()) as progress:
            report = examine(dtypes, progress)
        click.echo(report_json(report) if as_json else harmless(report_text(report)))
    if report.failed:
        click.get_current_context().exit(1)


@contextmanager
def _bar(console: "Console") -> Iterator[Callable[[str, int, int], None]]:
    """Say what is being done: a bar, or lines if stderr is not a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    has_bar = console.is_terminal and not console.is_dumb_terminal
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not has_bar) as bar:
        task = bar.add_task("")

        def update(title: str, done: int, total: int) -> None:
            bar.update(task, description=title, completed=done, total=total)
            if not has_bar:
                console.print(f"{done + 1}/{total}  {title}")

        yield update
