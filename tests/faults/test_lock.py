"""One run's folder, one process."""

import os
import shutil
import signal

import pytest


@pytest.mark.parametrize("options", [[], ["--resume"], ["--force"]])
def test_second_process_in_a_run_is_refused_until_the_first_is_gone(
    launchers, whole, tmp_path, options
):
    step = whole.moments.index("open run/metrics.jsonl") + 3
    process = launchers.start(tmp_path, at=step, act="SIGSTOP")
    owner = process.stopped()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    second = launchers.train(tmp_path, *options)
    assert (second.code, second.stdout) == (1, "")
    assert second.stderr == (
        f"TrainingError: run is in use: process {owner} is using it.\n"
        "Wait until it ends, stop it, or choose another folder.\n"
        "Options for that: --out.\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before

    if options == ["--resume"]:
        os.kill(owner, signal.SIGCONT)
        assert process.wait().code == 0
    else:
        os.kill(owner, signal.SIGKILL)  # the lock dies with its owner
        assert process.wait().code == -signal.SIGKILL
        assert (tmp_path / "run" / ".lock").exists()
    assert launchers.go_on(tmp_path).code == 0
    assert whole.compare(tmp_path, "after the other") == ""


def test_two_processes_that_begin_one_run_are_not_both_let_in(launchers, whole, tmp_path):
    process = launchers.start(tmp_path, at=4, act="SIGSTOP")  # loaded, nothing written yet
    owner = process.stopped()
    second = launchers.train(tmp_path)
    assert second.code == 1
    assert f"run is in use: process {owner}" in second.stderr
    os.kill(owner, signal.SIGCONT)
    assert process.wait().code == 0
    assert whole.compare(tmp_path, "the first") == ""


def test_run_whose_folder_is_moved_away_meanwhile_leaves_the_next_one_locked(
    launchers, whole, tmp_path
):
    last = len(whole.moments) - 5
    first = launchers.start(tmp_path, at=last, act="SIGSTOP")
    old = first.stopped()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    second = launchers.start(tmp_path, at=30, act="SIGSTOP")
    new = second.stopped()
    os.kill(old, signal.SIGCONT)
    first.wait()
    assert (tmp_path / "run" / ".lock").read_text() == str(new)
    os.kill(new, signal.SIGCONT)
    assert second.wait().code == 0
