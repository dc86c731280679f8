"""The `imate-mlx` command: parse, call one function, print.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a
user's mistake or a missing thing, 2 wrong usage, 130 interrupted.

Imports stand inside the commands, so that `--help` answers at once and
`backend` acts before MLX is loaded.
"""

import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from interviewmate_mlx import __version__
from interviewmate_mlx.errors import ConfigError, InterviewMateError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130


class _Finite(click.FloatRange):
    """A range that NaN is not in."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no number to calculate with.", param, ctx)
        return number


class _Commands(click.Group):
    """Turns this package's errors into one message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InterviewMateError as error:
            click.echo(_harmless(f"{type(error).__name__}: {error}"), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has gone; what is buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:
            # A path that cannot be written to, a full disk: the user's to mend.
            where = f" {error.filename}" if error.filename else ""
            said = (
                f"Cannot write or read{where}: {error.strerror or error}\n"
                "Check the path, its permissions and the room on its disk."
            )
            click.echo(_harmless(said), err=True)
            ctx.exit(1)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command has its own --help, with an example.",
)
@click.option("--version", is_flag=True, help="Print the version.")
@click.option(
    "--verbose", is_flag=True, help="With --version: this machine's device, BLAS, memory."
)
@click.pass_context
def main(ctx: click.Context, version: bool, verbose: bool) -> None:
    """Turn Falcon-RW-1B into an interview coach on your own machine.

    \b
    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx export adapters/run_A --push you/interview-coach
    """
    if version:
        _print_version(verbose)
        ctx.exit()
    if verbose:
        raise click.UsageError("--verbose goes with --version.")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


_model_option = click.option(
    "--model",
    metavar="BASE",
    help="The base: mini (shipped), a folder or a Hub id. By default the run's or adapter's own.",
)
_dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto is float32 on a CPU, bfloat16 on a GPU.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
_run_option = click.option(
    "--run",
    "run_name",
    default="A",
    show_default=True,
    metavar="A|B|C|mini|FILE",
    help="A shipped run, or the path of a .toml file.",
)
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key of the run, as in lora.rank=16. Can be given several times.",
)


@main.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; models/SOURCE.")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights written; by default the checkpoint's own.",
)
@click.option("--trim-vocab", is_flag=True, help="Cut the embedding to the tokenizer's size.")
@click.option("--force", is_flag=True, help="Convert again, replacing what is there.")
@_json_option
def convert(
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
    with _backend():
        from interviewmate_mlx.results.terminal import byte_bar
        from interviewmate_mlx.weights.base import models_folder
        from interviewmate_mlx.weights.convert import convert as convert_folder
        from interviewmate_mlx.weights.hub import pull
        from interviewmate_mlx.weights.names import is_hub_id, local_path, shipped_base

        console = _console()
        folder, name = shipped_base(source) or local_path(source), source
        if not folder.exists() and is_hub_id(source):
            out = out or models_folder(source)
            with byte_bar(f"pulling {source}", console) as progress:
                pulled = pull(source, revision, progress=progress)
            folder, revision = pulled.path, pulled.revision
        elif not folder.exists():
            raise ConfigError(
                f"No folder {source}, and no Hub id like owner/name.\n"
                "Give mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b."
            )
        elif revision:
            raise ConfigError(f"--revision is for Hub ids, and {source} is a folder.")
        else:
            out = out or models_folder(folder.resolve().name)
            name = source if shipped_base(source) else str(folder.resolve())
        with byte_bar(f"converting to {out}", console) as progress:
            converted = convert_folder(
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


@main.command()
@_run_option
@_set_option
@_model_option
@click.option("--out", type=click.Path(path_type=Path), help="Adapter folder; adapters/run_A.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in the adapter folder; --resume --out FOLDER is enough.",
)
@click.option("--force", is_flag=True, help="Replace the run in the adapter folder.")
@_json_option
@click.pass_context
def train(
    ctx: click.Context,
    run_name: str,
    overrides: tuple[str, ...],
    model: str | None,
    out: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train a run's LoRA adapter and write it as a PEFT folder.

    Ctrl-C ends the step, saves, and says how to go on.

    \b
    Example: imate-mlx train --run A --set data.path=my_questions --out adapters/mine
    """
    if resume and force:
        raise click.UsageError("--resume goes on with a run, --force replaces it: choose one.")
    with _backend():
        from interviewmate_mlx.results.log import Summary, record
        from interviewmate_mlx.results.terminal import byte_bar, show, summary_table
        from interviewmate_mlx.training.events import Finished, Started
        from interviewmate_mlx.training.folder import read_run
        from interviewmate_mlx.training.loop import train as train_run

        named = ctx.get_parameter_source("run_name") != ParameterSource.DEFAULT
        if resume and out and not (named or overrides or model):
            run = read_run(out)
        else:
            run = _load_run(run_name, overrides, model)
        out = out or Path("adapters") / run.name
        console, stop, summary = _console(), _StopOnSignal(), None
        with byte_bar(f"fetching {run.model.base}", console) as progress, ExitStack() as stack:
            events = train_run(
                run,
                out,
                resume=resume,
                replace=force,
                stop=lambda: stop.wanted,
                progress=progress,
            )
            for event in show(record(events, run, out), console):
                if isinstance(event, Started):  # until then there is nothing to save
                    stack.enter_context(stop)
                if isinstance(event, Finished) and event.interrupted:
                    console.print(f"interrupted after step {event.step}; everything is saved.")
                    console.print(f"Go on with: {_resume_command()}", soft_wrap=True)
                if isinstance(event, Summary):
                    summary = event
    if not summary:
        ctx.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps({**asdict(summary), "adapter": str(out)}))
    else:
        _console(sys.stdout).print(summary_table(summary))
        click.echo(f"adapter: {out}")


@main.command()
@click.argument("question")
@_model_option
@click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT folder.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temperature",
    type=_Finite(0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=_Finite(0, 1, min_open=True),
    help="With a temperature: sample from the likeliest tokens that make up this share.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="With a temperature: its draws.")
@_dtype_option
@_json_option
def generate(
    question: str,
    model: str | None,
    adapter: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Answer an interview question.

    \b
    Example: imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    """
    if not question.strip():
        raise click.UsageError("The question is empty.")
    if any("\ud800" <= char <= "\udfff" for char in question):
        raise click.UsageError("The question is not in UTF-8, as this terminal's text is.")
    if temperature == 0 and (top_p, seed) != (None, None):
        raise click.UsageError("--top-p and --seed need a --temperature above 0.")
    with _backend():
        from interviewmate_mlx.coach.generate import Sampling, answer, load_coach, stream_answer
        from interviewmate_mlx.results.terminal import byte_bar

        with byte_bar("fetching the base", _console()) as progress:
            coach, tokenizer = load_coach(model, adapter, dtype, progress)
        chosen = {"top_p": top_p, "seed": seed}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        sampling = Sampling(max_tokens, temperature, **given)
        if as_json:
            said = answer(coach, tokenizer, question, sampling)
            click.echo(json.dumps({"question": question, "answer": said, **asdict(sampling)}))
            return
        is_first = True
        for piece in stream_answer(coach, tokenizer, question, sampling):
            # No control characters: what a model says must not steer the terminal.
            piece = "".join(char for char in piece if char.isprintable() or char in "\n\t")
            piece = piece.lstrip() if is_first else piece
            is_first = is_first and not piece
            click.echo(piece, nl=False)
        click.echo()


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to copy the adapter to.")
@click.option("--push", metavar="REPO", help="Hub id to upload to; made when it is not there.")
@click.option("--private", is_flag=True, help="Make a new Hub repository private.")
@click.option("--force", is_flag=True, help="Replace an adapter exported there before.")
def export(adapter: Path, out: Path | None, push: str | None, private: bool, force: bool) -> None:
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
    with _backend():
        from interviewmate_mlx.weights.hub import push as push_folder
        from interviewmate_mlx.weights.peft import check_adapter, export_adapter

        check_adapter(adapter)
        if out:
            click.echo(export_adapter(adapter, out, replace=force))
        if push:
            click.echo(push_folder(adapter, push, private=private))


@main.command()
@_run_option
@_set_option
@_model_option
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--warmup", type=click.IntRange(0), default=3, show_default=True, help="Steps not timed."
)
@_json_option
def bench(
    run_name: str,
    overrides: tuple[str, ...],
    model: str | None,
    steps: int,
    warmup: int,
    as_json: bool,
) -> None:
    """Time some training steps of a run on this machine. Writes nothing.

    \b
    Example: imate-mlx bench --run A --steps 20
    """
    with _backend():
        from interviewmate_mlx.results.bench import bench as bench_run
        from interviewmate_mlx.results.terminal import byte_bar

        run = _load_run(run_name, overrides, model)
        console = _console()
        console.print(f"timing {steps} steps after {warmup} to warm up")
        with byte_bar(f"fetching {run.model.base}", console) as progress:
            result = bench_run(run, steps, warmup, progress)
        for slowdown in result.slowdowns:
            console.print(f"slower than it could be: {slowdown}")
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(
            f"{result.run} on {result.base}, {result.device}, {result.dtype}\n"
            f"{result.steps} steps ({result.rows} rows, {result.tokens} tokens) "
            f"in {result.seconds:.2f} s\n"
            f"{result.samples_per_s:.3f} samples/s ({result.samples_per_s_slowest:.3f} to "
            f"{result.samples_per_s_fastest:.3f} a step), {result.tokens_per_s:.0f} tokens/s\n"
            f"peak {result.peak_gb:.2f} GB; {result.products_share:.0%} of the time is what its "
            f"matrix products need at this machine's own {result.products_gflops:.0f} GFLOP/s\n"
            f"the whole run: {result.whole_run_s / 60:.1f} minutes"
        )
        if result.seed_samples_per_s:
            click.echo(
                f"the project this one comes from: {result.seed_samples_per_s} samples/s "
                "(falcon-rw-1b, PyTorch on Apple Silicon)"
            )


@main.group()
def data() -> None:
    """Look at rows before training on them.

    \b
    Example: imate-mlx data check my_questions/
    """


@data.command()
@click.argument("path")
@_model_option
@click.option(
    "--max-length",
    type=click.IntRange(8),
    help="With --model: rows of more tokens are faults; a run's own default otherwise.",
)
@_json_option
def check(path: str, model: str | None, max_length: int | None, as_json: bool) -> None:
    """Check a file or folder: its rows, its ids, and near-duplicates within and between splits.

    All faults come at once, with file and line. With --model rows are counted in its tokens.

    \b
    Example: imate-mlx data check my_questions/
    """
    if max_length and not model:
        raise click.UsageError("--max-length needs a --model, whose tokens it counts.")
    with _backend():
        from interviewmate_mlx.config import Data
        from interviewmate_mlx.data.check import check_data
        from interviewmate_mlx.results.terminal import byte_bar, data_tables
        from interviewmate_mlx.weights.names import find_data

        with byte_bar(f"fetching {path}", _console()) as progress:
            folder = find_data(path, progress)
        tokenizer = _tokenizer(model) if model else None
        report = check_data(folder, tokenizer, max_length or Data.max_length)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        console = _console(sys.stdout)
        for part in data_tables(report):
            console.print(part, no_wrap=True, overflow="ellipsis")


@data.command()
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the splits.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True)
@click.option(
    "--shares",
    type=_Finite(0, 1),
    nargs=3,
    default=(0.70, 0.15, 0.15),
    show_default=True,
    help="Of train, valid and test.",
)
def split(
    sources: tuple[Path, ...], out: Path, seed: int, shares: tuple[float, float, float]
) -> None:
    """Deal the rows of SOURCES out to train, valid and test.

    By category and difficulty. Rows that OUT holds already stay in their split;
    doing it again changes nothing.

    \b
    Example: imate-mlx data split rows.jsonl --out my_questions
    """
    with _backend():
        from interviewmate_mlx.data.splits import split_rows

        report = split_rows(list(sources), out, seed, shares)
    for name, count in report.rows.items():
        click.echo(f"{out}/{name}.jsonl: {count} rows, {report.added[name]} of them new")
    click.echo(
        f"{sum(report.added.values())} rows added, {report.updated} updated in their split, "
        f"{report.unchanged} left as they were"
    )


@data.command()
@click.argument("path")
@_model_option
@click.option("--row", type=click.IntRange(1), default=1, show_default=True)
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="train")
@click.option(
    "--max-length", type=click.IntRange(8), help="Tokens to keep; as in a run by default."
)
@click.option("--train-on", type=click.Choice(["answer", "all"]), help="As in a run by default.")
def preview(
    path: str,
    model: str | None,
    row: int,
    split: str,
    max_length: int | None,
    train_on: str | None,
) -> None:
    """Show a row's tokens, and which of them carry loss.

    \b
    Example: imate-mlx data preview my_questions/ --row 3
    """
    with _backend():
        from interviewmate_mlx.config import BaseModel, Data
        from interviewmate_mlx.data.prompts import encode_record
        from interviewmate_mlx.data.records import load_splits
        from interviewmate_mlx.results.terminal import preview_text
        from interviewmate_mlx.weights.names import find_data

        splits = load_splits(find_data(path))
        if split not in splits:
            raise ConfigError(
                f"{path} has no {split} rows, expected --split {' or '.join(splits)}."
            )
        records = splits[split]
        if row > len(records):
            raise ConfigError(f"--row: got {row}, expected at most {len(records)} ({split}).")
        tokenizer = _tokenizer(model or BaseModel.base)
        example = encode_record(
            tokenizer, records[row - 1], max_length or Data.max_length, train_on or Data.train_on
        )
        _console(sys.stdout).print(preview_text(tokenizer, example), soft_wrap=True)


def _harmless(text: str) -> str:
    """A message that quotes files of others: it must not steer the terminal, nor bear a token."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _print_version(verbose: bool) -> None:
    if not verbose:
        click.echo(f"imate-mlx {__version__}")
        return
    with _backend():
        from interviewmate_mlx import backend

        facts = backend.describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


def _tokenizer(base: str) -> Any:
    from interviewmate_mlx.results.terminal import byte_bar
    from interviewmate_mlx.weights.base import find_base, load_base_tokenizer

    with byte_bar(f"fetching {base}", _console()) as progress:
        return load_base_tokenizer(find_base(base, progress))


def _load_run(name: str, overrides: tuple[str, ...], model: str | None) -> Any:
    from interviewmate_mlx.config import load_run

    base = [] if model is None else [f"model.base={json.dumps(model, ensure_ascii=False)}"]
    return load_run(name, [*overrides, *base])


@contextmanager
def _backend() -> Iterator[None]:
    """Prepare the machine; warnings become one line on stderr."""
    # mlx-lm says through transformers that torch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        click.echo(_harmless(f"warning: {message}"), err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        from interviewmate_mlx import backend

        backend.prepare()
        yield


def _console(file: Any = None) -> "Console":
    from rich.console import Console

    file = file or sys.stderr
    # A pipe has no width; 80 columns would break lines that a program reads.
    width = None if file.isatty() else 160
    return Console(file=file, width=width, highlight=False, markup=False)


class _StopOnSignal:
    """The first SIGINT or SIGTERM asks for a stop after the step; the second stops at once.

    SIGHUP (the terminal was closed) asks too, however often it comes, and nothing is said any
    more: there is nowhere to say it. `nohup` holds: what is ignored stays ignored.
    """

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> "_StopOnSignal":
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._previous = {number: signal.signal(number, self._ask) for number in asking}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            for stream in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif self.wanted:
            raise KeyboardInterrupt
        if not self.wanted:
            self.wanted = True
            click.echo("\nfinishing this step, then saving; once more to stop at once", err=True)


def _resume_command() -> str:
    import shlex

    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
    return shlex.join(["imate-mlx", *words, "--resume"])
