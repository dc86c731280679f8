"""`--hosts` over two hosts with addresses of their own: network namespaces of this machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import LOSS, outcome

from interviewmate_mlx.config import load_run
from interviewmate_mlx.training.checkpoint import checkpoints, load_newest
from interviewmate_mlx.training.loop import train

ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
# What logs in to a host. As with ssh, nothing of the environment goes along.
SSH = """#!/bin/sh
echo "$@" >> {log}
shift 3
host=$1
shift
cat > {log}.stdin
exec < {log}.stdin
exec env -i PATH="$PATH" HOME="$HOME" ip netns exec {prefix}$host "$@"
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def refused() -> str:
    """Why this machine makes no network namespaces."""
    if not shutil.which("ip"):
        return "there is no command ip"
    found = subprocess.run(["ip", "netns", "add", "imate-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "imate-try"], capture_output=True)
    return found.stderr.strip()


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A prefix for the names of two namespaces with a cable between them."""
    if why := refused():
        pytest.skip(f"no network namespaces: {why}")
    prefix, number = f"imate{os.getpid()}-", os.getpid()
    ends = dict(zip(ADDRESSES, (f"im{number}a", f"im{number}b"), strict=True))
    try:
        for name in ADDRESSES:
            ip("netns", "add", prefix + name)
        ip("link", "add", ends["first"], "type", "veth", "peer", "name", ends["second"])
        for name, address in ADDRESSES.items():
            ip("link", "set", ends[name], "netns", prefix + name)
            ip("-n", prefix + name, "addr", "add", f"{address}/24", "dev", ends[name])
            ip("-n", prefix + name, "link", "set", ends[name], "up")
            ip("-n", prefix + name, "link", "set", "lo", "up")
        monkeypatch.chdir(tmp_path)
        ssh = tmp_path / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(SSH.format(log=tmp_path / "ssh.log", prefix=prefix), encoding="utf-8")
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", str(ssh.parent), prepend=os.pathsep)
        monkeypatch.setenv("INTERVIEWMATE_SILENCE", "5")
        monkeypatch.setenv("INTERVIEWMATE_API_KEY", "a-secret")
        listed = [{"ssh": name, "ips": [address]} for name, address in ADDRESSES.items()]
        Path("hosts.json").write_text(json.dumps(listed), encoding="utf-8")
        yield prefix, ends
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "del", prefix + name], capture_output=True)


@pytest.fixture
def settings(tiny_base, questions):
    return [
        f"model.base={tiny_base}",
        "model.dtype=float32",
        f"data.path={questions}",
        "train.grad_accumulation=5",
        "train.epochs=1",
        "lora.dropout=0",
    ]


def start(prefix: str, settings: list[str], *words: str) -> subprocess.Popen[str]:
    """A training on both hosts, from the first."""
    command = [sys.executable, "-m", "interviewmate_mlx", "train", "--hosts", "hosts.json", *words]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        ["ip", "netns", "exec", f"{prefix}first", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_hosts_train_one_run(hosts, settings):
    list(train(load_run("A", settings), "alone"))
    started = start(hosts[0], settings, "--out", "together")
    try:
        _, stderr = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode == 0, stderr
    assert outcome("together")[0] == pytest.approx(outcome("alone")[0], rel=LOSS)
    words = Path("ssh.log").read_text(encoding="utf-8").split()
    assert words == ["-T", "-o", "BatchMode=yes", "second", "/bin/sh"]
    script = Path("ssh.log.stdin").read_text(encoding="utf-8")
    assert "INTERVIEWMATE_SILENCE=5" in script
    assert "a-secret" not in script


def test_a_cable_that_is_pulled_ends_the_run(hosts, settings):
    prefix, ends = hosts
    settings = [*settings, "train.epochs=2000", "train.save_every=1"]
    started = start(prefix, settings, "--out", "out")
    try:
        end = time.monotonic() + 60
        while len(checkpoints(Path("out"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        ip("-n", f"{prefix}second", "link", "set", ends["second"], "down")
        cut = time.monotonic()
        _, stderr = started.communicate(timeout=60)
        # The limit, and what the launcher waits for ranks to end by themselves.
        assert time.monotonic() - cut < 30
        assert started.returncode == 1
        assert "Rank 1 (" in stderr
        assert "not been heard of" in stderr
    finally:
        started.kill()
        started.communicate()
    assert load_newest(Path("out")).state.step >= 1
