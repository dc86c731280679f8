"""A real server in a process of its own, on loopback."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

_START_S = 120.0  # on a slow machine, beside other tests


@dataclass
class Served:
    """A server that runs: its address, its process, and where its log goes."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, headers=headers, timeout=120)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=headers, timeout=120)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics."""
        text = self.get("/metrics").text
        found = [row for row in text.splitlines() if row.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextmanager
def running(folder: Path, *arguments: object, **environment: str) -> Iterator[Served]:
    """Start `imate-mlx serve` in a folder, wait for its address, and end it with the block."""
    command = [sys.executable, "-m", "interviewmate_mlx", "serve", "--port", "0", "--dtype"]
    command += ["float32", *map(str, arguments)]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"XDG_DATA_HOME": str(folder)} | environment,
            stderr=subprocess.PIPE,
            stdout=out,
            text=True,
        )
    assert process.stderr is not None
    try:
        url = ""
        deadline = time.monotonic() + _START_S
        while not url:
            ready, _, _ = select.select([process.stderr], [], [], deadline - time.monotonic())
            line = process.stderr.readline() if ready else ""
            assert line, f"the server has not started: {process.poll()}"
            found = re.match(r"(http://\S+) answers as", line)
            url = found[1] if found else ""
        with log.open("a") as out:
            copier = subprocess.Popen(["cat"], stdin=process.stderr, stdout=out)
        while True:
            try:
                httpx2.get(f"{url}/health", timeout=10)
                break
            except httpx2.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield Served(url, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()
        copier.wait()
