"""The compiled microbatch and the compiled update.

    gradient of a step = sum over its microbatches of d(loss_sum) / number of predicted tokens

So any split of a step into microbatches gives the same update, and padding
never matters. (With dropout, each split draws other masks.)
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from interviewmate_mlx.data.batches import Microbatch
from interviewmate_mlx.training.loss import (
    CHUNK_ELEMENTS,
    chunked_cross_entropy,
    masked_cross_entropy,
)

AddMicrobatches = Callable[[Sequence[Microbatch], Sequence[int]], None]
Update = Callable[[mx.array], dict[str, mx.array]]
TotalLoss = Callable[[Sequence[Microbatch]], tuple[float, int]]

# While a compiled function is traced, the model holds placeholders instead of its weights.
_TRACING = threading.Lock()


def loss_of(
    model: nn.Module, inputs: mx.array, positions: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Loss sum and token count of a microbatch. Logits exist only where there is a loss."""
    hidden = model.transformer(inputs)
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions]
    chunk = CHUNK_ELEMENTS // model.args.vocab_size
    if model.training and len(positions) > chunk and not has_trainable_head(model):
        loss = chunked_cross_entropy(
            model.head, predicting, targets, mask, chunk, model.cross_entropy
        )
        return loss, mask.sum()
    return masked_cross_entropy(model.head(predicting), targets, mask, model.cross_entropy)


def has_trainable_head(model: nn.Module) -> bool:
    """Whether training changes the matrix that makes logits."""
    head = model.transformer.word_embeddings if model.args.tie_word_embeddings else model.lm_head
    return bool(head.trainable_parameters())


def compile_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    max_grad_norm: float,
    workers: Sequence[Executor] = (),
) -> tuple[AddMicrobatches, Update]:
    """Compile the two halves of a step over a model's trainable parameters.

    Args:
        model: a network with `transformer` and `head`; its trainable parameters
            and the optimizer's state are changed in place.
        optimizer: initialised here.
        max_grad_norm: the global norm to clip to; 0 leaves gradients as they are.
        workers: of `backend.cpu_workers`, among which microbatches are dealt out;
            without, they run one after the other where they are called.

    Returns:
        add_microbatches: takes a step's microbatches, and the numbers that dropout
            is to follow from; adds their loss, tokens and gradients to the step's.
        update: takes the learning rate, () float32, updates once, starts the sums
            anew and returns `loss`, `grad_norm` (before clipping) and
            `is_finite`, () each. From the first loss, gradient or updated parameter
            on that is not finite, nothing is updated any more.
    """
    optimizer.init(model.trainable_parameters())
    sums = [zero_sums(model) for _ in range(max(1, len(workers)))]
    adders = [compile_adder(model, own_sums) for own_sums in sums]
    health = {"healthy": mx.array(True)}

    def add_microbatches(microbatches: Sequence[Microbatch], entropy: Sequence[int]) -> None:
        seeds = np.random.SeedSequence(entropy).generate_state(len(microbatches), np.uint64)
        remaining = iter(seeds.tolist())
        hands = [[(m, next(remaining)) for m in hand] for hand in deal(microbatches, len(adders))]
        state = [model.state, sums, [m.arrays() for m in microbatches]]
        share_out(workers, state, add_in_turn, adders, hands)

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


def compile_adder(model: nn.Module, sums: dict[str, Any]) -> Callable[..., Any]:
    """Compile what adds a microbatch, given as its arrays, to `sums`.

    It evaluates nothing and returns the sums so far. Evaluate them
    before the next microbatch, or this one's activations are kept too.
    """
    loss_and_gradients = nn.value_and_grad(model, partial(loss_of, model))

    @partial(
        mx.compile,
        inputs=[model.state, sums, mx.random.state],
        outputs=[sums, mx.random.state],
    )
    def add_microbatch(*arrays: mx.array) -> Any:
        parameters = model.trainable_parameters()
        (loss, tokens), gradients = loss_and_gradients(*arrays)
        # The gradient's placeholders go; the model is not an output here, which would put it right.
        model.update(parameters)
        sums["loss"] += loss
        sums["tokens"] += tokens
        sums["gradients"] = tree_map(mx.add, sums["gradients"], gradients)
        return sums["loss"], sums["tokens"], sums["gradients"]

    return add_microbatch


def add_in_turn(adder: Callable[..., Any], hand: Sequence[tuple[Microbatch, int]]) -> None:
    """Add microbatches to an adder's sums, each with the dropout of its own seed."""
    for microbatch, seed in hand:
        mx.random.seed(seed)
        with _TRACING:
            added = adder(*microbatch.arrays())
        # Gradients too: what is only planned keeps its activations.
        mx.async_eval(added)
    mx.synchronize()


def compile_loss(model: nn.Module, workers: Sequence[Executor] = ()) -> TotalLoss:
    """Compile the loss alone, for validation: the loss sum and token count of microbatches."""
    compiled = [
        mx.compile(partial(loss_of, model), inputs=[model.state])
        for _ in range(max(1, len(workers)))
    ]

    def add_up(loss: Callable[..., Any], hand: Sequence[Microbatch]) -> tuple[float, int]:
        loss_sum, num_tokens = 0.0, 0
        for microbatch in hand:
            with _TRACING:
                sums = loss(*microbatch.arrays())
            mx.eval(sums)
            loss_sum, num_tokens = loss_sum + sums[0].item(), num_tokens + sums[1].item()
        return loss_sum, num_tokens

    def total_loss(microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        hands = deal(microbatches, len(compiled))
        state = [model.state, [m.arrays() for m in microbatches]]
        sums = share_out(workers, state, add_up, compiled, hands)
        return sum(loss for loss, _ in sums), sum(tokens for _, tokens in sums)

    return total_loss


def deal(microbatches: Sequence[Microbatch], num_hands: int) -> list[list[Microbatch]]:
    """Deal microbatches out, the largest first, each to whoever has the least to do."""
    hands: list[list[Microbatch]] = [[] for _ in range(num_hands)]
    for microbatch in sorted(microbatches, key=lambda m: -m.inputs.size):
        min(hands, key=lambda hand: sum(m.inputs.size for m in hand)).append(microbatch)
    return hands


def share_out(
    workers: Sequence[Executor], state: Any, work: Callable[..., Any], *arguments: Sequence[Any]
) -> list[Any]:
    """`work` done for each tuple of arguments by a worker of its own, or here without workers.

    `state` is what the work reads: a thread cannot evaluate what another one planned.
    """
    if not workers:
        return list(map(work, *arguments))
    mx.eval(state)
    jobs = zip(workers, *arguments, strict=True)
    futures = [worker.submit(work, *job) for worker, *job in jobs]
    return [future.result() for future in futures]
