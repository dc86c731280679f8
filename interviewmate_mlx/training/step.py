"""The compiled microbatch and the compiled update.

    gradient of a step = sum over its microbatches of d(loss_sum) / number of predicted tokens

So any split of a step into microbatches gives the same update, and padding
never matters. (With dropout, each split draws other masks.)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.random import SeedSequence  # as in `data/batches.py`, not at the first step

from interviewmate_mlx import backend
from interviewmate_mlx.data.batches import Microbatch
from interviewmate_mlx.training.loss import (
    CHUNK_ELEMENTS,
    chunked_cross_entropy,
    masked_cross_entropy,
)

AddMicrobatches = Callable[[Sequence[Microbatch], Sequence[int]], None]
Update = Callable[[mx.array], dict[str, mx.array]]
TotalLoss = Callable[[Sequence[Microbatch]], tuple[float, int]]
Computation = Callable[..., list[mx.array]]


def loss_of(
    model: nn.Module, inputs: mx.array, positions: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Loss sum and token count of a microbatch, and what is computed on the way, in order.

    Logits exist only where there is a loss.
    """
    states = model.transformer.hidden_states(inputs)
    hidden = model.transformer.ln_f(states[-1])
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions]
    if model.training and not has_trainable_head(model):
        # Whatever the number of chunks: so the head's gradient is computed on the way, where as
        # part of the last layer's backward pass it would keep another stream waiting.
        chunk = CHUNK_ELEMENTS // model.args.vocab_size
        loss, gradient = chunked_cross_entropy(
            model.head, predicting, targets, mask, chunk, model.cross_entropy
        )
        return loss, mask.sum(), [*states, gradient]
    logits = model.head(predicting)
    return *masked_cross_entropy(logits, targets, mask, model.cross_entropy), states


def has_trainable_head(model: nn.Module) -> bool:
    """Whether training changes the matrix that makes logits."""
    head = model.transformer.word_embeddings if model.args.tie_word_embeddings else model.lm_head
    return bool(head.trainable_parameters())


def compile_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    max_grad_norm: float,
    streams: Sequence[mx.Stream] = (),
) -> tuple[AddMicrobatches, Update]:
    """Compile the two halves of a step over a model's trainable parameters.

    Args:
        model: a network with `transformer` and `head`; its trainable parameters
            and the optimizer's state are changed in place.
        optimizer: initialised here.
        max_grad_norm: the global norm to clip to; 0 leaves gradients as they are.
        streams: of `backend.cpu_streams`, among which microbatches are dealt out;
            without, they run one after the other on the default one.

    Returns:
        add_microbatches: takes a step's microbatches, and the numbers that dropout
            is to follow from; adds their loss, tokens and gradients to the step's.
        update: takes the learning rate, () float32, updates once, starts the sums
            anew and returns `loss`, `grad_norm` (before clipping) and
            `is_finite`, () each. From the first loss, gradient or updated parameter
            on that is not finite, nothing is updated any more.
    """
    optimizer.init(model.trainable_parameters())
    sums = [zero_sums(model) for _ in range(max(1, len(streams)))]
    adders = [compile_adder(model, own_sums) for own_sums in sums]
    health = {"healthy": mx.array(True)}

    def add_microbatches(microbatches: Sequence[Microbatch], entropy: Sequence[int]) -> None:
        seeds = SeedSequence(entropy).generate_state(len(microbatches), np.uint64)
        remaining = iter(seeds.tolist())

        def add(adder: Computation, microbatch: Microbatch) -> list[mx.array]:
            mx.random.seed(next(remaining))
            return adder(*microbatch.arrays())

        run_side_by_side(streams, adders, microbatches, add)

    state = [model.state, optimizer.state, sums, health]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(learning_rate: mx.array) -> dict[str, mx.array]:
        loss_sum, num_tokens, gradient_sums = tree_map(
            lambda *parts: sum(parts[1:], parts[0]),
            *([own["loss"], own["tokens"], own["gradients"]] for own in sums),
        )
        loss = loss_sum / num_tokens
        mean = tree_map(lambda g: g / num_tokens, gradient_sums)
        gradients, grad_norm = optim.clip_grad_norm(mean, max_grad_norm or math.inf)
        before = model.trainable_parameters(), tree_map(lambda a: a, optimizer.state)
        optimizer.state["learning_rate"] = learning_rate
        after = optimizer.apply_gradients(gradients, before[0]), optimizer.state
        sizes = [mx.abs(parameter).max() for _, parameter in tree_flatten(after[0])]
        # Once false it stays so: a later step must not be applied on top of a lost one.
        health["healthy"] &= mx.isfinite(loss) & mx.isfinite(grad_norm)
        health["healthy"] &= mx.isfinite(mx.stack(sizes)).all()
        is_finite = health["healthy"]
        parameters, moments = tree_map(
            lambda new, old: mx.where(is_finite, new, old), after, before
        )
        model.update(parameters)
        optimizer.state.update(moments)

        for own_sums in sums:
            own_sums.update(zero_sums(model))
        return {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}

    return add_microbatches, update


def zero_sums(model: nn.Module) -> dict[str, Any]:
    """What microbatches add to: the loss sum, the token count, the sums of gradients."""
    gradients = tree_map(mx.zeros_like, model.trainable_parameters())
    return {"loss": mx.array(0.0), "tokens": mx.array(0), "gradients": gradients}


def compile_adder(model: nn.Module, sums: dict[str, Any]) -> Computation:
    """Compile what adds a microbatch, given as its arrays, to `sums`.

    It evaluates nothing and returns what leads to the sums, in the order of its computation.
    """
    loss_and_gradients = nn.value_and_grad(model, partial(loss_of, model))

    @partial(
        mx.compile,
        inputs=[model.state, sums, mx.random.state],
        outputs=[sums, mx.random.state],
    )
    def add_microbatch(*arrays: mx.array) -> list[mx.array]:
        parameters = model.trainable_parameters()
        (loss, tokens, on_the_way), gradients = loss_and_gradients(*arrays)
        # The gradient's placeholders go; the model is not an output here, which would put it right.
        model.update(parameters)
        sums["loss"] += loss
        sums["tokens"] += tokens
        sums["gradients"] = tree_map(mx.add, sums["gradients"], gradients)
        backwards = [gradient for _, gradient in reversed(tree_flatten(sums["gradients"]))]
        return [*on_the_way, sums["loss"], sums["tokens"], *backwards]

    return add_microbatch


def compile_loss(model: nn.Module, streams: Sequence[mx.Stream] = ()) -> TotalLoss:
    """Compile the loss alone, for validation: the loss sum and token count of microbatches."""

    def compiled() -> Computation:
        @partial(mx.compile, inputs=[model.state])
        def loss(*arrays: mx.array) -> list[mx.array]:
            loss_sum, num_tokens, on_the_way = loss_of(model, *arrays)
            return [*on_the_way, loss_sum, num_tokens]

        return loss

    losses = [compiled() for _ in range(max(1, len(streams)))]

    def total_loss(microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        sums: list[tuple[mx.array, mx.array]] = []

        def add(loss: Computation, microbatch: Microbatch) -> list[mx.array]:
            results = loss(*microbatch.arrays())
            sums.append((results[-2], results[-1]))
            return results

        run_side_by_side(streams, losses, microbatches, add)
        values: Any = [(loss.item(), tokens.item()) for loss, tokens in sums]
        return sum(loss for loss, _ in values), sum(tokens for _, tokens in values)

    return total_loss


def run_side_by_side(
    streams: Sequence[mx.Stream],
    functions: Sequence[Computation],
    microbatches: Sequence[Microbatch],
    run: Callable[[Computation, Microbatch], list[mx.array]],
) -> None:
    """Deal microbatches out to streams, each with a function of its own, and start them all.

    Args:
        streams: that run at the same time; none for the default one.
        functions: as many as streams, or one.
        microbatches: what to run.
        run: calls a function with a microbatch; its results in the order of their computation.
    """
    for at_once in itertools.zip_longest(*deal(microbatches, len(functions))):
        results = []
        on_streams: list[Any] = [mx.stream(s) for s in streams] or [nullcontext()]
        if streams:
            backend.share_cores(len(at_once) - at_once.count(None))
        for on_stream, function, microbatch in zip(on_streams, functions, at_once, strict=True):
            if microbatch:
                with on_stream:
                    pieces = run(function, microbatch)
                if streams:  # then it is computed while the next stream's microbatch is traced
                    mx.async_eval(pieces.pop(0))
                results.append(pieces)
        if streams:
            evaluate_in_turn(results)
        else:
            mx.async_eval(results)


def evaluate_in_turn(results: Sequence[list[mx.array]]) -> None:
    """Start several streams' computations, a piece of each in turn; empties the lists.

    MLX lets some hundred operations wait, those of all streams together. Whole
    computations one after the other would leave the later streams without work.
    """
    for pieces in results:
        pieces.reverse()
    while any(results):
        for pieces in filter(None, results):
            mx.async_eval(pieces.pop())  # which is then held by what needs it alone


def deal(microbatches: Sequence[Microbatch], num_hands: int) -> list[list[Microbatch]]:
    """Deal microbatches out, the largest first, each to whoever has the least to do."""
    hands: list[list[Microbatch]] = [[] for _ in range(num_hands)]
    for microbatch in sorted(microbatches, key=lambda m: -m.inputs.size):
        min(hands, key=lambda hand: sum(m.inputs.size for m in hand)).append(microbatch)
    return hands
