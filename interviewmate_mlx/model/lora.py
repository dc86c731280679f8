"""LoRA by hand (https://arxiv.org/abs/2106.09685).

Module and parameter names are PEFT's, so that an adapter's keys are this
model's own parameter paths behind the prefix `base_model.model.`.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from interviewmate_mlx.errors import AdapterError, list_faults
from interviewmate_mlx.model.dropout import Dropout
from interviewmate_mlx.model.tree import named_arrays

Projection: TypeAlias = nn.Linear | nn.QuantizedLinear
ATTENTION, ALL_LINEAR = "attention", "all-linear"  # words for layers that a network has
LORA_NAMES = ("lora_A", "lora_B")  # of the matrices' modules, as in PEFT


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: `y = Wx + b + scale * B A dropout(x)`.

    A and B are float32, whatever the dtype of the base; what they are multiplied in, `dtype_for`
    says. B starts at zero, so that the first forward is the base's own.
    """

    def __init__(
        self, base_layer: Projection, rank: int, scale: float, dropout: float, number: int = 0
    ) -> None:
        """
        Args:
            base_layer: stays as it is.
            rank: of the update.
            scale: of the update.
            dropout: probability of dropping an input of the update while training.
            number: of the layer, see `Dropout`.
        """
        super().__init__()
        out_features, in_features = shape_of(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = Dropout(dropout, number)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        # Kaiming uniform with a = sqrt(5), as in PEFT: the bound is 1 / sqrt(fan in).
        bound = 1 / math.sqrt(in_features)
        self.lora_A.weight = mx.random.uniform(-bound, bound, (rank, in_features))
        self.lora_B.weight = mx.zeros((out_features, rank))

    def __call__(self, x: mx.array) -> mx.array:
        dtype = self.dtype_for(x.dtype)
        a, b = (matrix.weight.astype(dtype) for matrix in (self.lora_A, self.lora_B))
        if self.dropout.draws:  # it scales anyway
            inner = self.dropout(x, self.scale, dtype) @ a.T
        else:  # where there are the fewest numbers
            inner = ((x.astype(dtype) @ a.T).astype(mx.float32) * self.scale).astype(dtype)
        y: Any = add_product(self.base_layer(x), inner, b)
        return y

    def dtype_for(self, dtype: mx.Dtype) -> mx.Dtype:
        """What the update is computed in, for an input of a dtype.

        In bfloat16 where the input is: beside the base's own rounding that adds no error that can
        be measured (`benchmarks/gradient_error.py`). Float16 has not its range. A LoRA that begins
        as a part of the weight is taken out of it in float32 (`starts.py`).
        """
        return dtype if dtype == mx.bfloat16 and not hasattr(self, "first") else mx.float32

    def merged(self) -> nn.Linear:
        """A plain layer whose weight is `W + scale * B A`, in the base's dtype.

        A quantised base comes out dequantised: quantising it again would round
        the update away.
        """
        base, weight = self.base_layer, plain_weight(self.base_layer)
        update = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        linear = nn.Linear(1, 1, bias="bias" in base)
        linear.weight = (weight.astype(mx.float32) + update).astype(weight.dtype)
        if "bias" in base:
            linear.bias = base.bias
        return linear


@mx.custom_function
def add_product(y: mx.array, inner: mx.array, weight: mx.array) -> mx.array:
    """`y + inner weight^T` in the dtype of y, as one kernel; its derivatives in that of inner.

    The sum is rounded to y's dtype anyway, so the rounding of the small product before it
    is not seen in it.

    Args:
        y: (..., out), any float dtype.
        inner: (..., r), float32 or as y.
        weight: (out, r), as inner.
    """
    narrow, matrix = inner.astype(y.dtype), weight.astype(y.dtype)
    flat = mx.addmm(y.reshape(-1, y.shape[-1]), narrow.reshape(-1, inner.shape[-1]), matrix.T)
    return flat.reshape(y.shape)


@add_product.vjp
def _add_product_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, inner, weight = primals
    wide = cotangent.astype(inner.dtype)
    rows = wide.reshape(-1, wide.shape[-1])
    return cotangent, wide @ weight, rows.T @ inner.reshape(-1, inner.shape[-1])


def working_copies(model: nn.Module) -> Any:
    """The matrices of a model's LoRA layers as they compute, where that is not as they are.

    Made once a step, each microbatch finds them. What is learned stays in float32: a matrix, the
    sum of its gradients, and its update (https://arxiv.org/abs/1710.03740).

    Returns:
        The part of the model's trainable parameters that is replaced.
    """
    copies = [
        (f"{path}.{name}.weight", layer[name].weight.astype(dtype))
        for path, layer in lora_layers(model)
        if (dtype := layer.dtype_for(model.dtype)) != mx.float32
        for name in LORA_NAMES
    ]
    return tree_unflatten(copies) if copies else {}


def plain_weight(linear: Projection) -> mx.array:
    """The weight of a linear layer, (out, in), dequantised if need be."""
    if isinstance(linear, nn.QuantizedLinear):
        return mx.dequantize(
            linear.weight,
            linear.scales,
            linear.get("biases"),
            linear.group_size,
            linear.bits,
            linear.mode,
        )
    weight: mx.array = linear.weight
    return weight


def shape_of(linear: Projection) -> tuple[int, int]:
    """(out, in) of a linear layer, unpacked where it is quantised."""
    out_features, in_features = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_features = in_features * 32 // linear.bits
    return out_features, in_features


def lora_scale(rank: int, alpha: float, rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The LoRA layers of a model with their paths, in no particular order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the linear layers of a model, in its order."""
    leaves: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return [path for path, module in leaves if isinstance(module, Projection)]


def base_linear_paths(model: nn.Module) -> list[str]:
    """`linear_paths` as they are without LoRA, whether the model has it or not."""
    paths = (path for path in linear_paths(model) if not path.endswith(LORA_NAMES))
    return [path.removesuffix(".base_layer") for path in paths]


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The names of layers that targets mean in a network: `attention` and `all-linear` are words.

    Args:
        model: a `Network`, with LoRA or without.
        targets: the words or names of layers.

    Returns:
        Names as in PEFT's `target_modules`. `all-linear` is each linear layer of the blocks, as
        in PEFT: not the head.

    Raises:
        AdapterError: `all-linear` in a mixture of experts, whose experts are no linear layers.
    """
    if ALL_LINEAR in targets and any(
        isinstance(m, SwitchLinear | QuantizedSwitchLinear) for m in model.modules()
    ):
        raise AdapterError(
            f"lora.targets: got {ALL_LINEAR}, and the base is a mixture of experts, which are no "
            f"linear layers.\nChoose {ATTENTION}, or name the layers."
        )
    words = {
        ATTENTION: tuple(model.attention_targets),
        ALL_LINEAR: tuple(
            dict.fromkeys(
                path.rpartition(".")[2] for path in base_linear_paths(model) if path != "lm_head"
            )
        ),
    }
    return tuple(dict.fromkeys(name for target in targets for name in words.get(target, (target,))))


def block_numbers(model: nn.Module, layers: Sequence[int] | int) -> tuple[int, ...] | None:
    """The numbers of the blocks that get LoRA; None for all of them.

    Args:
        model: a `Network`.
        layers: that many of the last blocks, or their numbers from 0; none: all.

    Raises:
        AdapterError: the model has no such blocks.
    """
    count = len(model.layers)
    numbers = range(count - layers, count) if isinstance(layers, int) else layers
    if wrong := [number for number in numbers if number not in range(count)]:
        got = layers if isinstance(layers, int) else ", ".join(map(str, wrong))
        raise AdapterError(
            f"lora.layers: got {got}, and the base has {count} blocks, 0 to {count - 1}.\n"
            "Choose among these."
        )
    return tuple(numbers) or None


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the linear layers whose path ends in one of `targets`, in the model's order.

    A target is the last name of a path (`query_key_value`) or several
    (`h.0.self_attention.dense`), as in PEFT's `target_modules`.

    Raises:
        AdapterError: a target matches no linear layer, or there is none.
    """
    linears = linear_paths(model)
    found = {t: [p for p in linears if p == t or p.endswith("." + t)] for t in targets}
    missing = [target for target, paths in found.items() if not paths]
    if missing or not targets:
        names = sorted({path.rsplit(".", 1)[-1] for path in linears} - {"lm_head"})
        raise AdapterError(
            f"LoRA targets that match no linear layer: {', '.join(missing) or '(none given)'}\n"
            f"Choose from: {', '.join(names)}."
        )
    wanted = set().union(*found.values())
    return [path for path in linears if path in wanted]


def add_lora(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    *,
    rslora: bool = False,
) -> None:
    """Freeze the model and put a fresh `LoRALinear` around each target, in place.

    Args:
        model: any module with linear layers; left frozen but for the LoRA matrices.
        targets: names of linear layers, see `find_targets`.
        rank: inner size r of the update, at most the layer's smaller side.
        alpha: numerator of the scale, see `lora_scale`.
        dropout: probability of dropping an input of the update while training.
        rslora: scale by alpha / sqrt(rank).

    Raises:
        AdapterError: a target matches nothing, the rank is larger than a layer,
            or the model has LoRA layers already.
    """
    layers = dict.fromkeys(find_targets(model, targets), (rank, alpha))
    place_lora(model, layers, dropout, rslora=rslora)


def place_lora(
    model: nn.Module,
    rank_and_alpha: dict[str, tuple[int, float]],
    dropout: float = 0.0,
    *,
    rslora: bool = False,
) -> None:
    """`add_lora` with a rank and an alpha for each path (PEFT's rank and alpha patterns)."""
    if any(True for _ in lora_layers(model)):
        raise AdapterError(
            "The model has LoRA layers already.\nMerge them (merge_lora) or load the base again."
        )
    modules = dict(model.named_modules())
    faults = [
        f"{path}: got rank {rank}, expected at most {min(shape_of(modules[path]))}"
        for path, (rank, _) in rank_and_alpha.items()
        if rank > min(shape_of(modules[path]))
    ]
    if faults:
        raise AdapterError(
            f"A LoRA rank is larger than its layer:\n{list_faults(faults)}\nChoose a smaller rank."
        )
    model.freeze()
    layers = [
        (path, LoRALinear(modules[path], rank, lora_scale(rank, alpha, rslora), dropout, number))
        for number, (path, (rank, alpha)) in enumerate(rank_and_alpha.items())
    ]
    for _, layer in layers:
        layer.lora_A.unfreeze()
        layer.lora_B.unfreeze()
    model.update_modules(tree_unflatten(layers))


def train_biases(model: nn.Module, kind: str) -> None:
    """Let biases of a model with LoRA be trained, or loaded, in place; `remove_lora` restores them.

    Args:
        model: a `Network`, with LoRA.
        kind: as in PEFT: `lora_only` for those of layers with a LoRA, `all`, or `none`.

    Raises:
        AdapterError: it has no such bias.
    """
    if kind == "none":
        return
    loras = {id(layer.base_layer) for _, layer in lora_layers(model)}
    found = [
        module
        for module in model.modules()
        if "bias" in module and (kind == "all" or id(module) in loras)
    ]
    if not found:
        raise AdapterError(
            f"lora.bias: got {kind}, and the base has no such bias.\nChoose none, the default."
        )
    before = [(module, module.bias) for module in found]

    def restore() -> None:
        for module, bias in before:
            module.bias = bias

    model.restore_biases = restore
    for module in found:
        module.unfreeze(recurse=False, keys="bias")


def bias_shapes(model: nn.Module, kind: str, paths: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the biases that PEFT saves with an adapter, by their paths beside its LoRA.

    Args:
        model: without LoRA.
        kind: as for `train_biases`.
        paths: of the layers that get a LoRA.
    """
    found = {}
    for path, module in model.named_modules():
        if "bias" in module and (kind == "all" or (kind == "lora_only" and path in paths)):
            found[f"{path}.base_layer.bias" if path in paths else f"{path}.bias"] = (
                module.bias.shape
            )
    return found


def merge_lora(model: nn.Module) -> None:
    """Replace each LoRA layer by the plain layer that computes the same, in place."""
    model.update_modules(tree_unflatten([(p, layer.merged()) for p, layer in lora_layers(model)]))


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back, without their updates and with their own biases, in place."""
    model.update_modules(tree_unflatten([(p, layer.base_layer) for p, layer in lora_layers(model)]))
    if hasattr(model, "restore_biases"):
        model.restore_biases()
        del model.restore_biases


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers can be trained, and how many there are in all.

    A quantised layer counts as the layer that it stands for.
    """

    def count(tree: dict) -> int:
        return sum(array.size for array in named_arrays(tree).values())

    total = count(model.parameters())
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = {name: module.get(name) for name in ("weight", "scales", "biases")}
            stored = sum(array.size for array in packed.values() if array is not None)
            total += module.weight.size * 32 // module.bits - stored
    return count(model.trainable_parameters()), total
