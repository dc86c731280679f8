"""Training mlx-lm's networks against transformers and PEFT, and adapters exchanged with PEFT."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import torch
from networks import write_network
from peft import LoraConfig, PeftModel, get_peft_model
from peft_training import (
    CLIP,
    DECAY,
    our_name,
    random_rows,
    start_alike,
    steps_of,
    train_in_torch,
)
from transformers import get_linear_schedule_with_warmup

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import Adapter, adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.data.batches import collate, split_step
from interviewmate_mlx.model.lora import add_lora, resolve_targets
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step
from interviewmate_mlx.training.task import choose_kernels

STEPS, PEAK = 20, 5e-3
NETWORKS = {  # and what gets a LoRA: attention, or each linear layer
    "gemma2": "all-linear",
    "gemma3_text": "attention",
    "granite": "all-linear",
    "llama": "all-linear",
    "mistral": "attention",
    "mixtral": "attention",
    "olmo2": "attention",
    "olmo3": "all-linear",
    "phi3": "all-linear",
    "qwen2": "attention",
    "qwen3": "all-linear",
    "smollm3": "attention",
    "stablelm": "all-linear",
    "starcoder2": "all-linear",
}


@pytest.mark.parametrize(
    ("model_type", "path"),
    [*((name, "cpu") for name in NETWORKS), ("gemma2", "gpu"), ("llama", "gpu")],
)
def test_twenty_updates_and_the_adapters_equal_peft_s(model_type, path, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERVIEWMATE_PATH", "gpu" if path == "gpu" else "")
    reference = write_network(tmp_path / "base", model_type)
    base = Base.open(tmp_path / "base")
    model = base.load(mx.float32)
    targets = resolve_targets(model, [NETWORKS[model_type]])
    add_lora(model, targets, rank=4, alpha=8)
    choose_kernels(model, mx.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(reference), lora).eval()
    start_alike(theirs, {name: np.array(a) for name, a in adapter_weights(model).items()})

    steps = steps_of(random_rows(12), STEPS)
    expected = train_in_torch(theirs, steps, get_linear_schedule_with_warmup, PEAK)
    step, losses = Step(model.train(), adamw(DECAY), CLIP), []
    for number, rows in enumerate(steps):
        step.accumulate([collate(group) for group in split_step(rows, 128)], [0, number])
        rate = learning_rate_at(number, STEPS, PEAK, "linear", warmup_ratio=0.25)
        losses.append(step.update(rate)["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.05

    trained = {our_name(n) for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained == set(adapter_weights(model))

    # Ours to PEFT, and PEFT's to us.
    ids = np.random.default_rng(1).integers(3, 384, (2, 24))
    config = AdapterConfig(str(tmp_path / "base"), 4, 8.0, targets=targets)
    save_adapter(tmp_path / "ours", adapter_weights(model), config)
    loaded = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    assert_same(model.eval(), loaded, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    other = base.load(mx.float32)
    Adapter.open(tmp_path / "theirs").apply(other)
    assert_same(other.eval(), theirs, ids)


def assert_same(model, reference, ids) -> None:
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=2e-4)
