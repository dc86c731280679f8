"""Files and folders appear whole or not at all, even if the writer fails, is killed, or races."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from interviewmate_mlx import files
from interviewmate_mlx.errors import StorageError
from interviewmate_mlx.files import atomic_file, atomic_folder, locked


def write_folder(path: Path, text: str, replace: bool = False) -> None:
    with atomic_folder(path, replace=replace) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)


def write_half_a_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def write_half_a_folder(path: Path, replace: bool = False) -> None:
    with atomic_folder(path, replace=replace) as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt


def kill_inside(code: str, *arguments: object) -> None:
    """Run a program that kills itself in the middle of writing, as `kill -9` would."""
    program = textwrap.dedent(code) + "\nos.kill(os.getpid(), signal.SIGKILL)"
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom interviewmate_mlx import files\n"
    done = subprocess.run([sys.executable, "-c", head + program, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.safetensors"
    with atomic_file(path) as temporary:
        temporary.write_text("a")
        assert temporary.name == path.name  # for writers that look at the suffix
        assert not path.exists()
    assert path.read_text() == "a"
    assert os.listdir(path.parent) == [path.name]


def test_file_stays_as_it_was_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half_a_file(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_file_that_is_open_keeps_its_content_for_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_file_written_through_a_link_replaces_the_link_target(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a.txt")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a.txt").read_text() == "a"


def test_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError), atomic_file(tmp_path / "a.txt"):
        pass
    assert os.listdir(tmp_path) == []


def test_file_and_folder_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain_folder").mkdir()
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("")
    write_folder(tmp_path / "folder", "a")
    for ours, plain in (("file", "plain"), ("folder", "plain_folder")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / plain).stat().st_mode


@pytest.mark.parametrize("is_supported", [True, False])
def test_on_macos_what_is_written_reaches_the_disk_itself(tmp_path, monkeypatch, is_supported):
    """`fsync` stops at the disk's cache there; a file system may know no other."""
    full_sync, synced = 51, []

    def fcntl(descriptor: int, command: int) -> None:
        assert command == full_sync
        if not is_supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        synced.append("full")

    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", full_sync, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", lambda _: synced.append("plain"))
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("text")
    files.append_text(tmp_path / "a.txt", " and more", sync=True)
    assert synced == 3 * ["full" if is_supported else "plain"]  # the file twice, its folder once


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "models" / "out"
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "a.txt").read_text() == "a"
    assert os.listdir(path.parent) == ["out"]


def test_folder_does_not_appear_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half_a_folder(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_folder_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_folder(path, "old")
    with pytest.raises(StorageError):
        write_folder(path, "new")
    assert (path / "sub" / "a.txt").read_text() == "old"
    write_folder(path, "new", replace=True)
    assert (path / "sub" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_folder_replaces_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", "a")
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "a"


def test_folder_that_another_writer_made_first_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(StorageError), atomic_folder(path):
        write_folder(path, "the faster one")
    assert (path / "sub" / "a.txt").read_text() == "the faster one"
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_keeps_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_folder(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_half_a_folder(path, replace=True)
    assert (path / "sub" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_system_exchanges_folders_in_one_step(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", "1")
    write_folder(tmp_path / "other", "2")
    assert files._exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "sub" / "a.txt").read_text() == "2"
    assert (tmp_path / "other" / "sub" / "a.txt").read_text() == "1"


def test_replacing_works_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "out"
    write_folder(path, "old")
    write_folder(path, "new", replace=True)
    assert (path / "sub" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_in_two_steps_puts_the_old_folder_back_when_the_second_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "out"
    write_folder(path, "old")
    rename = os.rename
    calls: list[object] = []

    def failing_rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(StorageError, match="the disk went away"):
        write_folder(path, "new", replace=True)
    assert (path / "sub" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out", "out.replaced", "a [1]*", "run.tmp-x"])
def test_leftovers_of_a_killed_process_do_not_block_and_are_removed(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    for kind in ("atomic_file", "atomic_folder"):
        kill_inside(f"held = files.{kind}(Path(sys.argv[1])); held.__enter__()", path)
        assert len(os.listdir(tmp_path)) == 1  # the leftovers of the process before are cleared
    write_folder(path, "a")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_is_restored_when_its_replacer_was_killed_between_two_steps(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out"
    write_folder(path, "old")
    kill_inside(
        """
        path = Path(sys.argv[1])
        files._exchange = lambda one, other: False
        replace = files.os.rename
        def rename(source, target):
            replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        files.os.rename = rename
        with files.atomic_folder(path, replace=True) as folder:
            (folder / "a.txt").write_text("new")
        """,
        path,
    )
    assert not path.exists()
    with pytest.raises(StorageError):
        write_folder(path, "newer")
    assert (path / "sub" / "a.txt").read_text() == "old"


def test_a_second_writer_does_not_disturb_a_running_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as slow:
        slow.write_text("slow")
        with atomic_file(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
        assert slow.read_text() == "slow"
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_locked_folder_is_created_and_removed_again_if_it_stays_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    folder.joinpath("kept").unlink()
    with locked(folder):
        pass
    assert folder.is_dir(), "a folder that was there stays"


def test_locked_folder_is_refused_with_its_owner_and_free_afterwards(tmp_path):
    with locked(tmp_path):
        with pytest.raises(BlockingIOError) as refused, locked(tmp_path):
            pass
        assert refused.value.strerror == f"process {os.getpid()} is using it"
        assert refused.value.filename == str(tmp_path)
    (tmp_path / ".lock").write_text("of a process that is gone")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
