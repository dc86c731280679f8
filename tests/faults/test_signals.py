"""Signals that ask a run to stop, and a terminal that is closed."""

import os
import pty
import signal
import subprocess
import sys

import pytest

ENDED_AT_ONCE = {"SIGINT": 130, "SIGTERM": -signal.SIGTERM, "SIGHUP": -signal.SIGHUP}


@pytest.mark.parametrize("name", ENDED_AT_ONCE)
def test_signal_at_any_moment_loses_nothing(launchers, whole, tmp_path, name):
    started = whole.moments.index("open run/metrics.jsonl")
    synced = [n for n, moment in enumerate(whole.moments) if moment == "fsync /run/metrics.jsonl"]
    last_save = synced[-1]

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        stopped = launchers.train(work, at=moment, act=name)
        if moment >= last_save and stopped.code == 0:
            pass  # there was nothing left to stop
        elif moment >= started:
            if stopped.code != 130 or "everything is saved" not in stopped.stderr:
                return f"{what}: exit code {stopped.code}: {stopped.stderr}"
        elif stopped.code != ENDED_AT_ONCE[name]:
            return f"{what}: exit code {stopped.code}"
        resumed = launchers.go_on(work)
        if resumed.code != 0:
            return f"{what}: {resumed.stderr}"
        # It may have saved after other steps too, so other checkpoints may be left.
        return whole.compare(work, what, same_names=False)

    step = max(1, (len(whole.moments) - started) // 6)
    launchers.each(check, [2, 7, *range(started, len(whole.moments) - 1, step)])


def test_closed_terminal_saves_though_nothing_can_be_said(launchers, whole, tmp_path):
    """A real one: the kernel sends SIGHUP, and each write to it fails from then on."""
    words = [*launchers.words, "--set", "train.epochs=2000", "--set", "train.save_every=0"]
    words += ["--set", "validate.every=100000"]
    script = "from interviewmate_mlx.cli import main; main()"
    terminal, its_end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script, "train", *words],
        cwd=tmp_path,
        pass_fds=[its_end],
        preexec_fn=lambda: os.login_tty(its_end),
    ) as process:
        os.close(its_end)
        said = b""
        while b"loss" not in said:
            said += os.read(terminal, 10_000)
        os.close(terminal)
        assert process.wait() == 130
    out = tmp_path / "run"
    (saved,) = (out / "checkpoints").iterdir()
    steps = int(saved.stem.removeprefix("step-"))
    assert 0 < steps < 6000
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + steps


def test_run_under_nohup_does_not_stop_when_the_terminal_is_closed(launchers, whole, tmp_path):
    """Ignored signals stay so over exec, as nohup has it."""
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "from interviewmate_mlx.cli import signals\n"
    code += "stop = signals.StopOnSignal()\n"
    code += "with stop: signal.raise_signal(signal.SIGHUP)\n"
    code += "sys.exit(stop.wanted)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_run_that_has_started_loads_no_extension(launchers, tmp_path):
    """Some swallow the KeyboardInterrupt of a second signal while they are loaded."""
    code = "import sys\n"
    code += "from importlib.machinery import ExtensionFileLoader\n"
    code += "from interviewmate_mlx.cli import signals\n"
    code += "enter = signals.StopOnSignal.__enter__\n"
    code += "def note_and_enter(stop):\n"
    code += "    global before\n"
    code += "    before = set(sys.modules)\n"
    code += "    return enter(stop)\n"
    code += "signals.StopOnSignal.__enter__ = note_and_enter\n"
    code += "try:\n"
    code += "    from interviewmate_mlx.cli import main\n"
    code += "    main()\n"
    code += "finally:\n"
    code += "    new = {name: sys.modules[name] for name in set(sys.modules) - before}\n"
    code += "    loaders = {name: getattr(new[name], '__loader__', None) for name in new}\n"
    code += "    print([n for n in new if isinstance(loaders[n], ExtensionFileLoader)])"
    command = [sys.executable, "-c", code, "train", *launchers.words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
