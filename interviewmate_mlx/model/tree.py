"""The arrays of a nested tree, such as a model's parameters, by their dotted paths."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """A tree's arrays by path, as in `h.0.mlp.dense_h_to_4h.weight`, in the tree's order."""
    found = tree_flatten(tree, destination={})
    assert isinstance(found, dict)
    return found
