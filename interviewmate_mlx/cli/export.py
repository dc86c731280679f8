"""imate-mlx export"""

import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from interviewmate_mlx.cli.options import UserPath, prepared


@click.command("export")
@click.argument("adapter", type=UserPath())
@click.option("--out", type=UserPath(), help="Folder to copy the adapter to.")
@click.option("--push", metavar="REPO", help="Hub id to upload to; made if it does not exist.")
@click.option("--private", is_flag=True, help="Make a new Hub repository private.")
@click.option(
    "--model",
    metavar="BASE",
    help="Name of the base in the copy; by default the Hub id that the base was converted from.",
)
@click.option(
    "--as",
    "kind",
    type=click.Choice(["peft", "mlx-lm"]),
    default="peft",
    show_default=True,
    help="The format of the copy.",
)
@click.option("--force", is_flag=True, help="Replace an adapter exported there before.")
def command(
    adapter: Path,
    out: Path | None,
    push: str | None,
    private: bool,
    model: str | None,
    kind: str,
    force: bool,
) -> None:
    """Copy an adapter with its model card to a folder, to the Hub, or both.

    It is a PEFT folder, or with --as mlx-lm one for mlx_lm.generate. An adapter of mlx-lm's own
    tuner becomes a PEFT folder.

    Checkpoints stay at home. A path to the base means nothing to others, so the copy
    names the base by its Hub id where that is known.

    \b
    Example: imate-mlx export adapters/run_A --push you/interview-coach --private
    """
    if not out and not push:
        raise click.UsageError("Give --out FOLDER, --push REPO, or both.")
    if private and not push:
        raise click.UsageError("--private is for --push.")
    if force and not out:
        raise click.UsageError("--force is for --out.")
    if model is not None and not model.strip():
        raise click.UsageError("--model is empty.")
    with prepared():
        from interviewmate_mlx import backend
        from interviewmate_mlx.adapter.card import add_to_card, base_in_words
        from interviewmate_mlx.adapter.folder import Adapter
        from interviewmate_mlx.base.base import find_origin, public_name
        from interviewmate_mlx.coach.generate import open_base
        from interviewmate_mlx.hub.push import push as push_files

        opened = Adapter.open(adapter)
        named = opened.config.base
        base = model or public_name(named)
        if base != named:
            click.echo(f"the copy names its base {base}, not {named}", err=True)
        for warning in _local_paths(base, opened.folder):
            click.echo(f"warning: {warning}", err=True)
        with tempfile.TemporaryDirectory() as temporary:
            copy = out or Path(temporary, "copy")
            renamed = base if base != named else ""
            if kind == "peft":
                opened.export(copy, replace=force, base=renamed)
                words = base_in_words(base, find_origin(named))
                add_to_card(copy, "Base", words)
            else:
                network = open_base(None, opened).build(backend.resolve_dtype("auto"))
                opened.export_as_mlx_lm(copy, network, replace=force, base=renamed)
            if out:
                click.echo(out)
            if push:
                names = sorted(path.name for path in copy.iterdir())
                click.echo(push_files(copy, names, push, private=private))


def _local_paths(base: str, folder: Path) -> Iterator[str]:
    """Say which paths of this machine go out with an adapter."""
    from interviewmate_mlx.hub.names import is_data_path, is_path

    if is_path(base):
        yield (
            f"the copy names its base by a path of this machine: {base}\n"
            "It is in the adapter's config, card and run. --model OWNER/NAME writes a Hub id there."
        )
    with suppress(OSError, ValueError, KeyError, TypeError):  # no run of this package
        run = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
        if is_data_path(run["data"]["path"]):
            yield f"run.toml and the card name the data by its path: {run['data']['path']}"
        if run["lora"].get("start_from"):
            start = run["lora"]["start_from"]
            yield f"run.toml and the card name the adapter it started from by its path: {start}"
