"""Downloads models and data sets from the Hugging Face Hub.

Protocol, login and cache are those of `huggingface_hub`: HF_ENDPOINT, HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE work as its users expect, and files that another program
has downloaded are not downloaded again.
"""

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants

from interviewmate_mlx.data.records import folders_of_splits
from interviewmate_mlx.errors import HubError, list_faults
from interviewmate_mlx.files import Progress
from interviewmate_mlx.formats.model_files import (
    CARD_FILE,
    OTHER_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    index_of,
)
from interviewmate_mlx.hub.cache import (
    LIBRARY_NAME,
    RepoKind,
    fetch,
    find_commit,
    remember_commit,
)
from interviewmate_mlx.hub.errors import (
    LIBRARY_ERRORS,
    explain,
    is_unreachable,
    quiet_library,
)
from interviewmate_mlx.hub.network import check_settings

# What works without the network, by the kind of what was asked for.
_WITHOUT_HUB = {
    "model": "Without the Hub, these work: mini (the base that is shipped), a model's folder here.",
    "dataset": "Without the Hub, these work: interview (the questions that are shipped), a file or "
    "folder here.",
}
_DATA_FOLDERS = ("", "data/")  # before others
_PARQUET_BRANCH = "refs/convert/parquet"  # which the Hub makes of most data sets
REQUEST_TIMEOUT_S = 10.0

# Chooses files of a repository: (its id, all file names, fetch one file by name) -> chosen names
_ChooseFiles = Callable[[str, Collection[str], Callable[[str], Path]], list[str]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PulledFolder:
    """A folder in the Hub's cache, and the commit that it belongs to."""

    path: Path
    revision: str


def pull(
    repo_id: str, revision: str | None = None, *, progress: Progress | None = None
) -> PulledFolder:
    """Download what a conversion needs: config, tokenizer, and one set of weights.

    The weights are safetensors if the revision has them, pytorch_model.bin
    otherwise. Files in the cache are not downloaded again, and a partial file is
    resumed. If the Hub cannot be reached, a complete copy in the cache is used,
    and a warning is logged.

    Args:
        repo_id: as in "tiiuae/falcon-rw-1b".
        revision: a branch, a tag or a commit; main by default.
        progress: called with bytes done and bytes in all, of the files downloaded;
            never called if there are none. No progress bar is drawn here.

    Raises:
        HubError: the Hub, the network or the disk failed, or the repository has no
            model that can be converted.
        StorageError: the disk has too little free space.
    """
    return _pull("model", repo_id, revision, _choose_model_files, progress)


def pull_dataset(
    repo_id: str,
    revision: str | None = None,
    folder: str = "",
    *,
    progress: Progress | None = None,
) -> Path:
    """Download a data set's files; return the folder that holds them.

    The files are train, valid (validation, val, dev) and test, whole or in parts, in the
    repository's root, in its `data` folder, or in the only other folder that has such files.
    The rest is as for `pull`.

    Args:
        repo_id: as in "openai/gsm8k".
        revision: a branch, a tag or a commit; main by default.
        folder: of the repository, where it holds several sets.
        progress: as for `pull`.

    Raises:
        HubError: as for `pull`, or the repository has no train.jsonl and no train.json, or has
            them in several folders.
        StorageError: as for `pull`.
    """
    chosen = ""

    def choose(repo_id: str, names: Collection[str], _: object) -> list[str]:
        nonlocal chosen
        found = _choose_set(repo_id, names, revision, folder)
        chosen = found
        return folders_of_splits(names)[found]

    pulled = _pull("dataset", repo_id, revision, choose, progress)
    return pulled.path / chosen


def _pull(
    kind: RepoKind,
    repo_id: str,
    revision: str | None,
    choose: _ChooseFiles,
    progress: Progress | None,
) -> PulledFolder:
    revision = revision or constants.DEFAULT_REVISION
    api = HfApi(library_name=LIBRARY_NAME)
    get_info = api.model_info if kind == "model" else api.dataset_info
    try:
        with quiet_library():
            check_settings()
            info = get_info(
                repo_id, revision=revision, files_metadata=True, timeout=REQUEST_TIMEOUT_S
            )
    except LIBRARY_ERRORS as error:
        reason = explain(error, kind, repo_id, revision)
        cached = is_unreachable(error) and _find_complete(kind, repo_id, revision, choose)
        if not cached:
            if is_unreachable(error):
                reason = f"{reason}\n{_WITHOUT_HUB[kind]}"
            raise HubError(reason) from None
        _log.warning(
            "%s\nUsing commit %s from the cache.", reason.splitlines()[0], cached.revision[:8]
        )
        return cached
    commit = str(info.sha)
    files = {file.rfilename: file for file in info.siblings or []}

    def read(name: str) -> Path:
        return fetch(kind, repo_id, commit, [files[name]]) / name

    chosen = [files[name] for name in choose(repo_id, files, read)]
    folder = fetch(kind, repo_id, commit, chosen, progress)
    remember_commit(kind, repo_id, revision, commit)
    return PulledFolder(folder, commit)


def _find_complete(
    kind: RepoKind, repo_id: str, revision: str, choose: _ChooseFiles
) -> PulledFolder | None:
    """The cache's copy of the revision, if it has all the files that are needed."""
    folder = find_commit(kind, repo_id, revision)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    try:
        choose(repo_id, names, folder.joinpath)
    except HubError:
        return None
    return PulledFolder(folder, folder.name)


def _choose_model_files(
    repo_id: str, names: Collection[str], read: Callable[[str], Path]
) -> list[str]:
    if "config.json" not in names:
        adapter = "adapter_config.json" in names
        raise HubError(
            f"{repo_id} is not a model: it has no config.json.\n"
            + ("It is an adapter: give its base." if adapter else "Choose a model.")
        )
    known = [name for single, _ in WEIGHTS for name in (single, index_of(single))]
    weights = next((name for name in known if name in names), None)
    if weights is None:
        raise HubError(
            f"{repo_id} has no weights that can be read, expected one of\n"
            f"{list_faults(known)}\nChoose another revision or model."
        )
    others = (*OTHER_FILES, CARD_FILE, *TOKENIZER_FILES)
    chosen = [name for name in others if name in names] + [weights]
    if weights in dict(WEIGHTS):
        return chosen
    try:
        shards = sorted(set(json.loads(read(weights).read_bytes())["weight_map"].values()))
        faults = [f"{name}: missing" for name in shards if name not in names]
        faults += [
            f"{name}: lies in a folder, expected beside the index"
            for name in shards
            if name in names and "/" in name
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        faults = ["it is not an index: expected JSON with a weight_map from tensors to files"]
    if faults:
        raise HubError(
            f"{weights} of {repo_id} is wrong:\n{list_faults(faults)}\nChoose another revision."
        )
    return chosen + shards


def _choose_set(repo_id: str, names: Collection[str], revision: str | None, folder: str) -> str:
    """The folder whose files are the data set; it ends in a slash, if it is not the root."""
    found = folders_of_splits(names)
    at = f"@{revision}" if revision else ""
    if folder:
        if (wanted := folder.strip("/") + "/") in found:
            return wanted
        raise HubError(
            f"{repo_id}{at} has no rows to train on in its folder {folder}"
            + (f", but in\n{list_faults(sorted(found), 20)}\n" if found else ".\n")
            + "Choose another folder or data set."
        )
    if first := [each for each in _DATA_FOLDERS if each in found] or list(found)[: len(found) < 2]:
        return first[0]
    if found:
        one = sorted(found)[0].removesuffix("/")
        raise HubError(
            f"{repo_id} holds several data sets:\n{list_faults(sorted(found), 20)}\n"
            f"Name one of them behind a colon, as in {repo_id}{at}:{one}"
        )
    others = sorted(n for n in names if n.endswith((".jsonl", ".json", ".csv", ".parquet")))
    as_parquet = f"{repo_id}@{_PARQUET_BRANCH}"
    raise HubError(
        f"{repo_id} has no train.jsonl and no train.json, .csv, .tsv or .parquet"
        + (f", but\n{list_faults(others, max_shown=5)}\n" if others else ".\n")
        + (f"Try the Hub's own copy as Parquet, {as_parquet}, c" if not at else "C")
        + "hoose another data set, or save this one as JSONL and give that file:\n"
        f"  datasets.load_dataset({repo_id!r})['train'].to_json('train.jsonl')"
    )
