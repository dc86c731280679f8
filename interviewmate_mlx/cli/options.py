"""What several commands share: options, the console, and text that is safe to print."""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from interviewmate_mlx.errors import redact_secrets

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from rich.console import Console

    from interviewmate_mlx.config import RunConfig


class Finite(click.FloatRange):
    """A range that does not contain NaN."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class UserPath(click.Path):
    """A path with `~` expanded, also in `--out=~/x`, where the shell does not do it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return Path(os.fsdecode(super().convert(value, param, ctx))).expanduser()
        except RuntimeError:
            self.fail(f"{value}: there is no such user here. Write the path out.", param, ctx)


model_option = click.option(
    "--model",
    metavar="BASE",
    help="The base: mini (shipped), a folder or a Hub id. By default the run's or adapter's own.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto is float32 on a CPU, bfloat16 on a GPU.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
run_option = click.option(
    "--run",
    "run_name",
    default="A",
    show_default=True,
    metavar="A|B|C|mini|FILE",
    help="A shipped run, or the path of a .toml file.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key of the run, as in lora.rank=16. Can be given several times.",
)


def harmless(text: str) -> str:
    """A message that quotes files of others: it must not steer the terminal, nor show a token."""
    text = redact_secrets(text)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


@contextmanager
def prepared() -> Iterator[None]:
    """Load the backend; within the block, warnings become one line each on stderr."""
    # mlx-lm says through transformers that torch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        click.echo(harmless(f"warning: {message}"), err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        from interviewmate_mlx import backend

        backend.machine()
        yield


def make_console(file: Any = None) -> "Console":
    """A console on stderr, or on another file."""
    from rich.console import Console

    file = file or sys.stderr
    # A pipe has no width; 80 columns would break lines that a program reads.
    width = None if file.isatty() else 160
    return Console(file=file, width=width, highlight=False, markup=False)


def load_named_run(name: str, overrides: tuple[str, ...], model: str | None) -> "RunConfig":
    """The run of `--run`, `--set` and `--model`."""
    from interviewmate_mlx.config import load_run

    base = [] if model is None else [f"model.base={json.dumps(model, ensure_ascii=False)}"]
    return load_run(name, [*overrides, *base])


def load_tokenizer(base: str) -> "TokenizerWrapper":
    """The tokenizer of a base."""
    from interviewmate_mlx.base.base import Base
    from interviewmate_mlx.results.terminal import byte_bar

    with byte_bar(f"fetching {base}", make_console()) as progress:
        return Base.open(base, progress).tokenizer
