"""A whole run: what it yields, what it writes, and that interrupting it changes nothing."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import tiny_falcon, write_checkpoint
from rich.filesize import decimal

from interviewmate_mlx import __version__, backend
from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base import base as base_module
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import BackendError, DataError, StorageError, TrainingError
from interviewmate_mlx.model import gpu_kernels
from interviewmate_mlx.training import checkpoint, loop, memory, task
from interviewmate_mlx.training.checkpoint import checkpoints
from interviewmate_mlx.training.events import Finished, Started, Stepped, Validated
from interviewmate_mlx.training.folder import read_run
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.loss import token_loss
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.step import total_of


@pytest.fixture
def run(tiny_base, questions):
    """12 rows, effective batch 5: three steps an epoch, the last one smaller; in float32."""
    return load_run(
        "A",
        [
            f"model.base={tiny_base}",
            "model.dtype=float32",
            f"data.path={questions}",
            "train.learning_rate=1e-2",
            "train.grad_accumulation=5",
            "lora.dropout=0.3",
        ],
    )


def test_run_yields_its_story_in_order(run, tmp_path):
    events = list(train(run, tmp_path / "out"))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert (events[0].total_steps, events[0].steps_per_epoch) == (9, 3)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [event.step for event in steps] == list(range(1, 10))
    assert [event.epoch for event in steps] == [1] * 3 + [2] * 3 + [3] * 3
    for epoch in (1, 2, 3):
        assert sum(event.num_rows for event in steps if event.epoch == epoch) == 12
    assert [e.step for e in events if isinstance(e, Validated)] == [0, 3, 6, 9]


def test_loss_falls_and_the_best_adapter_is_kept(run, tmp_path):
    out = tmp_path / "out"
    events = list(train(run, out))
    validated = [event for event in events if isinstance(event, Validated)]
    best = min(validated[1:], key=lambda event: event.loss)
    assert best.loss < validated[0].loss - 0.1
    assert events[-1].best_step == best.step
    # The adapter on the disk is that one: evaluated again, it gives that loss.
    prepared = task.prepare(run)
    model = Base.open(run.model.base).load(mx.float32)
    Adapter.open(out).apply(model)
    task.choose_kernels(model, mx.float32)
    loss = loop.validate(replace(prepared, model=model), 0, total_of(model, token_loss)).loss
    assert loss == pytest.approx(best.loss, rel=1e-6)


def adapter_and_metrics(out):
    lines = [
        {key: value for key, value in line.items() if key != "timing"}
        for line in read_metrics(out / "metrics.jsonl")
    ]
    return (out / "adapter_model.safetensors").read_bytes(), lines


def finish(run, out, **options):
    return list(train(run, out, **options))


def last_step(out):
    """The newest step in the metrics, which lag one step behind the training."""
    return max(line["step"] for line in read_metrics(out / "metrics.jsonl"))


@pytest.mark.parametrize("stop_after", [[1], [3], [4], [7], [2, 5], [1, 2]])
def test_resume_repeats_the_uninterrupted_run(run, tmp_path, stop_after):
    finish(run, tmp_path / "whole")
    out, done = tmp_path / "parts", 0
    for step in stop_after:
        events = finish(run, out, resume=done > 0, stop=lambda s=step: last_step(out) >= s)
        assert events[-1].interrupted
        assert events[-1].step >= step
        done = events[-1].step
    events = finish(run, out, resume=True)
    assert not events[-1].interrupted
    assert adapter_and_metrics(out) == adapter_and_metrics(tmp_path / "whole")


def test_whole_run_on_the_path_of_a_gpu(run, tmp_path, monkeypatch):
    """In bfloat16, through fused attention, one microbatch after the other."""
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu")
    hub = write_checkpoint(tmp_path / "hub", tiny_falcon(2, 64, 2))
    base = convert(hub, tmp_path / "base").path
    run = run.replace(model={"base": str(base), "dtype": "auto"})
    prepared = task.prepare(run)
    attention_layer = prepared.model.layers[0].self_attention
    assert attention_layer.dense.weight.dtype == mx.bfloat16
    assert attention_layer.attend is gpu_kernels.attention
    assert prepared.executor.num_streams == 1

    events = finish(run, tmp_path / "whole")
    losses = [event.loss for event in events if isinstance(event, Validated)]
    assert losses[-1] < losses[0] - 0.1
    weights = mx.load(str(tmp_path / "whole" / "adapter_model.safetensors"))
    assert {array.dtype for array in weights.values()} == {mx.float32}

    out = tmp_path / "parts"
    finish(run, out, stop=lambda: last_step(out) >= 4)
    finish(run, out, resume=True)
    assert adapter_and_metrics(out) == adapter_and_metrics(tmp_path / "whole")


def test_run_with_the_attention_of_cuda(run, tmp_path, monkeypatch):
    """Computed by parts on a CPU: the same losses but for rounding."""
    if backend.machine().device != "cpu":
        pytest.skip("a GPU has one of the two")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu")
    hub = write_checkpoint(tmp_path / "hub", tiny_falcon(2, 64, 2))
    run = run.replace(model={"base": str(convert(hub, tmp_path / "base").path), "dtype": "auto"})
    causal = finish(run, tmp_path / "causal")
    monkeypatch.setattr(backend, "has_causal_kernel", lambda *_: False)
    monkeypatch.setattr(backend, "has_masked_kernel", lambda *_: True)
    prepared = task.prepare(run)
    attention_layer = prepared.model.layers[0].self_attention
    assert attention_layer.attend is gpu_kernels.padded_attention
    assert task.attention_of(prepared.model, mx.bfloat16) == (memory.SCORES_FUSED_MASKED, 64)
    padded = finish(run, tmp_path / "padded")
    losses = [
        np.array([event.loss for event in events if isinstance(event, Validated)])
        for events in (causal, padded)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)


def test_resumed_with_less_memory_and_recomputing_the_bytes_stay(run, tmp_path, monkeypatch):
    run = run.replace(train={"gradient_checkpointing": True})
    finish(run, tmp_path / "whole")
    out, original, budgets = tmp_path / "parts", task.plan_memory, []
    finish(run, out, stop=lambda: last_step(out) >= 4)

    def plan(*args, memory_bytes, token_budget, **kwargs):
        """With hardly more than the longest row needs."""
        memory_bytes = 100_000
        while True:
            try:
                least = original(*args, memory_bytes=memory_bytes, **kwargs)
            except BackendError:
                memory_bytes = int(1.05 * memory_bytes)
            else:
                break
        kept = original(*args, memory_bytes=memory_bytes, token_budget=token_budget, **kwargs)
        budgets.append((least.token_budget, kept.token_budget))
        return kept

    monkeypatch.setattr(task, "plan_memory", plan)
    finish(run, out, resume=True)
    assert budgets[0][0] < 100 < budgets[0][1]
    assert adapter_and_metrics(out) == adapter_and_metrics(tmp_path / "whole")


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(run, tmp_path):
    for name, seed in (("one", 42), ("two", 42), ("other", 43)):
        finish(run.replace(train={"seed": seed}), tmp_path / name)
    one, two, other = (adapter_and_metrics(tmp_path / n) for n in ("one", "two", "other"))
    assert one == two
    assert one[0] != other[0]


def test_training_does_not_depend_on_validation(run, tmp_path):
    losses = []
    for every in (0, 1, 2, 100):
        events = list(train(run.replace(validate={"every": every}), tmp_path / str(every)))
        losses.append([event.loss for event in events if isinstance(event, Stepped)])
    assert losses.count(losses[0]) == 4


def test_effective_batch_is_the_maths_and_the_microbatch_the_machine_s(run, tmp_path, monkeypatch):
    run = run.replace(lora={"dropout": 0.0})
    losses = []
    original = task.plan_memory
    for budget in (1, 64, 10**6):

        def plan(*args, budget=budget, **kwargs):
            return replace(original(*args, **kwargs), token_budget=budget)

        monkeypatch.setattr(task, "plan_memory", plan)
        events = list(train(run, tmp_path / str(budget)))
        losses.append([event.loss for event in events if isinstance(event, Stepped)])
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    swapped = run.replace(train={"batch_size": 5, "grad_accumulation": 1})
    events = list(train(swapped, tmp_path / "swapped"))
    assert [e.loss for e in events if isinstance(e, Stepped)] == losses[2]


def test_early_stop_ends_after_so_many_validations_without_a_best(run, tmp_path):
    run = run.replace(
        train={"learning_rate": 3.0, "epochs": 20, "max_grad_norm": 0.0},
        validate={"early_stop_patience": 2, "every": 1},
    )
    events = list(train(run, tmp_path / "out"))
    validated = [event for event in events if isinstance(event, Validated)][1:]
    assert events[-1].stopped_early
    assert events[-1].step < 60
    assert [event.is_best for event in validated[-2:]] == [False, False]
    assert validated[-3].is_best
    again = list(train(run, tmp_path / "out", resume=True))
    assert [type(event) for event in again] == [Started, Finished]


def test_run_without_validation_rows_keeps_the_last_adapter(run, tmp_path, questions):
    run = run.replace(data={"path": str(questions / "train.jsonl")})
    events = finish(run, tmp_path / "out")
    assert not any(isinstance(event, Validated) for event in events)
    assert events[-1].best_step is None
    assert events[-1].summary.best_valid_loss is None
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_loss_that_is_not_finite_stops_with_the_step_and_its_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop, "learning_rate_at", lambda step, *_: float("nan") if step == 3 else 1e-3
    )
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"(?s)Step 4.*not finite.*train.jsonl line"):
        finish(run, out)
    (last,) = checkpoints(out)
    assert last.name == "step-000003.safetensors"
    assert len(read_metrics(out / "metrics.jsonl")) == 2 + 3


def test_state_before_a_step_that_is_not_finite_is_saved(run, tmp_path, monkeypatch):
    finish(run, tmp_path / "whole")
    rates = loop.learning_rate_at
    with monkeypatch.context() as patch:
        patch.setattr(
            loop, "learning_rate_at", lambda s, *r: float("inf") if s == 4 else rates(s, *r)
        )
        with pytest.raises(TrainingError, match=r"(?s)Step 5.*after step 4 is saved"):
            finish(run, tmp_path / "out")
    assert checkpoints(tmp_path / "out")[-1].name == "step-000004.safetensors"
    finish(run, tmp_path / "out", resume=True)
    assert adapter_and_metrics(tmp_path / "out") == adapter_and_metrics(tmp_path / "whole")


def test_validation_loss_that_is_not_finite_is_no_best(run, tmp_path, monkeypatch):
    lost = Validated(0, float("nan"), is_best=False, elapsed_s=0.1)
    monkeypatch.setattr(loop, "validate", lambda *_: lost)
    with pytest.raises(TrainingError, match=r"validation loss after step 3 is nan"):
        finish(run, tmp_path / "out")


def test_run_killed_between_its_last_checkpoint_and_its_adapter_gets_it(run, tmp_path):
    finish(run, tmp_path / "out")
    expected = adapter_and_metrics(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    finish(run, tmp_path / "out", resume=True)
    assert adapter_and_metrics(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "lacks {0} of the {0} steps before this one: the curve has a gap"),
        (
            lambda text: text.replace('"event": "step", "step": 2', '"step": 2'),
            "lacks {1} of the {0} steps before this one, it is damaged at line 3: it does not",
        ),
    ],
    ids=["gone", "damaged"],
)
def test_run_goes_on_without_its_metrics_and_says_so(run, tmp_path, damage, said):
    finish(run, tmp_path / "whole")
    out = tmp_path / "out"
    done = finish(run, out, stop=lambda: last_step(out) >= 4)[-1].step
    path = out / "metrics.jsonl"
    path.write_text(damage(path.read_text()))
    events = finish(run, out, resume=True)
    (note,) = events[0].notes
    assert said.format(done, done - 1) in note
    adapter, lines = adapter_and_metrics(out)
    expected, all_lines = adapter_and_metrics(tmp_path / "whole")
    assert adapter == expected
    assert lines == [line for line in all_lines if line in lines]
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps[-(9 - done) :] == list(range(done + 1, 10))
    assert events[-1].summary.steps == 9


@pytest.mark.parametrize("leave_at", [1, 3, 4])
def test_leaving_the_loop_saves_what_is_done(run, tmp_path, leave_at):
    finish(run, tmp_path / "whole")
    out = tmp_path / "out"
    for event in train(run, out):
        if isinstance(event, Stepped) and event.step == leave_at:
            break
    done = min(3 if leave_at <= 3 else 6, leave_at + task.choose_executor().steps_ahead)
    assert checkpoints(out)[-1].name == f"step-{done:06d}.safetensors"
    finish(run, out, resume=True)
    assert adapter_and_metrics(out) == adapter_and_metrics(tmp_path / "whole")


def test_leaving_after_a_validation_loses_nothing(run, tmp_path):
    finish(run, tmp_path / "whole")
    for event in train(run, tmp_path / "out"):
        if isinstance(event, Validated) and event.step == 6:
            break
    finish(run, tmp_path / "out", resume=True)
    assert adapter_and_metrics(tmp_path / "out") == adapter_and_metrics(tmp_path / "whole")


def test_leaving_before_the_first_step_or_after_a_stop_saves_nothing(run, tmp_path):
    events = train(run, tmp_path / "one")
    next(events)
    events.close()
    asked = []
    for event in train(run, tmp_path / "two", stop=lambda: bool(asked)):
        if isinstance(event, Stepped):
            asked.append(event)
            break
    assert [checkpoints(tmp_path / name) for name in ("one", "two")] == [[], []]


def test_run_that_cannot_change_anything_is_refused(run, tmp_path, questions):
    rows = (questions / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(rows + "\n")
    run = run.replace(data={"path": str(tmp_path / "one.jsonl")}, train={"epochs": 1})
    with pytest.raises(TrainingError, match=r"The learning rate is 0 in all .*has 1\).*warmup"):
        next(train(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    finish(run.replace(train={"warmup_ratio": 0}), tmp_path / "out")


def test_options_that_can_have_no_effect_are_said(run, tmp_path, questions):
    patient = run.replace(validate={"early_stop_patience": 3})
    started = next(train(patient, tmp_path / "one"))
    assert started.notes == (
        "validate.early_stop_patience has no effect: got 3, and the run has only 3 validations",
    )
    assert next(train(run.replace(validate={"early_stop_patience": 2}), tmp_path / "x")).notes == ()
    alone = run.replace(data={"path": str(questions / "train.jsonl")}, validate={"every": 2})
    started = next(train(alone, tmp_path / "two"))
    assert started.notes == ("validate.every has no effect: there are no validation rows",)


def test_part_of_an_epoch_and_a_step_limit_end_the_run(run, tmp_path):
    events = finish(run.replace(train={"epochs": 0.5}), tmp_path / "half")
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2]
    assert [event.step for event in events if isinstance(event, Validated)] == [0, 2]
    assert events[-1].summary.epochs == pytest.approx(2 / 3)
    events = finish(run.replace(train={"max_steps": 4}), tmp_path / "four")
    rates = [event.learning_rate for event in events if isinstance(event, Stepped)]
    assert len(rates) == 4
    assert rates[-1] < rates[1] / 2  # the schedule falls over those four
    started = next(train(run.replace(train={"max_steps": 10}), tmp_path / "ten"))
    assert started.notes == ("train.max_steps has no effect: got 10, and the run has only 9 steps",)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS refuses such names itself")
def test_folder_that_mlx_cannot_write_to_is_refused_before_the_first_step(run, tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/lat\xe4/run"))
    with pytest.raises(StorageError, match="only to paths in UTF-8"):
        next(train(run, out))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_has_a_summary_and_a_card_of_what_is_done(run, tmp_path):
    finish(run, tmp_path, stop=lambda: True)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1
    assert "run_A" in (tmp_path / "README.md").read_text()


def test_machine_without_memory_or_disk_is_refused_before_the_first_step(
    run, tmp_path, monkeypatch
):
    small = replace(task.backend.machine(), memory_bytes=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(task.backend, "machine", lambda: small)
        with pytest.raises(BackendError, match=r"needs about .* GB .* may take 0.0 here"):
            next(train(run, tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(StorageError, match="0 bytes are free"):
            next(train(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_run_over_an_existing_one_is_refused(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="not empty"):
        next(train(run, out))
    with pytest.raises(TrainingError, match="Nothing to resume"):
        next(train(run, out, resume=True))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_changed_run_or_data_cannot_be_resumed(run, tmp_path, questions):
    out = tmp_path / "out"
    finish(run, out, stop=lambda: True)
    with pytest.raises(TrainingError, match=r"lora.dropout: got 0.1, expected 0.3"):
        next(train(run.replace(lora={"dropout": 0.1}), out, resume=True))
    other = tmp_path / "data"
    shutil.copytree(questions, other)
    run = run.replace(data={"path": str(other)})
    finish(run, tmp_path / "moved", stop=lambda: True)
    for file in other.iterdir():
        file.write_text(file.read_text().replace("loss", "cost"))
    with pytest.raises(TrainingError, match="changed since: data"):
        next(train(run, tmp_path / "moved", resume=True))


# What a person may have put into run.toml, and what is said of it.
EDITS = {
    ("rank = 8", "rank = 16"): "lora.rank: got 16, expected 8",
    ("rslora = false", "rslora = true"): "lora.rslora: got True, expected False",
    (
        '"attention"',
        '"dense"',
    ): r"lora.targets: got \('dense',\), expected \('attention'",
    ("learning_rate = 0.01", "learning_rate = 0.02"): "learning_rate: got 0.02, expected 0.01",
    (
        "epochs = 3.0",
        "epochs = 0.5",
    ): "has done . steps, and would have only 2 with train.epochs 0.5",
    ("max_steps = 0", "max_steps = 2"): "has done . steps, and would have only 2 .*max_steps 2",
}


@pytest.mark.parametrize(("edit", "said"), EDITS.items())
def test_edited_run_is_refused_by_key_and_nothing_changes(run, tmp_path, edit, said):
    out = tmp_path / "out"
    finish(run, out, stop=lambda: last_step(out) >= 3)
    text = (out / "run.toml").read_text()
    assert text.count(edit[0]) == 1
    (out / "run.toml").write_text(text.replace(*edit))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=said):
        next(train(read_run(out), out, resume=True))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_may_change_on_purpose_is_said_and_kept(run, tmp_path, questions):
    out, moved = tmp_path / "out", tmp_path / "moved"
    finish(run, out, stop=lambda: last_step(out) >= 3)
    shutil.copytree(questions, moved)
    longer = run.replace(
        data={"path": str(moved)},
        train={"epochs": 4, "save_every": 1, "keep_checkpoints": 3},
        validate={"every": 2, "early_stop_patience": 5},
    )
    events = finish(longer, out, resume=True)
    (note,) = events[0].notes
    assert note == (
        f"changed on purpose: data.path {str(questions)!r} -> {str(moved)!r}, train.epochs 3.0 -> "
        "4.0, train.save_every 50 -> 1, train.keep_checkpoints 2 -> 3, validate.every 0 -> 2, "
        "validate.early_stop_patience 0 -> 5; the learning rate follows the new number of steps"
    )
    assert (events[0].total_steps, events[-1].step) == (12, 12)
    assert read_run(out) == longer
    assert len(checkpoints(out)) == 3
    # The last checkpoint has the new values: from here on they are the run's own.
    assert next(train(longer, out, resume=True)).notes == ()


def test_name_stays_the_run_s_own(run, tmp_path):
    out = tmp_path / "elsewhere"
    finish(run, out, stop=lambda: True)
    renamed = replace(read_run(out), name="another")
    summary = finish(renamed, out, resume=True)[-1].summary
    assert (summary.run, read_run(out).name) == ("run_A", "run_A")
    assert (out / "README.md").read_text().count("run_A")


def test_changed_base_cannot_be_resumed(run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run.model.base, base)
    run = run.replace(model={"base": str(base)})
    finish(run, tmp_path / "out", stop=lambda: True)
    weights = mx.load(str(base / "model.safetensors"))
    name = "transformer.h.1.mlp.dense_4h_to_h.weight"
    mx.save_safetensors(str(tmp_path / "new.safetensors"), weights | {name: -weights[name]})
    (tmp_path / "new.safetensors").replace(base / "model.safetensors")
    with pytest.raises(TrainingError, match="changed since: base"):
        next(train(run, tmp_path / "out", resume=True))


def test_changes_are_named_before_the_weights_are_read(run, tmp_path, questions, monkeypatch):
    def build(*_):
        raise AssertionError("the weights were read")

    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(run.model.base, base)
    shutil.copytree(questions, data)
    run = run.replace(model={"base": str(base)}, data={"path": str(data)})
    finish(run, tmp_path / "out", stop=lambda: True)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr(Base, "read", build)
    with pytest.raises(TrainingError, match="began as another run"):
        next(train(run.replace(train={"seed": 1}), tmp_path / "out", resume=True))
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    file = data / "valid.jsonl"
    file.write_text(file.read_text().replace("number", "figure"))
    with pytest.raises(TrainingError, match="changed since: base, data"):
        next(train(run, tmp_path / "out", resume=True))
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_changed_version_is_named_and_the_run_goes_on(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    finish(run, out, stop=lambda: True)
    monkeypatch.setattr(task, "__version__", "9.9")
    events = finish(run, out, resume=True, stop=lambda: True)
    (note,) = events[0].notes
    assert note.startswith(f"changed since the run was saved: interviewmate-mlx {__version__} -> 9")
    assert finish(run, out, resume=True)[0].notes == ()  # said once


def test_checkpoint_of_another_version_is_no_damage(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    state = checkpoint.asdict
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", lambda value: state(value) | {"news": 1})
        finish(run, out, stop=lambda: True)
    names = [path.name for path in checkpoints(out)]
    with pytest.raises(TrainingError, match=r"another version of this package: .*news"):
        next(train(run, out, resume=True))
    assert [path.name for path in checkpoints(out)] == names


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [8, 9]), (20, list(range(1, 10)))])
def test_newest_checkpoints_are_kept_as_many_as_asked(run, tmp_path, monkeypatch, keep, kept):
    run = run.replace(train={"save_every": 1, "keep_checkpoints": keep})
    needed = []
    usage = shutil._ntuple_diskusage(0, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError) as refused:
            next(train(run, tmp_path / "out"))
        needed = str(refused.value)
    finish(run, tmp_path / "out")
    paths = checkpoints(tmp_path / "out")
    assert [path.name for path in paths] == [f"step-{step:06d}.safetensors" for step in kept]
    # The best adapter so far is in each, and what the disk was asked for is what they take.
    state, tensors = checkpoint.load_checkpoint(paths[0])
    best = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert state.best_step == 9 or kept[0] < 9
    if state.best_step == 9:
        for name, array in tensors["best"].items():
            assert mx.array_equal(array, best[f"base_model.model.{name}"])
    bytes_needed = 4 * sum(a.size for a in best.values()) * 4 * (keep + 1)
    assert f"expected {decimal(bytes_needed)}." in needed


def test_all_that_keeps_a_run_from_starting_is_said_at_once(run, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    data_and_targets = run.replace(data={"path": str(bad)}, lora={"targets": ("q_proj",)})
    with pytest.raises(TrainingError) as refused:
        next(train(data_and_targets, tmp_path / "out"))
    said = str(refused.value)
    assert said.startswith("The run run_A cannot start, for 2 reasons:\n\nDataError: ")
    assert "bad.jsonl" in said
    assert "\n\nAdapterError: LoRA targets" in said

    small = replace(task.backend.machine(), memory_bytes=1_000_000)
    usage = shutil._ntuple_diskusage(9, 9, 0)
    monkeypatch.setattr(task.backend, "machine", lambda: small)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TrainingError) as refused:
        next(train(run, tmp_path / "out"))
    said = str(refused.value)
    assert "0 bytes are free" in said
    assert "Training needs about" in said
    with pytest.raises(TrainingError, match=r"(?s)DataError: .*StorageError: .* 0 bytes are free"):
        next(train(run.replace(data={"path": str(bad)}), tmp_path / "out"))
    with pytest.raises(TrainingError, match=r"(?s)DataError: .*ModelError: No model at"):
        next(train(run.replace(data={"path": str(bad)}, model={"base": "/no"}), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_base_is_not_pulled_for_a_run_whose_data_is_at_fault(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def pull(*_, **__):
        raise AssertionError("pulled")

    monkeypatch.setattr(base_module, "fetch_model", pull)
    run = run.replace(data={"path": "/nowhere"}, model={"base": "owner/falcon"})
    with pytest.raises(DataError, match="No data at /nowhere"):
        next(train(run, tmp_path / "out"))


def test_rows_that_are_all_too_long_are_refused(run, tmp_path):
    run = run.replace(data={"max_length": 8})
    with pytest.raises(DataError, match="of 12 rows none"):
        next(train(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_summary_holds_what_the_metrics_say(run, tmp_path):
    out = tmp_path / "out"
    events = finish(run, out)
    summary = json.loads((out / "summary.json").read_text())
    steps = [event for event in events if isinstance(event, Stepped)]
    assert summary["steps"] == 9
    assert summary["epochs"] == 3.0
    assert summary["first_loss"] == steps[0].loss
    assert summary["final_loss"] == steps[-1].loss
    seconds = sum(event.elapsed_s for event in steps)
    assert summary["samples_per_s"] == pytest.approx(36 / seconds, rel=1e-3)
    assert summary["trainable_parameters"] == 2 * (8 * 64 + 192 * 8)
    assert "run_A" in (out / "README.md").read_text()
