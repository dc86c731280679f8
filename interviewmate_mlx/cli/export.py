"""imate-mlx export"""

from pathlib import Path

import click

from interviewmate_mlx.cli.options import UserPath, prepared


@click.command("export")
@click.argument("adapter", type=UserPath())
@click.option("--out", type=UserPath(), help="Folder to copy the adapter to.")
@click.option("--push", metavar="REPO", help="Hub id to upload to; made if it does not exist.")
@click.option("--private", is_flag=True, help="Make a new Hub repository private.")
@click.option("--force", is_flag=True, help="Replace an adapter exported there before.")
def command(adapter: Path, out: Path | None, push: str | None, private: bool, force: bool) -> None:
    """Copy an adapter with its model card to a folder, to the Hub, or both.

    Checkpoints stay at home.

    \b
    Example: imate-mlx export adapters/run_A --push you/interview-coach --private
    """
    if not out and not push:
        raise click.UsageError("Give --out FOLDER, --push REPO, or both.")
    if private and not push:
        raise click.UsageError("--private is for --push.")
    if force and not out:
        raise click.UsageError("--force is for --out.")
    with prepared():
        from interviewmate_mlx.adapter.folder import Adapter
        from interviewmate_mlx.hub.push import push as push_files

        opened = Adapter.open(adapter)
        if out:
            click.echo(opened.export(out, replace=force))
        if push:
            click.echo(push_files(opened.folder, opened.files, push, private=private))
