"""Notices that another rank has ended, has stopped, or can no longer be reached.

MLX's sums wait for all ranks, for ever. So every rank has a connection of its own to the first
one, and says each second over it that it lives and what it does. When a rank is lost, the first
one says which and why; all others end with it.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import psutil

from interviewmate_mlx.errors import BackendError, InterviewMateError

LIMIT_VARIABLE = "INTERVIEWMATE_SILENCE"
# A rank that has said nothing for so many seconds is lost. A machine that swaps, or loads
# gigabytes, may be silent for some.
LIMIT_S = 30.0
SLOWEST_BYTES_PER_S = 1e6  # of a sum; one that is slower has got stuck
_BEAT_S = 1.0
# A rank that fails may not be the only one: all meet a loss that is not finite. The first one
# has so long to say it itself.
_GRACE_S = 3.0
_MEETING_S = 20.0  # for the others to connect
_IDLE, _BUSY, _SUM, _FAULT, _LOST = "idle", "busy", "sum", "fault", "lost"


def limit_s() -> float:
    """Seconds of silence after which a rank is lost.

    Raises:
        BackendError: the variable holds no number above 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text or LIMIT_S)
    except ValueError:
        limit = 0
    if not 0 < limit < float("inf"):
        raise BackendError(
            f"{LIMIT_VARIABLE}: got {text!r}, expected seconds above 0.\nCorrect it, or unset it."
        )
    return limit


@dataclass
class Peer:
    """Another rank, as this one last heard of it."""

    rank: int
    connection: socket.socket
    heard_s: float = field(default_factory=time.monotonic)
    state: str = _IDLE
    detail: Any = None  # of a sum: its number and its bytes; of a fault: what it says
    since_s: float = field(default_factory=time.monotonic)  # that it is in this state
    unread: bytes = b""

    def read(self) -> bool:
        """Take in what has come; whether the connection still stands."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            state, detail = json.loads(line)
            if (state, detail) != (self.state, self.detail):
                self.since_s = time.monotonic()
            self.state, self.detail = state, detail
        self.heard_s = time.monotonic()
        return bool(data)


class Watch:
    """A thread that watches the other ranks while this one is busy.

    The first rank watches all others; they watch it.
    """

    def __init__(self, rank: int, hosts: Sequence[str], connections: dict[int, socket.socket]):
        """
        Args:
            rank: this process's.
            hosts: each rank's.
            connections: by rank, to those that this one watches.
        """
        self._rank, self._hosts, self._limit_s = rank, hosts, limit_s()
        # This rank's state, its detail, and since when: one value, for two threads.
        self._own: tuple[str, Any, float] = (_IDLE, None, time.monotonic())
        self._num_sums = 0
        self._selector = selectors.DefaultSelector()
        self._peers = [Peer(rank, connection) for rank, connection in connections.items()]
        self._failed: Peer | None = None  # the last that has said so; it may have ended
        self._left: Peer | None = None  # the last that has ended while it was not needed
        self._sending = threading.Lock()  # so that no older state is sent after a newer one
        self._hint = ""
        for peer in self._peers:
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        threading.Thread(target=self._run, name="watch of the ranks", daemon=True).start()

    @contextmanager
    def working(self, hint: str) -> Iterator[None]:
        """From here on this rank and the others need each other, until the end of the block.

        Args:
            hint: what to tell the user if a rank is lost.
        """
        self._hint = hint
        self._say(_BUSY)
        self._beat()  # who ends before the next one was not idle
        for peer in self._peers:
            peer.heard_s = time.monotonic()
        try:
            yield
        except GeneratorExit:
            self._say(_IDLE)
            raise
        except InterviewMateError as error:
            self._say(_FAULT, str(error))
            raise
        except BaseException as error:
            self._say(_FAULT, f"{type(error).__name__}: {error}")
            raise
        self._say(_IDLE)

    @contextmanager
    def summing(self, num_bytes: int) -> Iterator[None]:
        """This rank waits for a sum. If all do for too long, the network is at fault.

        Raises:
            BackendError: the sum has failed, and no rank is known to be lost.
        """
        self._num_sums += 1
        self._say(_SUM, [self._num_sums, num_bytes])
        try:
            yield
        except RuntimeError as error:
            # MLX knows that a connection is gone, and the watch will know whose.
            self._say(_SUM, [self._num_sums, 0])
            time.sleep(self._limit_s + _GRACE_S)
            raise BackendError(f"The ranks have lost each other: {error}") from error
        self._say(_BUSY)

    def _say(self, state: str, detail: object = None) -> None:
        self._own = (state, detail, time.monotonic())
        if state in (_IDLE, _FAULT):  # the process may end before the next beat
            self._beat()

    def _beat(self) -> None:
        with self._sending:
            line = json.dumps(self._own[:2]).encode() + b"\n"
            for peer in self._peers:
                with contextlib.suppress(OSError):  # who does not read is found by its silence
                    peer.connection.send(line)

    def _run(self) -> None:
        beat_s = time.monotonic()
        while True:
            if time.monotonic() >= beat_s:
                self._beat()
                beat_s = time.monotonic() + _BEAT_S
            for key, _ in self._selector.select(max(0, beat_s - time.monotonic())):
                if not key.data.read():
                    self._drop(key.data)
            self._judge()

    def _drop(self, peer: Peer) -> None:
        """A connection has ended."""
        self._selector.unregister(peer.connection)
        self._peers.remove(peer)
        if peer.state == _FAULT:
            self._failed = peer
        elif self._is_busy() and peer.state != _IDLE:
            self._end(f"{self._name(peer.rank)} has ended.", peer.rank)
        else:
            self._left = peer

    def _judge(self) -> None:
        """Whether what was heard, and what was not, means that a rank is lost."""
        now = time.monotonic()
        for peer in list(self._peers):
            if peer.state == _LOST:
                os._exit(1)  # the first rank has said why
            if peer.state == _FAULT:
                self._failed = peer
            if self._is_busy() and now - peer.heard_s > self._limit_s:
                silent = f"has not been heard of for {self._limit_s:g} seconds"
                self._end(f"{self._name(peer.rank)} {silent}.", peer.rank)
        # Read once: the main thread changes it meanwhile.
        state, detail, since_s = self._own
        if state == _SUM:
            self._judge_waiting(now, since_s, detail[1])

    def _judge_waiting(self, now: float, since_s: float, num_bytes: int) -> None:
        """Whether a sum will never come. Who computes, or saves, is left to end by itself."""
        failed = self._failed
        if failed and failed.state == _FAULT and now - failed.since_s > _GRACE_S:
            self._end(f"{self._name(failed.rank)} has failed: {failed.detail}", failed.rank)
        # All wait, in one sum or in several; or have left. Only the first rank knows of all: where
        # it waits too, it may be for one that is slow.
        waits = (_SUM, _IDLE) if self._rank == 0 else (_IDLE,)
        limit_s = self._limit_s + num_bytes / SLOWEST_BYTES_PER_S
        stuck = [peer.state in waits and now - peer.since_s > limit_s for peer in self._peers]
        if all(stuck) and now - since_s > limit_s:
            if self._left:
                self._end(f"{self._name(self._left.rank)} has ended.", self._left.rank)
            message = f"All ranks have waited for each other for {limit_s:.0f} seconds."
            self._end(message, 0 if self._rank else -1)

    def _is_busy(self) -> bool:
        return self._own[0] in (_BUSY, _SUM)

    def _name(self, rank: int) -> str:
        return f"Rank {rank} ({self._hosts[rank]})"

    def _end(self, message: str, lost: int) -> NoReturn:
        """End this process. The main thread waits within MLX, where no exception reaches it."""
        # Where the first rank is lost, the second speaks. Who has failed has spoken itself.
        failed = any(peer.rank == 0 and peer.state == _FAULT for peer in self._peers)
        if self._rank == 0 or (self._rank == 1 and lost == 0 and not failed):
            show_cursor = "\x1b[?25h" if sys.__stderr__ and sys.__stderr__.isatty() else ""
            text = "\n".join([show_cursor, message, *([self._hint] if self._hint else []), ""])
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self._say(_LOST)
        self._beat()
        os._exit(1)


def addresses() -> list[str]:
    """Where other machines, and processes of this one, can reach this one; the likeliest first."""
    found = [
        address.address
        for of_interface in psutil.net_if_addrs().values()
        for address in of_interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    # A link-local address needs the name of the other's interface.
    usable = [text for text in found if not text.startswith("fe80")]
    return sorted(usable, key=lambda text: (text in ("127.0.0.1", "::1"), ":" in text))


def meet(
    rank: int, hosts: Sequence[str], from_first: Callable[[object], Any]
) -> dict[int, socket.socket]:
    """Connect the first rank with all others.

    Args:
        rank: this process's.
        hosts: each rank's.
        from_first: gives all ranks what the first one says.

    Returns:
        Connections by rank.

    Raises:
        BackendError: they do not reach each other.
    """
    listener = socket.create_server(("", 0)) if rank == 0 else None
    invitation = [secrets.token_hex(16), listener.getsockname()[1], addresses()] if listener else []
    token, port, ours = from_first(invitation)
    if listener:
        with listener:
            return _accept(listener, token, hosts)
    return {0: _connect(rank, token, port, ours, hosts)}


def _accept(listener: socket.socket, token: str, hosts: Sequence[str]) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    end_s = time.monotonic() + _MEETING_S
    while len(found) < len(hosts) - 1:
        listener.settimeout(max(0.1, end_s - time.monotonic()))
        try:
            connection, _ = listener.accept()
            connection.settimeout(_BEAT_S)
            said = connection.recv(100).split()
            # A stranger must not be able to end a run.
            if len(said) == 2 and hmac.compare_digest(said[0], token.encode()):
                connection.sendall(token.encode())
                found[int(said[1])] = connection
        except OSError:
            if time.monotonic() >= end_s:
                break
    missing = [f"rank {rank} ({hosts[rank]})" for rank in range(1, len(hosts)) if rank not in found]
    if missing:
        raise BackendError(
            f"No connection from {', '.join(missing)} within {_MEETING_S:.0f} seconds, though "
            "MLX's own stands.\nLet a firewall pass connections to Python on this machine."
        )
    return found


def _connect(
    rank: int, token: str, port: int, targets: Sequence[str], hosts: Sequence[str]
) -> socket.socket:
    for target in targets:
        try:
            connection = socket.create_connection((target, port), timeout=_BEAT_S)
            connection.settimeout(_BEAT_S)
            connection.sendall(f"{token} {rank}".encode())
            if hmac.compare_digest(connection.recv(100), token.encode()):
                return connection
        except OSError:
            continue
    raise BackendError(
        f"Rank {rank} cannot connect to rank 0 ({hosts[0]}) at any of {', '.join(targets)}, port "
        f"{port}, though MLX's own connection stands.\nLet a firewall pass connections to Python."
    )
