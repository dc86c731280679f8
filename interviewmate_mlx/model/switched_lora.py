"""Several LoRA updates beside one frozen network; each row of a batch has its own.

Which update a row has travels with its keys and values, as one more entry of the list of
caches. So it stays right when mlx-lm's `BatchGenerator` joins, filters and splits batches.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from interviewmate_mlx.model.dora import DoRALinear
from interviewmate_mlx.model.lora import LoRALinear, Projection, shape_of
from interviewmate_mlx.model.zoo import Network


class RowUpdates:
    """The update of each row of a batch, by its number; 0 is none.

    It has the methods that mlx-lm asks of a cache, and holds no keys or values.
    """

    state: tuple[()] = ()
    nbytes = 0

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)

    @classmethod
    def merge(cls, caches: Sequence["RowUpdates"]) -> "RowUpdates":
        return cls([number for cache in caches for number in cache.numbers])

    def extend(self, other: "RowUpdates") -> None:
        self.numbers += other.numbers

    def filter(self, rows: Sequence[int]) -> None:
        self.numbers = [self.numbers[row] for row in rows]

    def extract(self, row: int) -> "RowUpdates":
        return RowUpdates([self.numbers[row]])

    def prepare(self, **_: Any) -> None:
        """Before rows are padded: nothing changes."""

    def finalize(self) -> None:
        """After rows were padded: nothing changes."""


class SwitchedLoRALinear(nn.Module):
    """`y = Wx + b + B_i A_i x`, with another i for each row; and the rows of DoRA's W stretched."""

    def __init__(self, base_layer: Projection, current: RowUpdates) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._current = current
        out_features, in_features = shape_of(base_layer)
        self.A = mx.zeros((1, 1, in_features))
        self.B = mx.zeros((1, out_features, 1))
        self.stretch = mx.zeros((1, out_features))  # of DoRA's rows, less 1
        self._has_dora = False

    def add(self, number: int, update: LoRALinear) -> None:
        """Take the matrices of a LoRA layer as an update; ranks are padded to the largest."""
        a, b = update.lora_A.weight, update.scale * update.lora_B.weight
        count, rank = max(number + 1, self.A.shape[0]), max(a.shape[0], self.A.shape[1])
        grown = count - self.A.shape[0], rank - self.A.shape[1]
        self.A = mx.pad(self.A, [(0, grown[0]), (0, grown[1]), (0, 0)])
        self.B = mx.pad(self.B, [(0, grown[0]), (0, 0), (0, grown[1])])
        self.stretch = mx.pad(self.stretch, [(0, grown[0]), (0, 0)])
        if isinstance(update, DoRALinear):
            stretch, self._has_dora = update.stretch(), True
            self.stretch[number], b = stretch - 1, stretch[:, None] * b
        self.A[number, : a.shape[0]] = a
        self.B[number, :, : a.shape[0]] = b

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, in) -> (B, L, out), in the dtype of the base layer; the updates in float32."""
        y = self.base_layer(x)
        # A layer that the last adapters do not change holds no updates for them.
        numbers = [n if n < self.A.shape[0] else 0 for n in self._current.numbers]
        if not any(numbers):
            return y
        rows = mx.array(numbers)
        inner = x.astype(mx.float32) @ self.A[rows].swapaxes(1, 2)
        added = inner @ self.B[rows].swapaxes(1, 2)
        if self._has_dora:
            seen = y - self.base_layer.bias if "bias" in self.base_layer else y
            added += self.stretch[rows][:, None] * seen.astype(mx.float32)
        return (y + added).astype(y.dtype)


class SwitchedModel(nn.Module):
    """A network whose rows have updates of their own. The last cache says which."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self._current = RowUpdates([])

    def add(self, number: int, updates: dict[str, LoRALinear]) -> None:
        """Add an update: LoRA layers by the path of the linear layer that they change.

        Args:
            number: of the update, from 1.
            updates: by path; the network itself is without LoRA.
        """
        modules = dict(self.network.named_modules())
        layers = []
        for path, update in updates.items():
            layer = modules[path]
            if not isinstance(layer, SwitchedLoRALinear):
                layer = SwitchedLoRALinear(layer, self._current)
                layers.append((path, layer))
            layer.add(number, update)
        self.network.update_modules(tree_unflatten(layers))

    def make_cache(self, number: int) -> list[Any]:
        """Caches for one row with an update; 0 for the base alone."""
        return [*self.network.make_cache(), RowUpdates([number])]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Token ids (B, L) int32 -> logits (B, L, V), with caches from `make_cache`."""
        *own, rows = cache
        self._current.numbers = rows.numbers
        logits: mx.array = self.network(inputs, cache=own)
        return logits
