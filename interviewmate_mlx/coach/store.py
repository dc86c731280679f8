"""SQLite files for what a user says: they survive a kill, and several processes at once."""

import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from interviewmate_mlx.errors import StorageError

_WAIT_S = 10.0  # for another process that is writing
_COMPANIONS = ("-wal", "-shm")  # files that SQLite keeps beside its own
_ENDING, _HEADER = ".sqlite", b"SQLite format 3\0"
_APPLICATION = 0x494D4154  # "IMAT", by which SQLite files tell whose they are


@contextmanager
def open_store(path: Path, tables: str, must_exist: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield a connection to an SQLite file with some tables, and close it.

    Each statement is on the disk when it returns. What is deleted is overwritten. A new file
    can be read by its owner only.
    A damaged file is renamed, with a warning, and a new one begun.

    Args:
        path: created with its parents if it does not exist.
        tables: `CREATE TABLE IF NOT EXISTS` and the like.
        must_exist: refuse a file that does not exist.

    Raises:
        StorageError: it does not exist, is not a file of these tables, or cannot be written.
    """
    if must_exist and not path.is_file():
        raise StorageError(f"No file {path}.\nName the one that was given to serve --keep.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _set_damaged_aside(path)
        path.touch(mode=0o600)  # what is said is the user's alone
        # Used by one thread at a time, but not always by the one that opened it.
        with closing(sqlite3.connect(path, _WAIT_S, check_same_thread=False)) as connection:
            connection.isolation_level = None  # no transaction but those that are written out
            connection.row_factory = sqlite3.Row
            _refuse_others(path, connection)
            _write_ahead(connection)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # macOS
            connection.execute("PRAGMA secure_delete = ON")
            connection.executescript(tables)
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"Cannot use {path}: {getattr(error, 'strerror', None) or error}.\n"
            "Check the path, its permissions and the free space of its disk, "
            "or name another file."
        ) from error


def _refuse_others(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse the file of another program: nothing is to be added to that."""
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (num_tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if owner != _APPLICATION and (owner or num_tables):
        raise StorageError(
            f"{path} is another program's SQLite file.\nName another file; it may be a new one."
        )


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Log writes ahead. SQLite does not wait here by itself for a process that is writing."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _set_damaged_aside(path: Path) -> None:
    if not path.exists() or _is_sound(path):
        return
    with path.open("rb") as file:
        has_header = file.read(len(_HEADER)) == _HEADER
    if not has_header and path.suffix != _ENDING:
        raise StorageError(
            f"{path} is not an SQLite file.\nName another file; it may be a new one."
        )
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    for ending in _COMPANIONS:
        companion = path.with_name(path.name + ending)
        if companion.exists():
            companion.rename(aside.with_name(aside.name + ending))
    warnings.warn(
        f"{path} is damaged. It was renamed to {aside}, and a new file was begun.", stacklevel=5
    )


def _is_sound(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path, _WAIT_S)) as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.OperationalError:  # busy, or no permission: not damaged
        return True
    except sqlite3.DatabaseError:
        return False
