"""The rows that are checked, the code that stands in them, and a few ways to assert."""

import collections
import copy
import itertools
import json
import math
import re
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

FOLDER = Path(__file__).parents[3] / "data" / "interview-1000"
ROWS: dict[str, dict[str, str]] = {
    row["id"]: row
    for split in ("train", "valid", "test")
    for row in map(json.loads, (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines())
}

# What code in a row may use without importing it.
NAMES = {
    "np": np,
    "time": time,
    "threading": threading,
    "Future": Future,
    "collections": collections,
    "itertools": itertools,
    "copy": copy,
    "math": math,
}


def blocks(row_id: str, key: str = "answer") -> list[str]:
    """The code in a text: fenced blocks, then runs of indented lines outside of them."""
    text = ROWS[row_id][key]
    fenced = re.findall(r"```(?:\w+)?\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .*(?:\n|$)|^\n(?=    ))+", rest, re.MULTILINE)
    return fenced + [textwrap.dedent(block) for block in indented if block.strip()]


def code_from(row_id: str, start: str) -> str:
    """The question from where `start` stands to its end."""
    question = ROWS[row_id]["question"]
    return question[question.index(start) :]


def after_blank_line(row_id: str) -> str:
    """The question without its first paragraph."""
    return ROWS[row_id]["question"].split("\n\n", 1)[1]


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Run code with these names; returns all names there are afterwards."""
    exec(code, names)
    return names


def run_block(
    row_id: str, names: dict[str, Any], key: str = "answer", n: int = 0
) -> dict[str, Any]:
    """Run the n-th block of a text in `names`, which are returned."""
    exec(blocks(row_id, key)[n], names)
    return names


def define(row_id: str, **names: Any) -> dict[str, Any]:
    """Run all blocks of an answer one after another; returns what they define."""
    space = NAMES | names
    for block in blocks(row_id):
        exec(block, space)
    return space


def answer_has(row_id: str, *texts: str, key: str = "answer") -> None:
    """Each of the texts stands in the answer: what is checked is what is claimed."""
    for text in texts:
        assert text in ROWS[row_id][key], f"{row_id} does not say {text!r}"


def row_has(row_id: str, *texts: str) -> None:
    """Each of the texts stands in the question or the answer."""
    row = ROWS[row_id]
    for text in texts:
        assert text in row["question"] + "\n" + row["answer"], f"{row_id} does not say {text!r}"


def shared_prefix(first: str, second: str) -> int:
    """How many characters two texts have in common from the start."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def near(got: float, expected: float, tol: float | None = None, rel: float = 0.01) -> None:
    """Within `tol`, or else within the share `rel` of what is expected."""
    assert abs(got - expected) <= (abs(expected) * rel if tol is None else tol), (got, expected)


def message(function: Callable[[], Any], error: type[Exception] = Exception) -> str:
    """What the error that a call raises says."""
    try:
        function()
    except error as raised:
        return str(raised)
    raise AssertionError("no error was raised")


def raises(error: type[Exception], function: Callable[..., Any], *args: Any, **names: Any) -> bool:
    """Whether a call raises such an error."""
    try:
        function(*args, **names)
    except error:
        return True
    return False
