"""Recomputed blocks: the same gradients, dropout included, for less memory."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import tiny_falcon
from mlx.utils import tree_flatten

from interviewmate_mlx import backend
from interviewmate_mlx.data.batches import collate
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.lora import add_lora, lora_layers
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.training.optimizer import adamw
from interviewmate_mlx.training.step import Step


def microbatch(rows: int = 2, length: int = 50):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 384, (rows, length)).astype(np.int32)
    return collate([Example(Record("row"), row, np.arange(length) >= 9) for row in tokens])


def lora_model(dropout: float, layers: int = 3) -> Model:
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(tiny_falcon(heads=4, layers=layers).config.to_dict()))
    add_lora(model, ["query_key_value", "dense_4h_to_h"], rank=4, alpha=8, dropout=dropout)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = 0.1 * mx.random.normal(layer.lora_B.weight.shape)
    return model.train()


def gradients(model: Model, batch) -> dict[str, np.ndarray]:
    """The sums over a microbatch."""
    step = Step(model, adamw())
    step.accumulate([batch], [7])
    loss_sum, _, _, found = step.sums
    return {name: np.array(g) for name, g in tree_flatten(found)} | {"loss": np.array(loss_sum)}


def same(one, other, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_gradients_are_those_of_kept_activations(dropout):
    """So dropout drops the same the second time."""
    model, batch = lora_model(dropout), microbatch()
    expected = gradients(model, batch)
    use_gradient_checkpointing(model)
    same(gradients(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_dropout_outside_of_a_step_drops_the_same_the_second_time():
    model = lora_model(0.5, layers=1)
    use_gradient_checkpointing(model)
    (block,) = model.layers
    rng, x = mx.random.key(1), mx.random.normal((2, 48, model.args.hidden_size))
    direction = mx.random.normal(x.shape, key=rng)

    def along(t):
        mx.random.seed(3)
        return block(x + t * direction, "causal").astype(mx.float32).square().mean()

    slope = mx.grad(along)(mx.array(0.0)).item()
    step = 1e-2
    finite = (along(mx.array(step)) - along(mx.array(-step))).item() / (2 * step)
    assert slope == pytest.approx(finite, rel=2e-2)


def test_paths_of_parameters_stay():
    model = lora_model(0.1)
    before = [name for name, _ in tree_flatten(model.parameters())]
    use_gradient_checkpointing(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == before


@pytest.mark.skipif(
    backend.machine().device == "cuda",
    reason="a CUDA graph holds what its kernels need until all of them are done",
)
def test_less_is_kept():
    model, batch = lora_model(0.1, layers=8), microbatch(rows=4, length=200)

    def peak() -> int:
        measure = partial(gradients, model, batch)
        measure()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        measure()
        return mx.get_peak_memory() - before

    kept = peak()
    use_gradient_checkpointing(model)
    assert peak() < 0.75 * kept
