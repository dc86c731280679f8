"""AdamW and Muon as torch computes them, and the learning rate of a step."""

import math
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map_with_path

from interviewmate_mlx.model.lora import base_linear_paths
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network


def adamw(weight_decay: float = 0.0, plus_ratio: float = 1.0) -> "AdamW":
    """AdamW with bias correction, which MLX leaves out by default; equal to `torch.optim.AdamW`.

    The learning rate is set before each step.

    Args:
        weight_decay: of what decays; see `AdamW`.
        plus_ratio: the learning rate of LoRA's B by that of its A; see `AdamW`.
    """
    return AdamW(weight_decay, plus_ratio)


class AdamW(optim.Adam):
    """AdamW in float32, with a rate and a decay that depend on what a parameter is.

    A parameter that is narrower has a float32 copy in the optimizer's state, its master. An
    update changes that one, and the parameter is what it rounds to: else most updates would be
    smaller than the rounding, and lost (https://arxiv.org/abs/1710.03740).

    Norms and biases, the vectors of a base, do not decay, as in transformers' trainer.

    LoRA+ (https://arxiv.org/abs/2402.12354): with a ratio above 1 B learns faster than A, and
    vectors learn as fast as B, as in PEFT's optimizer.
    """

    def __init__(self, weight_decay: float, plus_ratio: float) -> None:
        super().__init__(learning_rate=0.0, betas=[0.9, 0.999], eps=1e-8, bias_correction=True)
        self.weight_decay, self.plus_ratio = weight_decay, plus_ratio

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        super().init_single(parameter.astype(mx.float32), state)
        if parameter.dtype != mx.float32:
            state["master"] = parameter.astype(mx.float32)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        if not self._initialized:
            self.init(parameters)
        self.state["step"] = self.step + 1
        rate = self.learning_rate

        def update(
            path: str, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
        ) -> mx.array:
            is_fast = "lora_B" in path or parameter.ndim == 1
            own_rate = rate * self.plus_ratio if is_fast and self.plus_ratio != 1 else rate
            self.state["learning_rate"] = own_rate
            wide = state.get("master", parameter)
            if decays(path, parameter):
                wide = wide * (1 - own_rate * self.weight_decay)
            updated: mx.array = self.apply_single(gradient.astype(mx.float32), wide, state)
            if "master" in state:
                state["master"] = updated
            return updated.astype(parameter.dtype)

        updated = tree_map_with_path(update, gradients, parameters, self.state)
        self.state["learning_rate"] = rate
        return updated


class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW for the rest: for all weights.

    Muon replaces a matrix's momentum by the nearest matrix that turns and does not stretch, so
    that no direction is learned faster than another
    (https://kellerjordan.github.io/posts/muon/). Scaled by `0.2 sqrt(max(out, in))` its steps are
    as large as AdamW's, and both take one learning rate (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, weight_decay: float, matrices: Collection[str], momentum: float = 0.95):
        """
        Args:
            weight_decay: as AdamW's.
            matrices: the parameter paths that are Muon's. An embedding is none: it is no map
                between hidden states.
            momentum: with Nesterov's look ahead.
        """
        super().__init__(weight_decay, plus_ratio=1.0)
        self.matrices, self.momentum = frozenset(matrices), momentum

    def init(self, parameters: Any) -> None:
        super().init(parameters)

        def state_of(path: str, parameter: mx.array, state: dict[str, mx.array]) -> dict[str, Any]:
            if path not in self.matrices:
                return state
            kept = {"master": state["master"]} if "master" in state else {}
            return kept | {"momentum": mx.zeros(parameter.shape, mx.float32)}

        self.state.update(tree_map_with_path(state_of, parameters, self.state))

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        if "momentum" not in state:
            updated: mx.array = super().apply_single(gradient, parameter, state)
            return updated
        mix = self.momentum
        state["momentum"] = mix * state["momentum"] + (1 - mix) * gradient
        update = orthogonalise((1 - mix) * gradient + mix * state["momentum"])
        scale = 0.2 * max(parameter.shape) ** 0.5
        return parameter - self.learning_rate * scale * update


def muon_paths(model: Network) -> list[str]:
    """The parameter paths that are Muon's: the weights of the blocks' linear layers."""
    return [f"{path}.weight" for path in base_linear_paths(model) if path != "lm_head"]


def num_single(optimizer: str, model: Network) -> int:
    """Parameters for which an optimizer keeps one moment in place of two: Muon's."""
    paths = set(muon_paths(model)) if optimizer == "muon" else ()
    own = named_arrays(model.trainable_parameters())
    return sum(array.size for path, array in own.items() if path in paths)


def orthogonalise(matrix: mx.array, iterations: int = 5) -> mx.array:
    """Bring all singular values of a matrix near 1 (to between 0.7 and 1.2), in any dtype.

    The quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: (M, N).
        iterations: five suffice where no singular value is below a thousandth of the norm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / mx.maximum(mx.linalg.norm(matrix), 1e-7)
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def decays(path: str, parameter: mx.array) -> bool:
    """Whether weight decay is for a parameter: for all but norms and biases."""
    return parameter.ndim > 1 or "lora_" in path


def learning_rate_at(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str,
    warmup_ratio: float,
    warmup_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """The learning rate of one step, as transformers' schedules of the same names give it.

    Args:
        step: from 0. With a warmup the first step's rate is 0, as in transformers.
        total_steps: steps of the whole run.
        peak: the rate after the warmup.
        schedule: `constant`, `linear` (to 0) or `cosine` (half a wave, to the floor).
        warmup_ratio: share of the steps over which the rate rises from 0.
        warmup_steps: that many, and not the share; 0: the share.
        floor: share of the peak that `cosine` falls to.
    """
    warmup_steps = warmup_steps or math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        wave = 0.5 * (1 + math.cos(math.pi * progress))
        return peak * (floor + (1 - floor) * wave)
    return peak
