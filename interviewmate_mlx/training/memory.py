"""How much memory a microbatch takes, and so how many tokens may share one."""

import mlx.nn as nn
from mlx.utils import tree_flatten

from interviewmate_mlx.errors import BackendError
from interviewmate_mlx.model.falcon import ModelArgs

# Floats kept for the backward pass, a token and a layer: the inputs of the norms, the
# linear layers and the GELU (in units of C), and the attention scores (of H * L).
_KEPT_CHANNELS = 20
_KEPT_SCORES = 3
# float32 copies of a token's logits: the logits, their softmax, their gradient.
_KEPT_LOGITS = 3


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, and of the gradients and moments of what is trained."""
    parameters = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    trained = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    return parameters + 4 * trained


def bytes_per_token(args: ModelArgs, width: int, itemsize: int) -> int:
    """Bytes that one padded token of a microbatch takes.

    Args:
        args: the model's shape.
        width: tokens of a padded row; attention while training is unfused.
        itemsize: bytes of an activation.
    """
    kept = _KEPT_CHANNELS * args.hidden_size + _KEPT_SCORES * args.num_attention_heads * width
    return args.num_hidden_layers * kept * itemsize + _KEPT_LOGITS * args.vocab_size * 4


def token_budget(
    model: nn.Module, args: ModelArgs, width: int, itemsize: int, memory_bytes: int
) -> int:
    """Padded tokens that fit into one microbatch.

    Raises:
        BackendError: not even one row of `width` tokens fits.
    """
    weights, per_token = weight_bytes(model), bytes_per_token(args, width, itemsize)
    needed = weights + width * per_token
    if needed > memory_bytes:
        raise BackendError(
            f"Training needs about {needed / 1e9:.1f} GB ({weights / 1e9:.1f} of them weights), "
            f"this machine can give {memory_bytes / 1e9:.1f}.\n"
            "Lower data.max_length, set model.dtype to bfloat16, or train a smaller or quantised "
            "base."
        )
    return (memory_bytes - weights) // per_token
