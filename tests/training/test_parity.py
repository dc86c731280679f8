"""A training run against PEFT and torch: same start, same rows, same order, dropout 0, fp32."""

import copy

import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from interviewmate_mlx.adapter.folder import PREFIX, adapter_weights
from interviewmate_mlx.data.batches import collate, epoch_steps, split_step
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.gpu_kernels import use_fused_attention
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step

STEPS, BATCH, CLIP, DECAY = 50, 4, 0.5, 0.01


def random_rows(count: int) -> list[Example]:
    """Rows of unequal length with answers of unequal length."""
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        length = int(rng.integers(8, 60))
        prompt = int(rng.integers(2, length - 2))
        tokens = rng.integers(0, 384, length).astype(np.int32)
        rows.append(Example(Record("row"), tokens, np.arange(length) >= prompt))
    return rows


def steps_of(rows: list[Example]) -> list[list[Example]]:
    lengths, epoch, steps = [len(row) for row in rows], 0, []
    while len(steps) < STEPS:
        steps += [[rows[i] for i in s] for s in epoch_steps(lengths, BATCH, 0, epoch)]
        epoch += 1
    return steps[:STEPS]


def train_in_torch(model, steps, schedule, peak) -> list[float]:
    """A row at a time; the sum of the losses divided by the tokens of the whole step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=DECAY)
    scheduler = schedule(optimizer, num_warmup_steps=5, num_training_steps=STEPS)
    losses = []
    for rows in steps:
        num_tokens = sum(int(row.loss_mask.sum()) for row in rows)
        total = 0.0
        for row in rows:
            ids = torch.tensor(row.tokens[None].astype(np.int64))
            labels = torch.where(torch.tensor(row.loss_mask[None]), ids, -100)
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            (loss / num_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total / num_tokens)
    return losses


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
        [use_fused_attention],
        [use_fused_attention, use_gradient_checkpointing],
    ],
    ids=["mlx", "cpu", "recompute", "cpu_recompute", "gpu", "gpu_recompute"],
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
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.tensor(start[_ours(name)]))

    steps, peak = steps_of(random_rows(22)), 5e-3
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
    assert {_ours(name) for name in trained} == set(ours)
    for name, matrix in trained.items():
        np.testing.assert_allclose(np.array(ours[_ours(name)]), matrix, atol=1e-3)


def _ours(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".default", "")
