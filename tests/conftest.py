"""What several tests share: a tiny converted base, the checkpoint it came from, a few questions."""

import json
from pathlib import Path

import pytest

from interviewmate_mlx import backend  # noqa: F401  its BLAS must be loaded before MLX and torch

# isort: split
from checkpoints import tiny_falcon, write_checkpoint

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
