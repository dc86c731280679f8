"""imate-mlx convert"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from interviewmate_mlx.cli.options import UserPath, json_option, make_console, prepared
from interviewmate_mlx.errors import ConfigError


@click.command("convert")
@click.argument("source")
@click.option("--out", type=UserPath(), help="Folder to write; models/SOURCE.")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights written; by default the source's own.",
)
@click.option("--trim-vocab", is_flag=True, help="Cut the embedding to the tokenizer's size.")
@click.option("--force", is_flag=True, help="Convert again, replacing what is there.")
@json_option
def command(
    source: str,
    out: Path | None,
    revision: str | None,
    dtype: str | None,
    trim_vocab: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a Falcon-RW of the Hub, or a folder in its layout, to MLX.

    The folder that comes out serves this package, the stock mlx-lm commands
    (with --trust-remote-code) and transformers.

    \b
    Example: imate-mlx convert tiiuae/falcon-rw-1b --dtype bfloat16
    """
    with prepared():
        from interviewmate_mlx.base.base import models_folder
        from interviewmate_mlx.base.convert import convert
        from interviewmate_mlx.hub.names import is_hub_id, local_path, shipped_base
        from interviewmate_mlx.hub.pull import pull
        from interviewmate_mlx.results.terminal import byte_bar

        console = make_console()
        folder, name = shipped_base(source) or local_path(source), source
        if not folder.exists() and is_hub_id(source):
            out = out or models_folder(source)
            with byte_bar(f"pulling {source}", console) as progress:
                pulled = pull(source, revision, progress=progress)
            folder, revision = pulled.path, pulled.revision
        elif not folder.exists():
            raise ConfigError(
                f"No folder {source}, and not a Hub id like owner/name.\n"
                "Give mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b."
            )
        elif revision:
            raise ConfigError(f"--revision is for Hub ids, and {source} is a folder.")
        else:
            out = out or models_folder(folder.resolve().name)
            name = source if shipped_base(source) else str(folder.resolve())
        with byte_bar(f"converting to {out}", console) as progress:
            converted = convert(
                folder,
                out,
                dtype=dtype,
                trim_vocab=trim_vocab,
                force=force,
                source_name=name,
                revision=revision,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(asdict(converted), default=str))
    elif converted.already_there:
        click.echo(f"{out} holds this conversion already; --force does it again")
    else:
        click.echo(
            f"{out}: {converted.num_parameters:,} parameters, {converted.dtype}, "
            f"{converted.nbytes / 1e9:.2f} GB"
        )
