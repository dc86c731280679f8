"""The compiled step: any split gives the same update; nothing bad is applied."""

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from checkpoints import our_model
from mlx.utils import tree_flatten

from interviewmate_mlx import backend
from interviewmate_mlx.adapter.folder import adapter_weights
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.cpu_kernels import use_cpu_kernels
from interviewmate_mlx.model.falcon import Model, cross_entropy
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.training import step as step_module
from interviewmate_mlx.training.cpu_streams import CpuStreams
from interviewmate_mlx.training.loss import token_loss
from interviewmate_mlx.training.optimizer import adamw, learning_rate_at
from interviewmate_mlx.training.step import OneStream, Step, microbatch_loss, total_loss


def tiny_model(seed: int = 0, fast: bool = False) -> Model:
    model = our_model()
    mx.random.seed(seed)
    add_lora(model, ["query_key_value", "dense"], rank=4, alpha=8, dropout=0.2)
    if fast:
        use_cpu_kernels(model)
    return model.train()


def rows_of_unequal_length() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(Record("row"), rng.integers(0, 384, n).astype(np.int32), np.arange(n) >= prompt)
        for n, prompt in ((50, 40), (9, 2), (70, 5), (20, 19))
    ]


def one_update(
    groups: list[list[int]], width: int | None = None, *, fast: bool = False, streams: bool = False
) -> tuple[dict, dict]:
    """Two updates, so that momentum counts too, over the four rows in the given microbatches.

    SGD's, which are as exact as the gradients: AdamW divides a gradient by its own size, and so
    makes an error that is large beside a small number as large as the learning rate.
    """
    rows, model = rows_of_unequal_length(), tiny_model(fast=fast)
    executor = CpuStreams(2) if streams else OneStream()
    with executor.opened():
        step = Step(model, optim.SGD(0.0, momentum=0.9), 1.0, executor)
        for number in range(2):
            step.accumulate(
                [collate([rows[i] for i in group], width) for group in groups], [0, number]
            )
            numbers = step.update(1e-2)
        mx.eval(numbers, model.parameters())
    return adapter_weights(model), numbers


def assert_same_updates(weights: dict, expected: dict) -> None:
    """Weights after `one_update`, but for rounding.

    A gradient is a sum over 149 tokens behind some 40 roundings of two layers, forward and back:
    it errs by about sqrt(149 + 40) = 14 roundings of 2**-24 of its norm, which is clipped to 1,
    and by 5 times that at most. Two updates add it up 1 + 1.9 times, at a rate of 1e-2.
    """
    allowed = 5 * 14 * 2**-24 * 2.9 * 1e-2
    for name, array in expected.items():
        error = np.abs(np.array(weights[name]) - np.array(array)).max()
        assert error <= allowed + 2 * 2**-24 * np.abs(np.array(array)).max(), name


SPLITS = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 0, 2], [1]], [[2], [0, 1, 3]]]


@pytest.mark.parametrize("groups", SPLITS)
@pytest.mark.parametrize("fast", [False, True], ids=["mlx", "cpu_kernels"])
@pytest.mark.parametrize("streams", [False, True], ids=["in_turn", "side_by_side"])
def test_accumulation_equals_one_large_batch(groups, fast, streams):
    if streams and not backend.machine().cpu_streams:
        pytest.skip("streams need MLX's CPU backend, two cores and a known BLAS")
    expected, numbers = one_update([[0, 1, 2, 3]])
    weights, split_numbers = one_update(groups, fast=fast, streams=streams)
    assert_same_updates(weights, expected)
    for name in ("loss", "grad_norm"):
        assert split_numbers[name].item() == pytest.approx(numbers[name].item(), rel=1e-5)


def test_logits_in_chunks_give_the_same_update(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_has_trainable_head", lambda model: True)
        expected, numbers = one_update([[0, 1, 2, 3]])  # all logits at once, and autodiff
    monkeypatch.setattr(step_module, "tokens_at_once", lambda vocab_size: 7)
    weights, chunked = one_update([[0, 1, 2, 3]])
    assert_same_updates(weights, expected)
    for name in ("loss", "grad_norm"):
        assert chunked[name].item() == pytest.approx(numbers[name].item(), rel=1e-5)


def test_trainable_head_is_never_chunked(monkeypatch):
    """In chunks its own weights would get no gradient."""
    monkeypatch.setattr(step_module, "tokens_at_once", lambda vocab_size: 7)
    model = tiny_model()
    model.unfreeze()
    before = np.array(model.transformer.word_embeddings.weight)
    step = Step(model, adamw(), 0.0)
    step.accumulate([collate(rows_of_unequal_length())], [0, 0])
    mx.eval(step.update(1e-2), model.parameters())
    changed = np.array(model.transformer.word_embeddings.weight) != before
    # Also rows of tokens that no input holds: their gradient comes from the head alone.
    assert changed.any(axis=1).all()


def test_frozen_head_s_gradient_is_on_the_way_to_the_loss():
    model, arrays = tiny_model(), collate(rows_of_unequal_length()).arrays()
    num_layers = len(model.layers)
    *_, pieces = microbatch_loss(model, *arrays)
    # What leaves each block, the last of them normalised, and the gradient.
    assert len(pieces) == num_layers + 2
    assert pieces[-1].shape == (len(arrays[1]), model.args.hidden_size)
    model.eval()
    assert len(microbatch_loss(model, *arrays)[-1]) == num_layers + 1
    model.train().unfreeze()
    assert len(microbatch_loss(model, *arrays)[-1]) == num_layers + 1


def test_memory_does_not_grow_with_the_number_of_microbatches():
    model = tiny_model()
    step = Step(model, adamw(), max_grad_norm=1.0)
    batch = collate([rows_of_unequal_length()[2]] * 8)
    peaks = []
    for count in (1, 1, 8):
        mx.clear_cache()
        mx.reset_peak_memory()
        step.accumulate([batch] * count, [0, 0])
        mx.eval(step.update(1e-3), model.trainable_parameters())
        peaks.append(mx.get_peak_memory())
    # A GPU's queue holds what its next kernels need.
    assert peaks[2] < (1.1 if backend.machine().device == "cpu" else 2.5) * peaks[1]


@pytest.mark.parametrize("width", [69, 96, 200])
def test_padding_never_matters(width):
    expected, _ = one_update([[0, 1, 2, 3]])
    weights, _ = one_update([[0, 1, 2, 3]], width)
    assert_same_updates(weights, expected)


def test_update_that_is_not_finite_is_not_applied_and_neither_is_what_follows():
    model, rows = tiny_model(), rows_of_unequal_length()
    optimizer = adamw()
    step = Step(model, optimizer, max_grad_norm=1.0)
    batch = collate(rows)
    step.accumulate([batch], [0, 0])
    assert step.update(1e-2)["is_finite"].item()
    before = [np.array(a) for _, a in tree_flatten([adapter_weights(model), optimizer.state])]
    embedding = model.transformer.word_embeddings
    good = embedding.weight
    embedding.weight = good * math.nan
    step.accumulate([batch], [0, 0])
    assert not step.update(1e-2)["is_finite"].item()
    embedding.weight = good
    step.accumulate([batch], [0, 0])
    assert not step.update(1e-2)["is_finite"].item()
    after = [np.array(a) for _, a in tree_flatten([adapter_weights(model), optimizer.state])]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_frozen_weights_stay_as_they_were():
    model = tiny_model()
    frozen = {n: np.array(a) for n, a in tree_flatten(model.parameters()) if "lora" not in n}
    step = Step(model, adamw(0.1), max_grad_norm=0.0)
    step.accumulate([collate(rows_of_unequal_length())], [0, 0])
    mx.eval(step.update(1e-2), model.parameters())
    now = dict(tree_flatten(model.parameters()))
    for name, array in frozen.items():
        np.testing.assert_array_equal(np.array(now[name]), array)


def test_loss_is_the_reference_s_sum_and_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 50)).astype(np.float32) * 5
    targets, mask = rng.integers(0, 50, 6), np.array([1, 0, 1, 1, 0, 1], dtype=bool)
    ids = mx.array(targets.astype(np.int32))
    total, count, _ = token_loss(cross_entropy(mx.array(logits), ids), mx.array(mask), {})
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[mask]), torch.tensor(targets[mask]), reduction="sum"
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == 4
    halved = token_loss(
        cross_entropy(mx.array(logits).astype(mx.bfloat16), ids), mx.array(mask), {}
    )
    assert halved[0].dtype == mx.float32


def test_validation_loss_is_the_training_loss_before_the_update():
    model, rows = tiny_model(), rows_of_unequal_length()
    batch = collate(rows)
    model.eval()
    loss_sum, num_tokens = total_loss(model)([batch])
    model.train()
    step = Step(model, adamw(), 1.0)
    step.accumulate([batch], [0, 0])
    loss = step.update(1e-3)["loss"].item()
    assert loss_sum / num_tokens == pytest.approx(loss, rel=1e-6)


def test_adamw_equals_torch_s_from_the_first_step_on():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    ours, optimizer = {"w": mx.array(start)}, adamw(0.1)
    optimizer.learning_rate = 1e-2
    for _ in range(20):
        gradient = rng.normal(size=(5, 7)).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        ours = optimizer.apply_gradients({"w": mx.array(gradient)}, ours)
        np.testing.assert_allclose(np.array(ours["w"]), theirs.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "ratio"), [(159, 0.03), (10, 0.0), (1, 0.5), (7, 1.0)])
def test_learning_rate_equals_transformers(schedule, total, ratio):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(
        name, optimizer, num_warmup_steps=math.ceil(total * ratio), num_training_steps=total
    )
    for step in range(total):
        rate = learning_rate_at(step, total, 3e-4, schedule, ratio)
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
