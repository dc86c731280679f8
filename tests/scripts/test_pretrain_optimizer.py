"""Muon against MLX's own, and the rest of its weights against torch's AdamW."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from pretrain_optimizer import Muon, orthogonalise

VOCAB = 40
SHAPES = {"wide": (8, 24), "tall": (24, 8), "embedding": (VOCAB, 8), "bias": (24,)}


def arrays(seed: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()
    }


def trained(optimizer: optim.Optimizer, names: list[str], rate: float) -> dict[str, np.ndarray]:
    parameters = {name: arrays(0)[name] for name in names}
    optimizer.init(parameters)
    for seed in (1, 2, 3):
        optimizer.learning_rate = rate
        gradients = {name: arrays(seed)[name] for name in names}
        parameters = optimizer.apply_gradients(gradients, parameters)
    return {name: np.array(array) for name, array in parameters.items()}


def test_orthogonalised_matrix_turns_and_hardly_stretches():
    matrix = np.array(arrays(5)["wide"])
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    assert values.max() / values.min() > 1.5
    got = np.array(orthogonalise(mx.array(matrix)))
    inside = left.T @ got @ right.T  # diagonal where the directions are the same
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4)
    assert 0.65 < np.diag(inside).min() <= np.diag(inside).max() < 1.25
    np.testing.assert_allclose(
        np.array(orthogonalise(mx.array(matrix.T))), got.T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_matrix_moves_as_mlx_s_muon_moves_it_but_for_the_scale(name):
    rows, columns = SHAPES[name]
    # Theirs scales by sqrt(max(1, rows / columns)), ours by 0.2 sqrt(max(rows, columns)).
    ratio = 0.2 * max(rows, columns) ** 0.5 / max(1, rows / columns) ** 0.5
    got = trained(Muon(VOCAB, weight_decay=0.0), [name], 1e-2)
    expected = trained(optim.Muon(1e-2 * ratio, weight_decay=0.0), [name], 1e-2 * ratio)
    np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    assert np.abs(got[name] - np.array(arrays(0)[name])).max() > 1e-3


def test_embedding_and_biases_move_as_torch_s_adamw_moves_them():
    got = trained(Muon(VOCAB, weight_decay=0.1), list(SHAPES), 1e-2)
    for name, decay in (("embedding", 0.1), ("bias", 0.0)):
        parameter = torch.nn.Parameter(torch.tensor(np.array(arrays(0)[name])))
        adamw = torch.optim.AdamW([parameter], 1e-2, (0.9, 0.95), 1e-8, decay)
        for seed in (1, 2, 3):
            parameter.grad = torch.tensor(np.array(arrays(seed)[name]))
            adamw.step()
        np.testing.assert_allclose(got[name], parameter.detach().numpy(), atol=1e-6)


def test_matrix_decays_by_the_rate_times_the_decay():
    optimizer = Muon(VOCAB, weight_decay=0.1)
    start = {"wide": arrays(0)["wide"]}
    optimizer.init(start)
    optimizer.learning_rate = 0.5
    after = optimizer.apply_gradients({"wide": mx.zeros((8, 24))}, start)
    np.testing.assert_allclose(np.array(after["wide"]), np.array(start["wide"]) * 0.95, rtol=1e-6)


def test_step_of_a_matrix_is_as_large_as_adamw_s():
    """The root mean square of AdamW's steps while training is 0.2 to 0.4 of the rate."""
    optimizer = Muon(VOCAB, weight_decay=0.0)
    start = {"wide": arrays(0)["wide"]}
    optimizer.init(start)
    optimizer.learning_rate = 1.0
    after = optimizer.apply_gradients({"wide": arrays(1)["wide"]}, start)["wide"]
    step = np.array(after) - np.array(start["wide"])
    assert np.sqrt((step**2).mean()) == pytest.approx(0.2, abs=0.05)
