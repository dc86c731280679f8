"""How much memory a step takes, and so how many tokens may share a microbatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from interviewmate_mlx.data.batches import padded_width
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.errors import BackendError
from interviewmate_mlx.model.lora import LORA_NAMES, Projection, lora_layers, shape_of
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.step import Executor

# What a token takes on a CPU at the peak, which is at the loss. A block keeps for its backward pass
# what its linear layers take in and give out; and the scores, H * L, unless attention computes them
# again. On top come arrays that MLX has planned ahead: copies of the last layers' scores and, V
# each, of the logits.
_KEPT_SCORES = 3
_PLANNED_SCORES = 11
_PLANNED_LOGITS = 7
# On a GPU, at the same peak: logits in the base's dtype, and in float32 they, their softmax and
# their gradient, which is cast back.
_GPU_LOGITS = 2, 3


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
    """

    hidden: int
    vocab: int
    heads: int
    head_dim: int
    layers: int
    taken: int
    given: int


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
    heads = args.num_attention_heads
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // heads
    return Widths(
        args.hidden_size, args.vocab_size, heads, head_dim, len(model.layers), taken, given
    )


def weight_bytes(model: nn.Module, num_streams: int = 1) -> int:
    """Bytes of the parameters and of all that belongs to the trained ones.

    That is one set of gradients per stream, two moments and, during the update, a copy.
    """
    parameters, trained = (
        sum(array.nbytes for array in named_arrays(tree).values())
        for tree in (model.parameters(), model.trainable_parameters())
    )
    return parameters + (3 + num_streams) * trained


def cpu_bytes_per_token(
    widths: Widths,
    width: int,
    itemsize: int,
    keeps_scores: bool,
    gradient_checkpointing: bool = False,
    num_streams: int = 1,
) -> int:
    """Bytes that one padded token of a microbatch takes on a CPU.

    Fitted to the measured peaks of models of 4, 8 and 24 layers on a CPU, 64 to 1024
    tokens a row, one microbatch at a time: within 10 %. Streams that recompute
    may take less.

    Args:
        widths: of the network.
        width: tokens of a padded row; attention while training is unfused.
        itemsize: bytes of an activation.
        keeps_scores: false with `use_cpu_kernels`, whose attention computes them again.
        gradient_checkpointing: one block at a time keeps more than its input.
        num_streams: that run side by side. What MLX plans ahead, it plans for all of them
            together; measured, this does not hold with gradient checkpointing.
    """
    layers, inputs = widths.layers, 0
    if gradient_checkpointing:
        layers, inputs, num_streams = 1, layers, 1
    channels = inputs * widths.hidden + layers * (widths.taken + widths.given) / widths.layers
    scores = _PLANNED_SCORES / num_streams + (_KEPT_SCORES * layers if keeps_scores else 0)
    floats = channels + scores * widths.heads * width
    logits = _PLANNED_LOGITS / num_streams * widths.vocab
    return int(floats * itemsize + logits * 4)  # which are float32


def gpu_bytes_per_token(
    model: Network,
    width: int,
    itemsize: int,
    widened: int,
    keeps_scores: bool,
    gradient_checkpointing: bool = False,
) -> int:
    """Bytes that one padded token of a microbatch takes on a GPU: what is kept, and the logits.

    A block keeps for its backward pass, in its own dtype: its input and that of its second norm,
    the first norm's output and attention's; queries, keys and values, each as wide as attention
    took them; and what its MLP's activation takes. That is C, the output of attention, and what
    its linear layers give, since two of them give what is added to the residual. A LoRA keeps
    its input in float32 and, with dropout, what is left of that and a mask of bytes. What is not
    trained keeps nothing.

    Measured in bfloat16 on a CPU, 128 and 384 tokens a row: within 10 % of a block's share.

    Args:
        model: with its LoRA.
        width: tokens of a padded row.
        itemsize: bytes of an activation.
        widened: of a head in attention; its own size where that is not changed.
        keeps_scores: whether attention keeps its scores, H numbers a token and key.
        gradient_checkpointing: all blocks but one keep their input alone.
    """
    widths = widths_of(model)
    layers, heads = widths.layers, widths.heads
    of_lora = sum(
        shape_of(layer.base_layer)[1] * (4 + (5 if layer.dropout.draws else 0))
        for _, layer in lora_layers(model)
    )
    attended = heads * (widths.head_dim + 3 * (widened - widths.head_dim))
    block = (widths.hidden + attended + widths.given / layers) * itemsize + of_lora / layers
    scores = heads * width * itemsize if keeps_scores else 0
    block += scores
    inputs = widths.hidden * itemsize
    kept = block + layers * inputs if gradient_checkpointing else layers * block
    kept += _PLANNED_SCORES * scores
    narrow, wide = _GPU_LOGITS
    return int(kept + widths.vocab * (narrow * itemsize + wide * 4))


@dataclass(frozen=True)
class MemoryPlan:
    """What training may take of a machine's memory, and what it will.

    Attributes:
        memory_bytes: that may be taken.
        row_width: padded tokens of the longest row.
        token_budget: padded tokens that there is room for at a time, over all streams.
        step_tokens: of them, those of the largest step.
        peak_bytes: expected at that step.
    """

    memory_bytes: int
    row_width: int
    token_budget: int
    step_tokens: int
    peak_bytes: int

    @property
    def max_rows(self) -> int:
        """How many of the longest rows there is room for at a time."""
        return max(1, self.token_budget // self.row_width)


def plan_memory(
    model: Network,
    rows: Sequence[Example],
    effective_batch: int,
    bytes_per_token: Callable[[int, int], int],
    gradient_checkpointing: bool,
    memory_bytes: int,
    executor: Executor,
    token_budget: int = 0,
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

    Raises:
        BackendError: not even the longest row fits.
    """
    weights = weight_bytes(model)
    width = padded_width(max(map(len, rows)) - 1)
    per_token = bytes_per_token(width, 1)
    needed = weights + width * per_token
    if needed > memory_bytes:
        raise BackendError(
            f"Training needs about {needed / 1e9:.1f} GB ({weights / 1e9:.1f} of them weights), "
            f"but may take {memory_bytes / 1e9:.1f} here (train.memory_gb, or the machine's).\n"
            "Lower data.max_length, set model.dtype to bfloat16, train a smaller or quantised base"
            f"{'' if gradient_checkpointing else ', or set train.gradient_checkpointing'}."
        )
    budget = token_budget or (memory_bytes - weights) // per_token
    executor = executor.limited_to(budget // width)
    longest = sorted(rows, key=len)[-effective_batch:]
    groups = executor.split(longest, budget)
    sizes = sorted(padded_width(len(group[0]) - 1) * len(group) for group in groups)
    side_by_side = min(executor.num_streams, len(sizes))
    step_tokens = sum(sizes[-side_by_side:])
    per_token = bytes_per_token(width, side_by_side)
    peak_bytes = weight_bytes(model, side_by_side) + step_tokens * per_token
    return MemoryPlan(memory_bytes, width, budget, step_tokens, peak_bytes)
