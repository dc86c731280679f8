"""Downloads files into the Hub library's cache: resumed, checked, linked.

The layout is public, so that other programs can write it too:
https://huggingface.co/docs/hub/local-cache. The library's own download (1.31 to
2.4: `_download_to_tmp_and_move`) deletes a partial file when it gives up: after
five seconds without a network, at once when the connection is reset, at Ctrl-C.
That costs too much for gigabytes on a home connection. Here the partial file is
kept for this run and the next, and the complete file is compared with the Hub's
checksum.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import (
    constants,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from rich.filesize import decimal

from interviewmate_mlx.errors import HubError
from interviewmate_mlx.files import Progress, atomic_file, check_free_space
from interviewmate_mlx.hub.errors import (
    as_hub_error,
    is_unreachable,
    with_settings,
    without_tokens,
)

RepoKind = Literal["model", "dataset"]

LIBRARY_NAME = "interviewmate_mlx"
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1, or SHA-256
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between attempts that fetch nothing

_log = logging.getLogger(__name__)


def find_commit(kind: RepoKind, repo_id: str, revision: str) -> Path:
    """The cache's folder for a revision. It may not exist."""
    storage = _storage(kind, repo_id)
    reference = storage / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return storage / "snapshots" / commit


def remember_commit(kind: RepoKind, repo_id: str, revision: str, commit: str) -> None:
    """Store the commit of a branch or tag, so that it can be found without the Hub."""
    if find_commit(kind, repo_id, revision).name != commit:
        with atomic_file(_storage(kind, repo_id) / "refs" / revision) as temporary:
            temporary.write_text(commit)


def fetch(
    kind: RepoKind,
    repo_id: str,
    commit: str,
    files: Sequence[RepoSibling],
    progress: Progress | None = None,
) -> Path:
    """Download the files that the cache lacks; return the commit's folder.

    Args:
        files: with sizes and checksums, as `files_metadata=True` gives them.
        progress: called with bytes done and bytes in all, of the files downloaded.

    Raises:
        HubError: the Hub, the network or the disk failed, or a file arrived damaged.
        StorageError: the disk has too little free space.
    """
    with as_hub_error(kind, repo_id, commit):
        return _fetch(kind, repo_id, commit, files, progress)


def _fetch(
    kind: RepoKind,
    repo_id: str,
    commit: str,
    files: Sequence[RepoSibling],
    progress: Progress | None,
) -> Path:
    storage = _storage(kind, repo_id)
    folder = storage / "snapshots" / commit
    missing = []
    for file in files:
        checksum = file.lfs.sha256 if file.lfs else str(file.blob_id)
        if not (_CHECKSUM.fullmatch(checksum) and _CHECKSUM.fullmatch(commit)):
            text = (
                f"{constants.ENDPOINT} gives no checksum of {file.rfilename}; a Hub always gives "
                "one.\nCheck HF_ENDPOINT."
            )
            raise HubError(without_tokens(with_settings(text)))
        cached = try_to_load_from_cache(repo_id, file.rfilename, revision=commit, repo_type=kind)
        if not isinstance(cached, str):
            missing.append((file.rfilename, file.size or 0, storage / "blobs" / checksum))
    total = sum(size for _, size, _ in missing)
    on_disk = sum(_size(blob) + _size(_part_of(blob)) for _, _, blob in missing)
    check_free_space(storage, total - on_disk, "set HF_HOME to a folder on a larger disk")
    before = 0
    for name, size, blob in missing:
        url = hf_hub_url(repo_id, name, repo_type=kind, revision=commit)
        lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                _download(url, blob, size, partial(_report, progress, before, total))
            _link(blob, folder / name)
        before += size
        _report(progress, before, total)
    return folder


def _storage(kind: RepoKind, repo_id: str) -> Path:
    name = repo_folder_name(repo_id=repo_id, repo_type=kind)
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name


def _report(progress: Progress | None, before: int, total: int, arrived: int = 0) -> None:
    if progress is not None:
        progress(before + arrived, total)


def _size(path: Path) -> int:
    """The size of a file, 0 if it is not there. Another process may rename it at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _part_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _download(url: str, blob: Path, num_bytes: int, report: Callable[[int], None]) -> None:
    """Download a file to `blob`, whose name is its checksum. A partial file is resumed."""
    part = _part_of(blob)
    part.parent.mkdir(parents=True, exist_ok=True)
    pauses = iter(_PAUSES_S)
    while (start := _size(part)) < num_bytes or not part.exists():
        failure: Exception | None = None
        try:
            _append(url, part, start, report)
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if not is_unreachable(error):
                raise
            failure = error
        arrived = _size(part)
        if arrived > start:
            pauses = iter(_PAUSES_S)
        if arrived < num_bytes or not part.exists():
            pause = next(pauses, None)
            state = f"{decimal(arrived)} of {decimal(num_bytes)}"
            if pause is None and failure and not arrived:
                raise failure
            if pause is None:
                text = (
                    f"The download was interrupted too often: {state} have arrived and are kept.\n"
                    "Check the network and run the command again: it continues from there."
                )
                raise HubError(without_tokens(with_settings(text)))
            _log.warning(
                "The download was interrupted after %s; trying again in %.0f s.", state, pause
            )
            time.sleep(pause)
    checksum = _checksum(part, blob.name)
    if checksum != blob.name:
        part.unlink()
        raise HubError(
            f"{without_tokens(url)} arrived damaged: got checksum {checksum}, "
            f"expected {blob.name}.\n"
            "It was removed. Run the command again."
        )
    os.replace(part, blob)


def _append(url: str, part: Path, start: int, report: Callable[[int], None]) -> None:
    """Append to `part` what one request returns, from byte `start` on."""
    headers = build_hf_headers(library_name=LIBRARY_NAME) | {"accept-encoding": "identity"}
    if start:
        headers["range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        with part.open("ab") as file:
            if response.status_code != 206:  # the whole file: the server ignored the range
                file.truncate(0)
            for piece in response.iter_raw():
                file.write(piece)
                report(file.tell())


def _checksum(part: Path, expected: str) -> str:
    """The checksum of the same kind as `expected`.

    SHA-256 for large files, git's SHA-1 of a blob for the others.
    """
    with part.open("rb") as file:
        os.fsync(file.fileno())
        if len(expected) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        header = hashlib.sha1(b"blob %d\0" % _size(part))
        return hashlib.file_digest(file, header.copy).hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a file system without links, such as exFAT
        os.replace(blob, pointer)
