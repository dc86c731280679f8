"""LoRA by hand against its formula and against PEFT's counts."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import tiny_falcon
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import AdapterError
from interviewmate_mlx.model.falcon import Model, ModelArgs
from interviewmate_mlx.model.lora import (
    LoRALinear,
    add_lora,
    count_parameters,
    find_targets,
    lora_layers,
    lora_scale,
    merge_lora,
)

FALCON_RW_1B = ModelArgs(
    hidden_size=2048,
    num_attention_heads=32,
    num_hidden_layers=24,
    vocab_size=50304,
    ffn_hidden_size=8192,
    bias=True,
)
ALL_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def tiny_model() -> Model:
    return Model(ModelArgs.from_dict(tiny_falcon().config.to_dict()))


def randomise_lora(model: nn.Module, seed: int = 0) -> None:
    """Give B values too, so that the update is not zero."""
    mx.random.seed(seed)
    for _, layer in lora_layers(model):
        layer.lora_B.weight = mx.random.normal(layer.lora_B.weight.shape) * 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_its_formula(bias):
    linear = nn.Linear(12, 20, bias=bias)
    layer = LoRALinear(linear, rank=3, scale=1.7, dropout=0.0)
    layer.lora_B.weight = mx.random.normal((20, 3))
    x = mx.random.normal((5, 12))
    w, a, b = (np.array(m.weight) for m in (linear, layer.lora_A, layer.lora_B))
    expected = np.array(x) @ w.T + 1.7 * np.array(x) @ a.T @ b.T
    if bias:
        expected += np.array(linear.bias)
    np.testing.assert_allclose(np.array(layer(x)), expected, atol=1e-5)


def test_fresh_layer_changes_nothing_and_starts_as_peft_does():
    linear = nn.Linear(64, 32)
    layer = LoRALinear(linear, rank=256, scale=2.0, dropout=0.0)
    x = mx.random.normal((5, 64))
    assert mx.array_equal(layer(x), linear(x))
    a = np.array(layer.lora_A.weight)
    bound = 1 / math.sqrt(64)  # kaiming_uniform_(a=sqrt(5)) over 64 inputs
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_output_keeps_the_base_s_dtype_and_the_matrices_float32():
    linear = nn.Linear(16, 16)
    linear.set_dtype(mx.bfloat16)
    layer = LoRALinear(linear, rank=4, scale=2.0, dropout=0.0)
    assert layer(mx.ones((2, 16), dtype=mx.bfloat16)).dtype == mx.bfloat16
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == mx.float32


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match="expected from 0 to below 1"):
        LoRALinear(nn.Linear(4, 4), rank=2, scale=1.0, dropout=p)


def test_dropout_drops_inputs_of_the_update_alone():
    mx.random.seed(0)
    layer = LoRALinear(nn.Linear(1000, 4, bias=False), rank=2, scale=1.0, dropout=0.25)
    layer.base_layer.weight = mx.zeros((4, 1000))
    layer.lora_A.weight, layer.lora_B.weight = mx.ones((2, 1000)), mx.ones((4, 2))
    x = mx.ones((200, 1000))
    kept = np.array(layer.train()(x)) / 2 * 0.75 / 1000  # the share of inputs that is left
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    assert kept.std() > 0
    assert np.array(layer.eval()(x)).std() == 0


@pytest.mark.parametrize(("rank", "trainable"), [(8, 1_572_864), (4, 786_432), (2, 393_216)])
def test_falcon_rw_1b_has_the_original_project_s_trainable_counts(rank, trainable):
    model = Model(FALCON_RW_1B)
    add_lora(model, ["query_key_value"], rank, 2 * rank)
    assert count_parameters(model) == (trainable, 1_311_625_216 + trainable)


def test_falcon_rw_1b_totals_are_the_original_project_s_when_trimmed():
    full, trimmed = (
        Model(FALCON_RW_1B),
        Model(ModelArgs(**{**vars(FALCON_RW_1B), "vocab_size": 50257})),
    )
    for model in (full, trimmed):
        add_lora(model, ["query_key_value"], 8, 16)
    assert count_parameters(full)[1] == 1_313_198_080
    assert count_parameters(trimmed)[1] == 1_313_101_824


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantised_base_counts_as_its_unquantised_self(bits):
    model, quantised = (
        Model(ModelArgs.from_dict(tiny_falcon(head_dim=32).config.to_dict())) for _ in range(2)
    )
    nn.quantize(quantised, group_size=64, bits=bits)
    kinds = {type(module) for _, module in quantised.named_modules()}
    assert {nn.QuantizedLinear, nn.QuantizedEmbedding} <= kinds
    for each in (model, quantised):
        add_lora(each, ["query_key_value"], 4, 8)
    assert count_parameters(quantised) == count_parameters(model)


def test_quantised_layer_without_biases_counts_as_its_unquantised_self():
    layers = nn.Sequential(nn.Linear(64, 48))
    assert count_parameters(layers)[1] == 64 * 48 + 48
    nn.quantize(layers, group_size=32, bits=4, mode="mxfp4")
    assert layers.layers[0].get("biases") is None
    assert count_parameters(layers)[1] == 64 * 48 + 48


def test_only_the_lora_matrices_can_be_trained():
    model = tiny_model()
    add_lora(model, ["query_key_value"], 2, 4)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names == [
        f"transformer.h.{i}.self_attention.query_key_value.lora_{m}.weight"
        for i in range(2)
        for m in "AB"
    ]


def test_targets_are_found_by_the_end_of_their_path():
    model = tiny_model()
    assert len(find_targets(model, ALL_LINEAR)) == 8
    assert find_targets(model, ["h.1.self_attention.dense"]) == [
        "transformer.h.1.self_attention.dense"
    ]


def test_target_that_matches_nothing_is_refused_with_the_choices():
    with pytest.raises(AdapterError, match=r"(?s)q_proj.*dense, .*query_key_value"):
        add_lora(tiny_model(), ["query_key_value", "q_proj"], 2, 4)
    with pytest.raises(AdapterError, match="none given"):
        add_lora(tiny_model(), [], 2, 4)


@pytest.mark.parametrize("rank", [65, 10**9])
def test_rank_larger_than_a_layer_is_refused_by_the_layer_s_name(rank):
    model = tiny_model()
    before = [name for name, _ in tree_flatten(model.trainable_parameters())]
    with pytest.raises(AdapterError) as caught:
        add_lora(model, ["h.1.mlp.dense_h_to_4h"], rank, 4)
    expected = f"transformer.h.1.mlp.dense_h_to_4h: got rank {rank}, expected at most 64"
    assert expected in str(caught.value)
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == before


def test_rank_as_large_as_a_layer_is_taken():
    model = tiny_model()
    add_lora(model, ["h.1.mlp.dense_h_to_4h"], 64, 4)
    assert count_parameters(model)[0] == 64 * (64 + 256)


def test_second_lora_is_refused():
    model = tiny_model()
    add_lora(model, ["query_key_value"], 2, 4)
    with pytest.raises(AdapterError, match="already"):
        add_lora(model, ["dense"], 2, 4)


def test_merged_model_gives_the_same_logits():
    model = tiny_model()
    add_lora(model, ALL_LINEAR, 4, 8)
    randomise_lora(model)
    ids = mx.arange(20)[None]
    expected = np.array(model(ids))
    merge_lora(model)
    assert not list(lora_layers(model))
    np.testing.assert_allclose(np.array(model(ids)), expected, atol=1e-4)


def test_merging_into_a_quantised_base_keeps_the_update():
    model = Model(ModelArgs.from_dict(tiny_falcon(head_dim=32).config.to_dict()))
    nn.quantize(model, group_size=64, bits=4)
    add_lora(model, ["query_key_value"], 4, 8)
    randomise_lora(model)
    ids = mx.arange(20)[None]
    expected = np.array(model(ids))
    merge_lora(model)
    np.testing.assert_allclose(np.array(model(ids)), expected, atol=1e-3)


def test_rslora_scales_by_the_root_of_the_rank():
    assert lora_scale(16, 32) == 2
    assert lora_scale(16, 32, rslora=True) == 8
    model = tiny_model()
    add_lora(model, ["dense"], 16, 32, rslora=True)
    assert {layer.scale for _, layer in lora_layers(model)} == {8.0}
