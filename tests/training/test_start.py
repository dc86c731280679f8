"""A run that starts from an adapter: it goes on where that one was, or is refused by name."""

import json

import pytest
from conftest import write_rows

from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import AdapterError, TrainingError
from interviewmate_mlx.training.events import Validated
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(tiny_base, questions, tmp_path_factory):
    """A run of two epochs, and its folder. Read only."""
    settings = ["train.learning_rate=1e-2", "train.grad_accumulation=5", "train.epochs=2"]
    settings += [f"model.base={tiny_base}", f"data.path={questions}", "lora.dropout=0.2"]
    run, out = load_run("A", settings), tmp_path_factory.mktemp("start") / "first"
    return run, out, list(train(run, out))


def test_it_begins_where_the_adapter_ended_and_says_so(trained, tmp_path):
    run, first, events = trained
    out = tmp_path / "out"
    going_on = list(train(run.replace(lora={"start_from": str(first)}), out))
    start = next(event for event in going_on if isinstance(event, Validated))
    assert start.step == 0
    assert start.loss == pytest.approx(events[-1].summary.best_valid_loss, rel=1e-6)
    assert going_on[-1].summary.best_valid_loss < start.loss
    assert f"| started from | the adapter {first} |" in (out / "README.md").read_text()
    assert json.loads((out / "summary.json").read_text())["started_from"] == str(first)


def test_resumed_it_ends_in_the_same_bytes_and_with_another_start_it_is_refused(trained, tmp_path):
    run, first, _ = trained
    run = run.replace(lora={"start_from": str(first)})
    whole, out = tmp_path / "whole", tmp_path / "parts"
    list(train(run, whole))
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 2))
    with pytest.raises(TrainingError, match="changed since: start"):
        list(train(run.replace(lora={"start_from": str(whole)}), out, resume=True))
    list(train(run, out, resume=True))
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_preferences_are_compared_with_the_adapter_and_not_with_the_base(trained, tmp_path):
    run, first, _ = trained
    rows = [
        {"prompt": f"What is {n}?", "chosen": "A b c.", "rejected": f"D e {n}."} for n in range(6)
    ]
    data = write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "valid.jsonl", rows[:2])
    run = run.replace(
        lora={"start_from": str(first)},
        data={"path": str(data.parent)},
        train={"method": "dpo", "epochs": 1, "warmup_ratio": 0},
    )
    start, *_ = (e for e in train(run, tmp_path / "out") if isinstance(e, Validated))
    assert start.loss == pytest.approx(0.693147, abs=1e-4)
    assert start.measures["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "fault"),
    [
        ({"rank": 4}, "lora_A.weight: got (4, 64), expected (8, 64)"),
        ({"targets": ["dense"]}, "query_key_value.lora_A.weight: got nothing, expected (8, 64)"),
        ({"alpha": 8}, "lora.alpha: got 8, expected 16"),
        ({"rslora": True}, "lora.rslora: got True, expected False"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(trained, tmp_path, lora, fault):
    run, first, _ = trained
    with pytest.raises(AdapterError) as caught:
        list(train(run.replace(lora={"start_from": str(first), **lora}), tmp_path / "out"))
    assert fault in str(caught.value)


def test_an_adapter_of_another_base_and_the_run_s_own_folder_are_refused(trained, tmp_path):
    run, first, _ = trained
    settings = {"lora": {"start_from": str(first)}}
    with pytest.raises(AdapterError, match="got other weights than those of"):
        list(train(run.replace(model={"base": "mini"}, **settings), tmp_path / "out"))
    with pytest.raises(AdapterError, match="would write over the adapter that it starts from"):
        list(train(run.replace(**settings), first, replace=True))
    with pytest.raises(AdapterError, match="No adapter in"):
        list(train(run.replace(lora={"start_from": str(tmp_path)}), tmp_path / "out"))
