"""What `bench` makes of the steps that it timed."""

import os
import re
import time
from collections.abc import Iterable
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest

from interviewmate_mlx import backend
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.results.bench import (
    SEED_SAMPLES_PER_S,
    bench,
    needed_products,
    new_shapes,
)
from interviewmate_mlx.training.loop import rows_of_steps
from interviewmate_mlx.training.task import prepare

SHAPE = {
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 500,
}


@pytest.mark.parametrize("lora", [False, True])
def test_products_are_those_of_the_base_s_layers_and_of_the_head(monkeypatch, lora):
    asked = []

    def speed(rows: int, inner: int, columns: int, seconds: float, dtype: mx.Dtype) -> float:
        assert (rows, dtype) == (70 if columns == 500 else 100, mx.float32)
        asked.append((columns, inner))
        return 2.0 if columns == 500 else 4.0  # GFLOP/s

    monkeypatch.setattr(backend, "matmul_gflops", speed)
    model = Model(ModelArgs.from_dict(SHAPE))
    if lora:
        add_lora(model, ["query_key_value", "dense_h_to_4h"], rank=4, alpha=8)
    # A layer has 3 C^2 + C^2 + 4 C^2 + 4 C^2 weights; two products of 2 FLOPs each a token.
    layers, head = 4 * 3 * 12 * 64**2 * 1000, 4 * 500 * 64 * 700
    seconds, gflops = needed_products(model, 1000, 700, steps=10)
    assert seconds == pytest.approx(layers / 4e9 + head / 2e9)
    assert gflops == pytest.approx((layers + head) / 1e9 / seconds)
    assert sorted(asked) == [(64, 64), (64, 256), (192, 64), (256, 64), (500, 64)]


def test_bench_s_figures_follow_from_its_steps(tiny_base, questions):
    settings = [f"model.base={tiny_base}", f"data.path={questions}"]
    result = bench(load_run("A", settings), steps=3, warmup=1)
    assert result.rows == 12
    assert result.samples_per_s == pytest.approx(result.rows / result.seconds)
    assert result.samples_per_s_slowest <= result.samples_per_s <= result.samples_per_s_fastest
    assert result.whole_run_s == pytest.approx(3 * 12 / result.samples_per_s)
    assert result.products_share > 0
    assert result.products_gflops > 0
    assert result.seed_samples_per_s == SEED_SAMPLES_PER_S["run_A"] == 0.664


def test_every_shape_was_met_before_it_is_timed(tiny_base, questions):
    task = prepare(load_run("A", [f"model.base={tiny_base}", f"data.path={questions}"]))

    def shapes(numbers: Iterable[int]) -> set[tuple[int, ...]]:
        return {
            (*microbatch.inputs.shape, *microbatch.positions.shape)
            for wanted in numbers
            for _, rows in rows_of_steps(task, wanted, wanted + 1)
            for microbatch in map(collate, task.executor.split(rows, task.memory.token_budget))
        }

    for warmup in (0, 1, 4):
        new = new_shapes(task, warmup, 5)
        assert shapes(range(warmup, warmup + 5)) <= shapes([*range(warmup), *new])
        for number in new:  # and none of them for nothing
            assert not shapes([number]) <= shapes(range(number))


def test_bench_of_a_run_that_the_seed_did_not_make_names_no_seed(tiny_base, questions, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[data]\npath = "{questions}"\n')
    assert bench(load_run(str(path)), steps=1, warmup=0).seed_samples_per_s is None


@pytest.mark.parametrize(
    ("load", "plugged", "profile", "expected"),
    [
        (0.0, True, False, []),
        (0.0, None, False, []),
        (40.0, True, False, ["other work: a load of 40.0 on 2 cores in the last minute"]),
        (0.0, False, False, ["on battery: many machines run slower then"]),
        (0.0, True, True, ["a mode that saves power is on: turn it off in the system's settings"]),
    ],
)
def test_what_makes_a_machine_slow_is_said(monkeypatch, load, plugged, profile, expected):
    battery = SimpleNamespace(power_plugged=plugged) if plugged is not None else None
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(backend, "_saves_power", lambda: profile)
    monkeypatch.setattr(backend, "_num_cores", lambda: 2)
    monkeypatch.setattr(backend, "_device", lambda: "metal")
    assert backend.slowdowns() == expected


def test_a_gpu_that_is_not_used_is_said(monkeypatch):
    monkeypatch.setattr(backend, "_device", lambda: "cpu")
    monkeypatch.setattr(backend.mx, "is_available", lambda device: True)
    assert backend.slowdowns()[0].startswith("on the CPU, although MLX sees a GPU")


def test_bench_says_that_the_system_swapped(monkeypatch, tiny_base, questions):
    swapped = iter([1_000_000_000, 4_500_000_000])
    monkeypatch.setattr(backend, "swapped_bytes", lambda: next(swapped))
    monkeypatch.setattr(backend, "stolen_seconds", lambda: 0.0)
    monkeypatch.setattr(backend, "slowdowns", list)
    settings = [f"model.base={tiny_base}", f"data.path={questions}"]
    slowdowns = bench(load_run("A", settings), steps=1, warmup=0).slowdowns
    assert slowdowns == [
        "the system swapped 3.5 GB meanwhile: close other programs, or lower train.memory_gb"
    ]


def test_bench_says_that_the_machine_s_host_was_busy(monkeypatch, tiny_base, questions):
    now = time.perf_counter  # a machine that waits all the time, also between the readings
    monkeypatch.setattr(backend, "stolen_seconds", now)
    monkeypatch.setattr(backend, "swapped_bytes", lambda: 0)
    monkeypatch.setattr(backend, "slowdowns", list)
    run = load_run("A", [f"model.base={tiny_base}", f"data.path={questions}"])
    (slowdown,) = bench(run, steps=3, warmup=1).slowdowns
    found = re.fullmatch(r"other machines on its host took (\d+)% of the cores' time", slowdown)
    assert found, slowdown
    assert 100 <= int(found[1]) < 1000
    monkeypatch.setattr(backend, "stolen_seconds", lambda: now() * 0.005)
    assert bench(run, steps=3, warmup=1).slowdowns == []


@pytest.mark.parametrize(("times", "expected"), [({"user": 5.0, "steal": 3.0}, 1.5), ({}, 0.0)])
def test_stolen_time_is_a_core_s(monkeypatch, times, expected):
    assert backend.stolen_seconds() >= 0
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**times))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert backend.stolen_seconds() == expected


def test_swap_counts_both_ways(monkeypatch):
    assert backend.swapped_bytes() >= 0
    monkeypatch.setattr(backend.sys, "platform", "linux")
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(sin=3, sout=4))
    assert backend.swapped_bytes() == 7


@pytest.mark.parametrize("is_on", [False, True])
def test_low_power_mode_of_a_mac_is_found(monkeypatch, is_on):
    said = SimpleNamespace(stdout=f" sleep 1\n lowpowermode         {int(is_on)}\n")
    monkeypatch.setattr(backend.sys, "platform", "darwin")
    monkeypatch.setattr(backend.subprocess, "run", lambda *_, **__: said)
    assert backend._saves_power() == is_on
