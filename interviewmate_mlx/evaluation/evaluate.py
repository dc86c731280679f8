"""Adapters and their base side by side, on rows that none of them was trained on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.adapter.card import CARD_FILE, set_section
from interviewmate_mlx.adapter.config import CONFIG_FILE
from interviewmate_mlx.adapter.folder import RUN_FILE, Adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.tokenizer import TokenizerWrapper
from interviewmate_mlx.coach.generate import Answer, warn_of_other_weights
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.config import DataConfig, RunConfig
from interviewmate_mlx.data.prompts import (
    Example,
    encode_messages,
    encode_prompt,
    encode_records,
    pack_texts,
)
from interviewmate_mlx.data.records import Record, load_splits
from interviewmate_mlx.data.templates import VERBATIM, Template, end_ids, own_template
from interviewmate_mlx.errors import ConfigError, DataError, list_faults
from interviewmate_mlx.evaluation import harness, overlap
from interviewmate_mlx.evaluation.harness import Metrics
from interviewmate_mlx.evaluation.loss import (
    Difference,
    LossScore,
    RowLoss,
    difference,
    score,
)
from interviewmate_mlx.evaluation.overlap import AnswerScore, score_answers
from interviewmate_mlx.evaluation.work import TaskProgress, Work
from interviewmate_mlx.files import Progress, atomic_file
from interviewmate_mlx.hub.names import fetch_data
from interviewmate_mlx.model.lora import remove_lora
from interviewmate_mlx.training.folder import lock_run, read_run
from interviewmate_mlx.training.ranks import Ranks, join

EVALUATION_FILE = "evaluation.json"
ANSWERS_FILE = "answers.jsonl"
_SECTION = "Evaluation"
_LABELS = ("category", "difficulty")
_GREEDY = Sampling()


class Cut(NamedTuple):
    """How a run cuts its rows: see the keys of `[data]`."""

    max_length: int
    pack: bool


@dataclass(frozen=True)
class Questions:
    """The rows that models are compared on.

    Attributes:
        data: the data set's name.
        split: which of its rows.
        examples: the rows in tokens.
        prompts: what comes before each row's answer, token ids; empty if nothing is generated.
        learned: the texts that were trained on.
        num_left_out: rows of which nothing is left after `max_length` tokens.
    """

    data: str
    split: str
    examples: list[Example]
    prompts: list[list[int]]
    learned: list[str]
    num_left_out: int

    @property
    def records(self) -> list[Record]:
        return [example.record for example in self.examples]

    def content_hash(self) -> str:
        """Tells them from others."""
        content = b"".join(example.content() for example in self.examples)
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """What was found about one model.

    Attributes:
        name: the adapter's folder, or the base's name, as the user gave it.
        loss: over all rows.
        by_label: the same by category and by difficulty, then by label; those that rows have.
        difference: of the loss from the base's; None for the base.
        answers: None if nothing was generated.
        tasks: lm-eval's numbers, by task; {} if none was run.
        texts: the answers, one a row.
    """

    name: str
    loss: LossScore
    by_label: dict[str, dict[str, LossScore]]
    difference: Difference | None
    answers: AnswerScore | None
    tasks: dict[str, Metrics]
    texts: list[Answer]

    def facts(self) -> dict[str, Any]:
        """All but the texts, as JSON can hold it."""
        content = asdict(self)
        del content["texts"]
        if self.difference:
            content["difference"]["is_significant"] = self.difference.is_significant
        return content


def evaluate(
    adapters: Sequence[Path | str],
    base: str | None = None,
    *,
    data: str | None = None,
    split: str = "test",
    limit: int = 0,
    sampling: Sampling | None = _GREEDY,
    tasks: Sequence[str] = (),
    tasks_from: Path | None = None,
    dtype: str = "auto",
    fetching: Progress | None = None,
    progress: TaskProgress = lambda *_: None,
) -> tuple[Questions, list[Evaluation]]:
    """Compare adapters with their base.

    Where a launcher has started several processes, they share the rows and the tasks.

    Args:
        adapters: PEFT folders of one base; none to look at the base alone.
        base: its name; by default the one that all adapters name.
        data: a data set's name; by default the adapters' own, or the shipped questions.
        split: of the data: `valid` or `test`.
        limit: of rows (and of a task's documents), the first ones; 0: all.
        sampling: how to answer; None: no answers are generated.
        tasks: of lm-eval, to run as well.
        tasks_from: a folder with tasks of one's own.
        dtype: of the weights.
        fetching: called with bytes done and in all, while base or data is pulled.
        progress: called with what is done.

    Returns:
        What was asked; and the base's evaluation, followed by the adapters'.

    Raises:
        InterviewMateError: something is missing or does not fit.
    """
    extras = [overlap.check_installed] if sampling else []
    extras += [harness.check_installed] if tasks else []
    asking = split, limit, sampling is not None
    opened = _opened(adapters, base, data, asking, extras, dtype, fetching, progress)
    found: list[Evaluation] = []
    base_losses: list[RowLoss] = []
    with opened as (work, asked, models):
        for title, adapter in models:
            if adapter:
                adapter.apply(work.model)
                work.model.eval()
            losses = work.losses(title, asked.examples)
            texts = work.answers(title, asked.prompts, sampling)
            ran = work.tasks(title, tasks, tasks_from, limit)
            if adapter:
                remove_lora(work.model)
            base_losses = base_losses or losses
            written = [record.answer for record in asked.records]
            found.append(
                Evaluation(
                    title,
                    score(losses),
                    _by_label(asked.records, losses),
                    difference(base_losses, losses) if adapter else None,
                    score_answers(texts, written, asked.learned) if sampling else None,
                    ran,
                    texts,
                )
            )
    return asked, found


@contextmanager
def _opened(
    adapters: Sequence[Path | str],
    base: str | None,
    data: str | None,
    asking: tuple[str, int, bool],
    extras: Sequence[Callable[[], None]],
    dtype: str,
    fetching: Progress | None,
    progress: TaskProgress,
) -> Iterator[tuple[Work, Questions, list[tuple[str, Adapter | None]]]]:
    """Bring together what an evaluation needs, on all ranks; see `evaluate`.

    `asking` is the split, the limit, and whether there will be answers; `extras` are checks of
    what must be installed.

    Yields:
        The work; what is asked; and the models by name: the base, then the adapters.
    """
    ranks = join()
    split, limit, has_answers = asking
    with ExitStack() as stack:
        stack.enter_context(ranks.working())
        with ranks.together():
            for check in extras:
                check()
            own = [Adapter.open(folder) for folder in adapters] if ranks.is_first else []
            chosen = _choose(own, base, data) if ranks.is_first else None
        name, data, cut, titles = ranks.from_first(chosen)
        opened = [
            stack.enter_context(_adapter_of_first(ranks, adapter))
            for _, adapter in zip_longest(titles, own)
        ]
        with ranks.together():
            opened_base = Base.open(name, fetching)
            for adapter in opened:
                warn_of_other_weights(adapter, opened_base)
            tokenizer = opened_base.tokenizer
            template = common_template(opened, tokenizer)
            tokenizer.eos_token_ids = end_ids(template, tokenizer)
            asked = read_questions(
                tokenizer, str(data), split, limit, Cut(*cut), has_answers, fetching, template
            )
            model = opened_base.load(backend.resolve_dtype(dtype))
        facts = {"base": opened_base.fingerprint[:12], "data": asked.content_hash()[:12]}
        ranks.check_same({**facts, "dtype": str(model.dtype)})
        models = [(name, None), *zip(titles, opened, strict=True)]
        yield Work(ranks, model, tokenizer, progress), asked, models


def _choose(
    adapters: Sequence[Adapter], base: str | None, data: str | None
) -> tuple[str, str, Cut, list[str]]:
    """The base, the data, how its rows are cut, and the adapters' names."""
    runs = [read_run(adapter.folder) for adapter in adapters if RUN_FILE in adapter.files]
    titles = [str(adapter.folder) for adapter in adapters]
    return base or common_base(adapters), data or common_data(runs), common_cut(runs), titles


@contextmanager
def _adapter_of_first(ranks: Ranks, own: Adapter | None) -> Iterator[Adapter]:
    """An adapter that only the first rank need have."""
    folder = own.folder if own else Path()
    names = [CONFIG_FILE, own.weights_file.name] if own else []
    with ranks.folder_of_first(folder, names) as found:
        yield own or Adapter.open(found)


def read_questions(
    tokenizer: TokenizerWrapper,
    data: str,
    split: str,
    limit: int,
    cut: Cut,
    has_answers: bool,
    fetching: Progress | None = None,
    template: Template | None = None,
) -> Questions:
    """Read the rows of a split; `template` is that of `encode_record`.

    Raises:
        DataError: they are faulty, there are none, or nothing can be asked in them.
    """
    splits = load_splits(fetch_data(data, fetching))
    records = splits.get(split, [])
    if not records:
        there = ", ".join(f"{name} ({len(rows)} rows)" for name, rows in splits.items())
        raise DataError(
            f"{data} has no {split} rows to evaluate on; it has {there}.\n"
            "Choose another split, or deal the rows out: imate-mlx data split."
        )
    chosen = records[: limit or None]
    left_out: list[Example] = []
    if cut.pack and not any(record.messages or record.prompt for record in chosen):
        examples = pack_texts(tokenizer, chosen, cut.max_length)
    else:
        examples, left_out = encode_records(tokenizer, chosen, cut.max_length, "answer", template)
    if not examples:
        raise DataError(
            f"{data}: of {len(chosen)} {split} rows none has an answer within {cut.max_length} "
            "tokens."
        )
    prompts: list[list[int]] = []
    if has_answers:
        prompts = [_prompt(tokenizer, example.record, template) for example in examples]
    if has_answers and not all(prompts):
        raise DataError(
            f"{data}: its {split} rows are texts without a prompt, so there is nothing to answer.\n"
            "Evaluate without generating answers.",
            "answers",
        )
    learned = [_text(record) for record in splits["train"]]
    return Questions(data, split, examples, prompts, learned, len(left_out))


def _prompt(tokenizer: TokenizerWrapper, record: Record, template: Template | None) -> list[int]:
    if record.messages:
        return encode_messages(tokenizer, record.messages[:-1], template)
    return encode_prompt(tokenizer, record.prompt, VERBATIM) if record.prompt else []


def _text(record: Record) -> str:
    turns = [message.content for message in record.messages]
    return "\n".join(turns or [record.prompt, record.completion])


def _by_label(
    records: Sequence[Record], losses: Sequence[RowLoss]
) -> dict[str, dict[str, LossScore]]:
    found = {}
    for key in _LABELS:
        labels = sorted({getattr(record, key) for record in records} - {""})
        found[key] = {
            label: score([loss for record, loss in zip(records, losses, strict=True)
                          if getattr(record, key) == label])
            for label in labels
        }  # fmt: skip
    return {key: by_label for key, by_label in found.items() if by_label}


def common_base(adapters: Sequence[Adapter]) -> str:
    """The base that all adapters name.

    Raises:
        ConfigError: there are none, or they name several.
    """
    named = {str(adapter.folder): adapter.config.base for adapter in adapters}
    if not named:
        raise ConfigError("Nothing to evaluate: name an adapter's folder, or a base.", "base")
    if len(set(named.values())) > 1:
        listed = list_faults([f"{folder}: {base}" for folder, base in named.items()])
        raise ConfigError(
            f"These adapters have different bases, so their losses cannot be compared:\n{listed}\n"
            "Evaluate them apart; or, if it is one base under several names, name it.",
            "base",
        )
    (name,) = set(named.values())
    return name


def common_template(adapters: Sequence[Adapter], tokenizer: TokenizerWrapper) -> Template:
    """The template of the conversations that all adapters were trained on, or the base's own."""
    found = {adapter.template or own_template(tokenizer): str(adapter.folder)
             for adapter in adapters}  # fmt: skip
    found.pop(VERBATIM, None)
    if len(found) > 1:
        listed = list_faults([f"{folder}: {template.name}" for template, folder in found.items()])
        raise ConfigError(
            f"These adapters were trained with different templates, so their losses cannot be "
            f"compared:\n{listed}\nEvaluate them apart."
        )
    return next(iter(found), None) or own_template(tokenizer)


def common_cut(runs: Sequence[RunConfig]) -> Cut:
    """How rows are cut that are learned in any of the runs: the longest way."""
    length = max((run.data.max_length for run in runs), default=DataConfig().max_length)
    return Cut(length, any(run.data.pack for run in runs))


def common_data(runs: Sequence[RunConfig]) -> str:
    """The data that all runs were trained on; the default for none.

    Raises:
        ConfigError: they are several, or preferences, which have no answers to foresee.
    """
    for run in runs:
        if run.train.method != "sft":
            raise ConfigError(
                f"{run.name} was trained on preferences by {run.train.method} ({run.data.path}), "
                "and an evaluation asks for rows with one answer.\n"
                "Name the data to evaluate on, such as interview.",
                "data",
            )
    names = {run.data.path for run in runs}
    if len(names) > 1:
        raise ConfigError(
            f"The adapters were trained on different data: {', '.join(sorted(names))}.\n"
            "Name the data to evaluate on.",
            "data",
        )
    return names.pop() if names else DataConfig().path


def write_evaluation(
    out: Path, asked: Questions, sampling: Sampling | None, base: Evaluation, own: Evaluation | None
) -> None:
    """Write what was found into a folder; an adapter's card gets the main numbers.

    Args:
        out: the adapter's folder, or one for the base alone.
        asked: the rows.
        sampling: how the answers were made; None if there are none.
        base: the base's evaluation.
        own: the adapter's; None for the base alone.

    Raises:
        TrainingError: a run is training in the folder.
        StorageError: it cannot be written.
    """
    evaluations = {"base": base} | ({"adapter": own} if own else {})
    facts = {
        "package_version": __version__,
        "data": asked.data,
        "split": asked.split,
        "rows": len(asked.examples),
        "sampling": asdict(sampling) if sampling else None,
        "adapter_sha256": file_hash(Adapter.open(out).weights_file) if own else None,
        **{key: _nameless(evaluation) for key, evaluation in evaluations.items()},
    }
    with lock_run(out):
        if sampling:
            with atomic_file(out / ANSWERS_FILE) as temporary:
                lines = "".join(f"{line}\n" for line in _answer_lines(asked, evaluations))
                temporary.write_text(lines, encoding="utf-8")
        with atomic_file(out / EVALUATION_FILE) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        card = out / CARD_FILE
        if own and card.is_file():
            text = set_section(card.read_text(encoding="utf-8"), _SECTION, _table(asked, base, own))
            with atomic_file(card) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _nameless(evaluation: Evaluation) -> dict[str, Any]:
    """Its facts without its name, which may be a path of this machine."""
    return {key: value for key, value in evaluation.facts().items() if key != "name"}


def _answer_lines(asked: Questions, evaluations: dict[str, Evaluation]) -> Iterator[str]:
    for number, record in enumerate(asked.records):
        line = {
            "id": record.id,
            "question": record.question,
            "written": record.answer,
            **{key: evaluation.texts[number].text for key, evaluation in evaluations.items()},
        }
        yield json.dumps(line, ensure_ascii=False)


def _table(asked: Questions, base: Evaluation, own: Evaluation) -> str:
    """The main numbers in Markdown."""
    rows: list[tuple[str, ...]] = [
        ("loss", f"{base.loss.loss:.4f}", f"{own.loss.loss:.4f}"),
        ("perplexity", f"{base.loss.perplexity:.2f}", f"{own.loss.perplexity:.2f}"),
        ("tokens foreseen", f"{base.loss.accuracy:.1%}", f"{own.loss.accuracy:.1%}"),
    ]
    if base.answers and own.answers:
        pair = base.answers, own.answers
        rows += [
            ("ROUGE-L", *(f"{answers.rougeL:.3f}" for answers in pair)),
            ("chrF", *(f"{answers.chrf:.1f}" for answers in pair)),
            ("answers that end by themselves", *(f"{answers.ended:.0%}" for answers in pair)),
            ("four words repeated", *(f"{answers.repetition:.1%}" for answers in pair)),
        ]
    rows += [
        (f"{task}, {metric}", f"{value:.4f}", f"{own.tasks[task][metric]:.4f}")
        for task, metrics in base.tasks.items()
        for metric, value in metrics.items()
    ]
    lines = [f"| {' | '.join(row)} |" for row in [("", "base", "adapter"), ("---",) * 3, *rows]]
    interval = in_words(own.difference) if own.difference else ""
    return (
        f"On {len(asked.examples)} {asked.split} rows of {asked.data}, by `imate-mlx evaluate`:\n\n"
        + "\n".join(lines)
        + f"\n\nThe loss differs by {interval}."
    )


def in_words(found: Difference) -> str:
    """A difference with its interval, and whether it says anything."""
    sure = "" if found.is_significant else ", which is not significant"
    return (
        f"{found.loss:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f}{sure}; "
        f"better on {found.rows_better} of {found.rows} rows)"
    )


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
