"""For pretrain.py: Muon, which trains all weights from nothing."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


class Muon(optim.Adam):
    """Muon for the matrices of the blocks, AdamW for the rest: all weights trained from nothing.

    Muon replaces a matrix's momentum by the nearest matrix that turns and does not
    stretch, so that no direction is learned faster than another
    (https://kellerjordan.github.io/posts/muon/). Scaled by `0.2 sqrt(max(out, in))`
    its steps are as large as AdamW's, and both take one learning rate
    (https://arxiv.org/abs/2502.16982). Only matrices decay.
    """

    def __init__(self, vocab_size: int, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        """
        Args:
            vocab_size: rows of the embedding, which is no map between hidden states
                and is left to AdamW.
            weight_decay: decoupled, times the learning rate.
            momentum: of Muon, with Nesterov's look ahead.
        """
        super().__init__(learning_rate=0.0, betas=[0.9, 0.95], eps=1e-8, bias_correction=True)
        self.vocab_size = vocab_size
        self.weight_decay = weight_decay
        self.momentum = momentum

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        if parameter.ndim == 2 and parameter.shape[0] != self.vocab_size:
            state["momentum"] = mx.zeros_like(parameter)
        else:
            super().init_single(parameter, state)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        if parameter.ndim == 2:
            parameter = parameter * (1 - rate * self.weight_decay)
        if "momentum" not in state:
            return super().apply_single(gradient, parameter, state)
        state["momentum"] = self.momentum * state["momentum"] + gradient
        update = orthogonalise(gradient + self.momentum * state["momentum"])
        return parameter - rate * 0.2 * max(parameter.shape) ** 0.5 * update


def orthogonalise(matrix: mx.array, iterations: int = 5) -> mx.array:
    """Bring all singular values of a matrix near 1 (to between 0.7 and 1.2), in any dtype.

    The quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: (M, N).
        iterations: five suffice where no singular value is below a thousandth of the norm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (mx.linalg.norm(matrix) + 1e-7)
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
