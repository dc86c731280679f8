"""The network against transformers' sdpa path."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon
from mlx_lm.models.cache import BatchKVCache
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from interviewmate_mlx.model.falcon import Model, ModelArgs, alibi_mask, alibi_slopes

# heads, head size, layers, bias, lengths
SHAPES = [
    (4, 16, 2, True, (1, 2, 33)),
    (4, 32, 2, False, (7, 128)),
    (6, 16, 2, True, (1, 300)),
    (6, 8, 3, False, (64,)),
    (12, 16, 2, True, (129,)),
    (12, 8, 1, False, (5, 512)),
    (32, 8, 2, True, (257,)),
    (32, 16, 1, False, (40,)),
    (5, 16, 2, True, (100,)),
    (4, 16, 2, True, (1500,)),
    (12, 8, 2, False, (1500,)),
    (3, 64, 2, True, (1, 90)),
    (2, 128, 2, False, (33,)),
]


def same_model(reference: torch.nn.Module, dtype: mx.Dtype = mx.float32) -> Model:
    """Our network with the reference's weights."""
    model = our_model(reference.float())
    model.set_dtype(dtype)
    return model


def random_ids(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 384, shape)


@pytest.mark.parametrize(("heads", "head_dim", "layers", "bias", "lengths"), SHAPES)
def test_logits_equal_the_reference(heads, head_dim, layers, bias, lengths):
    reference = tiny_falcon(heads, head_dim, layers, bias=bias, seed=heads)
    model = same_model(reference)
    for length in lengths:
        ids = random_ids((2, length), seed=length)
        with torch.no_grad():
            expected = reference(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=1e-4, rtol=0)


def test_right_padding_leaves_the_real_tokens_alone():
    reference = tiny_falcon(heads=6)
    model = same_model(reference)
    lengths = [9, 23, 40]
    ids = random_ids((3, 40))
    attention_mask = torch.tensor([[i < length for i in range(40)] for length in lengths]).long()
    with torch.no_grad():
        expected = reference(torch.tensor(ids), attention_mask=attention_mask).logits.numpy()
    logits = np.array(model(mx.array(ids)))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-4, rtol=0)


def test_bfloat16_at_1500_tokens_errs_as_the_reference_does_and_not_more_with_the_position():
    reference = tiny_falcon(heads=8, head_dim=16, layers=2)
    rounded = same_model(reference, mx.bfloat16)
    exact = same_model(reference, mx.bfloat16)
    exact.set_dtype(mx.float32)  # the same rounded weights, exact arithmetic
    ids = random_ids((1, 1500))
    expected = np.array(exact(mx.array(ids)))
    with torch.no_grad():
        theirs = reference.to(torch.bfloat16)(torch.tensor(ids)).logits.float().numpy()
    ours = np.array(rounded(mx.array(ids)).astype(mx.float32))
    error, allowed = np.abs(ours - expected), np.abs(theirs - expected)
    # MLX's CPU keeps attention scores in bfloat16, torch in float32: hence the factor.
    assert error.max() < 1.6 * allowed.max()
    assert error.mean() < 1.6 * allowed.mean()
    # No drift with the position: late tokens are as near as early ones.
    assert error[:, -300:].mean() < 1.2 * error[:, :300].mean()


def test_relative_bias_is_exact_in_bfloat16_for_near_keys():
    slopes, length = alibi_slopes(32), 1500
    positions = mx.arange(length)[None]
    bias = [
        alibi_mask(slopes, positions, positions, 0.125, dtype)[0, 0, :, :]
        for dtype in (mx.float32, mx.bfloat16)
    ]
    rows = mx.arange(length)
    near = mx.abs(rows[:, None] - rows[None]) < 8
    difference = mx.abs(bias[0] - bias[1].astype(mx.float32))
    visible = near & (rows[:, None] >= rows[None])
    assert mx.where(visible, difference, 0).max().item() < 0.004


@pytest.mark.parametrize("heads", range(1, 130))
def test_slopes_equal_the_reference(heads):
    reference = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    slopes = np.array(alibi_slopes(heads).astype(mx.float32))
    np.testing.assert_array_equal(slopes, reference.reshape(heads, 2)[:, 1].numpy())


@pytest.mark.parametrize(("heads", "bias"), [(4, True), (6, True), (12, False), (32, True)])
def test_greedy_text_is_the_reference_s_with_and_without_cache(heads, bias):
    reference = tiny_falcon(heads=heads, bias=bias, seed=heads)
    model = same_model(reference)
    prompt = random_ids((1, 11), seed=heads)
    expected = reference.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(1, 11, dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 11:].tolist()
    assert greedy(model, prompt, 64, cached=True) == expected
    assert greedy(model, prompt, 64, cached=False) == expected


def test_left_padded_batch_says_what_each_row_says_alone():
    model = same_model(tiny_falcon(heads=6))
    prompts = [random_ids((1, length), seed=length) for length in (3, 17, 9)]
    alone = [greedy(model, prompt, 64, cached=True) for prompt in prompts]

    longest = max(prompt.shape[1] for prompt in prompts)
    padding = [longest - prompt.shape[1] for prompt in prompts]
    batch = np.concatenate(
        [np.pad(p, ((0, 0), (n, 0))) for p, n in zip(prompts, padding, strict=True)]
    )
    cache = [BatchKVCache(padding) for _ in model.layers]
    tokens = mx.argmax(model(mx.array(batch), cache)[:, -1], axis=-1)
    together = [tokens.tolist()]
    for _ in range(63):
        tokens = mx.argmax(model(tokens[:, None], cache)[:, -1], axis=-1)
        together.append(tokens.tolist())
    assert [list(row) for row in zip(*together, strict=True)] == alone


def greedy(model: Model, prompt: np.ndarray, count: int, *, cached: bool) -> list[int]:
    cache = model.make_cache() if cached else None
    ids, tokens = mx.array(prompt), []
    inputs = ids
    for _ in range(count):
        token = mx.argmax(model(inputs, cache)[:, -1], axis=-1, keepdims=True)
        tokens.append(token.item())
        ids = mx.concatenate([ids, token], axis=1)
        inputs = token if cached else ids
    return tokens


@pytest.mark.parametrize("cuts", [(5, 20), (1, 2, 30), (10,)])
def test_prompt_in_pieces_gives_the_logits_of_the_whole(cuts):
    model = same_model(tiny_falcon(heads=4))
    ids = mx.array(random_ids((1, 40)))
    cache = model.make_cache()
    borders = [0, *cuts, 40]
    pieces = [model(ids[:, a:b], cache) for a, b in itertools.pairwise(borders)]
    whole = np.array(model(ids))
    np.testing.assert_allclose(np.array(mx.concatenate(pieces, axis=1)), whole, atol=1e-4, rtol=0)


def test_quantised_model_stays_near_the_exact_one():
    import mlx.nn as nn

    model = same_model(tiny_falcon(heads=4, head_dim=32))
    ids = mx.array(random_ids((1, 30)))
    exact = model(ids)
    nn.quantize(model, group_size=64, bits=8)
    assert mx.abs(model(ids) - exact).max().item() < 0.05 * mx.abs(exact).max().item()


def test_untied_head_is_used():
    reference = tiny_falcon(tie_word_embeddings=False)
    model = same_model(reference)
    ids = random_ids((1, 10))
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(ids))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("multi_query", True),
        ("parallel_attn", True),
        ("new_decoder_architecture", True),
        ("alibi", False),
        ("model_type", "llama"),
        ("activation", "relu"),
        ("num_kv_heads", 2),
        ("hidden_size", 65),
        ("num_attention_heads", 0),
        ("vocab_size", None),
    ],
)
def test_other_architectures_are_refused_by_the_key(key, value):
    config = tiny_falcon().config.to_dict() | {key: value}
    with pytest.raises(ValueError, match=key) as error:
        ModelArgs.from_dict(config)
    assert str(value) in str(error.value)


def test_all_wrong_keys_are_named_at_once():
    config = tiny_falcon().config.to_dict() | {"multi_query": True, "alibi": False}
    with pytest.raises(ValueError, match=r"(?s)alibi.*multi_query"):
        ModelArgs.from_dict(config)
