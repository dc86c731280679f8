"""imate-mlx generate"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

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
    shown_text,
)

_STDIN = "-"
_QUESTION_KEYS = ("question", "prompt", "instruction")
_AT_ONCE = 64  # questions of a file; what is done is printed before the next ones


@click.command("generate")
@click.argument("question", required=False)
@model_option
@click.option("--adapter", type=UserPath(), help="A PEFT folder.")
@click.option("--system", metavar="TEXT", default="", help="Put before the question.")
@click.option("--raw", is_flag=True, help="No template: go on from the text as it stands.")
@click.option("--samples", type=click.IntRange(1), default=1, help="Answers to each question.")
@click.option(
    "--questions",
    type=UserPath(),
    metavar="FILE",
    help="JSON Lines of questions, answered side by side; answers come as JSON Lines.",
)
@sampling_options
@dtype_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    question: str | None,
    model: str | None,
    adapter: Path | None,
    system: str,
    raw: bool,
    samples: int,
    questions: Path | None,
    dtype: str,
    as_json: bool,
    **_: object,
) -> None:
    """Answer an interview question.

    It is put to the model as the adapter's rows were in training: with the template of
    questions and answers; or, if the adapter was trained on verbatim rows, as it stands.
    `-` reads the question from stdin. The seed of each further sample is one more.

    \b
    Example: imate-mlx generate "What is overfitting?" --adapter adapters/run_A
    """
    from interviewmate_mlx.files import is_utf8

    given = chosen_sampling(ctx)
    if (question is None) == (questions is None):
        raise click.UsageError("Give a question, - for stdin, or --questions FILE; one of them.")
    if questions and as_json:
        raise click.UsageError("--questions gives JSON Lines anyway; leave --json out.")
    if samples > 1 and given["temperature"] == 0:
        raise click.UsageError("--samples: without a --temperature above 0 all are the same.")
    question = _read_stdin() if question == _STDIN else question
    if question is not None and not question.strip():
        raise click.UsageError("The question is empty.")
    if not is_utf8((question or "") + system):
        raise click.UsageError("The question is not in UTF-8, as this terminal's text is.")
    rows = list(_read_questions(questions)) if questions else [{"question": question or ""}]
    with prepared():
        from interviewmate_mlx.adapter.folder import template_for
        from interviewmate_mlx.coach.generate import (
            answer_all,
            load_coach,
            prompt_for,
            stream_answer,
        )
        from interviewmate_mlx.coach.sampling import Sampling
        from interviewmate_mlx.data.templates import VERBATIM
        from interviewmate_mlx.results.terminal import byte_bar, work_bar

        with byte_bar("fetching the base", make_console()) as progress:
            coach, tokenizer = load_coach(model, adapter, dtype, progress)
        sampling = Sampling(**given)
        # The template puts a space before an answer; what follows a verbatim text is shown whole.
        is_answer = not raw and template_for(coach, tokenizer) != VERBATIM

        def prompt_of(text: str) -> list[int]:
            return prompt_for(coach, tokenizer, text, system, raw)

        if not questions and not as_json:
            prompt = prompt_of(rows[0]["question"])
            for number in range(samples):
                if samples > 1:
                    click.echo(f"--- {number + 1} of {samples}")
                own = replace(sampling, seed=sampling.seed + number)
                _show(stream_answer(coach, tokenizer, "", own, prompt), is_answer)
            return
        with work_bar(make_console()) as report:
            for start in range(0, len(rows), _AT_ONCE):
                chunk = rows[start : start + _AT_ONCE]
                prompts = [prompt_of(row["question"]) for row in chunk for _ in range(samples)]
                own = replace(sampling, seed=sampling.seed + start * samples)

                def progress_of(done: int, _: int, before: int = start * samples) -> None:
                    report("answering", before + done, len(rows) * samples)

                said = answer_all(coach, tokenizer, prompts, own, progress_of)
                texts = [a.text.strip() if is_answer else a.text for a in said]
                for number, row in enumerate(chunk):
                    facts: dict[str, Any] = dict(row)
                    if samples == 1:
                        facts["answer"] = texts[number]
                    else:
                        facts["answers"] = texts[number * samples : (number + 1) * samples]
                    facts |= asdict(sampling) if as_json else {}
                    click.echo(json.dumps(facts, ensure_ascii=False))


def _show(pieces: Iterator[str], is_answer: bool) -> None:
    for piece in pieces:
        piece = shown_text(piece)
        piece = piece.lstrip() if is_answer else piece
        is_answer = is_answer and not piece
        click.echo(piece, nl=False)
    click.echo()


def _read_stdin() -> str:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # refused below, with a message
    return sys.stdin.read()


def _read_questions(path: Path) -> Iterator[dict[str, str]]:
    """The questions of a file, each with its row's id if it has one.

    Raises:
        DataError: the file cannot be read, or rows hold no question; all of these are named.
    """
    from interviewmate_mlx.data.faults import Fault, data_error
    from interviewmate_mlx.data.rows import read_rows
    from interviewmate_mlx.errors import DataError

    faults, found = [], []
    if not path.is_file():
        raise DataError(f"No file {path}.\nGive a file of JSON Lines with a question each.")
    for row in read_rows(path):
        value = row.value if isinstance(row.value, dict) else {"question": row.value}
        text = next((value[key] for key in _QUESTION_KEYS if value.get(key)), None)
        source = f"{path.name} {row.place}".strip()
        if row.fault:
            faults.append(Fault(source, row.fault, row.advice))
        elif not isinstance(text, str) or not text.strip():
            faults.append(Fault(source, f"holds no text under {', '.join(_QUESTION_KEYS)}"))
        else:
            own_id = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
            found.append(own_id | {"question": text})
    if faults:
        raise data_error(path, faults)
    if not found:
        raise DataError(f"{path}: no questions.\nAdd some, one JSON object a line.")
    yield from found
