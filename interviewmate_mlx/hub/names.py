"""Decides what a name from the user means: something shipped, a local path, or a Hub id.

The same rules hold for bases and for data sets.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interviewmate_mlx.config import shipped, shipped_data
from interviewmate_mlx.errors import ConfigError, HubError, ModelError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.hub.pull import PulledFolder, pull, pull_dataset

_SUFFIXES = (".json", ".jsonl", ".toml", ".csv", ".tsv", ".parquet", ".gz", ".jinja")
MINI = "mini"  # the base that is shipped with the package
_log = logging.getLogger(__name__)


def shipped_base(name: str) -> Path | None:
    """The folder of a shipped base; None if the name is not one. `./mini` is a path."""
    return shipped(MINI) if name == MINI else None


def local_path(name: str | Path) -> Path:
    """A path with `~` expanded.

    Raises:
        ConfigError: it starts with `~someone`, and there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{name}: this user has no home folder here.\nGive the full path."
        ) from error


def is_path(name: str) -> bool:
    """Whether the name of a base means a path here, and so nothing to others."""
    if not name or shipped_base(name):
        return False
    return local_path(name).exists() or not is_hub_id(name)


def is_data_path(name: str) -> bool:
    """Whether the name of a data set means a path here, and so nothing to others."""
    if not name or shipped_data(name):
        return False
    return local_path(name).exists() or not is_hub_data(name)


def is_hub_data(name: str) -> bool:
    """Whether a name that is not a local path can be a data set on the Hub.

    It is a Hub id, perhaps with a revision and one of its folders: `owner/name@revision:folder`.
    """
    return is_hub_id(_parts(name)[0])


def _parts(name: str) -> tuple[str, str, str]:
    """A data set's Hub id, its revision and its folder; "" for what is not named."""
    found = re.fullmatch(r"([^@:]*/[^@:]*)(?:@([^:@]+))?(?::([^:@]+))?", name)
    return (found[1], found[2] or "", found[3] or "") if found else (name, "", "")


def is_hub_id(name: str) -> bool:
    """Whether a name that is not a local path can be `owner/name` on the Hub.

    A mistyped path must not be sent to the network. So a name with a file's suffix, or
    below an existing folder, counts as a path.
    """
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.suffix in _SUFFIXES or ":" in name
    return name.count("/") == 1 and not looks_local and not path.parent.exists()


def fetch_data(name: str | Path, progress: Progress | None = None) -> Path:
    """The folder or file of a data set, by its name. A Hub id is pulled.

    Args:
        name: a shipped name, a path, or a Hub id, perhaps with a revision and a folder. A path
            need not exist.
        progress: called with bytes done and bytes in all while a Hub id is pulled.

    Raises:
        ConfigError: as for `local_path`.
        HubError, StorageError: as for `pull_dataset`.
    """
    name = str(name)
    if folder := shipped_data(name):
        _warn_of_namesake(name, folder)
        return folder
    path = local_path(name)
    if path.exists() or not is_hub_data(name):
        return path
    repo_id, revision, chosen = _parts(name)
    with _after_looking_here(name, "file or folder"):
        return pull_dataset(repo_id, revision or None, chosen, progress=progress)


def fetch_model(
    name: str | Path, revision: str | None = None, progress: Progress | None = None
) -> PulledFolder:
    """The folder of a model, by its name. A Hub id is pulled; nothing is converted.

    Args:
        name: `mini`, a folder, or a Hub id.
        revision: a branch, tag or commit of a Hub id.
        progress: called with bytes done and bytes in all while a Hub id is pulled.

    Returns:
        The folder, and its commit on the Hub; "" for the commit of any other folder.

    Raises:
        ModelError: there is no such folder, and the name cannot be a Hub id.
        ConfigError: as for `local_path`; or a revision was given with a folder.
        HubError, StorageError: as for `pull`.
    """
    name = str(name)
    shipped_folder = shipped_base(name)
    folder = shipped_folder or local_path(name)
    if not folder.exists() and is_hub_id(name):
        with _after_looking_here(name, "folder"):
            return pull(name, revision, progress=progress)
    if not folder.exists():
        where = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise ModelError(
            f"No model at {name}: no such folder{where}, and not a Hub id like owner/name.\n"
            "Give mini, a folder, or a Hub id such as tiiuae/falcon-rw-1b."
        )
    if revision:
        raise ConfigError(f"A revision is for Hub ids, and {name} is a folder.\nLeave it out.")
    if shipped_folder:
        _warn_of_namesake(name, shipped_folder)
    return PulledFolder(folder, "")


@contextmanager
def _after_looking_here(name: str, what: str) -> Iterator[None]:
    """Say first, if the Hub fails, that there is no such path here: it may have been meant."""
    try:
        yield
    except HubError as error:
        raise HubError(
            f"No {what} {name} in {Path.cwd()}, so it was looked for on the Hub:\n{error}",
            *error.arguments,
        ) from None


def _warn_of_namesake(name: str, folder: Path) -> None:
    """Log it if there is another folder of a shipped name here: it may have been meant."""
    if os.path.isdir(name) and not os.path.samefile(name, folder):
        _log.warning("%s is what is shipped by that name; the folder here is ./%s", name, name)
