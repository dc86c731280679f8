"""Uploads a folder to the Hugging Face Hub, in one commit."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from interviewmate_mlx.errors import HubError
from interviewmate_mlx.hub.cache import LIBRARY_NAME
from interviewmate_mlx.hub.errors import as_hub_error, without_tokens
from interviewmate_mlx.hub.pull import REQUEST_TIMEOUT_S


def push(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    *,
    private: bool = False,
    what: str = "an adapter trained",
) -> str:
    """Upload files of a folder in one commit; return the repository's address.

    The repository is created if it does not exist.

    Args:
        folder: the folder with the files.
        names: the files' names, in the folder and on the Hub.
        repo_id: "name" or "owner/name".
        what: is uploaded, for the commit's message.
        private: make a new repository private; refuse an existing public one.

    Raises:
        HubError: the Hub or the network failed, or nobody is logged in.
    """
    with as_hub_error("model", repo_id, writes=True):
        token = get_token()
    if token is None:
        raise HubError(
            f"Cannot push to {repo_id}: you are not logged in to the Hub.\n"
            "Run `hf auth login`, or set HF_TOKEN to a token with write permission."
        )
    api = HfApi(library_name=LIBRARY_NAME)
    with as_hub_error("model", repo_id, writes=True):
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo.repo_id, timeout=REQUEST_TIMEOUT_S) if private else None
    address = without_tokens(str(repo.url))
    if info and not info.private:
        raise HubError(
            f"Nothing was pushed: {repo.repo_id} is public, and you asked for private.\n"
            f"Make it private at {address}/settings, or choose another name."
        )
    with as_hub_error("model", repo_id, writes=True):
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        api.create_commit(
            repo.repo_id,
            additions,
            commit_message=f"Upload {what} with InterviewMate",
        )
    return address
