"""A disk that is full or may not be written to: one message, and nothing saved is lost."""

import os
import stat
import sys

import pytest


def test_disk_that_fills_at_any_moment_costs_nothing_that_was_saved(launchers, whole, tmp_path):
    fsyncs = [n for n, moment in enumerate(whole.moments) if moment.startswith(("open", "fsync"))]

    def check(moment: int) -> str:
        work, what = tmp_path / str(moment), f"{moment} {whole.moments[moment]}"
        full = launchers.train(work, at=moment, act="fill")
        if (full.code, full.stdout) != (1, ""):
            return f"{what}: exit code {full.code}"
        if "No space left on device.\nCheck the path" not in full.stderr:
            return f"{what}: {full.stderr}"
        resumed = launchers.go_on(work)
        return whole.compare(work, what) if resumed.code == 0 else f"{what}: {resumed.stderr}"

    launchers.each(check, fsyncs[1::6])


@pytest.mark.parametrize("largest_file", [2_000, 20_000])
def test_file_that_may_not_grow_is_said(launchers, whole, tmp_path, largest_file):
    """Through the system's own limit: MLX's writer fails, not Python's."""
    limited = launchers.train(tmp_path, largest_file=largest_file)
    assert (limited.code, limited.stdout) == (1, "")
    assert "step-00000" in limited.stderr
    assert limited.stderr.endswith(
        "Check the path, its permissions and the free space of its disk.\n"
    )
    assert launchers.go_on(tmp_path).code == 0
    assert whole.compare(tmp_path, "resumed") == ""


@pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="root writes everywhere on this system"
)
@pytest.mark.parametrize("began", [False, True])
def test_folder_that_may_not_be_written_to_is_said_before_anything_is_loaded(
    launchers, whole, tmp_path, began
):
    if began:
        launchers.train(tmp_path, at=60)
    else:
        (tmp_path / "run").mkdir()
    folders = [path for path in (tmp_path / "run", tmp_path / "run/checkpoints") if path.exists()]
    (tmp_path / "run/.lock").unlink(missing_ok=True)
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused = launchers.train(tmp_path, *(["--resume"] * began), unprivileged=True)
    for folder in folders:
        folder.chmod(stat.S_IRWXU)
    assert (refused.code, refused.stdout) == (1, "")
    assert refused.stderr == (
        "StorageError: Cannot write run: run/.lock: Permission denied.\n"
        "Check the path, its permissions and the free space of its disk.\n"
    )
    assert launchers.go_on(tmp_path).code == 0
    assert whole.compare(tmp_path, "resumed") == ""
