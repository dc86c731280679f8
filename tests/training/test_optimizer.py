"""Learning rates against transformers', LoRA+ against PEFT's optimizer."""

import copy
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_training import our_name, random_rows, start_alike, steps_of
from transformers import get_scheduler

from interviewmate_mlx.adapter.folder import adapter_weights
from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.metrics import read_metrics
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import Step

RATE, DECAY, TARGETS = 2e-3, 0.1, ["query_key_value", "dense"]


@pytest.mark.parametrize(("total", "warmup", "floor"), [(159, 5, 0.1), (10, 0, 0.5), (7, 7, 0.0)])
def test_cosine_with_a_floor_and_warmup_in_steps_equal_transformers(total, warmup, floor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs={"min_lr_rate": floor},
    )
    for step in range(total):
        rate = learning_rate_at(step, total, 3e-4, "cosine", 0.0, warmup, floor)
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warmup_in_steps_takes_the_place_of_the_share():
    by_steps = [learning_rate_at(n, 100, 1.0, "constant", 0.5, 10) for n in range(12)]
    assert by_steps == [n / 10 for n in range(10)] + [1.0, 1.0]
    assert learning_rate_at(25, 100, 1.0, "constant", 0.5, 0) == 0.5


def test_loraplus_equals_peft_s_optimizer():
    base = tiny_falcon(6, 8, layers=2)
    model = our_model(base)
    add_lora(model, TARGETS, rank=4, alpha=8)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    reference = get_peft_model(copy.deepcopy(base), lora)
    start_alike(reference, {n: np.array(a) for n, a in adapter_weights(model).items()})
    theirs = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0, loraplus_weight_decay=DECAY
    )
    step = Step(model.train(), adamw(DECAY, plus_ratio=16.0), 0.0)
    losses, expected = [], []
    for number, rows in enumerate(steps_of(random_rows(22), 20)):
        count, total = sum(int(row.loss_mask.sum()) for row in rows), 0.0
        for row in rows:
            ids = torch.tensor(row.tokens[None].astype(np.int64))
            labels = torch.where(torch.tensor(row.loss_mask[None]), ids, -100)[0, 1:]
            logits = reference(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        theirs.step()
        theirs.zero_grad()
        expected.append(total)
        step.accumulate([collate(rows)], [0, number])
        losses.append(step.update(RATE)["loss"].item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    ours = adapter_weights(model)
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.detach().numpy()
            np.testing.assert_allclose(np.array(ours[our_name(name)]), matrix, atol=2e-3)


def test_a_ratio_of_1_is_plain_adamw_and_b_alone_is_faster():
    def moved(ratio):
        mx.random.seed(0)
        optimizer = adamw(0.0, ratio)
        parameters = {
            "lora_A": {"weight": mx.zeros(3)[None]},
            "lora_B": {"weight": mx.zeros((3, 1))},
        }
        gradients = {"lora_A": {"weight": mx.ones((1, 3))}, "lora_B": {"weight": mx.ones((3, 1))}}
        optimizer.init(parameters)
        optimizer.learning_rate = 1e-3
        found = optimizer.apply_gradients(gradients, parameters)
        return found["lora_A"]["weight"][0, 0].item(), found["lora_B"]["weight"][0, 0].item()

    assert moved(1.0) == pytest.approx((-1e-3, -1e-3), rel=1e-5)
    assert moved(8.0) == pytest.approx((-1e-3, -8e-3), rel=1e-5)


def test_a_run_with_loraplus_and_a_floor_resumes_to_the_same_bytes(tiny_base, questions, tmp_path):
    settings = [
        f"model.base={tiny_base}",
        f"data.path={questions}",
        "lora.plus_ratio=8",
        "train.schedule=cosine",
        "train.floor=0.25",
        "train.warmup_steps=2",
        "train.learning_rate=1e-3",
    ]
    run, whole, out = load_run("A", settings), tmp_path / "whole", tmp_path / "parts"
    list(train(run, whole))
    lines = read_metrics(whole / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "grad_norm" in line]
    assert rates[:3] == [0, 5e-4, 1e-3]
    last = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 6 / 7))
    assert rates[-1] == pytest.approx(last * 1e-3)
    list(train(run, out, stop=lambda: len(read_metrics(out / "metrics.jsonl")) > 4))
    list(train(run, out, resume=True))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_floor_without_cosine_is_refused():
    with pytest.raises(ConfigError, match="expected 0 but with schedule cosine"):
        load_run("A", ["train.floor=0.1"])
