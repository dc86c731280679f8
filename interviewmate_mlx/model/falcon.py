"""Falcon-RW in MLX.

One self-contained file: a copy travels with every converted model, where the
stock mlx-lm commands load it as the folder's `model_file`.

Modules bear the Hub's names and weights keep the Hub's layout (out, in), so a
checkpoint loads with nothing renamed and nothing transposed. The reference is
the sdpa path of transformers' `models/falcon/modeling_falcon.py`.

Shape letters, here and in the rest of the package:
    B batch    L length of the queries    K length of the keys, cached ones included
    H heads    D head dimension           C channels = H * D    V vocabulary
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

# What tells a Falcon-RW from the other Falcons: the key, the value it must have,
# and the value that transformers takes where the key is absent.
_FALCON_RW_TRAITS: list[tuple[str, Any, Any]] = [
    ("model_type", "falcon", "falcon"),
    ("alibi", True, False),
    ("multi_query", False, True),
    ("parallel_attn", False, True),
    ("new_decoder_architecture", False, False),
    ("apply_residual_connection_post_layernorm", False, False),
    ("activation", "gelu", "gelu"),
]


@dataclass
class ModelArgs:
    """The shape of a Falcon-RW, under the names of the Hub's `config.json`."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    ffn_hidden_size: int
    bias: bool = False
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048  # tokens of the texts it was trained on
    model_type: str = "falcon"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        """Read a `config.json`.

        Raises:
            ValueError: it describes another architecture, or a size is missing
                or impossible. All such keys are named.
        """
        faults = []
        for key, expected, default in _FALCON_RW_TRAITS:
            got = config.get(key, default)
            if got != expected:
                note = "" if key in config else " (absent)"
                faults.append(f"{key}: got {got!r}{note}, expected {expected!r}")
        sizes = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
        for key in sizes:
            got = config.get(key)
            if not isinstance(got, int) or isinstance(got, bool) or got < 1:
                faults.append(f"{key}: got {got!r}, expected a positive integer")
        longest = config.get("max_position_embeddings")
        if longest is not None and (type(longest) is not int or longest < 1):
            faults.append(f"max_position_embeddings: got {longest!r}, expected a positive integer")
        if not faults:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            if hidden % heads:
                faults.append(f"hidden_size: got {hidden}, expected a multiple of {heads} heads")
            kv_heads = config.get("num_kv_heads")
            if kv_heads not in (None, heads):
                faults.append(f"num_kv_heads: got {kv_heads}, expected {heads}")
        if faults:
            raise ValueError("config.json is not a Falcon-RW's:\n  " + "\n  ".join(faults))
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in config.items() if key in known and value is not None}
        given.setdefault("ffn_hidden_size", 4 * config["hidden_size"])
        return cls(**given)


def alibi_slopes(num_heads: int) -> mx.array:
    """One slope per head, as ALiBi defines them (https://arxiv.org/abs/2108.12409).

    A geometric sequence for a power of two. Other counts take the sequence of
    the largest power of two below, then every second slope of the doubled one.

    Returns:
        (H,) bfloat16, the precision in which Falcon-RW was trained.
    """

    def geometric(count: int) -> list[float]:
        base = 2.0 ** -(2.0 ** -(math.log2(count) - 3))
        return [base**power for power in range(1, count + 1)]

    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(closest) + geometric(2 * closest)[0::2][: num_heads - closest]
    return mx.array(slopes, dtype=mx.float32).astype(mx.bfloat16)


def alibi_mask(
    slopes: mx.array,
    query_positions: mx.array,
    key_positions: mx.array,
    scale: float,
    dtype: mx.Dtype,
) -> mx.array:
    """ALiBi and the causal mask in one array that is added to the scaled scores.

    The reference adds `scale * slope * key_position`, with the slope, the
    position and their product each rounded to bfloat16. A softmax ignores what
    is added to a whole row, so the query's own bias is subtracted here: the
    same answer, and the numbers that matter, those of near keys, stay small
    enough to be exact in bfloat16.

    Args:
        slopes: (H,) bfloat16.
        query_positions: (B, L) or (1, L) int32, from 0; negative on left padding.
        key_positions: (B, K) or (1, K) int32, likewise.
        scale: 1 / sqrt(D); ALiBi is scaled like the scores are.
        dtype: of the queries.

    Returns:
        (B, H, L, K) or (1, H, L, K) of `dtype`; a very low number where a query may not
        look. It is half of the lowest: kernels multiply it by log2(e), and a row of -inf alone,
        as left padding has it, would become NaN.
    """

    def bias(positions: mx.array) -> mx.array:
        rounded = slopes[None, :, None] * positions[:, None, :].astype(mx.bfloat16)
        return rounded.astype(mx.float32)

    relative = (bias(key_positions)[:, :, None, :] - bias(query_positions)[..., None]) * scale
    keys, queries = key_positions[:, None, None, :], query_positions[:, None, :, None]
    visible = (keys <= queries) & (keys >= 0)
    return mx.where(visible, relative, mx.finfo(dtype).min / 2).astype(dtype)


class Attention(nn.Module):
    """Multi-head attention with a fused projection: q, k and v are interleaved per head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.num_heads = args.num_attention_heads
        self.head_dim = args.hidden_size // args.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=args.bias)
        self.dense = nn.Linear(args.hidden_size, args.hidden_size, bias=args.bias)
        self.attend: Any = scaled_dot_product_attention

    def __call__(self, x: mx.array, mask: Any, cache: Any = None) -> mx.array:
        B, L, C = x.shape
        qkv = self.query_key_value(x).reshape(B, L, self.num_heads, 3, self.head_dim)
        # One split instead of three slices: its gradient is a single concatenation.
        queries, keys, values = (
            part.squeeze(3).swapaxes(1, 2) for part in mx.split(qkv, 3, axis=3)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = self.attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.dense(out.swapaxes(1, 2).reshape(B, L, C))


@partial(mx.compile, shapeless=True)  # one kernel, also where nothing else is compiled
def _gelu(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1 + mx.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


@mx.custom_function
def exact_gelu(x: mx.array) -> mx.array:
    """GELU with erf, in float32: half precision rounds erf to less than the tanh form gives.

    With a derivative of its own, so that nothing but `x` is kept for the backward pass;
    autodiff would keep three float32 arrays.
    """
    gelu: mx.array = _gelu(x)
    return gelu


@exact_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    # The dependency keeps the compiler from sharing the forward pass' float32 copy of x, which
    # would be kept until now.
    (x,) = mx.depends([x], [cotangent])
    wide = x.astype(mx.float32)
    cumulative = 0.5 * (1 + mx.erf(wide * math.sqrt(0.5)))
    density = mx.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (cotangent.astype(mx.float32) * (cumulative + wide * density)).astype(x.dtype)


class MLP(nn.Module):
    """Two layers around an exact (erf) GELU; the tanh form visibly changes the model."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, args.ffn_hidden_size, bias=args.bias)
        self.dense_4h_to_h = nn.Linear(args.ffn_hidden_size, args.hidden_size, bias=args.bias)
        self.activation: Any = exact_gelu

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """A serial pre-norm block: attention, then MLP, each added to the residual."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.self_attention = Attention(args)
        self.post_attention_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any = None) -> mx.array:
        x = x + self.self_attention(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks and the last norm: everything but the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.num_heads = args.num_attention_heads
        self.scale = (args.hidden_size // args.num_attention_heads) ** -0.5
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [Block(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)
        self.make_mask: Any = alibi_mask  # where there is no cache

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids (B, L) int32 -> the last hidden states (B, L, C), normalised."""
        return self.ln_f(self.hidden_states(inputs, cache)[-1])

    def hidden_states(self, inputs: mx.array, cache: list[Any] | None = None) -> list[mx.array]:
        """Token ids (B, L) int32 -> what leaves each block, (B, L, C) each."""
        x = self.word_embeddings(inputs)
        caches = cache or [None] * len(self.h)
        first, num_cached = _cache_position(caches[0])
        query_positions = first[:, None] + mx.arange(x.shape[1])
        key_positions = first[:, None] + mx.arange(-num_cached, x.shape[1])
        make_mask = alibi_mask if cache else self.make_mask
        mask = make_mask(
            alibi_slopes(self.num_heads), query_positions, key_positions, self.scale, x.dtype
        )
        states = []
        for block, block_cache in zip(self.h, caches, strict=True):
            x = block(x, mask, block_cache)
            states.append(x)
        return states


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """(..., V) of any float dtype and (...) int32 -> nats, (...) float32."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


class Model(nn.Module):
    """Falcon-RW with its head, which shares the embedding's matrix unless the config unties it."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.cross_entropy: Any = cross_entropy
        self.transformer = Transformer(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids (B, L) int32 -> logits (B, L, V) in the model's dtype.

        With a cache from `make_cache`, `inputs` continue what it holds. Rows of
        unequal length are padded on the right without a cache, or on the left
        with mlx-lm's `BatchKVCache`.
        """
        return self.head(self.transformer(inputs, cache))

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., C) -> logits (..., V)."""
        if self.args.tie_word_embeddings:
            return self.transformer.word_embeddings.as_linear(hidden)
        return self.lm_head(hidden)

    def states(self, inputs: mx.array) -> list[mx.array]:
        """Token ids (B, L) int32 -> what leaves each block, and the last, normalised: for `head`.

        (B, L, C) each, in the order of their computation.
        """
        states = self.transformer.hidden_states(inputs)
        return [*states, self.transformer.ln_f(states[-1])]

    @property
    def head_layer(self) -> nn.Module:
        """The layer whose matrix makes the logits."""
        tied = self.args.tie_word_embeddings
        return self.transformer.word_embeddings if tied else self.lm_head

    @property
    def layers(self) -> list[Block]:
        return self.transformer.h

    @property
    def attention_targets(self) -> list[str]:
        """The layers of attention that a LoRA changes by default: those that runs A, B, C have."""
        return ["query_key_value"]

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        dtype: mx.Dtype = self.transformer.ln_f.weight.dtype
        return dtype

    def make_cache(self) -> list[KVCache]:
        # Not a rotating cache: ALiBi needs every key at its own position.
        return [KVCache() for _ in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop the second copy of the embedding that some checkpoints hold as their head."""
        if self.args.tie_word_embeddings:
            weights = {name: w for name, w in weights.items() if name != "lm_head.weight"}
        return weights


def _cache_position(cache: Any) -> tuple[mx.array, int]:
    """The position of each row's next token, (B,) or (1,), and how many keys are cached.

    In a batch with left padding the two differ: `BatchKVCache.offset` starts at
    minus the padding, `_idx` at 0.
    """
    if cache is None:
        return mx.array([0]), 0
    if isinstance(cache.offset, mx.array):
        return cache.offset, cache._idx
    return mx.array([cache.offset]), cache.offset
