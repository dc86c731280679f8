"""Memory is as planned. It does not creep, and few variants are compiled: 2,000 steps, by hand.

The second with `-m slow`. INTERVIEWMATE_SLOW_BASE names another base than the tiny one,
INTERVIEWMATE_SLOW_DATA other rows.
"""

import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run, to_toml
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.errors import BackendError
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training import loop, preference
from interviewmate_mlx.training.checkpoint import State
from interviewmate_mlx.training.events import Started, Stepped
from interviewmate_mlx.training.memory import (
    SCORES_FUSED,
    SCORES_FUSED_MASKED,
    gpu_bytes_per_token,
    plan_memory,
    weight_bytes,
    widths_of,
)
from interviewmate_mlx.training.step import OneStream
from interviewmate_mlx.training.task import plan, prepare

STEPS = 2000


def resident_bytes() -> int:
    listed = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(listed.stdout) * 1024


@pytest.mark.parametrize("words", [40, 120])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_streams", [0, 2, "gpu"])
def test_peak_is_what_was_planned(tmp_path, monkeypatch, words, checkpointing, num_streams):
    here = backend.machine()
    if here.device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu" if num_streams == "gpu" else "")
    ahead = 0.0
    if num_streams == "gpu":
        # The next step is handed over meanwhile, and MLX allocates some of its arrays at once.
        num_streams, ahead = 0, 0.15
    elif num_streams > backend.machine().cpu_streams:
        pytest.skip("streams need two cores and a known BLAS")
    monkeypatch.setattr(backend, "_num_streams", lambda: num_streams)
    messages = [{"role": "user", "content": "Why?"}]
    messages.append({"role": "assistant", "content": "because it is learned " * (words // 4)})
    row = json.dumps({"messages": messages})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 8)
    settings = ["model.base=mini", f"data.path={tmp_path}", "train.epochs=1"]
    settings.append(f"train.gradient_checkpointing={str(checkpointing).lower()}")
    run = load_run("A", settings)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started, *events = loop.train(run, tmp_path / "out")
    assert isinstance(started, Started)
    steps = [event for event in events if isinstance(event, Stepped)]
    taken = steps[-1].peak_bytes - before
    if num_streams:  # at their peaks together or not, as it comes; these rows are all alike
        assert 0.2 * started.peak_bytes < taken < 1.5 * started.peak_bytes
    else:
        assert 0.85 * started.peak_bytes < taken < (1.15 + ahead) * started.peak_bytes


def test_rows_that_would_fit_are_said(tmp_path):
    words = "because it is learned " * 60
    row = json.dumps({"question": "Why?", "answer": words})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4)
    settings = ["model.base=mini", f"data.path={tmp_path / 'rows.jsonl'}", "train.epochs=1"]
    settings += ["train.warmup_ratio=0"]
    with pytest.raises(BackendError, match="Training needs about") as refused:
        next(loop.train(load_run("A", [*settings, "train.memory_gb=0.1"]), tmp_path / "out"))
    found = re.search(r"Rows of up to (\d+) tokens would fit", str(refused.value))
    assert found
    longest = int(found[1])
    assert 32 < longest < 256
    for length, fits in ((longest, True), (longest + 16, False)):
        run = load_run("A", [*settings, "train.memory_gb=0.1", f"data.max_length={length}"])
        if fits:
            next(loop.train(run, tmp_path / "fits"))
        else:
            with pytest.raises(BackendError):
                next(loop.train(run, tmp_path / "does_not"))
    with pytest.raises(BackendError, match="No row would fit"):
        next(loop.train(load_run("A", [*settings, "train.memory_gb=0.02"]), tmp_path / "none"))


def test_a_resumed_rank_plans_with_its_own_memory(questions):
    """The first rank's machine may have more."""
    run = load_run("A", ["model.base=mini", f"data.path={questions}", "train.memory_gb=0.3"])
    task = prepare(run)
    large = State(to_toml(run), token_budget=10 * task.memory.token_budget)
    shared = plan(run, task.model, task.rows, large, num_ranks=2)
    assert shared.token_budget <= task.memory.token_budget
    alone = plan(run, task.model, task.rows, large, num_ranks=1)
    assert alone.token_budget == large.token_budget  # so that its bytes stay the same


def run_a_s_model() -> Model:
    """In its full size; its arrays are never computed."""
    config = {"model_type": "falcon", "alibi": True, "bias": True, "multi_query": False}
    config |= {"parallel_attn": False, "new_decoder_architecture": False, "vocab_size": 50304}
    config |= {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24}
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    add_lora(model, ["query_key_value"], 8, 16, 0.05)
    return model


def test_run_a_with_rows_of_512_tokens_fits_on_a_mac_of_8_gb():
    """Its GPU may have 5.7 GB, of which training plans with three quarters."""
    model = run_a_s_model()
    widths = widths_of(model)
    ids = np.zeros(513, np.int32)
    rows = [Example(Record("row"), ids, np.arange(513) > 40)] * 4

    def bytes_per_token(width: int, num_streams: int) -> int:
        return gpu_bytes_per_token(widths, width, itemsize=2, widened=72, scores=SCORES_FUSED)

    plan = plan_memory(model, rows, 4, bytes_per_token, False, int(0.75 * 5.7e9), OneStream())
    assert plan.max_rows == 1
    assert 3.6e9 < plan.peak_bytes < 3.9e9


@pytest.mark.parametrize(("width", "more"), [(512, 0), (384, 0), (240, 17 / 15), (144, 23 / 9)])
def test_padded_queries_and_their_output_are_planned_for(width, more):
    """Without padding all three are views; with it there are 256 queries, and as many outputs."""
    widths = widths_of(run_a_s_model())
    plain, padded = (
        gpu_bytes_per_token(widths, width, 2, widths.head_dim, scores)
        for scores in (SCORES_FUSED, SCORES_FUSED_MASKED)
    )
    queries = math.ceil(width / 128) * 128
    of_mask = widths.heads * queries * 2
    of_queries = int(more * widths.hidden) * 2 * widths.layers
    assert padded - plain == pytest.approx(of_mask + of_queries, abs=2)


def test_no_width_s_tokens_exceed_the_plan():
    """Narrow rows take more a token where attention pads them: the budget is for the worst."""
    model, ids = run_a_s_model(), np.zeros(513, np.int32)
    widths = widths_of(model)
    rows = [Example(Record("row"), ids[:n], np.arange(n) > 0) for n in (513, 400, 145)]

    def bytes_per_token(width: int, num_streams: int) -> int:
        return gpu_bytes_per_token(widths, width, 2, widths.head_dim, SCORES_FUSED_MASKED)

    plan = plan_memory(model, rows, 4, bytes_per_token, False, int(20e9), OneStream())
    most = max(map(partial(bytes_per_token, num_streams=1), (512, 400, 144)))
    assert most == bytes_per_token(144, 1)
    assert plan.token_budget * most + weight_bytes(model) <= 20e9


def test_memory_that_was_kept_goes_back_in_the_end():
    if not backend.machine().cpu_streams or sys.platform != "linux":
        pytest.skip("glibc keeps memory for the streams of MLX's CPU backend")
    with backend.keep_freed_memory():
        arrays = [mx.zeros((1000, 1000)) + n for n in range(100)]
        mx.eval(arrays)
        arrays.clear()
        mx.synchronize()
        kept = resident_bytes()
    assert resident_bytes() < kept - 200_000_000  # of 400


@pytest.mark.slow
def test_memory_at_the_end_is_that_of_step_100(tiny_base, questions, tmp_path, monkeypatch, capsys):
    base = os.environ.get("INTERVIEWMATE_SLOW_BASE", str(tiny_base))
    data = os.environ.get("INTERVIEWMATE_SLOW_DATA", str(questions))
    shapes = set()
    original = preference.collate

    def collate(rows):
        microbatch = original(rows)
        shapes.add(tuple(array.shape for array in microbatch.arrays()))
        return microbatch

    monkeypatch.setattr(preference, "collate", collate)

    def train(epochs: int) -> Iterator[object]:
        settings = [f"model.base={base}", f"data.path={data}", f"train.epochs={epochs}"]
        settings += ["validate.every=500", "train.save_every=500"]
        return loop.train(load_run("A", settings), tmp_path / str(epochs))

    started = next(iter(train(1)))
    assert isinstance(started, Started)
    active, resident, variants = {}, {}, {}
    for event in train(math.ceil(STEPS / started.steps_per_epoch)):
        if isinstance(event, Stepped) and event.step in (100, 1000, STEPS):
            active[event.step], resident[event.step] = mx.get_active_memory(), resident_bytes()
            variants[event.step] = len(shapes)
    with capsys.disabled():
        print(f"\nactive {active}\nresident {resident}\nvariants {variants}")
    assert active[STEPS] <= 1.05 * active[100]
    assert resident[STEPS] <= 1.05 * resident[100]
    # A microbatch's width and its rows, or what it predicts, come in few sizes.
    assert variants[STEPS] <= 64
