"""Microbatches side by side on a Linux CPU; nothing here matters on a GPU.

MLX's CPU backend runs a stream's operations on one thread, all but the matrix
products. So a step's microbatches are dealt to several streams, which keep the
cores busy together.
"""

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_map

from interviewmate_mlx import backend
from interviewmate_mlx.data.batches import AnyRow, Microbatch, fill, padded_tokens
from interviewmate_mlx.model.tree import named_arrays
from interviewmate_mlx.training.step import Compute, add_up

Item = TypeVar("Item")

# With fewer padded tokens, matrix products lose speed, and another trace costs more than it gives.
MIN_STREAM_TOKENS = 256
# With more, intermediate results no longer fit in a CPU's caches.
MAX_STREAM_TOKENS = 2048

_LOCAL = threading.local()  # a stream belongs to the thread that made it


@dataclass(frozen=True)
class CpuStreams:
    """An `Executor` over several streams of a CPU."""

    num_streams: int
    steps_ahead: int = 0  # the CPU that reads the numbers is the one that computes them

    def limited_to(self, num_rows: int) -> "CpuStreams":
        return CpuStreams(max(1, min(self.num_streams, num_rows)))

    @contextmanager
    def opened(self) -> Iterator[None]:
        with backend.keep_freed_memory():
            try:
                yield
            finally:
                backend.share_cores(1)

    def split(self, rows: Sequence[AnyRow], token_budget: int) -> list[list[AnyRow]]:
        """Groups of rows that share the token budget, and the streams evenly."""
        rows = sorted(rows, key=len, reverse=True)
        if self.num_streams == 1:
            return fill(rows, min(token_budget, MAX_STREAM_TOKENS))
        of_rows = {padded_tokens(row) for row in rows}
        sizes = sorted(size * (n + 1) for size in of_rows for n in range(len(rows)))
        # The smallest size that makes no more groups than there are streams.
        even = bisect_left(sizes, True, key=lambda size: len(fill(rows, size)) <= self.num_streams)
        share = max(MIN_STREAM_TOKENS, sizes[even])
        return fill(rows, min(token_budget // self.num_streams, share, MAX_STREAM_TOKENS))

    def sum_of(self, compile_one: Callable[[], Compute]) -> Callable[[Sequence[Microbatch]], Any]:
        computes = [compile_one() for _ in range(self.num_streams)]  # one stream each

        def total(microbatches: Sequence[Microbatch]) -> Any:
            streams = _own_streams(self.num_streams)
            sums: list[Any] = [None] * self.num_streams
            hands = deal(microbatches, self.num_streams)
            # Once, not each time: what is still running would split its products, and so round
            # them, in one way or the other, as it comes.
            backend.share_cores(sum(map(bool, hands)))
            for at_once in itertools.zip_longest(*hands):
                results: list[list[mx.array]] = []
                for number, microbatch in enumerate(at_once):
                    if microbatch is None:
                        continue
                    with mx.stream(streams[number]):
                        result, arrays = computes[number](microbatch)
                        mx.async_eval(arrays.pop(0))  # runs while the next one is traced
                        sums[number] = add_up(sums[number], result)
                    arrays += reversed(named_arrays(sums[number]).values())
                    results.append(arrays)
                for array in in_turn(results):
                    mx.async_eval(array)
                    del array  # drop our reference, so that MLX can free it
            parts = [part for part in sums if part]
            return tree_map(lambda *arrays: sum(arrays[1:], arrays[0]), *parts)

        return total


def in_turn(lists: Sequence[list[Item]]) -> Iterator[Item]:
    """One item of each list in turn, taken out of it, until all are empty.

    MLX lets some hundred operations wait, counted over all streams. Whole
    computations one after the other would leave the later streams without work.
    """
    for items in lists:
        items.reverse()
    while any(lists):
        for items in filter(None, lists):
            yield items.pop()


def deal(microbatches: Sequence[Microbatch], num_hands: int) -> list[list[Microbatch]]:
    """Deal microbatches out, the largest first, each to the hand with the least to do."""
    hands: list[list[Microbatch]] = [[] for _ in range(num_hands)]
    for microbatch in sorted(microbatches, key=lambda m: -m.inputs.size):
        min(hands, key=lambda hand: sum(m.inputs.size for m in hand)).append(microbatch)
    return hands


def _own_streams(count: int) -> list[mx.Stream]:
    streams: list[mx.Stream] = _LOCAL.__dict__.setdefault("streams", [])
    streams += [backend.new_cpu_stream() for _ in range(count - len(streams))]
    return streams[:count]
