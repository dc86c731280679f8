"""mlx-lm's networks against transformers', and the configs that are refused."""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from networks import ARCHITECTURES, edit_config, random_network, write_network
from transformers import AutoModelForCausalLM

from interviewmate_mlx.base.base import Base
from interviewmate_mlx.errors import ModelError
from interviewmate_mlx.model.architectures import TESTED
from interviewmate_mlx.model.lora import find_targets, resolve_targets
from interviewmate_mlx.model.recompute import use_gradient_checkpointing
from interviewmate_mlx.training.task import choose_kernels

IDS = np.random.default_rng(0).integers(3, 384, (2, 48))
# Float32 sums of at most 96 products in some 30 places one after the other, of logits below 30:
# measured at most 6e-5, most below 3e-5.
LOGITS_ATOL = 1e-4

ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}


def logits_of(reference) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(IDS)).logits.numpy()


def assert_same_logits(folder, reference):
    model = Base.open(folder).load(mx.float32)
    np.testing.assert_allclose(
        np.array(model(mx.array(IDS))), logits_of(reference), atol=LOGITS_ATOL
    )
    return model


def test_every_tested_network_is_in_these_tests():
    assert set(ARCHITECTURES) == set(TESTED)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_equal_transformers(model_type, tmp_path):
    reference = write_network(tmp_path, model_type)
    model = assert_same_logits(tmp_path, reference)
    # The states before the head, and the head alone, at some tokens.
    hidden = model.states(mx.array(IDS))[-1]
    chosen = mx.array([3, 17, 60])
    logits = model.head(hidden.reshape(-1, hidden.shape[-1])[chosen])
    whole = model(mx.array(IDS)).reshape(-1, logits.shape[-1])[chosen]
    np.testing.assert_allclose(np.array(logits), np.array(whole), atol=LOGITS_ATOL)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "starcoder2"])
def test_head_may_be_the_embedding_or_not(model_type, tied, tmp_path):
    reference = write_network(tmp_path, model_type, tie_word_embeddings=tied)
    assert_same_logits(tmp_path, reference)


def test_key_that_is_absent_means_what_it_means_to_transformers(tmp_path):
    """mlx-lm ties the head of a llama whose config does not say so; transformers does not."""
    reference = write_network(tmp_path, "llama", tie_word_embeddings=False)
    edit_config(tmp_path, tie_word_embeddings=None, num_key_value_heads=2)
    assert "tie_word_embeddings" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_logits(tmp_path, reference)


@pytest.mark.parametrize("theta", [1e4, 3e5])
@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "smollm3"])
def test_rotary_settings_of_today_are_translated(model_type, kind, theta, tmp_path):
    rope = {**ROPE[kind], "rope_theta": theta}
    assert_same_logits(tmp_path, write_network(tmp_path, model_type, rope_parameters=rope))


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_settings_of_older_configs_are_read(kind, tmp_path):
    rope = {**ROPE[kind], "rope_theta": 3e5}
    reference = write_network(tmp_path, "llama", rope_parameters=rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    edit_config(tmp_path, rope_parameters=None, rope_theta=3e5, rope_scaling=scaling)
    assert_same_logits(tmp_path, reference)


def test_rotary_factors_for_short_rows_are_taken(tmp_path):
    reference = write_network(
        tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64
    )
    assert_same_logits(tmp_path, reference)
    assert Base.open(tmp_path).network.longest_row == 64


@pytest.mark.parametrize(("model_type", "expected"), [("gemma2", 64), ("olmo3", None)])
def test_window_that_is_not_computed_limits_the_rows(model_type, expected, tmp_path):
    write_network(tmp_path, model_type)
    network = Base.open(tmp_path).network
    assert network.longest_row == expected
    assert network.context == (expected or 128)


REFUSED = {
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected one"),
    "biases that are not there": ("qwen3", {"attention_bias": True}, "attention_bias: got True"),
    "both directions": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention: got True",
    ),
    "an untied head": (
        "cohere",
        {"tie_word_embeddings": False},
        "tie_word_embeddings: got False, expected True",
    ),
    "a rotary kind": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type: got 'dynamic', expected one of default, linear, llama3, yarn, longrope",
    ),
    "a rotary kind that the network does not know": (
        "starcoder2",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type: got 'linear', expected one of default",
    ),
    "a part of the heads": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor: got 0.5, expected none",
    ),
    "caps of scores": (
        "gemma3_text",
        {"attn_logit_softcapping": 30.0},
        "attn_logit_softcapping: got 30.0, expected None",
    ),
    "blocks in no order": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["sliding_attention"]},
        "layer_types: got",
    ),
    "a size": ("llama", {"intermediate_size": 1 << 40}, "intermediate_size: got 1099511627776"),
    "code": ("llama", {"model_file": "net.py"}, "model_file: got 'net.py', expected none"),
    "a vision tower": ("llama", {"vision_config": {}}, "vision_config: expected none"),
    "no such network": ("llama", {"model_type": "lllama"}, "model_type: got 'lllama', expected"),
    "a path": ("llama", {"model_type": "../x"}, "model_type: got '../x'"),
    "a network whose own package is missing": ("llama", {"model_type": "olmo"}, "got 'olmo'"),
    "a helper's file": ("llama", {"model_type": "cache"}, "model_type: got 'cache'"),
    "no size": ("llama", {"hidden_size": None, "num_attention_heads": 3}, "transformers"),
    "quantised by another tool": (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised by 'gptq'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_mlx_lm_would_not_compute_is_refused(case, tmp_path):
    model_type, changes, expected = REFUSED[case]
    write_network(tmp_path, model_type)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        Base.open(tmp_path)
    assert expected in str(caught.value)


def test_all_wrong_keys_are_named_at_once(tmp_path):
    write_network(tmp_path, "qwen3")
    edit_config(tmp_path, attention_bias=True, hidden_act="relu")
    with pytest.raises(ModelError) as caught:
        Base.open(tmp_path)
    assert "hidden_act" in str(caught.value)
    assert "attention_bias" in str(caught.value)


def test_unknown_keys_that_transformers_ignores_change_nothing(tmp_path):
    """mlx-lm's llama reads these, transformers' does not."""
    reference = write_network(tmp_path, "llama")
    kinds = ["full_attention", "sliding_attention"] * 2
    edit_config(tmp_path, layer_types=kinds, sliding_window=4, rope_traditional=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_array_equal(logits_of(again), logits_of(reference))
    assert_same_logits(tmp_path, reference)


def test_untested_network_is_opened_with_a_doubt(tmp_path):
    folder = tmp_path / "ours"
    write_network(folder, "llama")
    edit_config(folder, model_type="xverse", tie_word_embeddings=False)
    doubts = Base.open(folder).network.doubts
    assert "no test holds xverse of mlx-lm against transformers" in doubts
    assert "transformers does not know xverse" in doubts


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("phi3", ("qkv_proj", "o_proj")),
        ("phi", ("q_proj", "k_proj", "v_proj", "dense")),
        ("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_default_targets_are_the_attention_s(model_type, attention, tmp_path):
    write_network(tmp_path, model_type)
    model = Base.open(tmp_path).build(mx.float32)
    assert sorted(resolve_targets(model, ["attention"])) == sorted(attention)


@pytest.mark.parametrize("model_type", ["llama", "phi", "gemma3_text", "starcoder2", "stablelm"])
def test_all_linear_is_peft_s(model_type, tmp_path):
    from peft import LoraConfig, get_peft_model

    reference = write_network(tmp_path, model_type)
    model = Base.open(tmp_path).build(mx.float32)
    peft = get_peft_model(
        copy.deepcopy(reference), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in peft.named_parameters()
        if "lora_A" in name
    }
    assert set(find_targets(model, resolve_targets(model, ["all-linear"]))) == theirs


def test_recomputed_blocks_give_the_same_gradients(tmp_path):
    import mlx.nn as nn

    write_network(tmp_path, "gemma3_text")
    gradients = []
    for recompute in (False, True):
        model = Base.open(tmp_path).load(mx.float32).train()
        if recompute:
            use_gradient_checkpointing(model)
        loss = nn.value_and_grad(model, lambda m: m.states(mx.array(IDS))[-1].sum())
        _, found = loss(model)
        gradients.append(np.array(found["model"]["layers"][0]["self_attn"]["q_proj"]["weight"]))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_random_network_is_the_same_each_time():
    first, second = (random_network("llama").lm_head.weight.detach().numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_kernels_of_this_machine_leave_the_states_as_they_are(model_type, tmp_path):
    """Some norms have no bias, some have no weight: those stay MLX's."""
    write_network(tmp_path, model_type)
    model = Base.open(tmp_path).load(mx.float32)
    expected = np.array(model.states(mx.array(IDS))[-1])
    choose_kernels(model, mx.float32)
    states = np.array(model.states(mx.array(IDS))[-1])
    np.testing.assert_allclose(states, expected, atol=1e-4 * np.abs(expected).max())
