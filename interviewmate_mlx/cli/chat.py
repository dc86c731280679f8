"""imate-mlx chat"""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from interviewmate_mlx.cli.options import (
    adapters_option,
    chosen_adapters,
    chosen_sampling,
    dtype_option,
    harmless,
    make_console,
    model_option,
    prepared,
    sampling_options,
    shown_text,
)
from interviewmate_mlx.cli.typed import Typed
from interviewmate_mlx.errors import ConfigError, InterviewMateError

if TYPE_CHECKING:
    from interviewmate_mlx.coach.chat import Chat
    from interviewmate_mlx.coach.panel import Panel

_COMMANDS = {
    "/help": "these words",
    "/system TEXT": "what is put before the conversation; without a text, show it",
    "/retry": "answer the last message again",
    "/undo": "forget the last message and its answer",
    "/save FILE": "add the conversation to a file, as a row to train on",
    "/adapter NAME": "who answers from now on; without a name, show all",
    "/compare TEXT": "let everyone answer; nothing of it is kept",
    "/quit": "or Ctrl-D",
}
_HISTORY = "chat_history"


@click.command("chat")
@adapters_option
@model_option
@click.option("--system", metavar="TEXT", default="", help="Put before the conversation.")
@sampling_options
@dtype_option
@click.pass_context
def command(
    ctx: click.Context,
    adapters: tuple[str, ...],
    model: str | None,
    system: str,
    dtype: str,
    **_: object,
) -> None:
    """Talk with a base and its adapters, over several turns.

    /help lists what else can be typed. Ctrl-C stops an answer. In a pipe each line is a
    message, and each answer a line; line breaks in it are shown as spaces.

    \b
    Example: imate-mlx chat --adapter coach=adapters/run_A
    """
    given = chosen_sampling(ctx)
    named = chosen_adapters(adapters)
    if not named and not model:
        raise click.UsageError("Name an adapter with --adapter, or a base with --model.")
    with prepared():
        from platformdirs import user_data_path

        from interviewmate_mlx.coach.chat import Chat
        from interviewmate_mlx.coach.panel import Panel
        from interviewmate_mlx.coach.sampling import Sampling
        from interviewmate_mlx.results.terminal import byte_bar

        with byte_bar("fetching the base", make_console()) as progress:
            panel = Panel.load(model, named, dtype, progress)
        voice = list(panel.voices.values())[min(1, len(named))]
        chat = Chat(panel, Sampling(**given), voice, system)
        typed = Typed(user_data_path("interviewmate") / _HISTORY)
        if typed.is_terminal:
            click.echo(f"{voice.name} answers. /help lists what else can be typed.", err=True)
        _talk(panel, chat, typed)


def _talk(panel: "Panel", chat: "Chat", typed: Typed) -> None:
    while True:
        try:
            line = typed.line(f"{chat.voice.name}> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed.is_terminal:
                raise
            continue
        if line == "/quit":
            return
        try:
            if line:
                _obey(panel, chat, typed, line)
        except InterviewMateError as error:
            click.echo(harmless(str(error)), err=True)
            if not typed.is_terminal:  # a program would not see that its answer is missing
                raise click.exceptions.Exit(1) from error


def _obey(panel: "Panel", chat: "Chat", typed: Typed, line: str) -> None:
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if not line.startswith("/"):
        _show(chat, chat.ask(line), typed)
        return
    if rest and word in ("/help", "/retry", "/undo"):
        raise ConfigError(f"{word} takes nothing after it, got {harmless(rest)!r}.")
    match word:
        case "/help":
            width = max(map(len, _COMMANDS))
            for name, meaning in _COMMANDS.items():
                click.echo(f"{name:<{width}}  {meaning}", err=True)
        case "/system":
            if rest:
                chat.system = rest
            click.echo(f"system: {harmless(chat.system) or '(none)'}", err=True)
        case "/retry":
            _show(chat, chat.retry(), typed)
        case "/undo":
            click.echo(f"forgotten: {harmless(chat.undo())}", err=True)
        case "/save":
            _save(chat, rest)
        case "/adapter":
            if rest:
                chat.voice = panel.voice(rest)
            for name in panel.voices:
                mark = "*" if name == chat.voice.name else " "
                click.echo(f"{mark} {harmless(name)}", err=True)
        case "/compare":
            _compare(panel, chat, typed, rest)
        case _:
            words = ", ".join(name.split()[0] for name in _COMMANDS)
            raise ConfigError(f"Got {harmless(word)!r}, expected one of: {words}.")


def _compare(panel: "Panel", chat: "Chat", typed: Typed, text: str) -> None:
    from interviewmate_mlx.data.records import Message

    if not text:
        raise ConfigError("/compare needs a message after it.")
    for voice in panel.voices.values():
        click.echo(f"[{harmless(voice.name)}] ", nl=False)
        _show(chat, chat.answer(voice, Message("user", text)), typed)


def _show(chat: "Chat", pieces: Generator[str, None, None], typed: Typed) -> None:
    """Print an answer as it comes. At a terminal Ctrl-C stops it."""
    with contextlib.closing(pieces):
        try:
            for number, piece in enumerate(_stripped(pieces)):
                if not number and chat.num_forgotten:
                    count = chat.num_forgotten
                    said = f"note: the oldest {count} messages no longer fit, and were left out"
                    click.echo(said, err=True)
                text = shown_text(piece)
                click.echo(text if typed.is_terminal else " ".join(text.split("\n")), nl=False)
        except KeyboardInterrupt:
            if not typed.is_terminal:
                raise
            click.echo(" [stopped]", nl=False, err=True)
    click.echo()


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without the white space that it begins with."""
    has_begun = False
    for piece in pieces:
        text = piece if has_begun else piece.lstrip()
        has_begun = has_begun or bool(text)
        if text:
            yield text


def _save(chat: "Chat", name: str) -> None:
    from interviewmate_mlx.files import append_text

    if not name:
        raise ConfigError("/save needs a file, such as conversations.jsonl.")
    if not chat.messages:
        raise ConfigError("Nothing was said yet.")
    path = Path(name).expanduser()
    append_text(path, chat.to_row() + "\n", sync=True)
    click.echo(f"saved: {len(chat.messages)} messages, as a row of {path}", err=True)
