"""Several processes train one run, over MLX's ring on loopback."""

import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from rank_processes import LOSS, MATRIX, finish, outcome, start

from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.checkpoint import checkpoints, load_newest
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics


@pytest.fixture
def small(tiny_base, questions, tmp_path, monkeypatch):
    """Three steps of 5, 5 and 2 rows: the last has fewer rows than three ranks."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model.base": tiny_base,
        "model.dtype": "float32",
        "data.path": questions,
        "train.learning_rate": 1e-2,
        "train.grad_accumulation": 5,
        "train.epochs": 1,
        "lora.dropout": 0.2,
    }
    return ["train", *(word for k, v in keys.items() for word in ("--set", f"{k}={v}"))]


@pytest.mark.parametrize("size", [3, 4])  # two: below, with other methods
def test_the_update_is_that_of_one_process(small, size):
    list(train(load_run("A", small[2::2]), "alone"))
    told = finish(start([*small, "--out", "together"], size))
    assert [rank[0] for rank in told] == [0] * size, told
    assert f"{size} ranks share the work" in told[0][2] + told[0][1]
    assert all(not stdout and not stderr for _, stdout, stderr in told[1:])
    expected, got = outcome("alone"), outcome("together")
    assert got[0] == pytest.approx(expected[0], rel=LOSS)
    largest = np.abs(expected[1]).max()
    assert np.abs(got[1] - expected[1]).max() <= MATRIX * largest
    # And one process goes on where several have been.
    words = [*small, "--out", "together", "--resume", "--set", "train.epochs=2"]
    ((status, *_),) = finish(start(words, 1))
    assert status == 0
    assert load_newest(Path("together")).state.step == 6


# What is trained, and the file with it.
METHODS = {
    "sft": ([], "adapter_model.safetensors"),
    "dpo": (["train.method=dpo"], "adapter_model.safetensors"),
    "kto": (["train.method=kto"], "adapter_model.safetensors"),
    "pissa": (["lora.init=pissa", "lora.rank=2"], "adapter_model.safetensors"),
    "all": (
        ["train.weights=all", "lora.dropout=0.05", "train.learning_rate=1e-3"],
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_update_as_one_process_does(small, preferences, method):
    settings, file = METHODS[method]
    if method in ("dpo", "kto"):
        settings = [
            *settings,
            f"data.path={preferences / ('judged' if method == 'kto' else 'pairs')}",
        ]
    words = [*small, *(word for setting in settings for word in ("--set", setting))]
    list(train(load_run("A", words[2::2]), "alone"))
    told = finish(start([*words, "--out", "together"], 2))
    assert [rank[0] for rank in told] == [0, 0], told
    expected, got = outcome("alone", file), outcome("together", file)
    assert got[0] == pytest.approx(expected[0], rel=LOSS)
    largest = np.abs(expected[1]).max()
    assert np.abs(got[1] - expected[1]).max() <= MATRIX * largest


DRIFT = """
import mlx.core as mx
from interviewmate_mlx.training.ranks import join
ranks = join()
for offset in (0.0, 1e-7 * ranks.rank):
    own = {"a": mx.arange(3) / 3 + offset, "b": mx.array([7], mx.bfloat16)}
    found = ranks.aligned(own)
    print(ranks.rank, found["a"].tolist(), found["b"].tolist(), found["a"] is own["a"])
"""


def test_a_rank_that_rounds_otherwise_gets_the_numbers_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = finish(start([], 2, program=("-c", DRIFT)))
    first, second = (stdout.splitlines() for _, stdout, _ in told)
    values = "[0.0, 0.3333333432674408, 0.6666666865348816] [7.0]"
    assert first == [f"0 {values} True", f"0 {values} False"]
    assert second == [f"1 {values} True", f"1 {values} False"]


def test_an_evaluation_is_that_of_one_process(small, tiny_base, tmp_path, imate):
    """Rows are dealt, more and fewer than there are ranks; only the first has the adapter."""
    list(train(load_run("A", small[2::2]), "adapter"))
    places = [tmp_path, tmp_path / "second"]
    places[1].mkdir()
    for limit in (1, 3):
        options = ["--split", "valid", "--limit", str(limit), "--max-tokens", "12"]
        options += ["--temperature", "1", "--seed", "7", "--json"]
        words = ["evaluate", "adapter", "--model", str(tiny_base), *options]
        alone = imate(*words).stdout
        written = json.loads(Path("adapter", "evaluation.json").read_text(encoding="utf-8"))
        told = finish(start(words, 2, places))
        assert [status for status, *_ in told] == [0, 0], told
        assert all(not stdout and not stderr for _, stdout, stderr in told[1:])
        expected, got = json.loads(alone), json.loads(told[0][1])
        # Other rows beside them: only the order of float32 sums differs.
        assert_close(got, expected)
        again = json.loads(Path("adapter", "evaluation.json").read_text(encoding="utf-8"))
        assert_close(again, written)


# lm-eval itself takes long to load; each rank says here what it was asked for.
TASKS = """
from interviewmate_mlx.evaluation import work
from interviewmate_mlx.training.ranks import join
ranks = join()
def run_tasks(model, tokenizer, tasks, **_):
    return {task: {"acc": ranks.rank + len(tasks) / 10} for task in tasks}
work.run_tasks = run_tasks
with ranks.working():
    print(work.Work(ranks, None, None, print).tasks("base", ["c", "a", "b"], None, 0))
"""


def test_tasks_are_dealt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "{'c': {'acc': 0.2}, 'a': {'acc': 0.2}, 'b': {'acc': 1.1}}\n"
    for status, stdout, stderr in finish(start([], 2, program=("-c", TASKS))):
        assert (status, stdout) == (0, expected), stderr


def test_an_evaluation_that_one_rank_cannot_do_is_refused(small, tiny_base, tmp_path):
    words = ["evaluate", "--model", "base", "--no-answers", "--split", "valid"]
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    (places[0] / "base").symlink_to(tiny_base)
    told = finish(start(words, 2, places))
    assert [status for status, *_ in told] == [1, 1]
    assert "rank 1" in told[0][2]


def flat(found: object, name: str = "") -> dict[str, object]:
    """The values of nested JSON by their paths."""
    if isinstance(found, dict):
        return {k: v for key, part in found.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(found, list):
        return flat(dict(enumerate(found)), name)
    return {name: found}


def assert_close(got: object, expected: object) -> None:
    got, expected = flat(got), flat(expected)
    numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
    assert {name: got[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-6)
    assert got | numbers == expected


def test_what_differs_between_ranks_is_named(small, tmp_path, questions):
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(questions).iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        changed = [line.replace('"}', ' indeed"}') for line in lines]
        assert changed != lines
        (other / path.name).write_text("\n".join(changed), encoding="utf-8")
    places = []
    for number, folder in enumerate((Path(questions), other)):
        places.append(tmp_path / f"machine-{number}")
        places[-1].mkdir()
        (places[-1] / "rows").symlink_to(folder)
    words = [word.replace(f"data.path={questions}", "data.path=./rows") for word in small]
    told = finish(start(words, 2, places))
    assert [status for status, *_ in told] == [1, 1]
    assert "data is" in told[0][2]
    assert "rank 1" in told[0][2]
    assert not told[1][2]


@pytest.mark.parametrize("asked", [0, 1])
def test_ctrl_c_on_any_rank_stops_all_after_the_same_step(small, asked):
    words = [*small, "--out", "out", "--set", "train.save_every=1", "--set", "train.epochs=2000"]
    ranks = start(words, 2)
    wait_for_checkpoints(Path("out"))
    ranks[asked].send_signal(signal.SIGINT)
    (first, _, said), (second, *others) = finish(ranks)
    assert (first, second) == (130, 0)
    assert "everything is saved" in said
    assert others == ["", ""]
    step = load_newest(Path("out")).state.step
    assert f"interrupted after step {step};" in said
    assert [line["step"] for line in read_metrics(Path("out/metrics.jsonl"))][-1] == step


def test_a_run_that_diverges_is_saved_and_said_once(small):
    told = finish(start([*small, "--out", "out", "--set", "train.learning_rate=1e30"], 2))
    assert [status for status, *_ in told] == [1, 1]
    assert "not finite" in told[0][2]
    assert "is saved in out" in told[0][2]
    assert "has failed" not in told[0][2]
    assert not told[1][2]
    assert load_newest(Path("out")) is not None


def test_a_rank_that_fails_alone_ends_the_other_and_says_why(small):
    """Before they have met it speaks for itself; afterwards the first rank speaks."""
    told = finish(start(["train", "--no-such-option"], 2))
    assert [status for status, *_ in told] == [2, 2]
    assert all("No such option" in stderr for _, _, stderr in told)
    broken = """
import sys
from interviewmate_mlx.training import loop
from interviewmate_mlx.training.ranks import join
def fail(*_): raise KeyError("a fault")
if join().rank == 1: loop.validate = fail
from interviewmate_mlx.cli.main import main
main()
"""
    told = finish(start([*small, "--out", "out"], 2, program=("-c", broken)))
    assert [status for status, *_ in told] == [1, 1]
    assert "Rank 1 (" in told[0][2]
    assert "has failed: KeyError: 'a fault'" in told[0][2]


def test_bench_says_what_each_rank_did(small, preferences):
    """KTO looks at all answers of a step, also where each rank is timed alone."""
    settings = ["train.method=kto", f"data.path={preferences / 'judged'}"]
    words = ["bench", *small[1:], *(word for one in settings for word in ("--set", one))]
    told = finish(start([*words, "--steps", "2", "--warmup", "1", "--json"], 2))
    assert [status for status, *_ in told] == [0, 0], told
    found = json.loads(told[0][1])
    ranks = found["ranks"]
    assert [rank["name"].split()[:2] for rank in ranks] == [["rank", "0"], ["rank", "1"]]
    assert sum(rank["rows"] for rank in ranks) == found["rows"]
    assert sum(rank["tokens"] for rank in ranks) == found["tokens"]
    assert all(rank["alone_samples_per_s"] > 0 and rank["sums_seconds"] > 0 for rank in ranks)


PARTED = """
import time
import mlx.core as mx
from interviewmate_mlx.training.ranks import join
ranks = join()
with ranks.working("A hint."):
    ranks.sum(mx.zeros(3))
    if ranks.rank == {waits}:
        ranks.sum(mx.zeros({size}))
if ranks.rank != {waits}:
    time.sleep({stays})
"""


@pytest.mark.parametrize("waits", [0, 1])
@pytest.mark.parametrize(
    ("stays", "size", "said"),
    [
        (60, 9, "All ranks have waited for each other for 5 seconds."),
        # 64 MB, for which a slow network would be given a minute.
        (0, 1 << 24, "Rank {left} ({host}) has ended."),
    ],
)
def test_a_rank_that_waits_for_one_that_has_left_ends(
    tmp_path, monkeypatch, waits, stays, size, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERVIEWMATE_SILENCE", "5")
    program = PARTED.format(waits=waits, size=size, stays=stays)
    ranks = start([], 2, program=("-c", program))
    try:
        _, stderr = ranks[waits].communicate(timeout=50)
        assert ranks[waits].returncode == 1
        named = said.format(left=1 - waits, host=socket.gethostname())
        assert f"{named}\nA hint.\n" in stderr
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


SLOW = """
import time
import mlx.core as mx
from interviewmate_mlx.training.ranks import join
ranks = join()
with ranks.working():
    if ranks.rank == {slow}:
        time.sleep(7)
    print(ranks.sum(mx.ones(2)).tolist())
"""


@pytest.mark.parametrize("slow", [0, 2])
def test_a_rank_that_is_slow_is_waited_for(tmp_path, monkeypatch, slow):
    """For longer than the limit of silence: it says that it works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERVIEWMATE_SILENCE", "2")
    for status, stdout, stderr in finish(start([], 3, program=("-c", SLOW.format(slow=slow)))):
        assert (status, stdout) == (0, "[3.0, 3.0]\n"), stderr


def wait_for_checkpoints(out: Path) -> None:
    end = time.monotonic() + 60
    while len(checkpoints(out)) < 2 and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "not been heard of")]
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_ends_all(small, monkeypatch, number, said, lost):
    monkeypatch.setenv("INTERVIEWMATE_SILENCE", "5")
    words = [*small, "--out", "out", "--set", "train.save_every=1", "--set", "train.epochs=2000"]
    ranks = start(words, 2)
    try:
        wait_for_checkpoints(Path("out"))
        ranks[lost].send_signal(number)
        other = ranks[1 - lost]
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == 1
        assert f"Rank {lost}" in stderr
        assert said in stderr
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert load_newest(Path("out")).state.step >= 1
