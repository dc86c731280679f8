"""LoRA that starts with a part of the base's weights, which is taken out of these.

    W = W_rest + scale * B0 A0        then B and A are trained from B0 and A0

PiSSA (https://arxiv.org/abs/2404.02948) takes the largest singular values, OLoRA
(https://arxiv.org/abs/2406.01775) the first columns of a QR decomposition; both as in PEFT. What
was learned, `B A - B0 A0`, is a plain LoRA of twice the rank, for the base as it was:

    scale * (B A - B0 A0) = scale * [B, -B0] [A; A0]
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.model.lora import LoRALinear, lora_layers, shape_of


def start_from_weights(model: nn.Module, kind: str) -> None:
    """Take the start of each LoRA out of its base layer, in place.

    Args:
        model: with LoRA; its base is loaded, and not quantised.
        kind: `pissa` or `olora`.
    """
    for _, layer in lora_layers(model):
        weight = layer.base_layer.weight
        a, b = (_singular if kind == "pissa" else _orthogonal)(weight.astype(mx.float32), layer)
        layer.lora_A.weight, layer.lora_B.weight = a, b
        _take_out(layer, weight)


def take_out(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Take each LoRA as it is, for its start, out of the base's weights, in place.

    Args:
        model: that `start_from_weights` changed, with other matrices.
        weights: the base's, by parameter path.
    """
    for path, layer in lora_layers(model):
        _take_out(layer, weights[f"{path}.weight"])


def _take_out(layer: LoRALinear, weight: mx.array) -> None:
    a, b = layer.lora_A.weight, layer.lora_B.weight
    layer.first = _First(a, b)
    rest = weight.astype(mx.float32) - layer.scale * (b @ a)
    layer.base_layer.weight = rest.astype(weight.dtype)
    mx.eval(layer.parameters())


def check_doubled(model: nn.Module) -> None:
    """Refuse a LoRA whose double would be larger than its layer.

    Raises:
        AdapterError: all such layers.
    """
    faults = []
    for path, layer in lora_layers(model):
        rank, most = layer.lora_A.weight.shape[0], min(shape_of(layer.base_layer)) // 2
        if rank > most:
            faults.append(f"{path}: got rank {rank}, expected at most {most}")
    if faults:
        raise AdapterError(
            f"lora.init: twice the rank is saved, and is larger than a layer:\n"
            f"{list_faults(faults)}\nChoose a smaller lora.rank, or lora.init default."
        )


def as_plain(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """An adapter of such a model as a plain LoRA of twice the rank, for the untouched base.

    Args:
        model: that `start_from_weights` changed; another one's adapter stays as it is.
        weights: the adapter, by parameter path.
    """
    found = dict(weights)
    for path, layer in lora_layers(model):
        if first := getattr(layer, "first", None):
            a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
            found[a] = mx.concatenate([weights[a], first.a])
            found[b] = mx.concatenate([weights[b], -first.b], axis=1)
    return found


class _First:
    """The matrices that a LoRA began with; no parameters of the model."""

    def __init__(self, a: mx.array, b: mx.array) -> None:
        self.a, self.b = a, b


def _singular(weight: mx.array, layer: LoRALinear) -> tuple[mx.array, mx.array]:
    """A (r, in) and B (out, r): the largest singular values, their roots on both sides."""
    rank = layer.lora_A.weight.shape[0]
    # By numpy: MLX has neither decomposition on a GPU, and gives all of U and V.
    u, s, vt = np.linalg.svd(np.array(weight), full_matrices=False)
    roots = np.sqrt(s[:rank] / layer.scale)
    return mx.array(roots[:, None] * vt[:rank]), mx.array(u[:, :rank] * roots)


def _orthogonal(weight: mx.array, layer: LoRALinear) -> tuple[mx.array, mx.array]:
    """A (r, in) and B (out, r): the first rows of R and columns of Q."""
    rank = layer.lora_A.weight.shape[0]
    q, r = np.linalg.qr(np.array(weight))
    return mx.array(r[:rank]), mx.array(q[:, :rank])
