"""Every network that can be trained here, and the few questions that training asks it.

Falcon-RW answers them itself (`model/falcon.py`). Any other decoder is mlx-lm's own network,
which answers here, as long as it is built in the usual way: a body `model` that turns tokens
into hidden states, and a `__call__` that turns those into logits.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from interviewmate_mlx.errors import one_line
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.architectures import (
    NetworkConfig,
    network_class,
    read_network_config,
)
from interviewmate_mlx.model.lora import base_linear_paths
from interviewmate_mlx.model.tree import named_arrays


class Network(nn.Module):
    """What training, evaluation and generation ask of a network, beside what any module has.

    These are the answers of a network that is built in the usual way; they are mixed into its
    own class. Falcon-RW has its own.

    Attributes:
        args: its shape.
        cross_entropy: logits (N, V) and targets (N,) -> nats (N,) float32.
    """

    args: Any
    model: nn.Module
    cross_entropy: Any = staticmethod(falcon.cross_entropy)

    def states(self, inputs: mx.array) -> list[mx.array]:
        """Token ids (B, L) int32 -> hidden states on the way to the logits, (B, L, C) each.

        In the order of their computation; the last one is what `head` takes.
        """
        return [self.model(inputs, None)]

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., C) -> logits (..., V).

        By the network's own `__call__`, with these states in place of what its body gives: so
        scales and caps of logits are the network's, whatever it has.
        """
        view = dict.__new__(type(self))
        view.__dict__.update(self.__dict__)
        dict.update(view, self)
        dict.__setitem__(view, "model", _Given(self.model, hidden))
        logits: mx.array = view(mx.zeros((1, 1), mx.int32))
        return logits

    @property
    def head_layer(self) -> nn.Module:
        """The layer whose matrix makes the logits; the embedding, if they share it."""
        layer: nn.Module = self.lm_head if "lm_head" in self else self.model.embed_tokens
        return layer

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        blocks: list[nn.Module] = self.model.layers
        return blocks

    @property
    def attention_targets(self) -> list[str]:
        """The names of the linear layers of attention."""
        of_attention = [path.split(".") for path in base_linear_paths(self.layers[0])]
        names = [path[-1] for path in of_attention if any("att" in part for part in path[:-1])]
        return list(dict.fromkeys(names))

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        # A block's norms are never quantised.
        block = named_arrays(self.layers[0].parameters()).values()
        return next(array.dtype for array in block if array.ndim == 1)

    def make_cache(self) -> list[Any]:
        """Empty caches of keys and values for one row."""
        inherited = getattr(super(), "make_cache", None)
        caches: list[Any] = inherited() if inherited else make_prompt_cache(self.model)
        return caches


class _Given:
    """Stands for a network's body, whose states are given."""

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self._body, self._hidden = body, hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _tanh_gated(mlp: Any, x: mx.array) -> mx.array:
    y: mx.array = mlp.down_proj(nn.gelu_approx(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y


def _tanh_plain(mlp: Any, x: mx.array) -> mx.array:
    y: mx.array = mlp.c_proj(nn.gelu_approx(mlp.c_fc(x)))
    return y


# mlx-lm computes the exact GELU in these, where their configs ask for the tanh form.
_TANH_MLPS: dict[str, Callable[[Any, mx.array], mx.array]] = {
    "gemma": _tanh_gated,
    "starcoder2": _tanh_plain,
}


def read_network(config: dict[str, Any]) -> NetworkConfig:
    """Read which network a `config.json` describes, and its shape.

    Raises:
        ValueError: it is none that can be trained here. All wrong keys are named.
    """
    if config.get("model_type", "falcon") == "falcon":
        args = falcon.ModelArgs.from_dict(config)
        return NetworkConfig("falcon", args, activation="gelu")
    return read_network_config(config)


def build_network(config: NetworkConfig) -> Any:
    """Build a `Network`. Its weights are random.

    Raises:
        ValueError: it cannot be built, or not in the usual way.
    """
    if isinstance(config.args, falcon.ModelArgs):
        return falcon.Model(config.args)
    kind: Any = type("Network", (Network, network_class(config.model_type)), {})
    try:
        model = kind(config.args)
        if not isinstance(model.model, nn.Module) or not list(model.layers):
            raise ValueError("its body is not called `model`, or has no layers")
        if not isinstance(model.head_layer, nn.Linear | nn.Embedding):
            raise ValueError("its head is neither a linear layer nor its embedding")
    except Exception as error:  # of any kind: mlx-lm does not check its arguments
        raise ValueError(
            f"{config.model_type} cannot be built as mlx-lm builds it: {one_line(error)}"
        ) from error
    forward = _TANH_MLPS.get(config.model_type)
    if forward and config.activation != "gelu":
        for block in model.layers:
            block.mlp.__class__ = type("MLP", (type(block.mlp),), {"__call__": forward})
    return model
