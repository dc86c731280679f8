"""DoRA (https://arxiv.org/abs/2402.09353): LoRA turns a weight's rows, magnitudes stretch them.

Names and numbers are PEFT's.
"""

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.model.lora import LoRALinear, lora_layers, plain_weight, shape_of


class DoRALinear(LoRALinear):
    """`y = m / |W + scale * B A| * (W + scale * B A) x + b`, with a magnitude m for each row.

    The norm is that of each row, and nothing is differentiated through it, as in the paper.
    With dropout, what is added to `Wx + b` sees the dropped inputs. All that is added is float32.
    `place_dora` makes one.
    """

    lora_magnitude_vector: mx.array  # (out,) float32

    def __call__(self, x: mx.array) -> mx.array:
        y, dropped = self.base_layer(x), self.dropout(x)
        seen = self.base_layer(dropped.astype(x.dtype)) if self.dropout.draws else y
        seen = seen.astype(mx.float32)
        if "bias" in self.base_layer:
            seen = seen - self.base_layer.bias
        turned = self.scale * self.lora_A(dropped) @ self.lora_B.weight.T
        stretch = self.stretch()
        added = (stretch - 1) * seen + stretch * turned
        return (y + added).astype(y.dtype)

    def dtype_for(self, dtype: mx.Dtype) -> mx.Dtype:
        """Float32 for any input; see `LoRALinear`."""
        return mx.float32

    def stretch(self) -> mx.array:
        """The magnitude of each row by its norm, (out,) float32."""
        return self.lora_magnitude_vector / mx.stop_gradient(self.row_norms())

    def row_norms(self) -> mx.array:
        """The norm of each row of `W + scale * B A`, (out,) float32.

        From inner products, so that `B A` is not computed: it is as large as W.
        """
        weight, a = plain_weight(self.base_layer).astype(mx.float32), self.lora_A.weight
        b = self.scale * self.lora_B.weight
        squares = weight.square().sum(axis=1)
        squares += 2 * ((weight @ a.T) * b).sum(axis=1) + ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.sqrt(mx.maximum(squares, 0))

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same, in the base's dtype; see `LoRALinear.merged`."""
        linear = super().merged()
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        whole = self.stretch()[:, None] * (
            plain_weight(self.base_layer).astype(mx.float32) + update
        )
        linear.weight = whole.astype(linear.weight.dtype)
        return linear


def start_magnitudes(model: nn.Module) -> None:
    """Let the magnitudes of a model whose base is loaded be the norms of its rows, in place.

    Then the first forward is the base's own.
    """
    for _, layer in lora_layers(model):
        if isinstance(layer, DoRALinear):
            layer.lora_magnitude_vector = layer.row_norms()
    mx.eval(model.trainable_parameters())


def place_dora(model: nn.Module) -> None:
    """Make DoRA layers of a model's LoRA layers, in place; their numbers stay."""
    for _, layer in lora_layers(model):
        layer.__class__ = DoRALinear
        # Of the base's rows, once it is loaded: see `start_magnitudes`.
        layer.lora_magnitude_vector = mx.ones(shape_of(layer.base_layer)[0])
        layer.unfreeze(recurse=False, keys="lora_magnitude_vector")
