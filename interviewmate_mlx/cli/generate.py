"""imate-mlx generate"""

import json
from dataclasses import asdict
from pathlib import Path

import click

from interviewmate_mlx.cli.options import (
    UserPath,
    chosen_sampling,
    dtype_option,
    json_option,
    make_console,
    model_option,
    prepared,
    sampling_options,
)


@click.command("generate")
@click.argument("question")
@model_option
@click.option("--adapter", type=UserPath(), help="A PEFT folder.")
@sampling_options
@dtype_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    question: str,
    model: str | None,
    adapter: Path | None,
    dtype: str,
    as_json: bool,
    **_: object,
) -> None:
    """Answer an interview question.

    It is put to the model as the adapter's rows were in training: with the template of
    questions and answers; or, if the adapter was trained on verbatim rows, as it stands.

    \b
    Example: imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    """
    from interviewmate_mlx.files import is_utf8

    if not question.strip():
        raise click.UsageError("The question is empty.")
    if not is_utf8(question):
        raise click.UsageError("The question is not in UTF-8, as this terminal's text is.")
    given = chosen_sampling(ctx)
    with prepared():
        from interviewmate_mlx.adapter.folder import template_for
        from interviewmate_mlx.coach.generate import answer, load_coach, stream_answer
        from interviewmate_mlx.coach.sampling import Sampling
        from interviewmate_mlx.data.prompts import Template
        from interviewmate_mlx.results.terminal import byte_bar

        with byte_bar("fetching the base", make_console()) as progress:
            coach, tokenizer = load_coach(model, adapter, dtype, progress)
        sampling = Sampling(**given)
        if as_json:
            said = answer(coach, tokenizer, question, sampling)
            click.echo(json.dumps({"question": question, "answer": said, **asdict(sampling)}))
            return
        # The template puts a space before an answer; what follows a verbatim text is shown whole.
        is_first = template_for(coach) == Template.QUESTIONS
        for piece in stream_answer(coach, tokenizer, question, sampling):
            # No control characters: what a model says must not steer the terminal.
            piece = "".join(char for char in piece if char.isprintable() or char in "\n\t")
            piece = piece.lstrip() if is_first else piece
            is_first = is_first and not piece
            click.echo(piece, nl=False)
        click.echo()
