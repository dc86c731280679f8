"""imate-mlx convert"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from interviewmate_mlx.cli.options import UserPath, json_option, make_console, prepared


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
@click.option(
    "--quantize",
    type=click.IntRange(2, 8),
    metavar="BITS",
    help="Quantise the weights, to 4 or 8 bits as a rule. For this package and mlx-lm alone.",
)
@click.option(
    "--group-size",
    type=click.IntRange(1),
    help="With --quantize: weights that share a scale; 32, 64 or 128. By default 64.",
)
@click.option("--force", is_flag=True, help="Convert again, replacing what is there.")
@json_option
def command(
    source: str,
    out: Path | None,
    revision: str | None,
    dtype: str | None,
    trim_vocab: bool,
    quantize: int | None,
    group_size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a model of the Hub, or a folder in its layout, to MLX.

    The folder that comes out serves this package, the stock mlx-lm commands
    (a Falcon-RW with --trust-remote-code) and transformers.

    \b
    Example: imate-mlx convert tiiuae/falcon-rw-1b --dtype bfloat16
    """
    if group_size and not quantize:
        raise click.UsageError("--group-size is of --quantize: give that too.")
    with prepared():
        from interviewmate_mlx.base.base import models_folder
        from interviewmate_mlx.base.convert import convert
        from interviewmate_mlx.base.quantization import Quantization
        from interviewmate_mlx.hub.names import fetch_model, shipped_base
        from interviewmate_mlx.results.terminal import byte_bar

        console = make_console()
        quantization = Quantization.of(quantize, group_size or 64) if quantize else None
        with byte_bar(f"pulling {source}", console) as progress:
            found = fetch_model(source, revision, progress)
        is_of_hub, folder = bool(found.revision), found.path
        out = out or models_folder(source if is_of_hub else folder.resolve().name)
        is_path = not is_of_hub and not shipped_base(source)
        name = str(folder.resolve()) if is_path else source
        with byte_bar(f"converting to {out}", console) as progress:
            converted = convert(
                folder,
                out,
                dtype=dtype,
                trim_vocab=trim_vocab,
                quantization=quantization,
                force=force,
                source_name=name,
                revision=found.revision,
                progress=progress,
            )
        if shipped_base(str(out)):
            text = f"note: as a base, {out} means the one that is shipped; this one is ./{out}"
            click.echo(text, err=True)
    if as_json:
        click.echo(json.dumps(asdict(converted), default=str))
    elif converted.already_there:
        click.echo(f"{out} holds this conversion already; --force does it again")
    else:
        click.echo(
            f"{out}: {converted.num_parameters:,} parameters, {converted.dtype}, "
            f"{converted.nbytes / 1e9:.2f} GB" + (f", {quantize} bits" if quantize else "")
        )
