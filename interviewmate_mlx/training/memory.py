"""How much memory a microbatch takes, and so how many tokens may share one."""

import mlx.nn as nn
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import BackendError
from interviewmate_mlx.model.falcon import ModelArgs

# Floats that a token takes at the peak. A layer keeps for its backward pass the inputs of the
# norms, of the attention and of the GELU, in units of C; and the scores, of H * L, where
# attention does not compute them anew. On top come arrays that MLX has planned ahead.
_KEPT_CHANNELS = 16
_PLANNED_CHANNELS = 90
_KEPT_SCORES = 3
_PLANNED_SCORES = 11
# float32 copies of a token's logits: the logits, their softmax, their gradient.
_KEPT_LOGITS = 3


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, and of the gradients and moments of what is trained."""
    parameters = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    trained = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    return parameters + 4 * trained


def bytes_per_token(args: ModelArgs, width: int, itemsize: int, keeps_scores: bool) -> int:
    """Bytes that one padded token of a microbatch takes.

    Fitted to the measured peaks of models of 8 and of 24 layers on a CPU, 128 to 1024
    tokens a row, one microbatch at a time: within 7 %. Workers reach their peaks at
    different times, and take less. On a GPU it has not been measured.

    Args:
        args: the model's shape.
        width: tokens of a padded row; attention while training is unfused.
        itemsize: bytes of an activation.
        keeps_scores: false with `use_cpu_kernels`, whose attention computes them anew.
    """
    layers = args.num_hidden_layers
    channels = _KEPT_CHANNELS * layers + _PLANNED_CHANNELS
    scores = _PLANNED_SCORES + (_KEPT_SCORES * layers if keeps_scores else 0)
    floats = channels * args.hidden_size + scores * args.num_attention_heads * width
    return floats * itemsize + _KEPT_LOGITS * args.vocab_size * 4


def token_budget(
    model: nn.Module,
    args: ModelArgs,
    width: int,
    itemsize: int,
    memory_bytes: int,
    keeps_scores: bool = True,
) -> int:
    """Padded tokens that fit into one microbatch.

    Raises:
        BackendError: not even one row of `width` tokens fits.
    """
    weights, per_token = weight_bytes(model), bytes_per_token(args, width, itemsize, keeps_scores)
    needed = weights + width * per_token
    if needed > memory_bytes:
        raise BackendError(
            f"Training needs about {needed / 1e9:.1f} GB ({weights / 1e9:.1f} of them weights), "
            f"this machine can give {memory_bytes / 1e9:.1f}.\n"
            "Lower data.max_length, set model.dtype to bfloat16, or train a smaller or quantised "
            "base."
        )
    return (memory_bytes - weights) // per_token
