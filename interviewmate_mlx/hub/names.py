"""Decides what a name from the user means: something shipped, a local path, or a Hub id.

The same rules hold for bases and for data sets.
"""

import re
from pathlib import Path

from interviewmate_mlx.config import shipped
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.hub.pull import pull_dataset

MINI = "mini"  # the base that is shipped with the package
_SHIPPED_NAME = re.compile(r"[a-z0-9-]+").fullmatch


def shipped_base(name: str) -> Path | None:
    """The folder of a shipped base; None if the name is not one. `./mini` is a path."""
    return shipped(MINI) if name == MINI else None


def shipped_data(name: str) -> Path | None:
    """The folder of a shipped data set; None if the name is not one."""
    folder = shipped(f"data/{name}")
    return folder if _SHIPPED_NAME(name) and (folder / "train.jsonl").is_file() else None


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


def is_hub_id(name: str) -> bool:
    """Whether a name that is not a local path can be `owner/name` on the Hub.

    A mistyped path must not be sent to the network. So a name with a file's suffix, or
    below an existing folder, counts as a path.
    """
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.suffix in (".json", ".jsonl", ".toml")
    return name.count("/") == 1 and not looks_local and not path.parent.exists()


def fetch_data(name: str, progress: Progress | None = None) -> Path:
    """The folder or file of a data set, by its name. A Hub id is pulled.

    Args:
        name: a shipped name, a path, or a Hub id. A path need not exist.
        progress: called with bytes done and bytes in all while a Hub id is pulled.

    Raises:
        ConfigError: as for `local_path`.
        HubError, StorageError: as for `pull_dataset`.
    """
    if folder := shipped_data(name):
        return folder
    path = local_path(name)
    return pull_dataset(name, progress=progress) if is_hub_id(name) else path
