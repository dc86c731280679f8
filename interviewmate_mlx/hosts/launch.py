"""Starts a command on several machines, each as one rank; and tells which rank a process is."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from interviewmate_mlx.errors import ConfigError, brief
from interviewmate_mlx.hosts.watch import addresses

# A launcher sets one of these: MLX's and this one, or mpirun. Slurm sets its own for every job.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
FIRST_PORT = 32323  # and one more for each rank, as MLX's launcher has it
# What a rank elsewhere gets of this one's environment; no keys.
_PASSED = tuple(f"INTERVIEWMATE_{name}" for name in ("BLAS", "DEVICE", "SILENCE", "TRACEBACK"))
_GRACE_S = 10.0  # for the first rank to end by itself, and to say why, when another has
_FORM = '[{"ssh": "mac-1.local", "ips": ["10.0.0.1"]}, {"ssh": "mac-2.local", "ips": ["10.0.0.2"]}]'


def launched_rank() -> int | None:
    """This process's number among those that a launcher has started together; None without one."""
    found = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()]
    return int(found[0]) if found else None


def is_first_rank() -> bool:
    """Whether this process prints and writes."""
    return not launched_rank()


_when_met: list[Callable[[], None]] = []


def when_met(act: Callable[[], None]) -> None:
    """Have something done once the ranks have found each other."""
    _when_met.append(act)


def tell_of_meeting() -> None:
    """The ranks have found each other."""
    for act in _when_met:
        act()


@dataclass(frozen=True)
class Host:
    """A machine that takes part.

    Attributes:
        ssh: what `ssh` calls it.
        ip: its address for the others.
        python: there; by default at the same path as here.
    """

    ssh: str
    ip: str
    python: str = sys.executable

    @property
    def is_here(self) -> bool:
        return self.ip in addresses()


def read_hosts(path: Path) -> list[Host]:
    """Read a list of hosts, in the form that `mlx.launch --hostfile` reads too.

    Raises:
        ConfigError: it cannot be read, or cannot be used.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", "hosts") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}\nExpected {_FORM}", "hosts") from error
    settings = content if isinstance(content, dict) else {"hosts": content}
    backend = settings.get("backend") or "ring"
    if backend != "ring":
        raise ConfigError(
            f"{path}: got backend {brief(backend)}, and --hosts starts ring alone.\n"
            f"Start it with MLX's own launcher: mlx.launch --hostfile {path} -- imate-mlx ...",
            "hosts",
        )
    listed = settings.get("hosts")
    if not isinstance(listed, list) or len(listed) < 2:
        raise ConfigError(f"{path}: expected a list of at least two hosts: {_FORM}", "hosts")
    hosts = [_host(entry, f"{path}, host {number}") for number, entry in enumerate(listed)]
    if not hosts[0].is_here:
        raise ConfigError(
            f"{path}: the first host, {hosts[0].ip}, is not this machine, which has "
            f"{', '.join(addresses())}.\nBegin on the first host, or list this one first.",
            "hosts",
        )
    return hosts


def _host(entry: Any, place: str) -> Host:
    keys: dict[str, Any] = entry if isinstance(entry, dict) else {}
    ips = keys.get("ips")
    ssh, python = keys.get("ssh", ""), keys.get("python", sys.executable)
    ip = ips[0] if isinstance(ips, list) and ips else ""
    if not all(isinstance(value, str) and value for value in (ssh, ip, python)):
        raise ConfigError(
            f'{place}: got {brief(entry)}, expected "ssh" and "ips", as in {_FORM}', "hosts"
        )
    # Either would be taken for an option of ssh, or for several addresses.
    if ssh.startswith("-") or any(c.isspace() or c == ":" for c in ip):
        raise ConfigError(f"{place}: {ssh!r} and {ip!r} are no name and IPv4 address.", "hosts")
    return Host(ssh, ip, python)


def launch(hosts: Sequence[Host], words: Sequence[str]) -> int:
    """Run `imate-mlx` with these words on all hosts, and wait for its end.

    The first rank has this terminal, and gets the signals that this process gets. What another
    writes to stderr (ssh's refusal, a crash) is shown with its host's name.

    Returns:
        The first rank's exit status; if that is 0, the first other one that is not.
    """
    ring = json.dumps([[f"{h.ip}:{FIRST_PORT + rank}"] for rank, h in enumerate(hosts)])
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        for rank, host in enumerate(hosts):
            started = _start(host, rank, ring, words)
            ranks.append(started)
            if started.stderr:
                threading.Thread(target=_show, args=(host.ssh, started.stderr)).start()
        stack.enter_context(_forwarded(ranks[0]))
        lost_s = 0.0
        while ranks[0].poll() is None:
            time.sleep(0.1)
            if lost_s and time.monotonic() > lost_s + _GRACE_S:
                ended = [host.ssh for host, rank in zip(hosts, ranks, strict=True) if rank.poll()]
                print(f"ended on {', '.join(ended)}, so it is ended here too", file=sys.stderr)
                ranks[0].kill()  # it is stopped, or still waits for the others
                break
            if not lost_s and any(rank.poll() for rank in ranks[1:]):
                lost_s = time.monotonic()
    return next((abs(rank.returncode) for rank in ranks if rank.returncode), 0)


def _start(host: Host, rank: int, ring: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start one rank, in a session of its own: Ctrl-C reaches the first alone, and it tells all."""
    command = shlex.join([host.python, "-m", "interviewmate_mlx", *words])
    # MLX reads the addresses from a file: here, one without a name.
    script = (
        f"cd {shlex.quote(os.getcwd())} 2>/dev/null\n"
        f"exec env MLX_RANK={rank} MLX_HOSTFILE=/dev/fd/3 {command} 3<<'END'\n{ring}\nEND\n"
    )
    if rank == 0:
        return subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
    shell = ["/bin/sh"]
    if not host.is_here:
        shell = ["ssh", "-T", "-o", "BatchMode=yes", host.ssh, *shell]
        known = {name: os.environ[name] for name in _PASSED if name in os.environ}
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in known.items()]
        script = "".join(exports) + script
    started = subprocess.Popen(
        shell,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdin
    with contextlib.suppress(BrokenPipeError), started.stdin:  # it says itself why it has ended
        started.stdin.write(script.encode())
    return started


def _show(name: str, stream: IO[bytes]) -> None:
    """Pass on what a rank writes to stderr, but what MLX's ring says of connections that end."""
    with stream:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip()
            if text and not text.startswith("[ring]"):
                print(f"{name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def _forwarded(first: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Hand signals on to the first rank."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda got, _: first.send_signal(got)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Let all ranks end; those that do not, are ended."""
    end_s = time.monotonic() + _GRACE_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, end_s - time.monotonic()))
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
