"""The memory plan of networks of mlx-lm, against the peak of real steps."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from networks import write_network

from interviewmate_mlx import backend
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.base.convert import convert
from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.lora import add_lora, resolve_targets
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.training.memory import (
    SCORES_CAUSAL,
    cpu_bytes_per_token,
    gpu_bytes_per_token,
    weight_bytes,
    widths_of,
)
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import choose_kernels

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
SHAPE |= {"max_position_embeddings": 1024, "initializer_range": 0.02}
NETWORKS = {
    "llama": {"intermediate_size": 704, "num_key_value_heads": 2, "vocab_size": 8000},
    "qwen3": {"intermediate_size": 768, "num_key_value_heads": 2, "head_dim": 64},
    "gemma3_text": {"intermediate_size": 1024, "num_key_value_heads": 2, "sliding_window": 512},
    "phi3": {"intermediate_size": 704, "num_key_value_heads": 8, "vocab_size": 8000},
    "starcoder2": {"intermediate_size": 1024, "num_key_value_heads": 2, "vocab_size": 8000},
    "mixtral": {"intermediate_size": 512, "num_key_value_heads": 2, "vocab_size": 8000},
}
NETWORKS["qwen3"] |= {"vocab_size": 16000}
NETWORKS["gemma3_text"] |= {"vocab_size": 24000, "head_dim": 32, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", "attention"),
        ("llama", "all-linear"),
        ("qwen3", "attention"),
        ("gemma3_text", "all-linear"),
        ("phi3", "attention"),
        ("starcoder2", "all-linear"),
        ("mixtral", "attention"),  # experts are no linear layers
    ],
)
def test_peak_is_within_a_fifth_of_the_plan(model_type, targets, tmp_path):
    if backend.machine().device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    write_network(tmp_path, model_type, **{**SHAPE, **NETWORKS[model_type]})
    for checkpointing, rows, width in ((False, 6, 64), (False, 1, 256), (True, 2, 128)):
        taken, planned = measure(tmp_path, targets, mx.float32, checkpointing, rows, width)
        said = (
            f"{checkpointing=} {rows=} {width=}: {taken / 1e6:.0f} MB, {planned / 1e6:.0f} planned"
        )
        assert 0.8 * planned < taken < 1.2 * planned, said


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_peak_on_a_quantised_base_is_planned(bits, tmp_path, monkeypatch):
    """In bfloat16, as on a GPU: within 15 %."""
    if backend.machine().device != "cpu":
        pytest.skip("measured on MLX's CPU backend")
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu")
    small = {**SHAPE, **NETWORKS["llama"], "num_hidden_layers": 2, "vocab_size": 2000}
    write_network(tmp_path / "plain", "llama", **small)
    quantization = Quantization.of(bits, 32) if bits else None
    convert(tmp_path / "plain", tmp_path / "base", dtype="bfloat16", quantization=quantization)
    taken, planned = measure(tmp_path / "base", "attention", mx.bfloat16, False, 2, 64)
    said = f"{taken / 1e6:.0f} MB, {planned / 1e6:.0f} planned"
    assert 0.85 * planned < taken < 1.15 * planned, said


def measure(folder, targets, dtype, checkpointing, rows, width) -> tuple[int, int]:
    """Bytes that two steps take at the most, and those that are planned."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = Base.open(folder).load(dtype)
    add_lora(model, resolve_targets(model, [targets]), 8, 16, dropout=0.05)
    choose_kernels(model, dtype)
    if checkpointing:
        use_gradient_checkpointing(model)
    widths = widths_of(model)
    if dtype == mx.float32:
        per_token = cpu_bytes_per_token(widths, width, 4, SCORES_CAUSAL, checkpointing)
    else:
        head = widths.head_dim
        per_token = gpu_bytes_per_token(widths, width, 2, head, SCORES_CAUSAL, checkpointing)
    planned = weight_bytes(model) + per_token * rows * width
    ids = np.random.default_rng(0).integers(3, 384, width + 1).astype(np.int32)
    batch = collate([Example(Record("row"), ids, np.arange(width + 1) > 8)] * rows)
    step = Step(model.train(), adamw(), 1.0)
    for number in range(2):
        if number:
            gc.collect()
            mx.reset_peak_memory()
        step.accumulate([batch], [0, number])
        mx.eval(step.update(1e-4), model.trainable_parameters())
    return mx.get_peak_memory() - before, planned
