"""How much memory a step takes, and so how many tokens may share a microbatch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from interviewmate_mlx.data.batches import WIDTH_STEP, Row, padded_tokens, padded_width
from interviewmate_mlx.errors import BackendError
from interviewmate_mlx.model.dora import DoRALinear
from interviewmate_mlx.model.gpu_kernels import QUERY_TILE
from interviewmate_mlx.model.lora import LORA_NAMES, Projection, lora_layers, shape_of
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.step import Executor

# What a token takes on a CPU at the peak, which is at the loss. A block keeps for its backward pass
# most of what its linear layers take in and give out. On top come arrays that MLX has planned
# ahead, V each: of the logits.
_KEPT_SHARE = 0.9
_PLANNED_LOGITS = 7
# On a GPU's path, at the same peak: logits in the base's dtype and their gradient, and what MLX's
# loss takes in float32. Measured on a CPU; a GPU's fused loss takes less.
_GPU_LOGITS = 2, 4

# Bytes that a DoRA layer keeps for its magnitude, by what the layer gives: measured, with mini.
_OF_DORA = 9


class Scores(NamedTuple):
    """Arrays of attention's scores, H * L numbers a token."""

    kept: int  # by each block, for its backward pass
    planned: int  # ahead, at the peak
    tile: int = 1  # that queries are padded to a multiple of


# By how attention is computed: again in the backward pass; with a mask that is added, on a CPU and
# on a GPU's path; causal, as MLX has it without a kernel; and fused, by a GPU's kernel, which may
# take a mask: one for all rows, as large as the scores of one.
SCORES_AGAIN = Scores(0, 11)
SCORES_MASKED = Scores(3, 11)
SCORES_MASKED_ON_GPU = Scores(1, 11)
SCORES_CAUSAL = Scores(1, 3)
SCORES_FUSED = Scores(0, 0)
SCORES_FUSED_MASKED = Scores(0, 1, QUERY_TILE)


@dataclass(frozen=True)
class Widths:
    """How wide a network's arrays are, in numbers a token.

    Attributes:
        hidden: C.
        vocab: V.
        heads: of the queries.
        head_dim: of a head.
        layers: number of blocks.
        taken: by all linear layers of the blocks, summed.
        given: by them, summed.
        kept: of that, what a GPU's path keeps for the backward pass, and C a block if it is not
            only given. mlx-lm's networks, with autodiff's derivatives, keep what their layers
            take, too; so does any network whose own weights are trained.
        lora_bytes: a token, of what the LoRA layers take, summed, in the dtype they compute in.
        dropped_bytes: of those of them that drop some of it.
        stretched: given by the DoRA layers, summed.
    """

    hidden: int
    vocab: int
    heads: int
    head_dim: int
    layers: int
    taken: int
    given: int
    kept: int
    lora_bytes: int
    dropped_bytes: int
    stretched: int = 0


def widths_of(model: Network) -> Widths:
    """Read the widths of a network, with LoRA or without."""
    args, taken, given = model.args, 0, 0
    for block in model.layers:
        for path, module in block.named_modules():
            if isinstance(module, Projection) and not path.endswith(LORA_NAMES):
                given, taken = given + shape_of(module)[0], taken + shape_of(module)[1]
            elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
                # A token goes through some experts.
                given += args.num_experts_per_tok * module.output_dims
                taken += args.num_experts_per_tok * module.input_dims
    has_own_derivatives = any(hasattr(module, "attend") for module in model.modules())
    heads = args.num_attention_heads
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // heads
    layers = [layer for _, layer in lora_layers(model)]
    loras = [
        (
            shape_of(layer.base_layer)[1] * layer.dtype_for(model.dtype).size,
            layer.dropout.draws,
        )
        for layer in layers
    ]
    doras = [layer for layer in layers if isinstance(layer, DoRALinear)]
    more = 0 if has_own_derivatives and layers else taken + args.hidden_size * len(model.layers)
    return Widths(
        hidden=args.hidden_size,
        vocab=args.vocab_size,
        heads=heads,
        head_dim=head_dim,
        layers=len(model.layers),
        taken=taken,
        given=given,
        kept=given + more,
        lora_bytes=sum(size for size, _ in loras),
        dropped_bytes=sum(size for size, draws in loras if draws),
        stretched=sum(shape_of(layer.base_layer)[0] for layer in doras),
    )


def weight_bytes(model: nn.Module, num_streams: int = 1, num_single: int = 0) -> int:
    """Bytes of the parameters and of what belongs to the trained ones, while rows go through.

    That is two moments, gradients of each stream and their sum, float32, and a master of what is
    narrower; and of a LoRA that computes in bfloat16 its copies, and each stream's gradients in
    it. So many parameters as `num_single` have a single moment.
    """
    parameters, trained, masters, _ = _parts(model)
    copies = sum(
        2 * (layer.lora_A.weight.size + layer.lora_B.weight.size)
        for _, layer in lora_layers(model)
        if layer.dtype_for(model.dtype) != mx.float32
    )
    own = parameters + masters + (3 + num_streams) * trained - 4 * num_single
    return own + (1 + num_streams) * copies


def update_bytes(model: nn.Module, num_single: int = 0) -> int:
    """Bytes during an update: of all parameters, the gradients' sum, and old and new state."""
    parameters, trained, masters, narrow = _parts(model)
    return parameters + narrow + 2 * masters + 5 * trained - 2 * 4 * num_single


def _parts(model: nn.Module) -> tuple[int, int, int, int]:
    """Bytes of all parameters; of the trained ones in float32; of masters; of those as they are."""
    arrays = named_arrays(model.trainable_parameters()).values()
    parameters = sum(array.nbytes for array in named_arrays(model.parameters()).values())
    trained = sum(4 * array.size for array in arrays)
    masters = sum(4 * array.size for array in arrays if array.itemsize < 4)
    return parameters, trained, masters, sum(array.nbytes for array in arrays)


def cpu_bytes_per_token(
    widths: Widths,
    width: int,
    itemsize: int,
    scores: Scores,
    gradient_checkpointing: bool = False,
    num_streams: int = 1,
) -> int:
    """Bytes that one padded token of a microbatch takes on a CPU.

    Fitted to the measured peaks of Falcon-RWs of 4, 8 and 24 layers on a CPU, 64 to 1024
    tokens a row, one microbatch at a time: within 10 %; and of seven other networks, within 20 %
    (`tests/training/test_memory_of_networks.py`). Streams that recompute may take less.

    Args:
        widths: of the network.
        width: tokens of a padded row; attention while training is unfused.
        itemsize: bytes of an activation.
        scores: how attention is computed.
        gradient_checkpointing: one block at a time keeps more than its input.
        num_streams: that run side by side. What MLX plans ahead, it plans for all of them
            together; measured, this does not hold with gradient checkpointing.
    """
    layers, inputs = widths.layers, 0
    if gradient_checkpointing:
        layers, inputs, num_streams = 1, layers, 1
    of_block = _KEPT_SHARE * (widths.taken + widths.given) / widths.layers
    channels = inputs * widths.hidden + layers * of_block
    num_scores = scores.planned / num_streams + scores.kept * layers
    floats = channels + num_scores * widths.heads * width
    of_lora = layers * (widths.dropped_bytes + widths.stretched * _OF_DORA) / widths.layers
    logits = _PLANNED_LOGITS / num_streams * widths.vocab
    return int(floats * itemsize + of_lora + logits * 4)  # which are float32


def gpu_bytes_per_token(
    widths: Widths,
    width: int,
    itemsize: int,
    widened: int,
    scores: Scores,
    gradient_checkpointing: bool = False,
) -> int:
    """Bytes that one padded token of a microbatch takes on a GPU: what is kept, and the logits.

    A block keeps for its backward pass, in its own dtype: its input, that of its second norm and
    attention's output; queries, keys and values, each as wide as attention took them; and what
    its MLP's activation takes. That is the output of attention, and what its linear layers give,
    since two of them give what is added to the residual. Queries that are padded are kept beside
    those that are not, and their output is as long. A LoRA keeps its input, or what dropout left of
    it. What is not trained keeps nothing.

    Whole steps in bfloat16 on a CPU stay within 20 % of it, but for what is allocated ahead.

    Args:
        widths: of the network with its LoRA.
        width: tokens of a padded row.
        itemsize: bytes of an activation.
        widened: of a head in attention; its own size where that is not changed.
        scores: how attention is computed.
        gradient_checkpointing: all blocks but one keep their input alone.
    """
    layers, heads = widths.layers, widths.heads
    of_lora = widths.lora_bytes + _OF_DORA * widths.stretched
    attended = heads * (widths.head_dim + 3 * (widened - widths.head_dim))
    padded = math.ceil(width / scores.tile) * scores.tile / width
    if padded > 1:
        attended += int(heads * widths.head_dim * (2 * padded - 1))
    block = (attended + widths.kept / layers) * itemsize + of_lora / layers
    of_scores = heads * width * padded * itemsize
    block += scores.kept * of_scores
    inputs = widths.hidden * itemsize
    kept = block + layers * inputs if gradient_checkpointing else layers * block
    kept += scores.planned * of_scores
    narrow, wide = _GPU_LOGITS
    return int(kept + widths.vocab * (narrow * itemsize + wide * 4))


@dataclass(frozen=True)
class MemoryPlan:
    """What training may take of a machine's memory, and what it will.

    Attributes:
        memory_bytes: that may be taken.
        row_tokens: padded tokens of the longest row; both sides of a pair count.
        token_budget: padded tokens that there is room for at a time, over all streams.
        step_tokens: of them, those of the largest step.
        peak_bytes: expected at that step.
    """

    memory_bytes: int
    row_tokens: int
    token_budget: int
    step_tokens: int
    peak_bytes: int

    @property
    def max_rows(self) -> int:
        """How many of the longest rows there is room for at a time."""
        return max(1, self.token_budget // self.row_tokens)


def plan_memory(
    model: Network,
    rows: Sequence[Row],
    effective_batch: int,
    bytes_per_token: Callable[[int, int], int],
    gradient_checkpointing: bool,
    memory_bytes: int,
    executor: Executor,
    token_budget: int = 0,
    keeps_best: bool = False,
    num_single: int = 0,
) -> MemoryPlan:
    """Plan a run: weights, and `bytes_per_token` for each padded token.

    Args:
        model: with what is trained.
        rows: all that training and validation put through the model.
        effective_batch: rows of a step.
        bytes_per_token: of rows of a width, on a number of streams side by side.
        gradient_checkpointing: whether that is done already.
        memory_bytes: what training may take.
        executor: of the machine, before it is limited to the plan.
        token_budget: of the run that goes on, which keeps its own; 0 for a new run.
        keeps_best: whether there are validations, so that the best weights stay in memory.
        num_single: parameters for which the optimizer keeps one moment in place of two.

    Raises:
        BackendError: not even the longest row fits.
    """
    best = _parts(model)[-1] if keeps_best else 0
    weights = best + weight_bytes(model, 1, num_single)
    update = best + update_bytes(model, num_single)
    width, row_tokens = padded_width(max(map(len, rows)) - 1), max(map(padded_tokens, rows))
    per_token = bytes_per_token(width, 1)
    needed = max(update, weights + row_tokens * per_token)
    if needed > memory_bytes:
        sides = row_tokens // width
        fitting = _fitting_width(
            width,
            lambda w: max(update, weights + sides * w * bytes_per_token(w, 1)) <= memory_bytes,
        )
        raise _too_large(model, needed, update, memory_bytes, fitting, gradient_checkpointing)
    # A token of narrower rows may take more, where attention pads them.
    most = max(bytes_per_token(w, 1) for w in {padded_width(len(row) - 1) for row in rows})
    budget = token_budget or (memory_bytes - weights) // most
    executor = executor.limited_to(budget // row_tokens)
    longest = sorted(rows, key=len)[-effective_batch:]
    groups = executor.split(longest, budget)
    sizes = sorted(padded_tokens(group[0]) * len(group) for group in groups)
    side_by_side = min(executor.num_streams, len(sizes))
    step_tokens = sum(sizes[-side_by_side:])
    per_token = bytes_per_token(width, side_by_side)
    side_by_side_bytes = best + weight_bytes(model, side_by_side, num_single)
    side_by_side_bytes += step_tokens * per_token
    peak_bytes = max(update, side_by_side_bytes)
    return MemoryPlan(memory_bytes, row_tokens, budget, step_tokens, peak_bytes)


def _too_large(
    model: Network,
    needed: int,
    update: int,
    memory_bytes: int,
    fitting: int,
    gradient_checkpointing: bool,
) -> BackendError:
    """The error of a run that does not fit, with what would.

    Args:
        model: with what is trained.
        needed: bytes, for the longest row.
        update: bytes of them that no row changes.
        memory_bytes: that may be taken.
        fitting: padded width that would fit; 0 if none would.
        gradient_checkpointing: whether that is done already.
    """
    hints = ["lower data.max_length"]
    if any(True for _ in lora_layers(model)):
        fixed, what = weight_bytes(model), "weights"
        hints += ["set model.dtype to bfloat16", "train a smaller or quantised base"]
    else:
        fixed, what = update, "all weights, their gradients and moments"
        hints += ["train a smaller base, or a LoRA (train.weights lora)"]
    if not gradient_checkpointing:
        hints += ["or set train.gradient_checkpointing"]
    if what != "weights" and update > memory_bytes:
        hints = hints[1:2]
    would = f"Rows of up to {fitting + 1} tokens would fit" if fitting else "No row would fit"
    return BackendError(
        f"Training needs about {needed / 1e9:.1f} GB ({fixed / 1e9:.1f} of them {what}), "
        f"but may take {memory_bytes / 1e9:.1f} here (train.memory_gb, or the machine's).\n"
        f"{would}: {', '.join(hints)}."
    )


def _fitting_width(width: int, fits: Callable[[int], bool]) -> int:
    """The largest padded width below `width` that fits; 0 if none does."""
    widths = range(0, width, WIDTH_STEP)
    return max((w for w in widths if w and fits(w)), default=0)
