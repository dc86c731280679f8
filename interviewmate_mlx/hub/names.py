"""What a name given by a user means: something shipped, something here, or something on the Hub.

The names of bases and of data sets follow the same rules.
"""

from pathlib import Path

from interviewmate_mlx.config import shipped
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.files import Progress
from interviewmate_mlx.hub.pull import pull_dataset

MINI = "mini"  # the base that comes with the package


def shipped_base(name: str) -> Path | None:
    """The folder of a base that comes with the package, for its name; `./mini` is a path."""
    return shipped(MINI) if name == MINI else None


def shipped_data(name: str) -> Path | None:
    """The folder of a data set that comes with the package, for its name."""
    folder = shipped(f"data/{name}")
    return folder if name.isidentifier() and (folder / "train.jsonl").is_file() else None


def local_path(name: str | Path) -> Path:
    """A path with `~` expanded.

    Raises:
        ConfigError: `~someone` is not a user here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}: no such user's home.\nWrite the path out.") from error


def is_hub_id(name: str) -> bool:
    """Whether a name that is not here can be `owner/name` on the Hub.

    A mistyped path must not go to the network. So a name with a file's ending, or in
    a folder that exists here, is a path.
    """
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.suffix in (".json", ".jsonl", ".toml")
    return name.count("/") == 1 and not looks_local and not path.parent.exists()


def fetch_data(name: str, progress: Progress | None = None) -> Path:
    """The folder or file of a data set: a shipped name, a path, or a Hub id, which is pulled.

    Raises:
        HubError: the Hub did not give it.
    """
    if folder := shipped_data(name):
        return folder
    path = local_path(name)
    return pull_dataset(name, progress=progress) if is_hub_id(name) else path
