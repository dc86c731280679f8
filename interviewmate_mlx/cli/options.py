"""What several commands share: options, the console, and text that is safe to print."""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from interviewmate_mlx.errors import redact_secrets
from interviewmate_mlx.hosts.launch import is_first_rank

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
adapters_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]PATH",
    help="A PEFT folder, and a name for it; may be given several times.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto is float32 on a CPU, bfloat16 on a GPU.",
)


def _launch(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Start the command on all hosts instead, and end as it does. There it is one of the ranks."""
    from interviewmate_mlx.hosts.launch import launch, launched_rank, read_hosts

    if path and launched_rank() is None:
        ctx.exit(launch(read_hosts(path), sys.argv[1:]))


hosts_option = click.option(
    "--hosts",
    type=UserPath(),
    metavar="FILE",
    callback=_launch,
    expose_value=False,
    help="Share the work with other machines: a list as mlx.launch has it.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
_SAMPLING_OPTIONS = [
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option(
        "--temperature",
        type=Finite(0),
        default=0.0,
        show_default=True,
        help="0 takes the likeliest token.",
    ),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        help="With a temperature: sample from the likeliest tokens that make up this share.",
    ),
    click.option(
        "--top-k", type=click.IntRange(1), help="With a temperature: from so many of the likeliest."
    ),
    click.option(
        "--min-p",
        type=Finite(0, 1, max_open=True),
        help="With a temperature: no token below this share of the likeliest one's probability.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), help="With a temperature: its draws."
    ),
    click.option(
        "--repetition-penalty",
        type=Finite(0, min_open=True),
        help="Above 1 makes the last 64 tokens less likely.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="An answer ends before this text; may be given several times.",
    ),
]
_RUN = "run_name"  # the parameter, and in `Context.meta` the overrides of its keys
Command = TypeVar("Command", bound=Callable[..., Any])


def _key_option(
    name: str,
    key: str,
    type_: Any,
    metavar: str | None,
    help_: str,
    *,
    multiple: bool = False,
    is_flag: bool = False,
) -> Any:
    """An option that is the same as `--set KEY=VALUE`; a flag, as `--set KEY=true`."""

    def store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None and value not in ((), False):
            is_text = isinstance(value, str | tuple | bool)
            given = json.dumps(value, ensure_ascii=False) if is_text else value
            ctx.meta.setdefault(_RUN, {})[key] = (name, f"{key}={given}")

    return click.option(
        name,
        type=type_,
        metavar=metavar,
        callback=store,
        expose_value=False,
        help=help_,
        multiple=multiple,
        is_flag=is_flag,
    )


board_option = _key_option(
    "--log",
    "log.to",
    str,
    "BOARD",
    "tensorboard, wandb or trackio, each an extra; may be given several times.",
    multiple=True,
)


_RUN_OPTIONS = [
    click.option(
        "--run",
        _RUN,
        default="A",
        show_default=True,
        metavar="A|B|C|mini|alpaca|dpo|FILE",
        help="A shipped run, or the path of a .toml file.",
    ),
    _key_option("--model", "model.base", str, "BASE", "mini (shipped), a folder or a Hub id."),
    _key_option(
        "--untested-base",
        "model.untested_base",
        bool,
        None,
        "Train also a network that no test holds against transformers.",
        is_flag=True,
    ),
    _key_option("--data", "data.path", str, "DATA", "A folder, a file, or a Hub data set."),
    _key_option("--epochs", "train.epochs", float, "NUMBER", "Times over the rows; may be 0.5."),
    _key_option(
        "--max-steps", "train.max_steps", int, "STEPS", "The run ends there at the latest."
    ),
    _key_option("--lr", "train.learning_rate", float, "RATE", "The learning rate."),
    _key_option("--seed", "train.seed", int, "SEED", "Of the first values, order, and dropout."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override any key of the run, as in lora.rank=16. Can be given several times.",
    ),
]


def sampling_options(command: Command) -> Command:
    """How answers are made; `chosen_sampling` checks and gives it."""
    for option in reversed(_SAMPLING_OPTIONS):
        command = option(command)
    return command


# Of a `Sampling`; those of draws need a temperature.
_DRAWS = ("top_p", "top_k", "min_p", "seed")
_SAMPLING = ("max_tokens", "temperature", *_DRAWS, "repetition_penalty", "stop")


def chosen_sampling(ctx: click.Context) -> dict[str, Any]:
    """The arguments of a `Sampling` that the options of a command give.

    Raises:
        UsageError: an option would be ignored.
    """
    given = {key: ctx.params[key] for key in _SAMPLING}
    ignored = [key for key in _DRAWS if given["temperature"] == 0 and given[key] is not None]
    if ignored:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in ignored)
        raise click.UsageError(f"{names} need a --temperature above 0.", ctx)
    if "" in given["stop"]:
        raise click.UsageError("--stop: got an empty text, which every answer begins with.", ctx)
    return {key: value for key, value in given.items() if value is not None}


def chosen_adapters(given: Sequence[str]) -> dict[str, Path]:
    """The folders that `adapters_option` gives, by name: the given one, or the folder's.

    Raises:
        UsageError: a name is empty, or there twice.
    """
    found: dict[str, Path] = {}
    for word in given:
        name, sign, rest = word.partition("=")
        is_path = not sign or "/" in name or Path(word).exists()
        path = Path(word if is_path else rest).expanduser()
        name = path.resolve().name if is_path else name.strip()
        if not name or not name.isprintable():
            raise click.UsageError(f"--adapter {word!r}: expected NAME=PATH, got no name.")
        if name in found:
            raise click.UsageError(
                f"--adapter: {name!r} is there twice. Give another name: NAME=PATH."
            )
        found[name] = path
    return found


def refuse_sampling(ctx: click.Context, option: str) -> None:
    """Refuse options of sampling beside one with which nothing is generated.

    Raises:
        UsageError: one is given.
    """
    for key in _SAMPLING:
        if ctx.get_parameter_source(key) != ParameterSource.DEFAULT:
            name = key.replace("_", "-")
            raise click.UsageError(f"{option} generates nothing: leave out --{name}.", ctx)


def run_options(command: Command) -> Command:
    """The options that make up a run; `chosen_run` gives it."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


def override_options(command: Command) -> Command:
    """Those that override keys of runs that are named otherwise; `chosen_overrides` gives them."""
    for option in reversed(_RUN_OPTIONS[1:]):
        command = option(command)
    return command


def harmless(text: str) -> str:
    """A message that quotes files of others: it must not steer the terminal, nor show a token."""
    text = redact_secrets(text)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def shown_text(piece: str) -> str:
    """Part of what a model says, without control characters: it must not steer the terminal."""
    return "".join(char for char in piece if char.isprintable() or char in "\n\t")


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
    """A console on stderr, or on another file; silent where another rank speaks."""
    from rich.console import Console

    file = file or sys.stderr
    # A pipe has no width; 80 columns would break lines that a program reads.
    width = None if file.isatty() else 160
    quiet = not is_first_rank()
    return Console(file=file, width=width, highlight=False, markup=False, quiet=quiet)


def chosen_run(ctx: click.Context, folder: Path | None = None) -> "RunConfig":
    """The run of a command with `run_options`.

    Args:
        ctx: of the command.
        folder: of a run that goes on: it is that run, unless `--run` is given.

    Raises:
        UsageError: a key is given twice.
        InterviewMateError: the run is not valid.
    """
    from interviewmate_mlx.config import load_run, override_run
    from interviewmate_mlx.training.folder import read_run

    words = chosen_overrides(ctx)
    if folder and ctx.get_parameter_source(_RUN) == ParameterSource.DEFAULT:
        return override_run(read_run(folder), words)
    return load_run(ctx.params[_RUN], words)


def chosen_overrides(ctx: click.Context) -> list[str]:
    """What the options of a command override, each as `table.key=value`.

    Raises:
        UsageError: a key is given twice.
    """
    words = list(ctx.params["overrides"])
    sets = {word.partition("=")[0].strip() for word in words}
    for key, (option, override) in ctx.meta.get(_RUN, {}).items():
        if key in sets:
            raise click.UsageError(f"{option} is --set {key}: give one of them.", ctx)
        words.append(override)
    return words


def load_tokenizer(base: str) -> "TokenizerWrapper":
    """The tokenizer of a base."""
    from interviewmate_mlx.base.base import Base
    from interviewmate_mlx.results.terminal import byte_bar

    with byte_bar(f"fetching {base}", make_console()) as progress:
        return Base.open(base, progress).tokenizer
