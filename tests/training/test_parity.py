"""A training run against PEFT and torch: same start, same rows, same order, dropout 0, fp32."""

import copy

import numpy as np
import pytest
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, get_peft_model
from peft_training import (
    CLIP,
    DECAY,
    our_name,
    random_rows,
    start_alike,
    steps_of,
    train_in_torch,
)
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from interviewmate_mlx.adapter.folder import adapter_weights
from interviewmate_mlx.data.batches import collate, split_step
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.gpu_kernels import (
    use_frozen_norms,
    use_fused_attention,
    use_padded_attention,
)
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step

STEPS = 50


@pytest.mark.parametrize(
    ("schedule", "reference_schedule", "targets"),
    [
        ("cosine", get_cosine_schedule_with_warmup, ["query_key_value"]),
        ("linear", get_linear_schedule_with_warmup, ["query_key_value", "dense_h_to_4h"]),
    ],
)
@pytest.mark.parametrize(
    "paths",
    [
        [],
        [use_cpu_kernels],
        [use_gradient_checkpointing],
        [use_cpu_kernels, use_gradient_checkpointing],
        [use_fused_attention, use_frozen_norms],
        [use_fused_attention, use_frozen_norms, use_gradient_checkpointing],
        [use_padded_attention, use_frozen_norms, use_gradient_checkpointing],
    ],
    ids=["mlx", "cpu", "recompute", "cpu_recompute", "gpu", "gpu_recompute", "cuda_recompute"],
)
def test_fifty_updates_equal_peft_s(schedule, reference_schedule, targets, paths):
    heads, head_dim = (2, 64) if use_fused_attention in paths else (6, 8)
    base = tiny_falcon(heads, head_dim, layers=2)
    model = our_model(base)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(copy.deepcopy(base), lora)
    add_lora(model, targets, rank=4, alpha=8, dropout=0.0)
    start = {name: np.array(array) for name, array in adapter_weights(model).items()}
    start_alike(reference, start)

    steps, peak = steps_of(random_rows(22), STEPS), 5e-3
    expected = train_in_torch(reference, steps, reference_schedule, peak)

    for use in paths:
        use(model)
    step = Step(model.train(), adamw(DECAY), CLIP)
    losses, norms = [], []
    for number, rows in enumerate(steps):
        groups = split_step(rows, token_budget=128)
        step.accumulate([collate(group) for group in groups], [0, number])
        rate = learning_rate_at(number, STEPS, peak, schedule, warmup_ratio=0.1)
        numbers = step.update(rate)
        losses.append(numbers["loss"].item())
        norms.append(numbers["grad_norm"].item())

    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert max(norms) > CLIP > min(norms)  # so clipping was at work, and not always
    assert losses[-1] < losses[0] - 0.1  # and something was learned
    trained = {n: p.detach().numpy() for n, p in reference.named_parameters() if p.requires_grad}
    ours = adapter_weights(model)
    assert {our_name(name) for name in trained} == set(ours)
    for name, matrix in trained.items():
        np.testing.assert_allclose(np.array(ours[our_name(name)]), matrix, atol=1e-3)
