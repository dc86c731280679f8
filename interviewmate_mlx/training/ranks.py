"""Several processes train one run: each computes its share of a step, and all make the same update.

The loss is a sum and a count, so what ranks find adds up as microbatches do. All they exchange
goes through MLX's sums: those of a step, and, before it, what all must agree on.
"""

from interviewmate_mlx import __version__, backend  # its BLAS must be loaded before MLX

# isort: split
import contextlib
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic

import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_map

from interviewmate_mlx.data.batches import AnyRow, padded_tokens
from interviewmate_mlx.errors import BackendError, InterviewMateError, TrainingError, list_faults
from interviewmate_mlx.hosts.launch import launched_rank, tell_of_meeting
from interviewmate_mlx.hosts.watch import Watch, meet

_MEETING_S = 60  # for all ranks to start
# A LoRA's gradients are one message. All weights are several, so that their copy stays small.
_MESSAGE_BYTES = 64 << 20

# For a process of its own: MLX waits for the others without letting Python run.
_LIMIT_WAITING = """
import os, select, signal, sys
limit, message, waiting = sys.argv[1:]
if not select.select([0], [], [], float(limit))[0]:
    try:
        os.write(2, message.encode())
    finally:
        os.kill(int(waiting), signal.SIGTERM)
"""


@dataclass(frozen=True)
class Share(Generic[AnyRow]):
    """One rank's part of some rows.

    Attributes:
        rows: to compute, at least one.
        sum: adds up over all ranks what was computed of them.
    """

    rows: Sequence[AnyRow]
    sum: Callable[[Any], Any]


class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: this process's number; the first is 0, which alone writes and prints.
        hosts: the name of each rank's machine.
        is_stopping: whether a rank has asked for a stop; alike on all ranks after each sum.
        sum_seconds: spent in sums so far, waiting for slower ranks included.
        sum_bytes: of this rank's part in the largest sum.
    """

    def __init__(self, group: Any = None, watch: Watch | None = None, hosts: Sequence[str] = ("",)):
        self._group, self._watch = group, watch
        self.rank = group.rank() if group else 0
        self.hosts = tuple(hosts)
        self.is_stopping = False
        self.sum_seconds, self.sum_bytes = 0.0, 0
        self._wants_to_stop: Callable[[], bool] = lambda: False

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})"

    def notes(self) -> list[str]:
        """What to tell the user of who takes part."""
        if self.size == 1:
            return []
        return [f"{self.size} ranks share the work: {', '.join(map(self.name, range(self.size)))}"]

    def working(self, hint: str = "") -> contextlib.AbstractContextManager[None]:
        """While the block runs, a rank that is lost ends all others within seconds.

        Args:
            hint: what to tell the user then.
        """
        return self._watch.working(hint) if self._watch else nullcontext()

    def agreed_stop(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """What to ask instead of `stop`: all ranks stop after the same step, whoever was asked."""
        if self.size == 1:
            return stop
        self._wants_to_stop, self.is_stopping = stop, False
        return lambda: self.is_stopping

    def share(self, rows: Sequence[AnyRow]) -> Share[AnyRow]:
        """This rank's part of rows, dealt by tokens: the largest first, to who has the least.

        With fewer rows than ranks, a rank without any computes one that does not count: its sums
        must have the shapes of the others'.
        """
        if self.size == 1:
            return Share(rows, lambda sums: sums)
        hands: list[list[AnyRow]] = [[] for _ in range(self.size)]
        for row in sorted(rows, key=padded_tokens, reverse=True):
            min(hands, key=lambda hand: sum(map(padded_tokens, hand))).append(row)
        mine = hands[self.rank]
        if mine:
            return Share(mine, self.sum)
        shortest = min(rows, key=padded_tokens)
        return Share([shortest], lambda sums: self.sum(tree_map(lambda a: a * 0, sums)))

    def sum(self, tree: Any) -> Any:
        """Add up the arrays of a tree over all ranks, in float32 and in as few messages as fit.

        Counts stay exact below 2**24.

        Raises:
            BackendError: a rank is lost.
        """
        arrays: list[mx.array] = []
        tree_map(arrays.append, tree)
        found: list[mx.array] = []
        while len(found) < len(arrays):
            sizes = itertools.accumulate(4 * a.size for a in arrays[len(found) :])
            count = max(1, sum(size <= _MESSAGE_BYTES for size in sizes))
            found += self._sum_of(arrays[len(found) :][:count])
        summed = iter(found)
        return tree_map(lambda _: next(summed), tree)

    def _sum_of(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        wants_to_stop = mx.array([float(self._wants_to_stop())])
        parts = [wants_to_stop, *(a.reshape(-1).astype(mx.float32) for a in arrays)]
        flat = self._all_sum(mx.concatenate(parts))
        self.is_stopping |= bool(flat[0] > 0)
        ends = np.cumsum([1, *(a.size for a in arrays)]).tolist()
        return [
            part.reshape(array.shape).astype(array.dtype)
            for part, array in zip(mx.split(flat, ends[:-1])[1:], arrays, strict=True)
        ]

    def _all_sum(self, array: mx.array) -> mx.array:
        mx.eval(array)  # so that the clock, and the watch, tell computing from waiting
        with self._watch.summing(array.nbytes) if self._watch else nullcontext():
            start = time.perf_counter()
            found = mx.distributed.all_sum(array, group=self._group)
            mx.eval(found)
            self.sum_seconds += time.perf_counter() - start
        self.sum_bytes = max(self.sum_bytes, array.nbytes)
        return found

    def gather(self, value: object) -> list[Any]:
        """What each rank says, as JSON can hold it, in order."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = np.zeros(self.size, np.int32)
        lengths[self.rank] = len(text)
        ends = np.cumsum(np.array(self._all_sum(mx.array(lengths))))
        line = np.zeros(ends[-1], np.uint8)
        line[ends[self.rank] - len(text) : ends[self.rank]] = np.frombuffer(text, np.uint8)
        said = bytes(np.array(self._all_sum(mx.array(line))))
        return [json.loads(said[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def from_first(self, value: object) -> Any:
        """What the first rank says, as JSON can hold it."""
        return self.gather(value if self.is_first else None)[0]

    def tensors_from_first(self, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        """The first rank's tensors, to the bit; what others give does not matter."""
        if self.size == 1:
            return tensors
        shapes = self.from_first(
            {name: [a.shape, str(a.dtype).rpartition(".")[2]] for name, a in tensors.items()}
        )
        found = {}
        for name, (shape, dtype) in shapes.items():
            array = tensors[name] if self.is_first else mx.zeros(shape, getattr(mx, dtype))
            data = array.reshape(-1).view(mx.uint8)
            found[name] = self._all_sum(data).view(array.dtype).reshape(shape)
        return found

    def aligned(self, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        """These tensors; the first rank's where another's differ from them in a bit."""
        digest = hashlib.sha256()
        for array in tensors.values():
            digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
        are_same = len(set(self.gather(digest.hexdigest()))) == 1
        return tensors if are_same else self.tensors_from_first(tensors)

    @contextmanager
    def folder_of_first(self, folder: Path, names: Sequence[str]) -> Iterator[Path]:
        """A folder with the first rank's files: its own there, and a copy on the others.

        Args:
            folder: on the first rank.
            names: of its files; what others give does not matter.
        """
        if self.size == 1:
            yield folder
            return
        own = names if self.is_first else []
        found = self.tensors_from_first(
            {name: mx.array(np.fromfile(folder / name, np.uint8)) for name in own}
        )
        if self.is_first:
            yield folder
            return
        with tempfile.TemporaryDirectory() as copy:
            for name, content in found.items():
                np.array(content).tofile(Path(copy, name))
            yield Path(copy)

    def deal(
        self, count: int, compute: Callable[[Sequence[int]], Sequence[tuple[Any, ...]]]
    ) -> list[Any]:
        """What is found about each of `count` things, computed by one rank and known to all.

        Args:
            count: how many there are.
            compute: what is found about those of these numbers, as JSON can hold it.

        Raises:
            InterviewMateError: what went wrong, by rank.
        """
        with self.together():
            mine = compute(range(self.rank, count, self.size))
        parts = self.gather(mine)
        return [parts[number % self.size][number // self.size] for number in range(count)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks run the block, and all or none go on after it.

        Raises:
            InterviewMateError: what went wrong, by rank, and the same on all of them.
        """
        own: InterviewMateError | None = None
        try:
            yield
        except InterviewMateError as error:
            if self.size == 1:
                raise
            own = error
        if self.size == 1:
            return
        faults = self.gather(str(own or ""))
        if not any(faults):
            return
        if own and ((self.is_first and not any(faults[1:])) or len(set(faults)) == 1):
            raise own
        listed = [f"{self.name(r)}: {fault}" for r, fault in enumerate(faults) if fault]
        raise TrainingError(f"The ranks cannot go on:\n{list_faults(listed)}") from own

    def check_same(self, facts: dict[str, str]) -> None:
        """Refuse to begin where ranks do not have the same.

        Raises:
            TrainingError: what differs from the first rank's, by rank.
        """
        first, *others = self.gather(facts)
        faults = [
            f"{self.name(rank)}: {key} is {of_rank[key]}, and {of_first} on {self.name(0)}"
            for rank, of_rank in enumerate(others, start=1)
            for key, of_first in first.items()
            if of_rank[key] != of_first
        ]
        if faults:
            raise TrainingError(
                f"The ranks do not have the same, so their work would not fit together:\n"
                f"{list_faults(faults)}\nBring it to all machines, and begin again."
            )


ALONE = Ranks()


@cache
def join() -> Ranks:
    """The ranks that a launcher has started together with this process; or this one alone.

    Raises:
        BackendError: they do not find each other.
    """
    if launched_rank() is None or _is_only_rank():
        return ALONE
    host = socket.gethostname()
    with _limited_waiting(f"This rank waits on {host}"):
        try:
            return _meet(mx.distributed.init(), host)
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                f"The ranks do not find each other (this is {host}): {error}\n"
                "Compare the addresses in the list of hosts with those of the machines."
            ) from error


def _meet(group: Any, host: str) -> Ranks:
    if group.size() == 1:
        return ALONE
    unwatched = Ranks(group, hosts=[host] * group.size())
    machines = unwatched.gather([host, int(psutil.boot_time())])
    hosts, mine = [name for name, _ in machines], machines[unwatched.rank]
    backend.take_share(machines[: unwatched.rank].count(mine), machines.count(mine))
    mlx_version = backend.machine().mlx_version
    unwatched.check_same({"interviewmate-mlx": __version__, "mlx": mlx_version})
    with unwatched.together():
        connections = meet(unwatched.rank, hosts, unwatched.from_first)
    tell_of_meeting()
    return Ranks(group, Watch(unwatched.rank, hosts, connections), hosts)


def _is_only_rank() -> bool:
    """Whether MLX's launcher was asked for one rank: its file of addresses is empty then."""
    path = Path(os.environ.get("MLX_HOSTFILE", ""))
    return path.is_file() and path.stat().st_size <= 1


@contextmanager
def _limited_waiting(who: str) -> Iterator[None]:
    """End this process if the block, within which Python may stand still, takes too long."""
    message = (
        f"\n{who}, and the ranks have not found each other within {_MEETING_S} seconds.\n"
        "Is the command running on all hosts? Do a firewall or other addresses keep them apart?\n"
    )
    words = [sys.executable, "-S", "-c", _LIMIT_WAITING, str(_MEETING_S), message, str(os.getpid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE):
        yield  # the pipe is closed after it, and that ends the process
