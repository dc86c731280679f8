"""Pull and push against a local Hub server; the cache is compared with the library's own."""

import contextlib
import errno
import hashlib
import json
import logging
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from hub_server import READ_TOKEN, TOKEN, USER, HubServer, point_library_at
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download

from interviewmate_mlx.data.records import split_files
from interviewmate_mlx.errors import HubError, StorageError
from interviewmate_mlx.hub import cache as hub_cache
from interviewmate_mlx.hub.names import fetch_data, is_data_path, is_hub_data
from interviewmate_mlx.hub.pull import PulledFolder, pull, pull_dataset
from interviewmate_mlx.hub.push import push

# The library's own warning, where it uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FALCON = "tiiuae/falcon-rw-1b"
NEEDED = {
    "README.md",  # names the licence
    "config.json",
    "generation_config.json",
    "merges.txt",
    "pytorch_model.bin",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}
NOT_NEEDED = {".gitattributes", "configuration_falcon.py", "modeling_falcon.py"}
ADAPTER = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "run.toml",
    "metrics.jsonl",
    "summary.json",
}
FILES = sorted(ADAPTER)
WEIGHTS = random.Random(0).randbytes(300_000)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a folder of files: names to bytes, or names whose content does not matter."""

    def write_folder(name: str, *names: str, **files: bytes) -> Path:
        folder = tmp_path / name
        for file in names:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.get(path.stem, f"{name}: {file}\n".encode()))
        return folder

    return write_folder


@pytest.fixture
def falcon(write: Write) -> Path:
    """The files of falcon-rw-1b's main, weights of 300 kB."""
    return write("falcon", *NEEDED, *NOT_NEEDED, pytorch_model=WEIGHTS)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., HubServer]]:
    """Start a Hub server for this process, with an empty cache and no pauses between attempts."""
    monkeypatch.setattr(hub_cache, "_PAUSES_S", (0.0, 0.0))
    with contextlib.ExitStack() as stack:

        def start(*args: object, **options: object) -> HubServer:
            hub = stack.enter_context(HubServer(*args, **options))  # type: ignore[arg-type]
            hub.isolate(monkeypatch, tmp_path / "home")
            return hub

        yield start


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weight_requests(hub: HubServer) -> list[str | None]:
    """The Range headers of the requests for the bytes of large files, in order."""
    return [request.range for request in hub.requests if request.storage]


# what is pulled


def test_pull_fetches_what_a_conversion_needs_of_falcon_rw_and_no_code(serve, falcon):
    hub = serve({FALCON: falcon})
    pulled = pull(FALCON)
    assert names_in(pulled.path) == NEEDED
    for name in NEEDED:
        assert (pulled.path / name).read_bytes() == (falcon / name).read_bytes()
    assert pulled == PulledFolder(pulled.path, hub.repos[FALCON].sha("main"))
    assert not [line for line in hub.lines() if any(name in line for name in NOT_NEEDED)]


def test_pull_prefers_safetensors_and_takes_no_second_set_of_weights(serve, write):
    weights = ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
    others = ("model.onnx", "coreml/model.mlpackage", "onnx/model.safetensors", "rust_model.ot")
    hub = serve({FALCON: write("repo", "config.json", "tokenizer.json", *weights, *others)})
    pulled = pull(FALCON)
    assert names_in(pulled.path) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert len(weight_requests(hub)) == 1


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_pull_takes_the_shards_that_the_index_names_and_no_others(serve, write, stem, suffix):
    shards = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    index = f"{stem}.{suffix}.index.json"
    folder = write("repo", "config.json", *shards, f"{stem}-00001-of-00009.{suffix}")
    weight_map = {"a": shards[1], "b": shards[0], "c": shards[1]}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    serve({FALCON: folder})
    assert names_in(pull(FALCON).path) == {"config.json", index, *shards}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "gone.bin"}}', "gone.bin: missing"),
        ('{"weight_map": {"a": "sub/x.bin"}}', "sub/x.bin: lies in a folder"),
        ('{"weight_map": [1]}', "it is not an index"),
        ("not JSON", "it is not an index"),
    ],
)
def test_pull_refuses_a_wrong_index(serve, write, index, said):
    folder = write("repo", "config.json", "sub/x.bin")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    serve({FALCON: folder})
    with pytest.raises(HubError, match=f"(?s)pytorch_model.bin.index.json of {FALCON}.*{said}"):
        pull(FALCON)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "tf_model.h5"], r"no weights that can be read.*pytorch_model\.bin"),
        (["adapter_config.json", "adapter_model.safetensors"], "is not a model.*It is an adapter"),
        (["pytorch_model.bin"], "is not a model: it has no config.json"),
    ],
)
def test_pull_refuses_a_repository_without_a_model_before_it_fetches(serve, write, files, said):
    hub = serve({FALCON: write("repo", *files)})
    with pytest.raises(HubError, match=f"(?s){said}"):
        pull(FALCON)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("revision", ["refs/pr/7", "v1.0", "commit", "short commit"])
def test_pull_takes_the_revision_it_is_asked_for(serve, falcon, write, revision):
    branch = revision if "commit" not in revision else "other"
    other = write("other", "config.json", "model.safetensors")
    hub = serve({FALCON: falcon, f"{FALCON}@{branch}": other})
    commit = hub.repos[FALCON].sha(branch)
    asked = {"commit": commit, "short commit": commit[:9]}.get(revision, revision)
    pulled = pull(FALCON, asked)
    assert names_in(pulled.path) == {"config.json", "model.safetensors"}
    assert pulled.revision == commit


# the cache


def test_a_second_pull_asks_once_and_downloads_nothing(serve, falcon):
    hub = serve({FALCON: falcon})
    first = pull(FALCON)
    hub.requests.clear()
    calls = []
    assert pull(FALCON, progress=lambda *numbers: calls.append(numbers)) == first
    assert hub.lines() == [f"GET /api/models/{FALCON}/revision/main"]
    assert calls == []


def test_a_pull_after_a_new_commit_fetches_only_what_changed(serve, falcon):
    hub = serve({FALCON: falcon})
    first = pull(FALCON)
    hub.requests.clear()
    config = hub.repos[FALCON].revisions["main"]["config.json"]
    hub.repos[FALCON].revisions["main"] |= {"config.json": type(config)(config.name, b"{}")}
    second = pull(FALCON)
    assert second.revision != first.revision
    assert (second.path / "config.json").read_bytes() == b"{}"
    assert (second.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert hub.lines("resolve") == [f"GET /{FALCON}/resolve/{second.revision}/config.json"]


def test_the_library_finds_in_its_cache_what_pull_put_there(serve, falcon):
    hub = serve({FALCON: falcon})
    pulled = pull(FALCON)
    hub.requests.clear()
    found = snapshot_download(FALCON, local_files_only=True)
    assert Path(found) == pulled.path
    found = hf_hub_download(FALCON, "pytorch_model.bin", revision=pulled.revision)
    assert Path(found).read_bytes() == WEIGHTS
    assert hub.requests == []
    (repo,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert repo.repo_id == FALCON
    assert repo.size_on_disk == sum((falcon / name).stat().st_size for name in NEEDED)
    assert {file.file_name for revision in repo.revisions for file in revision.files} == NEEDED


def test_pull_finds_in_the_cache_what_the_library_put_there(serve, falcon):
    hub = serve({FALCON: falcon})
    folder = snapshot_download(FALCON)
    hub.requests.clear()
    assert pull(FALCON).path == Path(folder)
    assert len(hub.requests) == 1


def test_a_disk_without_links_gets_the_files_themselves(serve, falcon, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    serve({FALCON: falcon})
    monkeypatch.setattr(Path, "symlink_to", no_links)
    pulled = pull(FALCON)
    assert names_in(pulled.path) == NEEDED
    assert pull(FALCON) == pulled


def test_progress_counts_every_downloaded_byte_and_ends_at_the_total(serve, falcon, capfd):
    serve({FALCON: falcon})
    calls = []
    pull(FALCON, progress=lambda *numbers: calls.append(numbers))
    total = sum((falcon / name).stat().st_size for name in NEEDED)
    assert {whole for _, whole in calls} == {total}
    assert [arrived for arrived, _ in calls] == sorted(arrived for arrived, _ in calls)
    assert calls[-1] == (total, total)
    assert len(calls) > len(NEEDED)
    assert capfd.readouterr() == ("", "")


def test_an_empty_file_is_pulled_and_retried_like_others(serve, write):
    hub = serve(
        {FALCON: write("repo", "config.json", "merges.txt", "model.safetensors", merges=b"")}
    )
    hub.fail(503, "merges.txt", times=3)
    with pytest.raises(HubError, match=r" failed \(503\)"):
        pull(FALCON)
    assert (pull(FALCON).path / "merges.txt").read_bytes() == b""


# interrupted connections


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_an_interrupted_download_resumes_by_range_with_the_right_bytes(serve, falcon, reset):
    hub = serve({FALCON: falcon})
    hub.cut("pytorch_model.bin", after=100_000, reset=reset)
    pulled = pull(FALCON)
    assert weight_requests(hub) == [None, "bytes=100000-"]
    assert (pulled.path / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_download_interrupted_many_times_goes_on_while_each_attempt_fetches_bytes(serve, falcon):
    hub = serve({FALCON: falcon})
    hub.cut("pytorch_model.bin", after=20_000, times=14)
    pulled = pull(FALCON)
    assert len(weight_requests(hub)) == 15
    assert (pulled.path / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_what_arrived_before_a_failed_run_is_kept_for_the_next_one(serve, falcon):
    hub = serve({FALCON: falcon})
    hub.cut("pytorch_model.bin", after=100_000)
    hub.cut("pytorch_model.bin", after=0, times=2)
    with pytest.raises(HubError, match=r"100\.0 kB of 300\.0 kB have arrived and are kept"):
        pull(FALCON)
    assert weight_requests(hub) == [None, "bytes=100000-", "bytes=100000-"]
    hub.requests.clear()
    calls = []
    pulled = pull(FALCON, progress=lambda *numbers: calls.append(numbers))
    assert weight_requests(hub) == ["bytes=100000-"]
    assert calls[0][0] > 100_000
    assert (pulled.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert not list((pulled.path.parents[1] / "blobs").glob("*.incomplete"))


def test_a_killed_download_is_resumed_by_the_next_process(serve, falcon):
    hub = serve({FALCON: falcon})
    script = (
        "import os\n"
        "from interviewmate_mlx.hub.pull import pull\n"
        "def die(arrived, total):\n"
        "    if arrived > 150_000: os._exit(9)\n"
        f"pull({FALCON!r}, progress=die)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    hub.requests.clear()
    pulled = pull(FALCON)
    (asked,) = weight_requests(hub)
    assert asked is not None
    assert int(asked.removeprefix("bytes=").removesuffix("-")) > 0
    assert (pulled.path / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_server_that_ignores_ranges_is_read_from_the_start(serve, falcon):
    hub = serve({FALCON: falcon})
    hub.ignores_ranges = True
    hub.cut("pytorch_model.bin", after=100_000)
    pulled = pull(FALCON)
    assert weight_requests(hub) == [None, "bytes=100000-"]
    assert (pulled.path / "pytorch_model.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json"])
def test_a_file_that_arrives_damaged_is_refused_and_not_kept(serve, falcon, name):
    hub = serve({FALCON: falcon})
    hub.damage(name)
    with pytest.raises(HubError, match=f"{name} arrived damaged: got checksum .*\nIt was removed"):
        pull(FALCON)
    assert (pull(FALCON).path / name).read_bytes() == (falcon / name).read_bytes()


def test_file_that_another_pull_renames_has_no_size(tmp_path, monkeypatch):
    """Between the question whether it is there and that for its size, it may go."""
    part = tmp_path / "blob.incomplete"
    monkeypatch.setattr(type(part), "is_file", lambda _: True)
    assert hub_cache._size(part) == 0
    part.write_bytes(b"four")
    assert hub_cache._size(part) == 4


def test_two_pulls_at_once_fetch_each_file_once(serve, falcon):
    hub = serve({FALCON: falcon})
    folders: list[PulledFolder] = []
    threads = [threading.Thread(target=lambda: folders.append(pull(FALCON))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(weight_requests(hub)) == 1


# access


def test_the_token_reaches_the_hub_and_never_the_storage_of_another_origin(
    serve, falcon, monkeypatch
):
    hub = serve({FALCON: falcon}, private=(FALCON,))
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    pull(FALCON)
    assert {request.authorized for request in hub.requests if not request.storage} == {True}
    assert {request.authorized for request in hub.requests if request.storage} == {False}


def test_a_missing_or_private_model_says_how_to_log_in(serve, falcon):
    serve({FALCON: falcon}, private=(FALCON,))
    for name in (FALCON, "tiiuae/no-such-model"):
        with pytest.raises(HubError) as caught:
            pull(name)
        assert str(caught.value) == (
            f"There is no public model {name} (401).\n"
            "Check the spelling; if it is private, run `hf auth login`, or set HF_TOKEN."
        )


def test_a_missing_model_for_a_user_says_that_the_token_may_have_no_access(serve, monkeypatch):
    serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError) as caught:
        pull(FALCON)
    assert str(caught.value) == (
        f"There is no model {FALCON}, or your token has no access to it (404).\nCheck the spelling."
    )


def test_a_refused_token_is_reported_as_refused(serve, falcon, monkeypatch):
    hub = serve({FALCON: falcon})
    monkeypatch.setenv("HF_TOKEN", "hf_OutOfDate0123456789")
    with pytest.raises(HubError) as caught:
        pull(FALCON)
    assert str(caught.value) == (
        "The Hub refuses your token (401): it is mistyped, expired or revoked.\n"
        f"Create one at {hub.endpoint}/settings/tokens and run `hf auth login`, or set HF_TOKEN."
    )


@pytest.mark.parametrize("token", [None, TOKEN], ids=["nobody", "user"])
def test_a_gated_model_says_where_to_ask(serve, falcon, monkeypatch, token):
    hub = serve({FALCON: falcon}, gated=(FALCON,))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        pull(FALCON)
    then = "" if token else ", then run `hf auth login`, or set HF_TOKEN"
    assert str(caught.value) == (
        f"The model {FALCON} is gated: its owners must give access.\n"
        f"Ask for it at {hub.endpoint}/{FALCON}{then}."
    )


def test_a_missing_revision_is_named(serve, falcon):
    hub = serve({FALCON: falcon})
    with pytest.raises(HubError) as caught:
        pull(FALCON, "refs/pr/99")
    assert str(caught.value) == (
        f"The model {FALCON} has no revision 'refs/pr/99'.\n"
        f"Choose one of those at {hub.endpoint}/{FALCON}/tree/main."
    )


@pytest.mark.parametrize("name", ["a/b/c", "no spaces/here", "..", "a" * 97, "x/.git"])
def test_an_impossible_name_is_refused_without_a_request(serve, name):
    hub = serve()
    with pytest.raises(HubError, match="cannot be a name on the Hub: expected owner/name"):
        pull(name)
    assert hub.requests == []


# when something fails


@pytest.mark.parametrize("path", ["/api/models", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, r"Your token has no permission to read the model .* \(403\)"),
        (404, r"There is no public model .* \(404\)"),
        (429, r"too many requests from here \(429\)"),
        (500, r"The Hub at 127.0.0.1 failed \(500\)"),
        (503, r"The Hub at 127.0.0.1 failed \(503\)"),
        (418, r"127.0.0.1 rejects the request for the model .* \(418\): Short and stout"),
    ],
)
def test_a_refusing_response_is_reported_at_once(serve, falcon, path, status, said):
    hub = serve({FALCON: falcon})
    hub.fail(status, path, message="Short and stout")
    with pytest.raises(HubError, match=said):
        pull(FALCON)
    is_retried = path == "/resolve/" and (status == 429 or status >= 500)
    assert len(hub.lines(path)) == (3 if is_retried else 1)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, r"rejects the request for the model .* \(403\): Signature expired"),
        (500, r"failed \(500\)"),
    ],
)
def test_a_storage_that_refuses_is_not_reported_as_a_token_problem(serve, falcon, status, said):
    hub = serve({FALCON: falcon})
    hub.fail(status, "GET /storage/", message="Signature expired")
    with pytest.raises(HubError, match=f"^127.0.0.1 {said}|^The Hub at 127.0.0.1 {said}"):
        pull(FALCON)


def test_a_hub_that_fails_briefly_does_not_stop_a_download(serve, falcon):
    hub = serve({FALCON: falcon})
    hub.fail(503, "GET /storage/", times=2)
    assert names_in(pull(FALCON).path) == NEEDED


def test_a_pull_without_network_says_so_at_once(serve, monkeypatch, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        point_library_at(endpoint, monkeypatch, tmp_path / "home")
        with pytest.raises(HubError) as caught:
            pull(FALCON)
    happened, settings, *advice = str(caught.value).splitlines()
    assert happened == f"Cannot reach {endpoint}."
    assert settings.startswith("Set here: ")
    assert f"HF_ENDPOINT={endpoint}" in settings
    assert advice[0] == "Check the network and its settings, and run the command again."
    assert "mini" in advice[1]  # what works without it


def test_a_hub_that_never_answers_is_given_up(serve, monkeypatch, tmp_path):
    monkeypatch.setattr("interviewmate_mlx.hub.pull.REQUEST_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_library_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch, tmp_path)
        with pytest.raises(HubError, match=r"does not answer\.\nSet here: .*\nCheck the network"):
            pull(FALCON)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("huggingface.co", "HF_ENDPOINT is not an address"),
        ("http://[::1", "HF_ENDPOINT is not an address"),
    ],
)
def test_an_endpoint_that_is_not_an_address_is_named(monkeypatch, tmp_path, endpoint, said):
    point_library_at(endpoint, monkeypatch, tmp_path)
    with pytest.raises(HubError, match=said):
        pull(FALCON)


def test_a_page_that_is_not_a_hub_is_reported_as_such(serve, falcon, monkeypatch):
    hub = serve({FALCON: falcon})
    portal = httpx2.Response(200, html="<p>Log in", request=httpx2.Request("GET", hub.endpoint))
    monkeypatch.setattr(httpx2.Client, "get", lambda *_, **__: portal)
    with pytest.raises(HubError, match="answers, but not like a Hub"):
        pull(FALCON)


def test_a_hub_without_checksums_is_not_trusted(serve, falcon):
    hub = serve({FALCON: falcon})
    hub.hides_checksums = True
    with pytest.raises(
        HubError, match=r"gives no checksum of config\.json.*\nSet here: .*\nCheck HF_ENDPOINT"
    ):
        pull(FALCON)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(serve, falcon, monkeypatch):
    hub = serve({FALCON: falcon})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 200_000))
    with pytest.raises(StorageError, match=r"200\.0 kB are free, expected 300\.\d kB.\n.*HF_HOME"):
        pull(FALCON)
    assert len(hub.requests) == 1


def test_a_kept_partial_download_needs_no_disk_space_again(serve, falcon, monkeypatch):
    hub = serve({FALCON: falcon})
    hub.cut("pytorch_model.bin", after=250_000)
    hub.cut("pytorch_model.bin", after=0, times=2)
    with pytest.raises(HubError, match="and are kept"):
        pull(FALCON)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 50_000))
    assert names_in(pull(FALCON).path) == NEEDED


def test_a_disk_that_fills_up_keeps_what_has_arrived(serve, falcon, monkeypatch):
    serve({FALCON: falcon})
    append = hub_cache._append

    def append_then_fill(url: str, part: Path, *rest: object) -> None:
        append(url, part, *rest)  # type: ignore[arg-type]
        if "pytorch_model" in url:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_cache, "_append", append_then_fill)
    with pytest.raises(HubError, match=r"is full\. What has arrived is kept"):
        pull(FALCON)
    monkeypatch.setattr(hub_cache, "_append", append)
    assert names_in(pull(FALCON).path) == NEEDED


def test_a_cache_that_cannot_be_written_is_named(serve, falcon, tmp_path):
    serve({FALCON: falcon})
    (tmp_path / "home").write_text("a file")
    with pytest.raises(HubError, match=r"home.*: Not a directory\.\nCheck its permissions, or"):
        pull(FALCON)


# without the Hub


@pytest.mark.parametrize("down", [True, False], ids=["no network", "failing"])
def test_a_pulled_model_is_used_without_the_hub_with_a_warning(serve, falcon, caplog, down):
    hub = serve({FALCON: falcon})
    pulled = pull(FALCON)
    if down:
        hub.__exit__()
    else:
        hub.fail(503, "/api/")
    with caplog.at_level(logging.WARNING):
        assert pull(FALCON) == pulled
    reason = f"Cannot reach {hub.endpoint}." if down else "The Hub at 127.0.0.1 failed (503)."
    assert caplog.messages == [f"{reason}\nUsing commit {pulled.revision[:8]} from the cache."]


def test_a_model_that_is_gone_from_the_hub_is_not_taken_from_the_cache(serve, falcon):
    hub = serve({FALCON: falcon})
    pull(FALCON)
    del hub.repos[FALCON]
    with pytest.raises(HubError, match="There is no public model"):
        pull(FALCON)


def test_offline_a_complete_copy_is_used_by_branch_and_by_commit(serve, falcon, monkeypatch):
    hub = serve({FALCON: falcon})
    pulled = pull(FALCON)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(FALCON) == pull(FALCON, "main") == pull(FALCON, pulled.revision) == pulled
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull(FALCON, "v2")
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["pytorch_model.bin", "config.json"])
def test_offline_an_incomplete_copy_is_not_used(serve, falcon, monkeypatch, missing):
    serve({FALCON: falcon})
    (pull(FALCON).path / missing).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        pull(FALCON)
    assert str(caught.value).startswith(
        f"HF_HUB_OFFLINE is set: cannot reach the model {FALCON}.\n"
        "Unset it to download the files that the cache lacks."
    )


def test_environment_variables_alone_lead_a_new_process_to_hub_and_cache(
    serve, falcon, monkeypatch
):
    hub = serve({FALCON: falcon}, private=(FALCON,))
    script = f"from interviewmate_mlx.hub.pull import pull; print(pull({FALCON!r}).path)"

    def run() -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
        )
        return done.stdout, done.stderr

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path, stderr = run()
    assert names_in(Path(path.strip())) == NEEDED
    assert stderr == ""
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again, stderr = run()
    assert again == path
    assert "HF_HUB_OFFLINE is set" in stderr
    assert "from the cache" in stderr
    assert hub.requests == []


# data sets


@pytest.mark.parametrize("folder", ["", "data/"])
def test_pull_dataset_gives_the_folder_of_its_jsonl_files(serve, write, folder):
    names = ["train.jsonl", "validation.jsonl", "test.json"]
    others = ["README.md", "build.py", "other/train.parquet", "other/test.csv", "all.csv"]
    source = write("set", *(folder + name for name in names), *others)
    serve({"datasets/owner/questions": source})
    pulled = pull_dataset("owner/questions")
    assert names_in(pulled) == set(names)
    assert (pulled / "train.jsonl").read_bytes() == (source / folder / names[0]).read_bytes()
    assert pull_dataset("owner/questions", "main") == pulled


def test_pull_dataset_takes_one_file_a_split(serve, write):
    names = ["train.jsonl", "train.json", "valid.jsonl", "validation.jsonl", "dev.json"]
    serve({"datasets/owner/questions": write("set", *names)})
    assert names_in(pull_dataset("owner/questions")) == {"train.jsonl", "valid.jsonl"}


@pytest.mark.parametrize("files", [["data/questions.parquet"], ["all.jsonl"], ["q.py"]])
def test_pull_dataset_refuses_a_set_without_a_train_file_and_names_what_there_is(
    serve, write, files
):
    serve({"datasets/owner/questions": write("set", *files)})
    with pytest.raises(HubError, match=r"has no train\.jsonl and no train\.json") as caught:
        pull_dataset("owner/questions")
    assert (files[0] in str(caught.value)) == (not files[0].endswith(".py"))
    assert "load_dataset('owner/questions')['train'].to_json('train.jsonl')" in str(caught.value)


PARTS = [f"train-0000{n}-of-00002.parquet" for n in range(2)]


@pytest.mark.parametrize("folder", ["", "data/", "plain_text/"])
def test_pull_dataset_takes_the_parts_of_a_split_as_the_hub_names_them(serve, write, folder):
    names = [*PARTS, "validation-00000-of-00001.parquet", "test-00000-of-00001-0a1b2c.parquet"]
    serve({"datasets/owner/questions": write("set", *(folder + n for n in names), "README.md")})
    assert names_in(pull_dataset("owner/questions")) == set(names)


@pytest.mark.parametrize("files", [PARTS, ["train/0000.parquet", "train/0001.parquet"]])
def test_one_of_several_sets_is_chosen_by_its_folder(serve, write, files):
    names = [f"{folder}/{file}" for folder in ("easy", "hard") for file in files]
    serve({"datasets/owner/questions": write("set", *names)})
    with pytest.raises(HubError) as caught:
        pull_dataset("owner/questions")
    assert str(caught.value) == (
        "owner/questions holds several data sets:\n  easy/\n  hard/\n"
        "Name one of them behind a colon, as in owner/questions:easy"
    )
    for folder in ("easy", "hard"):  # both are in the cache then
        pulled = fetch_data(f"owner/questions:{folder}")
        assert pulled.name == folder
        assert split_files(pulled) == {"train": [pulled / file for file in files]}
    with pytest.raises(HubError, match=r"in its folder odd, but in\n  easy/\n  hard/\nChoose"):
        fetch_data("owner/questions:odd")


def test_the_hubs_own_copy_as_parquet_is_named_and_read(serve, write):
    branch = ["default/train/0000.parquet", "default/validation/0000.parquet"]
    serve(
        {
            "datasets/owner/questions": write("set", "questions.csv"),
            "datasets/owner/questions@refs/convert/parquet": write("branch", *branch),
        }
    )
    with pytest.raises(HubError, match="as Parquet, owner/questions@refs/convert/parquet, choose"):
        fetch_data("owner/questions")
    pulled = fetch_data("owner/questions@refs/convert/parquet")
    assert split_files(pulled) == {
        "train": [pulled / "train/0000.parquet"],
        "valid": [pulled / "validation/0000.parquet"],
    }
    assert fetch_data("owner/questions@refs/convert/parquet:default") == pulled


def test_set_of_the_root_or_of_data_comes_before_others_that_are_not_named(serve, write):
    serve({"datasets/owner/questions": write("set", "data/train.csv", "other/train.csv")})
    assert fetch_data("owner/questions").name == "data"
    assert fetch_data("owner/questions:other").name == "other"


HUB_NAMES = {
    "a/b": True,
    "a/b@main": True,
    "a/b:c": True,
    "a/b@refs/pr/1:c/d": True,
    "a:b": False,
    "./a/b:c": False,
    "a/b/c:d": False,
    "a/rows.csv:x": False,
    "a/b:": False,
    "a/b@:c": False,
    "a/b:c:d": False,
}


@pytest.mark.parametrize(("name", "is_hub"), HUB_NAMES.items())
def test_what_is_a_data_set_on_the_hub(name, is_hub):
    assert is_hub_data(name) == is_hub
    assert is_data_path(name) == (not is_hub)


def test_a_missing_data_set_is_called_a_data_set(serve):
    serve()
    with pytest.raises(HubError, match="There is no public data set owner/questions"):
        pull_dataset("owner/questions")


# pushing


@pytest.fixture
def adapter(write: Write) -> Path:
    others = ("checkpoints/step_10.safetensors", ".run.toml.tmp-ab12/run.toml", ".DS_Store", "x.py")
    folder = write("adapter", *ADAPTER, *others, adapter_model=WEIGHTS)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# An adapter\n")
    return folder


def test_push_creates_the_repository_and_uploads_the_files_of_an_adapter(
    serve, adapter, monkeypatch, capfd
):
    hub = serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(adapter, FILES, f"{USER}/coach") == f"{hub.endpoint}/{USER}/coach"
    assert set(hub.uploaded[f"{USER}/coach"]) == ADAPTER
    for name, content in hub.uploaded[f"{USER}/coach"].items():
        assert content == (adapter / name).read_bytes()
    assert hub.created[f"{USER}/coach"] == {"name": "coach", "organization": USER}
    assert hub.lines("commit") == [f"POST /api/models/{USER}/coach/commit/main"]
    assert capfd.readouterr() == ("", "")


def test_push_tells_the_hub_that_the_repository_is_private(serve, adapter, monkeypatch):
    hub = serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(adapter, FILES, "coach", private=True) == f"{hub.endpoint}/{USER}/coach"
    assert hub.created[f"{USER}/coach"]["visibility"] == "private"
    assert set(hub.uploaded[f"{USER}/coach"]) == ADAPTER


def test_push_to_an_existing_repository_adds_to_it(serve, adapter, write, monkeypatch):
    hub = serve({f"{USER}/coach": write("old", "README.md", "notes.txt")})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(adapter, FILES, f"{USER}/coach")
    push(adapter, FILES, f"{USER}/coach")
    assert set(hub.repos[f"{USER}/coach"].revisions["main"]) == ADAPTER | {"notes.txt"}


def test_a_private_push_to_a_public_repository_uploads_nothing(serve, adapter, write, monkeypatch):
    hub = serve({f"{USER}/coach": write("old", "README.md")})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match=f"{USER}/coach is public, and you asked for private"):
        push(adapter, FILES, f"{USER}/coach", private=True)
    assert hub.uploaded == {}


def test_push_uploads_the_files_it_is_given_and_no_others(serve, adapter, monkeypatch):
    hub = serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(adapter, ["README.md", "x.py"], f"{USER}/coach")
    assert set(hub.uploaded[f"{USER}/coach"]) == {"README.md", "x.py"}


def test_push_without_a_token_says_how_to_log_in(serve, adapter):
    hub = serve()
    with pytest.raises(HubError, match=r"(?s)you are not logged in.*hf auth login.*HF_TOKEN"):
        push(adapter, FILES, f"{USER}/coach")
    assert hub.requests == []


def test_push_offline_says_what_to_unset(serve, adapter, monkeypatch):
    serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*\nUnset it to push\."):
        push(adapter, FILES, f"{USER}/coach")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (READ_TOKEN, rf"has no permission to write to the model {USER}/coach \(403\)"),
        ("hf_OutOfDate0123456789", r"The Hub refuses your token \(401\)"),
    ],
)
def test_push_with_a_token_without_write_permission_says_so(
    serve, adapter, monkeypatch, token, said
):
    hub = serve()
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=said):
        push(adapter, FILES, f"{USER}/coach")
    assert hub.uploaded == {}


@pytest.mark.parametrize(
    ("status", "path", "said"),
    [
        (500, "/api/repos/create", " failed .500."),
        (400, "/commit/", "rejects the request for the model .* .400.: Short and stout"),
        (400, "PUT /storage/", "rejects the request for the model .* .400.: Short and stout"),
    ],
)
def test_a_push_that_the_hub_refuses_is_reported(serve, adapter, monkeypatch, status, path, said):
    hub = serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail(status, path, message="Short and stout")
    with pytest.raises(HubError, match=said):
        push(adapter, FILES, f"{USER}/coach")
    assert hub.uploaded == {}


def test_what_was_pushed_is_pulled_again_with_the_same_bytes(serve, falcon, monkeypatch):
    serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(falcon, sorted(NEEDED), f"{USER}/model")
    pulled = pull(f"{USER}/model")
    weights = (pulled.path / "pytorch_model.bin").read_bytes()
    assert hashlib.sha256(weights).digest() == hashlib.sha256(WEIGHTS).digest()


# secrets


PLANTED = "hf_PlantedSecret0123456789"


@pytest.mark.parametrize("token", [PLANTED, f"{PLANTED}\x01", f"{PLANTED}\u20ac", "plain-secret"])
@pytest.mark.parametrize("fault", ["refused", "echoed", "no network", "gone"])
def test_the_token_shows_in_no_message_and_no_output(
    serve, falcon, adapter, monkeypatch, capfd, caplog, token, fault
):
    hub = serve({FALCON: falcon})
    monkeypatch.setenv("HF_TOKEN", token)
    if fault == "echoed":
        hub.fail(418, "/api/", message=f"Not {ascii(token)[1:-1]}, nor {PLANTED}")
    if fault == "gone":
        hub.fail(404, "/", code="RepoNotFound")
    if fault == "no network":
        hub.__exit__()
    shown = []
    with caplog.at_level(logging.INFO):
        for act in (lambda: pull(FALCON), lambda: push(adapter, FILES, f"{USER}/coach")):
            with pytest.raises(HubError) as caught:
                act()
            shown += traceback.format_exception(caught.value)
    shown += [*capfd.readouterr(), caplog.text]
    assert not [text for text in shown if "Planted" in text or "plain-secret" in text]


def test_no_bar_and_no_log_line_of_the_library_reaches_the_output(
    serve, falcon, adapter, monkeypatch, capfd, caplog
):
    hub = serve({FALCON: falcon})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail(503, "POST /api/models", times=1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    pull(FALCON)
    push(adapter, FILES, f"{USER}/coach")
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []
