"""Muon against torch's and MLX's own, and the rest of its weights against torch's AdamW."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon

from interviewmate_mlx.config import RunConfig, load_run
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.training.optimizer import Muon, orthogonalise
from interviewmate_mlx.training.task import choose_optimizer

SHAPES = {"wide": (8, 24), "tall": (24, 8), "embedding": (40, 8), "bias": (24,)}
MATRICES = ("wide", "tall")
BETAS = (0.9, 0.999)


def arrays(seed: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()
    }


def trained(optimizer: optim.Optimizer, names: list[str], rate: float, dtype=mx.float32):
    parameters = {name: arrays(0)[name].astype(dtype) for name in names}
    optimizer.init(parameters)
    for seed in (1, 2, 3):
        optimizer.learning_rate = rate
        gradients = {name: arrays(seed)[name] for name in names}
        parameters = optimizer.apply_gradients(gradients, parameters)
    return {name: np.array(array.astype(mx.float32)) for name, array in parameters.items()}


def torch_trained(name: str, make) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.tensor(np.array(arrays(0)[name])))
    optimizer = make([parameter])
    for seed in (1, 2, 3):
        parameter.grad = torch.tensor(np.array(arrays(seed)[name]))
        optimizer.step()
    return parameter.detach().numpy()


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
    assert not np.array(orthogonalise(mx.zeros((3, 2)))).any()


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_moves_as_torch_s_muon_moves_it(name):
    """Torch iterates in bfloat16: in each of five steps some roundings of 2^-9."""
    rate = 1e-2
    expected = torch_trained(
        name, lambda p: torch.optim.Muon(p, rate, 0.1, adjust_lr_fn="match_rms_adamw")
    )
    got = trained(Muon(0.1, MATRICES), [name], rate)[name]
    start = np.array(arrays(0)[name])
    moved = np.linalg.norm(expected - start)
    assert moved > 0.05
    assert np.linalg.norm(got - expected) < 0.03 * moved


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_moves_as_mlx_s_muon_moves_it_but_for_the_scale(name):
    rows, columns = SHAPES[name]
    # Theirs scales by sqrt(max(1, rows / columns)), ours by 0.2 sqrt(max(rows, columns)).
    ratio = 0.2 * max(rows, columns) ** 0.5 / max(1, rows / columns) ** 0.5
    got = trained(Muon(0.0, MATRICES), [name], 1e-2)
    expected = trained(optim.Muon(1e-2 * ratio, weight_decay=0.0), [name], 1e-2 * ratio)
    np.testing.assert_allclose(got[name], expected[name], atol=1e-5)


def test_embedding_and_biases_move_as_torch_s_adamw_moves_them():
    got = trained(Muon(0.1, MATRICES), list(SHAPES), 1e-2)
    for name, decay in (("embedding", 0.1), ("bias", 0.0)):
        expected = torch_trained(
            name, lambda p, decay=decay: torch.optim.AdamW(p, 1e-2, BETAS, 1e-8, decay)
        )
        np.testing.assert_allclose(got[name], expected, atol=1e-6)


def test_narrow_weights_have_a_master():
    """Steps below the rounding of bfloat16 add up."""
    wide = trained(Muon(0.1, MATRICES), list(SHAPES), 1e-4)
    optimizer = Muon(0.1, MATRICES)
    trained(optimizer, list(SHAPES), 1e-4, mx.bfloat16)
    for name in SHAPES:
        start = np.array(arrays(0)[name].astype(mx.bfloat16).astype(mx.float32))
        moved = np.array(optimizer.state[name]["master"]) - start
        np.testing.assert_allclose(moved, wide[name] - np.array(arrays(0)[name]), atol=1e-6)
        assert ("momentum" in optimizer.state[name]) == (name in MATRICES)


def test_step_of_a_matrix_is_as_large_as_adamw_s():
    """The root mean square of AdamW's steps while training is 0.2 to 0.4 of the rate."""
    optimizer = Muon(0.0, MATRICES)
    start = {"wide": arrays(0)["wide"]}
    optimizer.init(start)
    optimizer.learning_rate = 1.0
    after = optimizer.apply_gradients({"wide": arrays(1)["wide"]}, start)["wide"]
    step = np.array(after) - np.array(start["wide"])
    assert np.sqrt((step**2).mean()) == pytest.approx(0.2, abs=0.05)


def test_it_takes_the_matrices_of_the_blocks():
    run = RunConfig().replace(train={"weights": "all", "optimizer": "muon"})
    optimizer = choose_optimizer(run, our_model(tiny_falcon(6, 8, layers=2)))
    linear = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
              "mlp.dense_4h_to_h")  # fmt: skip
    assert optimizer.matrices == {
        f"transformer.h.{n}.{name}.weight" for n in (0, 1) for name in linear
    }


def test_a_lora_has_no_muon():
    with pytest.raises(ConfigError, match=r"train\.optimizer: got 'muon', expected 'adamw'"):
        load_run("A", ["train.optimizer=muon"])
