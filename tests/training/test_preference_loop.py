"""A whole run over preferences: what it writes, resumed and killed, and what it refuses."""

import gc
import json
import shutil

import mlx.core as mx
import pytest
from conftest import write_rows

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import ConfigError, DataError
from interviewmate_mlx.results.report import build_report
from interviewmate_mlx.results.runs import read_runs
from interviewmate_mlx.training import task
from interviewmate_mlx.training.events import Started, Stepped
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.task import REFERENCE_FILE


@pytest.fixture
def run_of(tiny_base, preferences):
    def run(method, *settings):
        data = preferences / ("judged" if method == "kto" else "pairs")
        words = [
            f"model.base={tiny_base}",
            f"data.path={data}",
            f"train.method={method}",
            "train.learning_rate=1e-2",
            "train.grad_accumulation=5",
            "train.save_every=2",
            "lora.dropout=0.3",
        ]
        return load_run("A", [*words, *settings])

    return run


def written(out):
    lines = [
        {key: value for key, value in line.items() if key != "timing"}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    files = ("adapter_model.safetensors", REFERENCE_FILE)
    return [(out / name).read_bytes() for name in files if (out / name).exists()], lines


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_resumed_run_repeats_the_uninterrupted_one(run_of, tmp_path, method):
    run, out = run_of(method), tmp_path / "parts"
    events = list(train(run, tmp_path / "whole"))
    assert [event.step for event in events if isinstance(event, Stepped)] == list(range(1, 10))
    margins = [event.measures for event in events if isinstance(event, Stepped)]
    margins = [found["margin"] for found in margins if "margin" in found]
    assert max(margins[-3:]) > margins[0] + 0.01
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 4))
    list(train(run, out, resume=True))
    assert written(out) == written(tmp_path / "whole")


def test_a_lost_or_damaged_reference_is_computed_again(run_of, tmp_path):
    run, whole, out = run_of("dpo"), tmp_path / "whole", tmp_path / "parts"
    list(train(run, whole))
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 4))
    for damage in ("lost", "damaged", "of_another"):
        broken = tmp_path / damage
        shutil.copytree(out, broken)
        if damage == "lost":
            (broken / REFERENCE_FILE).unlink()
        elif damage == "damaged":
            content = bytearray((broken / REFERENCE_FILE).read_bytes())
            content[-2] ^= 1
            (broken / REFERENCE_FILE).write_bytes(content)
        else:
            found = mx.load(str(broken / REFERENCE_FILE))
            tensors = {name: array + 1 for name, array in found.items()}
            mx.save_safetensors(str(broken / REFERENCE_FILE), tensors, {"of": "{}", "sha256": ""})
        list(train(run, broken, resume=True))
        assert written(broken) == written(whole), damage


def test_reference_is_read_when_a_run_goes_on(run_of, tmp_path, monkeypatch):
    run, out = run_of("dpo"), tmp_path / "out"
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 4))
    monkeypatch.setattr(task, "log_probabilities", None)  # would fail if called
    list(train(run, out, resume=True))


def test_measures_stand_in_the_log_the_summary_and_the_report(run_of, tmp_path):
    out = tmp_path / "out"
    events = list(train(run_of("dpo"), out))
    lines = read_metrics(out / "metrics.jsonl")
    names = {"reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen"}
    assert all(names <= line["measures"].keys() for line in lines)
    step = lines[-1]
    rewards = step["measures"]["reward_chosen"] - step["measures"]["reward_rejected"]
    assert step["measures"]["margin"] == pytest.approx(rewards)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "dpo"
    best = next(
        line
        for line in lines
        if line["event"] == "validation" and line["step"] == summary["best_step"]
    )
    assert summary["best_valid_measures"] == best["measures"]
    assert events[-1].summary.first_loss == pytest.approx(0.693, abs=0.2)
    report = build_report(read_runs([out]))
    section = next(s for s in report.sections if s.title == "Which answers they prefer")
    table = {row[0]: row[1] for row in section.parts[1].rows}
    assert table["margin"] == f"{best['measures']['margin']:.4f}"
    assert "pairs of answers" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_peak_is_what_was_planned(run_of, tmp_path, monkeypatch, method):
    if backend.machine().device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    monkeypatch.setattr(backend, "_num_streams", lambda: 0)
    text = "because it is learned " * 40
    row = {"prompt": "Why?", "chosen": text, "rejected": f"{text} not"}
    rows = [row] * 8
    if method == "kto":
        rows = [{"prompt": "Why?", "completion": text, "label": bool(n % 2)} for n in range(12)]
    write_rows(tmp_path / "train.jsonl", rows)
    run = run_of(method, "model.base=mini", f"data.path={tmp_path / 'train.jsonl'}")
    run = run.replace(train={"epochs": 1, "grad_accumulation": 4})
    gc.collect()  # what earlier tests left, and is freed meanwhile, would be missing
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started, *events = train(run, tmp_path / "out")
    assert isinstance(started, Started)
    taken = [event for event in events if isinstance(event, Stepped)][-1].peak_bytes - before
    assert 0.8 * started.peak_bytes < taken < 1.2 * started.peak_bytes


BAD_SETTINGS = {
    "beta_of_sft": ("sft", ["preference.beta=0.2"], "preference.beta: got 0.2"),
    "smoothing_of_ipo": ("ipo", ["preference.label_smoothing=0.1"], "dpo or simpo"),
    "mean_of_orpo": ("orpo", ["preference.length_normalized=true"], "or the method dpo"),
    "margin_of_dpo": ("dpo", ["preference.target_margin=1"], "or the method simpo"),
    "all_of_dpo": ("dpo", ["data.train_on=all"], "data.train_on: got 'all'"),
    "one_row_of_kto": ("kto", ["train.grad_accumulation=1"], "expected at least 2"),
}


@pytest.mark.parametrize(("method", "settings", "fault"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_key_that_the_method_does_not_ask_for_is_refused(run_of, method, settings, fault):
    with pytest.raises(ConfigError) as caught:
        run_of(method, *settings)
    assert fault in str(caught.value)


def test_rows_of_another_method_are_refused(run_of, preferences, questions, tmp_path):
    for method, data in (("dpo", questions), ("kto", preferences / "pairs")):
        with pytest.raises(DataError, match="got nothing"):
            list(train(run_of(method, f"data.path={data}"), tmp_path / method))
