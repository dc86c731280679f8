"""A sweep trains what `train` would, goes on where it was, and survives a trial that does not."""

import json
import math
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from interviewmate_mlx.base import base as base_module
from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import ConfigError, TrainingError
from interviewmate_mlx.results.sweep import (
    Outcome,
    Space,
    Trial,
    best_of,
    check_trials,
    clearly_worse,
    settings_of,
    sweep,
    trials_of_runs,
    trials_of_space,
)
from interviewmate_mlx.training.events import Stepped
from interviewmate_mlx.training.loop import train

FILES = ("adapter_model.safetensors", "adapter_config.json", "run.toml", "README.md")


@pytest.fixture
def runs(tiny_base, questions):
    """Two runs of three steps an epoch; one of them lowers the loss less."""
    settings = [f"model.base={tiny_base}", f"data.path={questions}", "lora.dropout=0.2"]
    return [
        load_run("A", [*settings, "train.learning_rate=1e-2"]),
        load_run("B", [*settings, "train.learning_rate=1e-4"]),
    ]


def swept(trials, out, **options) -> list[Outcome]:
    items = sweep(trials, out, settings={"for": "a test"}, **options)
    return [item for item in items if isinstance(item, Outcome)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def losses_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def test_each_trial_is_what_train_writes_byte_by_byte(runs, tmp_path):
    outcomes = swept(trials_of_runs(runs), tmp_path / "sweep")
    assert [outcome.status for outcome in outcomes] == ["finished", "finished"]
    for run in runs:
        list(train(run, tmp_path / "alone" / run.name))
        here, alone = tmp_path / "sweep" / run.name, tmp_path / "alone" / run.name
        assert bytes_of(here) == bytes_of(alone)
        assert losses_of(here) == losses_of(alone)
        assert sorted(p.name for p in here.rglob("*")) == sorted(p.name for p in alone.rglob("*"))
    best = best_of(outcomes)
    assert best.trial.name == "run_A"
    assert best.loss == min(outcome.summary.best_valid_loss for outcome in outcomes)


def test_weights_of_a_base_are_read_once(runs, tmp_path, monkeypatch):
    read, original = [], base_module.load_tensors
    monkeypatch.setattr(
        base_module, "load_tensors", lambda path: read.append(path) or original(path)
    )
    swept(trials_of_runs(runs, num_seeds=2), tmp_path / "sweep")
    assert len(read) == 1


@pytest.mark.parametrize("after", [1, 5, 9, 10, 14])
def test_interrupted_sweep_goes_on_to_the_same_bytes(runs, tmp_path, after):
    whole = swept(trials_of_runs(runs), tmp_path / "whole")
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= after

    first = swept(trials_of_runs(runs), tmp_path / "parts", stop=stop)
    assert first[-1].status == "interrupted"
    second = swept(trials_of_runs(runs), tmp_path / "parts")
    assert [outcome.status for outcome in second] == ["finished", "finished"]
    for run in runs:
        assert bytes_of(tmp_path / "parts" / run.name) == bytes_of(tmp_path / "whole" / run.name)
    assert [outcome.loss for outcome in second] == [outcome.loss for outcome in whole]


@pytest.mark.parametrize("events", [1, 2, 6, 14, 17, 25])
def test_killed_sweep_goes_on_to_the_same_bytes(runs, tmp_path, events):
    """Whoever iterates leaves, as late as within the saving of a trial."""
    swept(trials_of_runs(runs), tmp_path / "whole")
    items = sweep(trials_of_runs(runs), tmp_path / "parts", settings={"for": "a test"})
    list(islice(items, events))
    items.close()
    swept(trials_of_runs(runs), tmp_path / "parts")
    for run in runs:
        assert bytes_of(tmp_path / "parts" / run.name) == bytes_of(tmp_path / "whole" / run.name)


def test_finished_trials_are_not_trained_again(runs, tmp_path):
    swept(trials_of_runs(runs), tmp_path / "sweep")
    items = list(sweep(trials_of_runs(runs), tmp_path / "sweep", settings={"for": "a test"}))
    assert [type(item) for item in items] == [Trial, Outcome] * 2


def test_trial_that_diverges_is_an_outcome_and_the_rest_goes_on(runs, tmp_path):
    wild = runs[1].replace("wild", train={"learning_rate": 1e30, "warmup_ratio": 0.0})
    trials = trials_of_runs([wild, runs[0]])
    outcomes = swept(trials, tmp_path / "sweep")
    assert [outcome.status for outcome in outcomes] == ["diverged", "finished"]
    assert "not finite" in outcomes[0].message
    assert outcomes[0].loss == math.inf
    assert best_of(outcomes).trial.name == "run_A"
    again = list(sweep(trials, tmp_path / "sweep", settings={"for": "a test"}))
    assert not any(isinstance(item, Stepped) for item in again)
    assert [item.status for item in again if isinstance(item, Outcome)] == ["diverged", "finished"]


def test_seeds_are_trials_of_their_own(runs, tmp_path):
    trials = trials_of_runs(runs[:1], num_seeds=3)
    assert [trial.name for trial in trials] == ["run_A-seed42", "run_A-seed43", "run_A-seed44"]
    losses = {outcome.loss for outcome in swept(trials, tmp_path / "sweep")}
    assert len(losses) == 3


def test_runs_need_names_of_their_own(runs):
    with pytest.raises(ConfigError, match="run_A is there twice"):
        trials_of_runs([runs[0], runs[0]])


# Spaces.


def proposals(space: Space, losses=lambda values: 1.0) -> list[dict]:
    proposer, found = space.proposer(), []
    try:
        values = next(proposer)
        while True:
            found.append(values)
            values = proposer.send(losses(values))
    except StopIteration:
        return found


def test_grid_is_all_combinations():
    space = Space.read({"values": {"lora.rank": [2, 4], "lora.alpha": [8.0, 16.0, 32.0]}}, "x")
    found = proposals(space)
    assert len(found) == 6
    assert found[0] == {"lora.rank": 2, "lora.alpha": 8.0}
    assert found[-1] == {"lora.rank": 4, "lora.alpha": 32.0}


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_drawn_values_are_of_their_range_and_repeat(method):
    values = {
        "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "lora.rank": {"low": 2, "high": 8},
        "lora.targets": [["query_key_value"], ["query_key_value", "dense"]],
        "lora.dropout": {"low": 0.0, "high": 0.5},
    }
    table = {"method": method, "trials": 12, "seed": 3, "values": values}
    found, again = (proposals(Space.read(table, "x"), lambda v: v["lora.rank"]) for _ in range(2))
    assert found == again != proposals(Space.read(table | {"seed": 4}, "x"))
    assert len(found) == 12
    for drawn in found:
        assert 1e-5 <= drawn["train.learning_rate"] <= 1e-2
        assert drawn["lora.rank"] in range(2, 9)
        assert type(drawn["lora.rank"]) is int
        assert drawn["lora.targets"] in values["lora.targets"]
        assert 0 <= drawn["lora.dropout"] <= 0.5
    assert min(drawn["train.learning_rate"] for drawn in found) < 1e-3


def test_optuna_learns_from_what_it_is_told():
    table = {"method": "optuna", "trials": 40, "seed": 0}
    space = Space.read(table | {"values": {"lora.alpha": {"low": 0.0, "high": 100.0}}}, "x")
    found = [v["lora.alpha"] for v in proposals(space, lambda v: abs(v["lora.alpha"] - 70))]
    assert sum(abs(alpha - 70) for alpha in found[20:]) < sum(abs(a - 70) for a in found[:20])
    # A trial that diverged teaches nothing, and ends nothing.
    assert len(proposals(space, lambda v: math.inf)) == 40


def test_swept_space_goes_on_with_the_same_proposals(runs, tmp_path):
    values = {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    table = {"method": "optuna", "trials": 3, "values": values}
    space = Space.read(table, "x")
    whole = swept(trials_of_space(runs[0], space), tmp_path / "whole")
    asked = []
    stop = lambda: asked.append(1) or len(asked) >= 12  # noqa: E731
    swept(trials_of_space(runs[0], space), tmp_path / "parts", stop=stop)
    second = swept(trials_of_space(runs[0], space), tmp_path / "parts")
    assert [o.trial.values for o in second] == [o.trial.values for o in whole]
    for trial in ("trial_001", "trial_002", "trial_003"):
        assert bytes_of(tmp_path / "parts" / trial) == bytes_of(tmp_path / "whole" / trial)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "sweep.values: expected keys of a run"),
        ({"values": {}}, "sweep.values: expected keys of a run"),
        ({"values": {"lora.rank": []}}, "sweep.values.lora.rank: got an empty list"),
        ({"values": {"lora.rank": 8}}, "sweep.values.lora.rank: got 8, expected a list"),
        ({"values": {"lora.rank": {"low": 1, "high": 2}}}, "a grid has no end otherwise"),
        ({"method": "bayes", "values": {"lora.rank": [1]}}, "got 'bayes', expected grid, random"),
        ({"method": "random", "trials": 0, "values": {"lora.rank": [1]}}, "sweep.trials: got 0"),
        ({"method": "random", "seed": -1, "values": {"lora.rank": [1]}}, "sweep.seed: got -1"),
        ({"what": 1, "values": {"lora.rank": [1]}}, "sweep.what: not known"),
        (
            {"method": "random", "values": {"lora.rank": {"low": 2, "high": 1}}},
            "got 2 to 1, expected low < high",
        ),
        (
            {"method": "random", "values": {"lora.dropout": {"low": 0, "high": 1, "log": True}}},
            "expected 0 < low < high, as log is true",
        ),
        ({"method": "random", "values": {"lora.rank": {"low": "a", "high": 1}}}, "{low = NUMBER"),
    ],
)
def test_wrong_space_is_refused(table, said):
    with pytest.raises(ConfigError, match="holds no valid sweep") as caught:
        Space.read(table, "mine.toml")
    assert said in str(caught.value)


def test_wrong_values_are_refused_before_the_first_trial(runs):
    for values, said in (
        ({"lora.rnk": [8]}, "lora.rnk"),
        ({"lora.rank": [8, 0]}, "lora.rank: got 0"),
        ({"nonsense": [8]}, "nonsense"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_trials(runs[0], Space.read({"values": values}, "x"))


def test_missing_optuna_is_named(monkeypatch):
    monkeypatch.setattr("interviewmate_mlx.results.sweep.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"interviewmate-mlx\[tune\]"):
        Space.read({"method": "optuna", "values": {"lora.rank": [1]}}, "x")


# Pruning.


@pytest.mark.parametrize(
    ("curve", "rival", "step", "is_worse"),
    [
        ({0: 5.0, 3: 4.9, 6: 4.8}, {0: 5.0, 3: 4.6, 6: 4.4}, 6, True),  # a third of what was gained
        ({0: 5.0, 3: 4.9, 6: 4.7}, {0: 5.0, 3: 4.6, 6: 4.4}, 6, False),  # half
        ({0: 5.0, 3: 4.9}, {0: 5.0, 3: 4.6}, 3, False),  # the first validation
        ({0: 5.0, 3: 5.1, 6: 5.2}, {0: 5.0, 3: 4.6, 6: 4.4}, 6, True),
        ({0: 5.0, 3: 4.9, 6: 4.8}, {}, 6, False),
        ({0: 5.0, 4: 4.9, 8: 4.8}, {0: 5.0, 3: 4.6, 6: 4.4}, 8, False),  # other steps
        ({0: 5.0, 3: 5.1, 6: 5.2}, {0: 5.0, 3: 5.3, 6: 5.4}, 6, False),  # the other is worse
    ],
)
def test_clearly_worse_has_gained_less_than_half(curve, rival, step, is_worse):
    assert bool(clearly_worse(curve, rival, step)) == is_worse


def test_pruned_trial_stops_and_says_why(runs, tmp_path):
    slow = runs[1].replace("slow", train={"learning_rate": 1e-7})
    outcomes = swept(trials_of_runs([runs[0], slow]), tmp_path / "sweep", prune=True)
    assert [outcome.status for outcome in outcomes] == ["finished", "stopped"]
    assert outcomes[1].message.startswith("after step 6 it had gained ")
    assert outcomes[1].summary.steps in (6, 7)
    again = swept(trials_of_runs([runs[0], slow]), tmp_path / "sweep", prune=True)
    assert [outcome.status for outcome in again] == ["finished", "stopped"]
    kept = swept(trials_of_runs([runs[0], slow]), tmp_path / "other")
    assert [outcome.status for outcome in kept] == ["finished", "finished"]


# Folders.


def test_folder_with_something_else_is_refused(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(TrainingError, match="holds no sweep"):
        swept(trials_of_runs(runs), tmp_path / "full")
    swept(trials_of_runs(runs[:1]), tmp_path / "sweep")
    other = sweep(trials_of_runs(runs), tmp_path / "sweep", settings=settings_of(runs, 1, None))
    with pytest.raises(TrainingError, match="holds another sweep"):
        next(other)


def test_command_ends_in_a_table_and_names_the_best(imate, tiny_base, questions):
    words = ["sweep", "A", "C", "--model", tiny_base, "--data", questions, "--epochs", 1]
    said = imate(*words)
    assert said.stdout.rstrip().endswith("best: sweeps/run_A_run_C/run_A")
    assert "run_C" in said.stdout
    assert said.stderr.count("to train on") == 2
    again = imate(*words)
    assert again.stdout == said.stdout
    assert "to train on" not in again.stderr
    assert "holds another sweep" in imate(*words, "--lr", 1e-3, code=1).stderr


def test_command_sweeps_a_file(imate, tiny_base, questions):
    Path("mine.toml").write_text(
        f'[model]\nbase = "{tiny_base}"\n[data]\npath = "{questions}"\n[train]\nepochs = 1\n'
        '[sweep.values]\n"lora.rank" = [2, 4]\n'
    )
    found = json.loads(imate("sweep", "mine.toml", "--json").stdout)
    assert [trial["values"] for trial in found["trials"]] == [{"lora.rank": 2}, {"lora.rank": 4}]
    assert Path(found["out"], found["best"], "adapter_model.safetensors").is_file()
    assert "trial_001: lora.rank = 2" in imate("sweep", "mine.toml").stderr
    assert "swept alone" in imate("sweep", "mine.toml", "A", code=2).stderr
    assert "unknown table [sweep]" in imate("train", "--run", "mine.toml", code=1).stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("sweep", 2, "Missing argument"),
        ("sweep nonsense", 1, "No run 'nonsense'"),
        ("sweep A A", 1, "run_A is there twice"),
        ("sweep A --seeds 0", 2, "--seeds"),
    ],
)
def test_wrong_command_is_refused(imate, words, code, said):
    assert said in imate(*words.split(), code=code).stderr
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(("trial", "line"), [("run_A", "step 3/9"), ("run_B", "step 5/9")])
def test_sweep_that_is_killed_for_real_goes_on(tmp_path, tiny_base, questions, trial, line):
    program = str(Path(sys.executable).with_name("imate-mlx"))
    words = [program, "sweep", "A", "B", "--model", str(tiny_base), "--data", str(questions)]
    words += ["--set", "train.save_every=1", "--out"]
    subprocess.run([*words, "whole"], cwd=tmp_path, check=True, capture_output=True)
    with subprocess.Popen(
        [*words, "parts"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = iter(process.stderr.readline, "")
        assert any(text.rstrip() == trial for text in said)
        assert any(text.startswith(line) for text in said)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(
        [*words, "parts"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "going on after step" in done.stderr
    for name in ("run_A", "run_B"):
        assert bytes_of(tmp_path / "parts" / name) == bytes_of(tmp_path / "whole" / name)
