"""Writes files and folders that appear whole or not at all, and locks folders.

Everything is written inside a hidden folder beside the target, `.NAME.tmp-XXXX/`.
It is moved to its name when it is complete and on the disk. The hidden folder is
locked, and the lock ends with the process. So the next writer to the same name can
tell what a killed process left behind, and removes it.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.filesize import decimal

from interviewmate_mlx.errors import StorageError

LOCK_FILE = ".lock"  # in a folder that a process uses; holds the process's id

Progress = Callable[[int, int], None]  # called with bytes done and bytes in all

# What macOS, Windows and Linux desktops leave in folders that somebody has looked at.
_SYSTEM_FILES = (".ds_store", ".localized", "icon\r", "thumbs.db", "desktop.ini", ".directory")
_APPLE_DOUBLE = "._"  # before a file's name: what macOS keeps beside it on other file systems


def contents(folder: Path) -> list[Path]:
    """What a folder holds, without the files that the system leaves in folders by itself.

    Raises:
        OSError: it is not a folder, or cannot be read.
    """
    return sorted(path for path in folder.iterdir() if not _is_system_file(path))


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder that holds nothing, or only files that the system left there."""
    return path.is_dir() and not contents(path)


def _remove_system_files(folder: Path) -> None:
    """Empty a folder that `is_empty_folder`: a folder can be renamed only to an empty one."""
    if folder.exists():
        for path in filter(_is_system_file, folder.iterdir()):
            path.unlink()


def _is_system_file(path: Path) -> bool:
    is_known = path.name.lower() in _SYSTEM_FILES or path.name.startswith(_APPLE_DOUBLE)
    return is_known and not path.is_dir()


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a file of limited size: a file from a stranger could fill the memory.

    Raises:
        OSError: it cannot be read, or is larger than `max_bytes` (EFBIG).
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        limit = f"{max_bytes >> 20} MB" if max_bytes >= 1 << 20 else f"{max_bytes >> 10} kB"
        raise OSError(errno.EFBIG, f"it is larger than {limit}", str(path))
    return data


def is_utf8(text: str) -> bool:
    """Whether a string can be written in UTF-8.

    Python reads a path or an argument in another encoding as lone surrogates.
    """
    return not any("\ud800" <= char <= "\udfff" for char in text)


def check_free_space(
    path: Path, needed_bytes: int, hint: str = "choose a folder on another disk"
) -> None:
    """Check that a disk has enough free space for what will be written.

    Args:
        path: where it will be written; it need not exist yet.
        needed_bytes: of all files together.
        hint: how to write to another disk, for the message.

    Raises:
        StorageError: there is too little.
    """
    folder = next(place for place in (path, *path.parents) if place.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{folder}: {decimal(free_bytes)} are free, expected {decimal(needed_bytes)}.\n"
            f"Free some space, or {hint}."
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same file name. It becomes `path` when the block ends.

    An existing file is replaced. If the block raises, `path` is unchanged.
    A symbolic link is followed. Missing parents are created.

    Raises:
        StorageError: the folder cannot be written to, the disk is full, or the
            block wrote no file.
    """
    path = Path(os.path.realpath(path))
    with _as_storage_error(path), _workspace(path) as workspace:
        temporary = workspace / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def append_text(path: Path, text: str, sync: bool = False) -> None:
    """Append to a file.

    Args:
        path: the file; created if it does not exist.
        text: what to append.
        sync: wait until all of the file is on the disk.

    Raises:
        StorageError: it cannot be written.
    """
    with _as_storage_error(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            _sync_descriptor(file.fileno())


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder of the same name. It becomes `path` when the block ends.

    If the block raises, `path` is unchanged. With `replace`, the new folder takes the
    place of an existing one: in one step if the system can do that (Linux, macOS),
    otherwise in two. A symbolic link is followed. Missing parents are created.

    Raises:
        StorageError: `path` exists, is not an empty folder (see `is_empty_folder`), and
            `replace` is false; or the folder cannot be written to, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    with _as_storage_error(path), _workspace(path) as workspace:
        if not replace:
            _refuse_existing(path)
        temporary = workspace / path.name
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace and path.exists():
            _swap(temporary, path)
        else:
            _refuse_existing(path)
            _remove_system_files(path)
            os.rename(temporary, path)
        _sync(path.parent)


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, as `atomic_file` does. The file is removed when the block ends.

    Raises:
        StorageError: the folder cannot be written to.
    """
    path = Path(os.path.realpath(path))
    with _as_storage_error(path), _workspace(path) as workspace:
        yield workspace / path.name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process while the block runs.

    The folder and its parents are created if they are missing. Those that were created
    are removed again if they stay empty. The lock ends with the process, even if that is
    killed. Some file systems have no locks; there, other processes are not kept out.

    Raises:
        BlockingIOError: another process has locked it; `strerror` says which.
        StorageError: the folder cannot be written to.
    """
    path = folder / LOCK_FILE
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, created)
        with _as_storage_error(folder):
            descriptor = _take_lock(path)
        stack.callback(os.close, descriptor)
        stack.callback(_remove_lock, path, descriptor)
        yield


def _take_lock(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner before has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode() or "another"
            os.close(descriptor)
            message = f"process {owner} is using it"
            raise BlockingIOError(errno.EAGAIN, message, str(path.parent)) from error
        except OSError:
            pass  # no locks on this file system
        if _is_at(path, descriptor):
            with suppress(OSError):  # the disk is full: others are not told who has the lock
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # the owner before removed the file before it was locked here


def _remove_lock(path: Path, descriptor: int) -> None:
    with suppress(OSError):  # a file that stays behind locks nothing
        if _is_at(path, descriptor):
            path.unlink()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # stops at the first that is not empty
        for folder in folders:
            folder.rmdir()


def clear_leftovers(path: Path) -> None:
    """Remove the hidden folders of killed processes that were writing a file or folder.

    Args:
        path: the file or folder; its name may be a `glob` pattern.
    """
    for leftover in path.parent.glob(f".{path.name}.tmp-{'?' * 8}"):  # mkdtemp adds 8 characters
        name = leftover.name[1:].rpartition(".tmp-")[0]
        _clear_if_stale(leftover, path.with_name(name))


def _refuse_existing(path: Path) -> None:
    if path.exists() and not is_empty_folder(path):
        raise FileExistsError(errno.EEXIST, "it already exists", str(path))


@contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a StorageError about writing `path`."""
    try:
        yield
    except BlockingIOError:  # another process has the lock
        raise
    except OSError as error:
        place = error.filename or path
        if isinstance(place, int) or ".tmp-" in str(place):
            place = path
        raise StorageError(
            f"Cannot write {path}: {f'{place}: ' if str(place) != str(path) else ''}"
            f"{error.strerror or error}.\n"
            "Check the path, its permissions and the free space of its disk."
        ) from error


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """Yield a locked folder beside `path`, on the same file system. Removed after the block."""
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.with_name(glob.escape(path.name)))
    with ExitStack() as stack:
        stack.callback(_remove_empty, created)  # a failure leaves no parents behind
        workspace, lock = _make_locked_folder(f".{path.name}.tmp-", path.parent)
        stack.callback(os.close, lock)
        stack.callback(shutil.rmtree, workspace, ignore_errors=True)
        yield workspace


def _make_locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # another process cleared it before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nothing is ever cleared there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _clear_if_stale(workspace: Path, path: Path) -> None:
    """Remove the workspace of a process that has ended; restore what it was replacing."""
    with suppress(OSError), ExitStack() as stack:
        descriptor = os.open(workspace, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = workspace / _aside_name(path)
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(workspace)


def _aside_name(path: Path) -> str:
    return f"{path.name}.replaced"


def _swap(new: Path, path: Path) -> None:
    """Move `new` to `path`. What was at `path` goes to `new`, or beside it."""
    if _exchange(new, path):
        return
    aside = new.parent / _aside_name(path)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step: renameat2(2) on Linux, renamex_np(2) on macOS.

    Returns:
        False if the system cannot do it.
    """
    libc = ctypes.CDLL(None)
    first, second, exchange = os.fsencode(one), os.fsencode(other), ctypes.c_uint(2)
    at_cwd = -100
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(at_cwd, first, at_cwd, second, exchange) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(first, second, exchange) == 0)
    return False  # an older libc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _sync_descriptor(descriptor: int) -> None:
    """Wait until a file is on the disk. On macOS `fsync` waits for the disk's cache alone."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not on every file system, such as a network's
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
