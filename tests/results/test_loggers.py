"""Boards: what their own readers find, and that none of them can harm a run."""

import json
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.results import loggers
from interviewmate_mlx.results.loggers import check_installed, logged, numbers_of
from interviewmate_mlx.training.events import Finished, Started, Stepped, Validated
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics

KEYS = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_s"}
KEYS |= {"train/epoch", "eval/loss", "eval/perplexity"}


@pytest.fixture
def run(tiny_base, questions):
    """12 rows, three steps an epoch, three epochs."""
    settings = [f"model.base={tiny_base}", f"data.path={questions}"]
    return load_run("A", [*settings, "train.grad_accumulation=4", "train.learning_rate=1e-2"])


def train_logged(run, out, said=None, **options) -> list:
    report = [] if said is None else said
    events = list(logged(train(run, out, **options), run, out, report.append))
    assert said is not None or report == []
    return events


def in_two_sessions(run, out) -> None:
    """Stopped after the fourth step, and gone on with."""
    done = []

    def stop() -> bool:
        done.append(1)
        return len(done) >= 4

    assert isinstance(train_logged(run, out, stop=stop)[-1], Finished)
    train_logged(run, out, resume=True)


def curves_of_metrics(out: Path) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {"train/loss": {}, "eval/loss": {}}
    for line in read_metrics(out / "metrics.jsonl"):
        kind = "train/loss" if line["event"] == "step" else "eval/loss"
        curves[kind][line["step"]] = line["loss"]
    return curves


def test_tensorboard_s_own_reader_finds_one_curve(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run.replace(log={"to": ("tensorboard",)})
    out = tmp_path / "out"
    in_two_sessions(run, out)
    found = EventAccumulator(str(out / "boards" / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == KEYS
    for key, expected in curves_of_metrics(out).items():
        got = {event.step: event.value for event in found.Scalars(key)}
        assert got == pytest.approx(expected, rel=1e-6)  # it keeps float32
        assert len(got) == len(found.Scalars(key)), "each step once"


def test_trackio_keeps_the_run_on_this_machine(run, tmp_path, monkeypatch, capfd):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    for module in ("sqlite_storage", "run"):
        part = getattr(trackio, module, None)
        if part is not None and hasattr(part, "TRACKIO_DIR"):
            monkeypatch.setattr(part, "TRACKIO_DIR", tmp_path / "trackio")
    run = run.replace(log={"to": ("trackio",), "project": "interviews"})
    out = tmp_path / "out"
    in_two_sessions(run, out)
    assert capfd.readouterr().out == ""
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert len({name for name, *_ in rows}) == 1
    curves: dict[str, dict[int, float]] = {}
    for _, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            curves.setdefault(key, {})[step] = value
    assert set(curves) >= KEYS
    for key, expected in curves_of_metrics(out).items():
        assert curves[key] == pytest.approx(expected)


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format, after seven bytes of its own."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if (room := -place % 32768) < 7:  # no header fits into the rest of a block
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_offline_keeps_the_run(run, tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    run = run.replace(log={"to": ("wandb",)})
    out = tmp_path / "out"
    in_two_sessions(run, out)
    curves: dict[str, dict[int, float]] = {}
    ids = set()
    paths = sorted((out / "boards" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    for path in paths:
        for data in records_of(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for key, value in items.items():
                curves.setdefault(key, {})[items["_step"]] = value
    assert len(ids) == 1, "the second session goes on with the first one's run"
    for key, expected in curves_of_metrics(out).items():
        assert curves[key] == pytest.approx(expected)


class Failing:
    """A board whose library fails where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error, self.given = where, error, []

    def open(self, *_):
        self.fail("open")
        return self

    def add(self, step, numbers):
        self.given.append(step)
        self.fail("add")

    def finish(self):
        self.fail("finish")

    def fail(self, where):
        if where == self.where:
            raise self.error


@pytest.mark.parametrize("where", ["open", "add", "finish"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("no hf_abcdefghijklmnopqrstuvwxyz0123456789 here"), SystemExit(1), KeyError("x")],
    ids=["RuntimeError", "SystemExit", "KeyError"],
)
def test_board_that_fails_is_reported_once_and_the_run_is_the_same(
    run, tmp_path, monkeypatch, where, error
):
    train_logged(run, tmp_path / "alone")
    board, said = Failing(where, error), []
    monkeypatch.setitem(loggers._BOARDS, "wandb", board.open)
    run = run.replace(log={"to": ("wandb",)})
    train_logged(run, tmp_path / "logged", said)
    assert len(said) == 1
    assert said[0].startswith(f"wandb has failed and gets no more numbers: {type(error).__name__}")
    assert "hf_abc" not in said[0]
    name = "adapter_model.safetensors"
    assert (tmp_path / "logged" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_board_that_hangs_does_not_hold_a_run(run, tmp_path, monkeypatch):
    released = threading.Event()

    class Hanging:
        def __init__(self, *_):
            pass

        def add(self, step, numbers):
            released.wait()

        def finish(self):
            pass

    monkeypatch.setitem(loggers._BOARDS, "wandb", Hanging)
    monkeypatch.setattr(loggers, "_PATIENCE_S", 0.1)
    said = []
    events = train_logged(run.replace(log={"to": ("wandb",)}), tmp_path / "out", said)
    assert isinstance(events[-1], Finished)
    assert said == ["wandb does not answer: the last numbers may be missing there"]
    released.set()


def test_one_board_s_fault_is_not_another_s(run, tmp_path, monkeypatch):
    good, bad, said = Failing("", KeyError()), Failing("add", KeyError("x")), []
    monkeypatch.setitem(loggers._BOARDS, "wandb", bad.open)
    monkeypatch.setitem(loggers._BOARDS, "trackio", good.open)
    train_logged(run.replace(log={"to": ("wandb", "trackio")}), tmp_path / "out", said)
    assert len(said) == 1
    assert good.given == sorted(good.given)
    assert set(good.given) == set(range(10))
    assert len(bad.given) == 1


def test_who_leaves_the_loop_ends_the_boards_too(run, tmp_path, monkeypatch):
    board = Failing("", KeyError())
    ended = []
    monkeypatch.setattr(board, "finish", lambda: ended.append(1))
    monkeypatch.setitem(loggers._BOARDS, "wandb", board.open)
    run = run.replace(log={"to": ("wandb",)})
    events = logged(train(run, tmp_path / "out"), run, tmp_path / "out", lambda _: None)
    for event in events:
        if isinstance(event, Stepped):
            break
    events.close()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [1]


def test_names_of_the_numbers():
    step = Stepped(3, 1, 2.5, 1e-4, 0.7, 4, 200, 90, 0.5, 10)
    assert numbers_of(step) == {
        "train/loss": 2.5,
        "train/learning_rate": 1e-4,
        "train/grad_norm": 0.7,
        "train/tokens_per_s": 400.0,
        "train/epoch": 1,
    }
    assert numbers_of(Validated(3, 0.0, True, 0.1)) == {"eval/loss": 0.0, "eval/perplexity": 1.0}
    assert numbers_of(replace(Validated(3, 0.0, True, 0.1), loss=1e4))["eval/perplexity"] == float(
        "inf"
    )


def test_missing_extra_is_named_before_the_run_begins(
    run, monkeypatch, imate, tiny_base, questions
):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackio, wandb is not .*\n.*\[trackio,wandb\]"):
        check_installed(run.replace(log={"to": ("trackio", "wandb")}))
    words = ["train", "--model", tiny_base, "--data", questions, "--log", "tensorboard"]
    assert "log.to: tensorboard is not installed" in imate(*words, code=1).stderr
    assert not os.path.exists("adapters")


def test_unknown_board_is_refused_with_the_choices(imate):
    said = imate("train", "--log", "neptune", code=1).stderr
    assert "log.to: got ['neptune'], expected some of tensorboard, wandb, trackio" in said


def test_wandb_without_a_login_is_said_and_asks_nothing(run, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda _: None))
    wandb.teardown()
    said: list[str] = []
    train_logged(run.replace(log={"to": ("wandb",)}), tmp_path / "out", said)
    assert len(said) == 1
    assert "nobody is logged in (wandb login, or WANDB_MODE=offline)" in said[0]
    wandb.teardown()


def test_events_pass_unchanged(run, tmp_path):
    plain = [type(event) for event in train(run, tmp_path / "one")]
    assert [type(event) for event in train_logged(run, tmp_path / "two")] == plain
    assert plain[0] is Started
