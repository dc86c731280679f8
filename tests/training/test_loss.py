"""The loss by chunks against the loss at once."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from interviewmate_mlx import backend
from interviewmate_mlx.model import cpu_kernels
from interviewmate_mlx.training.loss import chunked_cross_entropy, token_loss, tokens_at_once


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize("function", [nn.losses.cross_entropy, cpu_kernels.cross_entropy])
def test_chunks_give_the_loss_and_the_gradient_of_the_whole(chunk, function):
    mx.random.seed(0)
    weight, hidden = mx.random.normal((50, 8)), mx.random.normal((20, 8))
    targets, mask = mx.random.randint(0, 50, (20,)), mx.arange(20) < 17

    def head(states):
        return states @ weight.T

    def whole(states):
        return token_loss(nn.losses.cross_entropy(head(states), targets), mask, {})[0]

    def chunked(states):
        losses, gradient = chunked_cross_entropy(head, states, targets, chunk, function)
        # Not the loss itself but its third: the chunks' gradients follow what comes after.
        return token_loss(losses, mask, {})[0] / 3, gradient

    (loss, along), gradient = mx.compile(mx.value_and_grad(chunked))(hidden)
    expected, reference = mx.value_and_grad(lambda h: whole(h) / 3)(hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), np.array(reference), atol=1e-6)
    np.testing.assert_allclose(np.array(along)[:17], 3 * np.array(reference)[:17], atol=3e-6)


@pytest.mark.parametrize(("chunk", "sizes"), [(7, [7, 7, 6]), (15, [10, 10]), (64, [20])])
def test_chunks_are_of_one_size_but_for_the_last(chunk, sizes):
    found = []

    def head(states):
        found.append(len(states))
        return states @ mx.ones((50, 8)).T

    chunked_cross_entropy(head, mx.ones((20, 8)), mx.zeros(20, mx.int32), chunk)
    assert found == sizes


def test_on_cuda_a_chunk_has_four_times_the_tokens(monkeypatch):
    here = replace(backend.machine(), device="metal")
    monkeypatch.setattr(backend, "machine", lambda: here)
    assert tokens_at_once(50_304) == 512
    here = replace(here, device="cuda")
    assert tokens_at_once(50_304) == 2048
    assert tokens_at_once(32_000) == 3219


def test_each_token_s_gradient_in_chunks_follows_what_its_own_loss_counts():
    mx.random.seed(0)
    weight, hidden = mx.random.normal((50, 8)), mx.random.normal((20, 8))
    targets, share = mx.random.randint(0, 50, (20,)), mx.random.normal((20,))

    def whole(states):
        return (share * nn.losses.cross_entropy(states @ weight.T, targets) ** 2).sum()

    def chunked(states):
        losses, _ = chunked_cross_entropy(lambda s: s @ weight.T, states, targets, 7)
        return (share * losses**2).sum()

    expected, gradient = mx.grad(whole)(hidden), mx.grad(chunked)(hidden)
    np.testing.assert_allclose(np.array(gradient), np.array(expected), rtol=1e-4, atol=1e-4)


def test_chunks_keep_a_gradient_in_the_hidden_states_dtype():
    hidden = mx.random.normal((6, 8)).astype(mx.bfloat16)
    weight = mx.random.normal((50, 8)).astype(mx.bfloat16)
    targets = mx.zeros(6, dtype=mx.int32)

    def loss(states):
        return chunked_cross_entropy(lambda s: s @ weight.T, states, targets, 4)[0].sum()

    value, gradient = mx.value_and_grad(loss)(hidden)
    assert (value.dtype, gradient.dtype) == (mx.float32, mx.bfloat16)
