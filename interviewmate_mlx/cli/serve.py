"""imate-mlx serve"""

import signal
from contextlib import ExitStack
from pathlib import Path

import click

from interviewmate_mlx.cli.options import (
    Finite,
    UserPath,
    adapters_option,
    chosen_adapters,
    dtype_option,
    harmless,
    make_console,
    model_option,
    prepared,
)

KEY_VARIABLE = "INTERVIEWMATE_API_KEY"


@click.command("serve")
@adapters_option
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Others need an --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--api-key",
    envvar=KEY_VARIABLE,
    default="",
    metavar="KEY",
    help=f"Asked of every client. Better in {KEY_VARIABLE}: others here see a command's options.",
)
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page that may use the server, as http://localhost:3000.",
)
@click.option("--keep", type=UserPath(), metavar="FILE", help="Keep conversations and feedback.")
@click.option("--data", default="interview", show_default=True, help="Of the mock interview.")
@click.option(
    "--queue", type=click.IntRange(0), default=64, show_default=True, help="Answers that may wait."
)
@click.option(
    "--timeout",
    type=Finite(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds for an answer.",
)
@dtype_option
def command(
    adapters: tuple[str, ...],
    model: str | None,
    host: str,
    port: int,
    api_key: str,
    origins: tuple[str, ...],
    keep: Path | None,
    data: str,
    queue: int,
    timeout: float,
    dtype: str,
) -> None:
    """Serve a base and its adapters: a page to practise on, and OpenAI's routes.

    Conversations are kept only with --keep. Ctrl-C ends it when what runs is answered.

    \b
    Example: imate-mlx serve --adapter coach=adapters/run_A --keep feedback.sqlite
    """
    named = chosen_adapters(adapters)
    if not named and not model:
        raise click.UsageError("Name an adapter with --adapter, or a base with --model.")
    if not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise click.UsageError("--api-key: expected printable ASCII without spaces around it.")
    with prepared(), ExitStack() as stack:
        from interviewmate_mlx.coach.feedback import Feedback
        from interviewmate_mlx.coach.interview import Deck, Practice
        from interviewmate_mlx.coach.panel import Panel
        from interviewmate_mlx.hub.names import fetch_data
        from interviewmate_mlx.results.terminal import byte_bar
        from interviewmate_mlx.serve.answers import Service
        from interviewmate_mlx.serve.engine import Engine
        from interviewmate_mlx.serve.server import Address, serve, set_up_log

        address = Address(host, port, api_key, origins)
        sock = address.listen()
        stack.callback(sock.close)
        with byte_bar("fetching", make_console()) as progress:
            deck = Deck.read(fetch_data(data, progress))
            panel = Panel.load(model, named, dtype, progress)
        feedback = stack.enter_context(Feedback.open(keep)) if keep else None
        practice = stack.enter_context(Practice.open(keep)) if keep else None
        engine = stack.enter_context(Engine(panel, queue))
        set_up_log()
        shown_host = f"[{host}]" if ":" in host else host
        names = ", ".join(panel.voices)
        click.echo(
            harmless(f"http://{shown_host}:{sock.getsockname()[1]} answers as: {names}"), err=True
        )
        click.echo(f"kept in {keep}" if keep else "nothing is kept; --keep FILE does", err=True)
        received = serve(Service(engine, deck, feedback, practice, timeout), address, sock)
    if received == signal.SIGINT:
        raise KeyboardInterrupt
