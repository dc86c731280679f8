"""The compiled microbatch and the compiled update.

    gradient of a step = sum over its microbatches of d(loss_sum) / number of predicted tokens

So any split of a step into microbatches gives the same update, and padding
never matters. (With dropout, each split draws other masks.)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from interviewmate_mlx.training.loss import masked_cross_entropy

# A compiled function, of a microbatch's arrays.
MicrobatchFunction = Callable[[mx.array, mx.array, mx.array, mx.array], Any]


def loss_of(
    model: nn.Module, inputs: mx.array, positions: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Loss sum and token count of a microbatch. Logits exist only where there is a loss."""
    hidden = model.transformer(inputs)
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions]
    return masked_cross_entropy(model.head(predicting), targets, mask)


def compile_step(
    model: nn.Module, optimizer: optim.Optimizer, max_grad_norm: float
) -> tuple[MicrobatchFunction, Callable[[mx.array], dict[str, mx.array]]]:
    """Compile the two halves of a step over a model's trainable parameters.

    Args:
        model: a network with `transformer` and `head`; its trainable parameters
            and the optimizer's state are changed in place.
        optimizer: initialised here.
        max_grad_norm: the global norm to clip to; 0 leaves gradients as they are.

    Returns:
        add_microbatch: adds a microbatch's loss, tokens and gradients to the
            step's; evaluates nothing and returns the sums of loss and gradients so
            far. Evaluate both before the next, or its activations are kept too.
        update: takes the learning rate, () float32, updates once, starts the sums
            anew and returns `loss`, `grad_norm` (before clipping) and
            `is_finite`, () each. From the first loss, gradient or updated parameter
            on that is not finite, nothing is updated any more.
    """
    optimizer.init(model.trainable_parameters())
    sums = {
        "loss": mx.array(0.0),
        "tokens": mx.array(0),
        "healthy": mx.array(True),
        "gradients": tree_map(mx.zeros_like, model.trainable_parameters()),
    }
    state = [model.state, optimizer.state, sums, mx.random.state]
    compiled = partial(mx.compile, inputs=state, outputs=state)
    loss_and_gradients = nn.value_and_grad(model, partial(loss_of, model))

    @compiled
    def add_microbatch(
        inputs: mx.array, positions: mx.array, targets: mx.array, mask: mx.array
    ) -> tuple[mx.array, Any]:
        (loss, tokens), gradients = loss_and_gradients(inputs, positions, targets, mask)
        sums["loss"] += loss
        sums["tokens"] += tokens
        sums["gradients"] = tree_map(mx.add, sums["gradients"], gradients)
        return sums["loss"], sums["gradients"]

    @compiled
    def update(learning_rate: mx.array) -> dict[str, mx.array]:
        loss = sums["loss"] / sums["tokens"]
        mean = tree_map(lambda g: g / sums["tokens"], sums["gradients"])
        gradients, grad_norm = optim.clip_grad_norm(mean, max_grad_norm or math.inf)
        before = model.trainable_parameters(), tree_map(lambda a: a, optimizer.state)
        optimizer.state["learning_rate"] = learning_rate
        after = optimizer.apply_gradients(gradients, before[0]), optimizer.state
        sizes = [mx.abs(parameter).max() for _, parameter in tree_flatten(after[0])]
        # Once false it stays so: a later step must not be applied on top of a lost one.
        sums["healthy"] &= mx.isfinite(loss) & mx.isfinite(grad_norm)
        sums["healthy"] &= mx.isfinite(mx.stack(sizes)).all()
        is_finite = sums["healthy"]
        parameters, moments = tree_map(
            lambda new, old: mx.where(is_finite, new, old), after, before
        )
        model.update(parameters)
        optimizer.state.update(moments)

        sums["loss"], sums["tokens"] = mx.array(0.0), mx.array(0)
        sums["gradients"] = tree_map(mx.zeros_like, sums["gradients"])
        return {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}

    return add_microbatch, update


def compile_loss(model: nn.Module) -> MicrobatchFunction:
    """Compile the loss alone: `(loss_sum, num_tokens)` of a microbatch, for validation."""
    return mx.compile(partial(loss_of, model), inputs=[model.state])
