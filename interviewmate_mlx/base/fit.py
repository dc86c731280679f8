"""Whether tensors are those of a network."""

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from interviewmate_mlx.base.quantization import Quantization
from interviewmate_mlx.base.source import check_depth
from interviewmate_mlx.errors import WeightsError, list_faults, one_line
from interviewmate_mlx.formats.cast import FLOAT_DTYPES
from interviewmate_mlx.formats.safetensors_file import TensorEntry
from interviewmate_mlx.model import falcon
from interviewmate_mlx.model.architectures import NetworkConfig
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.model.zoo import build_network

EMBEDDING = "transformer.word_embeddings.weight"  # of a Falcon-RW
HEAD = "lm_head.weight"


def put_weights(
    model: nn.Module,
    weights: dict[str, mx.array],
    quantization: Quantization | None,
    *,
    are_own: bool = False,
) -> None:
    """Give a network its weights, in place.

    Args:
        model: the network.
        weights: under a checkpoint's names.
        quantization: of the weights.
        are_own: they are under the network's own names.

    Raises:
        Exception: of any kind: they do not fit. Some of mlx-lm's networks raise what they meet.
    """
    if not are_own and hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    if quantization:
        quantization.apply(model, weights)
    model.load_weights(list(weights.items()))


def check_fit(
    folder: Path,
    network: NetworkConfig,
    tensors: dict[str, TensorEntry],
    quantization: Quantization | None,
) -> None:
    """Check that tensors are exactly a network's, without reading them.

    Raises:
        WeightsError: they are not.
    """
    check_depth(network.num_layers, tensors)
    # Nothing is computed, so these take no memory.
    blank = {
        name: mx.zeros(e.shape, getattr(mx, e.dtype, mx.float32)) for name, e in tensors.items()
    }
    try:
        put_weights(build_network(network), blank, quantization)
    except Exception as error:
        raise WeightsError(
            f"{folder}: its tensors do not fit the {network.model_type} in its config.json: "
            f"{one_line(error)}\nCorrect config.json, or download the model again."
        ) from error


def fit_falcon(
    tensors: dict[str, TensorEntry], args: falcon.ModelArgs, dtype: str | None
) -> dict[str, TensorEntry]:
    """Check that the tensors are exactly the model's; return them in the model's order."""
    check_depth(args.num_hidden_layers, tensors)
    expected = {
        name: value.shape for name, value in named_arrays(falcon.Model(args).parameters()).items()
    }
    faults = [f"{name}: missing" for name in expected if name not in tensors]
    common = tensors[EMBEDDING].dtype if EMBEDDING in tensors else None
    for name, entry in tensors.items():
        if name not in expected and not (name == HEAD and args.tie_word_embeddings):
            faults.append(f"{name}: unknown")
        elif name in expected and entry.shape != expected[name]:
            faults.append(f"{name}: got {entry.shape}, expected {expected[name]}")
        if entry.dtype not in FLOAT_DTYPES:
            faults.append(f"{name}: got {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        elif dtype is None and common in FLOAT_DTYPES and entry.dtype != common:
            faults.append(f"{name}: got {entry.dtype}, expected {common} like the embedding")
    is_tied = args.tie_word_embeddings and HEAD in tensors
    if not faults and is_tied and not _are_equal(tensors[HEAD], tensors[EMBEDDING]):
        faults.append(f"{HEAD}: differs from the embedding, but tie_word_embeddings is true")
    if faults:
        path = next(iter(tensors.values())).path.parent if tensors else "The model"
        raise WeightsError(
            f"{path}: its tensors do not fit the Falcon-RW in its config.json:\n"
            f"{list_faults(faults, max_shown=40)}\n"
            "Correct config.json, or download the model again; for mixed dtypes, choose one dtype.",
            "dtype",
        )
    return {name: tensors[name] for name in expected}


def _are_equal(one: TensorEntry, other: TensorEntry) -> bool:
    if one == other:  # they share a storage
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = hashlib.sha256(), hashlib.sha256()
    for digest, entry in ((first, one), (second, other)):
        for chunk in entry.chunks():
            digest.update(chunk)
    return first.digest() == second.digest()
