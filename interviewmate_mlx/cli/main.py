"""The group of commands: finds them, and turns errors into messages and exit codes."""

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Container
from pathlib import Path
from typing import Any

import click

from interviewmate_mlx import __version__
from interviewmate_mlx.cli.options import harmless, prepared
from interviewmate_mlx.errors import InterviewMateError
from interviewmate_mlx.hosts.launch import is_first_rank, launched_rank, when_met

INTERRUPTED = 130
TRACEBACK_VARIABLE = "INTERVIEWMATE_TRACEBACK"

# By name: each is `command` in the file of that name. Their first lines are repeated here, so
# that `--help` loads none of them.
COMMANDS = {
    "convert": "Convert a model of the Hub, or a folder in its layout, to MLX.",
    "train": "Train a run's LoRA adapter and write it as a PEFT folder.",
    "sweep": "Train several runs one after the other, and compare them.",
    "generate": "Answer an interview question.",
    "chat": "Talk with a base and its adapters, over several turns.",
    "interview": "Be asked, answer, and see what was missing.",
    "serve": "Serve a base and its adapters: a page to practise on, and OpenAI's routes.",
    "feedback": "Look at what users said of answers, and make training rows of it.",
    "evaluate": "Compare adapters with their base, on rows that none of them was trained on.",
    "report": "Write a page about runs: curves, costs, what they answer, and which to use.",
    "merge": "Write a base with adapters merged in, as a model of its own.",
    "export": "Copy an adapter with its model card to a folder, to the Hub, or both.",
    "bench": "Time some training steps of a run on this machine. Writes nothing.",
    "doctor": "Check that this machine computes rightly, and how fast; for bug reports.",
    "data": "Look at rows before training on them.",
}
# Options, by the name of the argument that an error gives.
_OPTIONS = {
    "adapter": "--adapter",
    "answers": "--no-answers",
    "api_key": "--api-key",
    "base": "--model",
    "data": "--data",
    "dtype": "--dtype",
    "force": "--force",
    "group_size": "--group-size",
    "hosts": "--hosts",
    "host": "--host",
    "leave_out": "--leave-out",
    "out": "--out",
    "port": "--port",
    "quantize": "--quantize",
    "replace": "--force",
    "skip_faulty": "--skip-faulty",
    "resume": "--resume",
    "split": "--split",
    "system": "--system",
    "trim_vocab": "--trim-vocab",
    "untested_base": "--untested-base",
}
_SHARED = ("train", "bench", "evaluate")  # what several ranks do together
_PACKAGES = Path(__file__).parents[2]


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"interviewmate_mlx.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output has gone; what is buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Exception as error:
            if ctx.params["traceback"]:  # of any rank
                text = "".join(traceback.format_exception(error))
                click.echo(harmless(text), sys.__stderr__ if launched_rank() else None, err=True)
            else:
                command = self.get_command(ctx, ctx.invoked_subcommand or "")
                click.echo(harmless(describe(error, _options_of(command))), err=True)
            ctx.exit(1)


def _options_of(command: click.Command | None) -> set[str]:
    """All options of a command, those of the commands below it included."""
    if command is None:
        return set()
    found = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*map(_options_of, below))


def describe(error: Exception, known: Container[str]) -> str:
    """What an error means to a user.

    An OSError that names a file of theirs is theirs to solve. Anything else that is not
    an InterviewMateError is a fault of this program.

    Args:
        error: what ended the command.
        known: the options that it has; no others are named.
    """
    if isinstance(error, InterviewMateError):
        options = [option for name in error.arguments if (option := _OPTIONS[name]) in known]
        hint = f"\nOptions for that: {', '.join(options)}." if options else ""
        return f"{type(error).__name__}: {error}{hint}"
    if isinstance(error, OSError) and _is_users(error.filename):
        return (
            f"Cannot use {error.filename}: {error.strerror or error}.\n"
            "Check the path, its permissions and the free space of its disk."
        )
    return (
        f"imate-mlx has failed: {type(error).__name__}: {error}\n"
        "This is a fault of the program. Run it again with --traceback before the command "
        "(imate-mlx --traceback ...), and report what it prints."
    )


def _is_users(name: object) -> bool:
    return isinstance(name, str | Path) and not Path(name).absolute().is_relative_to(_PACKAGES)


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
@click.option(
    "--traceback",
    is_flag=True,
    envvar=TRACEBACK_VARIABLE,
    help=f"Show the whole error, for a bug report. Or set {TRACEBACK_VARIABLE}=1.",
)
@click.pass_context
def main(ctx: click.Context, version: bool, verbose: bool, traceback: bool) -> None:
    """Turn Falcon-RW-1B into an interview coach on your own machine.

    \b
    imate-mlx convert tiiuae/falcon-rw-1b
    imate-mlx train --run A
    imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    imate-mlx export adapters/run_A --push you/interview-coach
    """
    if launched_rank() is not None and ctx.invoked_subcommand not in (None, *_SHARED):
        raise click.UsageError(
            f"{ctx.invoked_subcommand} runs in one process; several ranks share "
            f"{', '.join(_SHARED)}."
        )
    if not is_first_rank():  # which speaks for all, once it knows of them
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  until the end
        when_met(lambda: setattr(sys, "stderr", sys.stdout))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode is shown escaped
            stream.reconfigure(errors="backslashreplace")
    if version:
        _print_version(verbose)
        ctx.exit()
    if verbose:
        raise click.UsageError("--verbose goes with --version.")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def _print_version(verbose: bool) -> None:
    if not verbose:
        click.echo(f"imate-mlx {__version__}")
        return
    with prepared():
        from interviewmate_mlx import backend

        facts = backend.describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
