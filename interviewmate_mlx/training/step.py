"""One optimizer update: microbatches are accumulated, then applied.

    gradient of a step = sum over its microbatches of d(loss_sum) / count

The count is that of what the loss is a sum over: predicted tokens, or the rows of preferences.

So any split of a step into microbatches gives the same update, and padding
never matters: what dropout drops of a row depends on the row alone.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map
from numpy.random import SeedSequence  # loaded here: a Ctrl-C is lost while it loads

from interviewmate_mlx.data.batches import AnyRow, Microbatch, split_step
from interviewmate_mlx.model.dropout import seeds_for, token_seeds, tokens_seeded
from interviewmate_mlx.model.lora import working_copies
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.loss import (
    Loss,
    Measures,
    chunked_cross_entropy,
    token_loss,
    tokens_at_once,
)

# A result to be added up, and the arrays that are computed on the way to it, in order.
Computed = tuple[Any, list[mx.array]]
Compute = Callable[[Microbatch], Computed]


class Executor(Protocol):
    """How a step's rows become microbatches, and where these are computed."""

    @property
    def num_streams(self) -> int:
        """How many microbatches are computed at once."""

    @property
    def steps_ahead(self) -> int:
        """How many steps are handed to the device before the first one's numbers are read."""

    def limited_to(self, num_rows: int) -> "Executor":
        """The same, with no more streams than there is memory for rows."""

    def opened(self) -> AbstractContextManager[object]:
        """Use it within the block."""

    def split(self, rows: Sequence[AnyRow], token_budget: int) -> list[list[AnyRow]]:
        """The rows of each microbatch of a step."""

    def sum_of(self, compile_one: Callable[[], Compute]) -> Callable[[Sequence[Microbatch]], Any]:
        """A function that adds up what a compiled computation gives for each microbatch."""


class OneStream:
    """Microbatches one after the other, on MLX's default device."""

    num_streams = 1
    steps_ahead = 1

    def limited_to(self, num_rows: int) -> "OneStream":
        return self

    def opened(self) -> AbstractContextManager[object]:
        return nullcontext()

    def split(self, rows: Sequence[AnyRow], token_budget: int) -> list[list[AnyRow]]:
        return split_step(rows, token_budget)

    def sum_of(self, compile_one: Callable[[], Compute]) -> Callable[[Sequence[Microbatch]], Any]:
        compute = compile_one()

        def total(microbatches: Sequence[Microbatch]) -> Any:
            sums: Any = None
            for microbatch in microbatches:
                result, _ = compute(microbatch)
                sums = add_up(sums, result)
                mx.async_eval(sums)
            return sums

        return total


def add_up(sums: Any, result: Any) -> Any:
    """Add what a computation gave to sums, if there are some, in float32 where that is narrower."""
    narrow = (mx.bfloat16, mx.float16)
    wide = tree_map(lambda a: a.astype(mx.float32) if a.dtype in narrow else a, result)
    return tree_map(mx.add, sums, wide) if sums else wide


class Step:
    """The compiled update of a model's trainable parameters.

    `accumulate` some microbatches, then `update`. Model and optimizer are changed in
    place. From the first loss, gradient or updated parameter on that is not finite,
    nothing is updated any more.

    Attributes:
        sums: the loss sum, count, measures and gradients of what was accumulated since the
            last update; None before the first microbatch.
        num_updates: how often `update` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        max_grad_norm: float = 0.0,
        executor: Executor | None = None,
        loss: Loss = token_loss,
    ) -> None:
        """
        Args:
            model: a `Network`.
            optimizer: initialised here.
            max_grad_norm: the global norm to clip to; 0 does not clip.
            executor: where microbatches are computed; by default one after the other.
            loss: of the predicted tokens.
        """
        optimizer.init(model.trainable_parameters())
        self._model, self._optimizer = model, optimizer
        self._max_grad_norm = max_grad_norm or math.inf
        self._total = (executor or OneStream()).sum_of(
            partial(_compile_gradients, model, loss, lambda: self._copies)
        )
        self._copies: Any = {}
        self.sums: Any = None
        self.num_updates = 0
        self._is_healthy = mx.array(True)
        state = [model.state, optimizer.state]
        self._update = partial(mx.compile, inputs=state, outputs=state)(self._apply)

    def accumulate(self, microbatches: Sequence[Microbatch], entropy: Sequence[int]) -> None:
        """Add the loss, tokens and gradients of microbatches to those of the step.

        Args:
            microbatches: of the step, some or all.
            entropy: numbers that the dropout of the step follows from.
        """
        if not microbatches:
            return
        if not self.sums:
            self._copies = working_copies(self._model)
        (seed,) = SeedSequence(entropy).generate_state(1).tolist()
        sums = self._total([replace(microbatch, seed=seed) for microbatch in microbatches])
        self.sums = add_up(self.sums, sums)

    def update(
        self, learning_rate: float, across: Callable[[Any], Any] = lambda sums: sums
    ) -> dict[str, Any]:
        """Apply what was accumulated, and start the next step's sums.

        Args:
            learning_rate: of this step.
            across: adds what other ranks have accumulated.

        Returns:
            `loss`, `grad_norm` (before clipping), () float32 each, `is_finite`, () bool, and
            `measures`, a sum and a count by name; on their way to the device, not evaluated.
        """
        sums = across(self.sums)
        numbers = self._update(sums, mx.array(learning_rate), self._is_healthy)
        self.sums, self._copies, self._is_healthy = None, {}, numbers["is_finite"]
        self.num_updates += 1
        mx.async_eval(numbers, self._model.trainable_parameters())
        return numbers

    def _apply(self, sums: Any, learning_rate: mx.array, is_healthy: mx.array) -> dict[str, Any]:
        model, optimizer = self._model, self._optimizer
        loss_sum, count, measures, gradient_sums = sums
        loss = loss_sum / count
        mean = tree_map(lambda g: g / count, gradient_sums)
        gradients, grad_norm = optim.clip_grad_norm(mean, self._max_grad_norm)
        before = model.trainable_parameters(), tree_map(lambda a: a, optimizer.state)
        optimizer.state["learning_rate"] = learning_rate
        after = optimizer.apply_gradients(gradients, before[0]), optimizer.state
        sizes = [mx.abs(parameter).max() for parameter in named_arrays(after[0]).values()]
        # Once false it stays false: no step may be applied on top of one that was lost.
        is_finite = is_healthy & mx.isfinite(loss) & mx.isfinite(grad_norm)
        is_finite &= mx.isfinite(mx.stack(sizes)).all()
        parameters, moments = tree_map(
            lambda new, old: mx.where(is_finite, new, old), after, before
        )
        model.update(parameters)
        optimizer.state.update(moments)
        numbers = {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}
        return {**numbers, "measures": measures}


def total_loss(
    model: nn.Module, executor: Executor | None = None
) -> Callable[[Sequence[Microbatch]], tuple[float, int]]:
    """Compile the loss alone, for validation: the loss sum and token count of microbatches."""
    total = total_of(model, token_loss, executor)

    def evaluate(microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        loss_sum, num_tokens, _ = total(microbatches)
        return loss_sum.item(), num_tokens.item()

    return evaluate


def total_of(
    model: nn.Module, loss: Callable[..., Any], executor: Executor | None = None
) -> Callable[[Sequence[Microbatch]], Any]:
    """Compile what a loss gives, without gradients; of several microbatches it is added up.

    Args:
        model: a `Network`.
        loss: a `Loss`, or one that gives other arrays.
        executor: where microbatches are computed; by default one after the other.
    """
    return (executor or OneStream()).sum_of(partial(_compile_loss, model, loss))


def microbatch_loss(
    model: nn.Module,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    mask: mx.array,
    of_rows: dict[str, mx.array],
    *,
    loss: Loss = token_loss,
) -> tuple[mx.array, mx.array, Measures, list[mx.array]]:
    """What a microbatch comes to. Logits exist only where there is a loss.

    Args:
        model: a `Network`.
        inputs, positions, targets, mask, of_rows: see `Microbatch`.
        loss: of the predicted tokens.

    Returns:
        loss_sum: () float32, nats.
        count: () int32, of what it is a sum over.
        measures: see `Sums`.
        on_the_way: arrays that lead to the loss, in the order of their computation.
    """
    losses, on_the_way = _token_losses(model, inputs, positions, targets)
    return *loss(losses, mask, of_rows), on_the_way


def _token_losses(
    model: nn.Module, inputs: mx.array, positions: mx.array, targets: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """Each predicted token's loss, (N,) float32; and what leads to it."""
    states = model.states(inputs)
    hidden = states[-1]
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions]
    if model.training and not _has_trainable_head(model):
        chunk = tokens_at_once(model.args.vocab_size)
        losses, gradient = chunked_cross_entropy(
            model.head, predicting, targets, chunk, model.cross_entropy
        )
        return losses, [*states, gradient]
    if not model.training:
        return model.cross_entropy(model.head(predicting), targets), states
    with tokens_seeded(seeds_for(inputs.shape).reshape(-1)[positions]):  # of those tokens alone
        logits = model.head(predicting)
    return model.cross_entropy(logits, targets), states


def _has_trainable_head(model: nn.Module) -> bool:
    """Whether training changes the matrix that makes logits."""
    return bool(model.head_layer.trainable_parameters())


def _compile_gradients(model: nn.Module, loss: Loss, copies_of: Callable[[], Any]) -> Compute:
    """Compile the loss sum, count, measures and gradients of a microbatch.

    Args:
        model: a `Network`.
        loss: of the predicted tokens.
        copies_of: gives what takes the place of some parameters, see `working_copies`.
    """

    def loss_and_rest(*arrays: Any) -> Any:
        return microbatch_loss(model, *arrays, loss=loss)

    differentiate = nn.value_and_grad(model, loss_and_rest)

    @partial(mx.compile, inputs=[model.state])
    def gradients_of(copies: Any, seeds: mx.array, *arrays: Any) -> Any:
        parameters = model.trainable_parameters()
        model.update(copies)
        with tokens_seeded(seeds):
            (loss_sum, count, measures, on_the_way), gradients = differentiate(*arrays)
        # Put the parameters back: tracing leaves placeholders in the model, which is not an output.
        model.update(parameters)
        return (loss_sum, count, measures, gradients), on_the_way

    def compute(microbatch: Microbatch) -> Computed:
        length = microbatch.inputs.shape[1]
        seeds = token_seeds(microbatch.row_ids, length, microbatch.seed)
        return gradients_of(copies_of(), seeds, *microbatch.arrays())

    return compute


def _compile_loss(model: nn.Module, loss: Callable[..., Any]) -> Compute:
    @partial(mx.compile, inputs=[model.state])
    def loss_of(
        inputs: mx.array,
        positions: mx.array,
        targets: mx.array,
        mask: mx.array,
        of_rows: dict[str, mx.array],
    ) -> Any:
        losses, on_the_way = _token_losses(model, inputs, positions, targets)
        return loss(losses, mask, of_rows), on_the_way

    return lambda microbatch: loss_of(*microbatch.arrays())
