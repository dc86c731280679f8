"""How much memory a microbatch takes, and so how many tokens may share one."""

import mlx.nn as nn
from mlx.utils import tree_flatten

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
    """Padded tokens that fit into one microbatch; at least one row's."""
    free = memory_bytes - weight_bytes(model)
    return max(width, free // bytes_per_token(args, width, itemsize))
