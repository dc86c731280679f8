"""What several tests share: a tiny base, a few questions, an adapter, the command line."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX and torch

# isort: split
from checkpoints import tiny_falcon, write_checkpoint

from interviewmate_mlx.cli import main
from interviewmate_mlx.config import load_run
from interviewmate_mlx.results import progress
from interviewmate_mlx.results.log import record
from interviewmate_mlx.training.loop import Stepped, train
from interviewmate_mlx.weights.convert import convert

_TOPICS = [
    "a loss",
    "a mean",
    "the gradient",
    "a validation set",
    "supervised learning",
    "a learning rate",
    "attention",
    "an example",
    "a label",
    "a row",
    "a training set",
    "a model",
    "a hard idea",
    "a step",
    "a function",
    "a minimum",
    "the length of a step",
    "a score",
    "structure",
]
# Of unequal length, so that rows fall into several widths.
_ANSWERS = [
    "It tells how far the model is from its examples.",
    "The sum by the number.",
    "It takes small steps against the gradient, and the learning rate sets their length; "
    "a rate that is too large jumps over the minimum.",
    "Rows that the model has not been trained on.",
    "Labels.",
]


def question_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows of questions and short answers, each unlike the others."""
    return [
        {"question": f"What is {topic}?", "answer": f"{_ANSWERS[i % len(_ANSWERS)]} So is {topic}."}
        for i, topic in enumerate(_TOPICS[first : first + count], start=first)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon-RW of two layers, four heads of 16, as it would lie on the Hub. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-falcon"
    return write_checkpoint(folder, tiny_falcon(heads=4, head_size=16, layers=2))


@pytest.fixture(scope="session")
def tiny_base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` converted, weights in float32. Read only."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    return convert(tiny_checkpoint, out, dtype="float32").path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 12 rows to train on, 4 to validate on, 3 to test on. Read only."""
    folder = tmp_path_factory.mktemp("questions")
    rows = question_rows(19)
    write_rows(folder / "train.jsonl", rows[:12])
    write_rows(folder / "valid.jsonl", rows[12:16])
    write_rows(folder / "test.jsonl", rows[16:])
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_base: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter on `tiny_base` that has learned enough of `questions` to answer in words.

    Read only.
    """
    out = tmp_path_factory.mktemp("adapters") / "learned"
    run = load_run(
        "A",
        [
            f"model.base={tiny_base}",
            f"data.path={questions / 'train.jsonl'}",
            'lora.targets=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]',
            "lora.dropout=0",
            "train.epochs=40",
            "train.learning_rate=2e-2",
            "train.save_every=0",
            "validate.every=1000",
        ],
    )
    for _ in record(train(run, out), run, out):
        pass
    return out


@pytest.fixture
def imate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `imate-mlx` in this process, in an empty folder, and hold it to an exit code.

    What the command line does not turn into a message is raised here.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(
            main, [str(word) for word in words], prog_name="imate-mlx", catch_exceptions=False
        )
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def signal_after() -> Callable[..., AbstractContextManager[None]]:
    """Send this process signals once `imate-mlx train` has shown a step."""

    @contextmanager
    def patched(step: int, *signals: signal.Signals) -> Iterator[None]:
        original = progress.show

        def show(*arguments: object) -> Iterator[object]:
            for event in original(*arguments):
                yield event
                if isinstance(event, Stepped) and event.step == step:
                    for number in signals:
                        os.kill(os.getpid(), number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress, "show", show)
            yield

    return patched
