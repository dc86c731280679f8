"""A server under load: first tokens, tokens a second beside one after another, memory.

    python benchmarks/serve.py                  mini, 32 clients, 500 requests
    python benchmarks/serve.py --requests 2000  is the memory flat?

The server runs in a process of its own, the clients here; both share the machine's cores.
Questions are those of `interview`, answers have at most 64 tokens.
"""

import argparse
import itertools
import json
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import httpx2
import psutil

from interviewmate_mlx.config import shipped_data
from interviewmate_mlx.data.records import load_splits

_TOKENS = 64
_ALONE = 40  # requests one after another


@dataclass(frozen=True)
class Reply:
    """How one request went: seconds to its first token, its tokens, whether it is whole."""

    first_s: float
    num_tokens: int
    is_whole: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=PATH")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    command = [sys.executable, "-m", "interviewmate_mlx", "serve", "--port", "0"]
    command += ["--model", options.model, "--queue", str(options.clients)]
    command += [word for adapter in options.adapter for word in ("--adapter", adapter)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = re.match(r"http://\S+", line)[0]
        threading.Thread(target=drain, args=(process.stderr,), daemon=True).start()
        try:
            measure(url, options.clients, options.requests, psutil.Process(process.pid))
        finally:
            process.terminate()


def drain(stream) -> None:
    for _ in stream:
        pass


def measure(url: str, num_clients: int, num_requests: int, server: psutil.Process) -> None:
    rows = [row for split in load_splits(shipped_data("interview")).values() for row in split]
    while True:
        try:
            names = [m["id"] for m in httpx2.get(f"{url}/v1/models").json()["data"]]
            break
        except httpx2.TransportError:
            time.sleep(0.1)
    asked = list(
        itertools.islice(
            zip(itertools.cycle(names), (row.question for row in itertools.cycle(rows))),
            num_requests,
        )
    )
    load(url, asked[:8], 8)  # warm
    alone, alone_s = load(url, asked[:_ALONE], 1)
    alone_rate = sum(reply.num_tokens for reply in alone) / alone_s
    memory = []
    replies, took_s = load(url, asked, num_clients, lambda: memory.append(server.memory_info().rss))
    rate = sum(reply.num_tokens for reply in replies) / took_s
    firsts = sorted(reply.first_s for reply in replies)
    lost = sum(not reply.is_whole for reply in replies)
    print(f"{num_requests} requests, {num_clients} clients, {', '.join(names)}: {lost} lost")
    p95 = firsts[int(0.95 * (len(firsts) - 1))]
    print(f"first token: median {statistics.median(firsts):.3f} s, 95th percentile {p95:.3f} s")
    print(f"{rate:.0f} tokens/s, one after another {alone_rate:.0f}: {rate / alone_rate:.1f} times")
    quarter = max(1, len(memory) // 4)
    parts = [statistics.mean(memory[i * quarter : (i + 1) * quarter]) for i in range(4)]
    print("memory by quarter of the requests, MB:", *(f"{part / 1e6:.0f}" for part in parts))


def load(url, asked, num_clients, after=lambda: None) -> tuple[list[Reply], float]:
    """Put questions to a server from several clients at once."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for each in asked:
        waiting.put(each)
    replies: list[Reply] = []

    def work() -> None:
        with httpx2.Client(timeout=600) as client:
            while True:
                try:
                    name, question = waiting.get_nowait()
                except queue.Empty:
                    return
                replies.append(ask(client, url, name, question))
                after()

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies, time.perf_counter() - start


def ask(client: httpx2.Client, url: str, name: str, question: str) -> Reply:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _TOKENS,
        "temperature": 0.7,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first_s, num_tokens, is_whole = time.perf_counter(), 0.0, 0, False
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                is_whole = response.status_code == 200
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
                elif not first_s and event["choices"][0]["delta"].get("content"):
                    first_s = time.perf_counter() - start
    return Reply(first_s, num_tokens, is_whole)


if __name__ == "__main__":
    main()
