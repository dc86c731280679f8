"""imate-mlx merge"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from interviewmate_mlx.cli.options import UserPath, json_option, make_console, prepared

if TYPE_CHECKING:
    from interviewmate_mlx.evaluation.survival import Survival


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("--out", type=UserPath(), help="Folder to write.")
@click.option(
    "--model", metavar="BASE", help="The base; by default the one that the adapters name."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights written; by default the base's own.",
)
@click.option(
    "--quantize",
    type=click.IntRange(2, 8),
    metavar="BITS",
    help="Quantise the merged weights, and measure what that leaves of the adapter.",
)
@click.option(
    "--group-size",
    type=click.IntRange(1),
    help="With --quantize: weights that share a scale; 32, 64 or 128. By default 64.",
)
@click.option(
    "--data",
    help="With --quantize: whose validation rows to measure on; by default the adapter's own.",
)
@click.option("--push", metavar="REPO", help="Hub id to upload to; made if it does not exist.")
@click.option("--private", is_flag=True, help="Make a new Hub repository private.")
@click.option("--force", is_flag=True, help="Replace a model merged there before.")
@json_option
def command(
    adapters: tuple[str, ...],
    out: Path | None,
    model: str | None,
    dtype: str | None,
    quantize: int | None,
    group_size: int | None,
    data: str | None,
    push: str | None,
    private: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a base with adapters merged in, as a model of its own.

    The folder has the Hub's layout: transformers, mlx-lm and this package load it. A quantised
    base comes out plain, unless --quantize asks for it. Several adapters are added up with
    their weights, as PEFT's linear combination does it.

    \b
    Example: imate-mlx merge adapters/run_A --out models/coach
    """
    if not out and not push:
        raise click.UsageError("Give --out FOLDER, --push REPO, or both.")
    for given, option, needed in (
        (group_size, "--group-size", quantize and "--quantize"),
        (data, "--data", quantize and "--quantize"),
        (private, "--private", push and "--push"),
        (force, "--force", out and "--out"),
    ):
        if given and not needed:
            other = {"--private": "--push", "--force": "--out"}.get(option, "--quantize")
            raise click.UsageError(f"{option} is of {other}: give that too.")
    folders, weights = _read_adapters(adapters)
    with prepared():
        from interviewmate_mlx.base.quantization import Quantization
        from interviewmate_mlx.evaluation.merge import merge
        from interviewmate_mlx.hub.push import push as push_files
        from interviewmate_mlx.results.terminal import byte_bar

        quantization = Quantization.of(quantize, group_size or 64) if quantize else None
        with tempfile.TemporaryDirectory() as temporary:
            folder = out or Path(temporary, "merged")
            with byte_bar(f"merging into {out or push}", make_console()) as progress:
                merged = merge(
                    folders,
                    folder,
                    weights=weights,
                    base=model,
                    dtype=dtype,
                    quantization=quantization,
                    data=data,
                    replace=force,
                    progress=progress,
                )
            address = ""
            if push:
                names = sorted(path.name for path in folder.iterdir())
                address = push_files(folder, names, push, private=private, what="a model merged")
    survival = merged.survival
    if as_json:
        facts = {"path": str(out) if out else None, "url": address or None, "nbytes": merged.nbytes}
        share = survival.share if survival else None
        click.echo(json.dumps({**facts, "share_left": share}))
        return
    if survival:
        click.echo(_in_words(survival, quantize or 0))
    if out:
        click.echo(f"{out}: {merged.nbytes / 1e9:.2f} GB")
    if address:
        click.echo(address)


def _read_adapters(words: Sequence[str]) -> tuple[list[Path], list[float]]:
    """The folders, and the weight of each: 1 where none is given.

    Raises:
        UsageError: what follows the last `=` is not a finite number.
    """
    folders, weights = [], []
    for word in words:
        path, sign, text = word.rpartition("=")
        if not sign or Path(word).expanduser().exists():
            path, text = word, "1"
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not path or not math.isfinite(weight):
            raise click.UsageError(f"{word!r}: expected ADAPTER=WEIGHT, as in adapters/a=0.7.")
        folders.append(Path(path).expanduser())
        weights.append(weight)
    return folders, weights


def _in_words(survival: "Survival", bits: int) -> str:
    return (
        f"quantised to {bits} bits, {survival.share:.0%} of the adapter's effect is left: the loss "
        f"on validation rows falls from {survival.quantized_base:.4f} to "
        f"{survival.quantized_merged:.4f}, before it fell from {survival.base:.4f} to "
        f"{survival.merged:.4f}"
    )
