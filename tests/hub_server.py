"""A small Hugging Face Hub on loopback, for tests that pull and push.

It answers what huggingface_hub asks for as the Hub does: the error codes in
headers, large files redirected to a storage of another origin, uploads by LFS.
Xet is not offered. Tests look at what arrived (`requests`, `created`,
`uploaded`) and order faults (`fail`, `cut`, `damage`).

The routes: huggingface_hub 2.4, hf_api.py, file_download.py, _commit_api.py, lfs.py.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session

TOKEN = "hf_AllowedToReadAndWrite0123456789"
READ_TOKEN = "hf_AllowedToReadOnly0123456789"
USER = "tester"
LARGE = (".bin", ".safetensors", ".h5", ".msgpack", ".onnx", ".parquet")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """A request that arrived. `storage` is true at the origin that holds the large files."""

    method: str
    path: str
    range: str | None
    authorized: bool
    storage: bool


@dataclass(frozen=True)
class File:
    """A file of a repo, in memory or on disk."""

    name: str
    source: bytes | Path

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def blob_id(self) -> str:
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    @property
    def large(self) -> bool:
        return self.name.endswith(LARGE)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size if stop is None else stop
        if isinstance(self.source, bytes):
            yield self.source[start:stop]
            return
        with self.source.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
                start += len(chunk)
                yield chunk

    def _digest(self, digest: Any) -> str:
        for chunk in self.chunks():
            digest.update(chunk)
        return str(digest.hexdigest())


@dataclass
class Repo:
    """A repo's files by revision; `main` is there once something was put in."""

    private: bool = False
    gated: bool = False
    revisions: dict[str, dict[str, File]] = field(default_factory=dict)

    def sha(self, revision: str) -> str:
        listing = [(name, file.etag) for name, file in sorted(self.revisions[revision].items())]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch that a branch name, a commit or the first letters of one stand for."""
        if revision in self.revisions:
            return revision
        commits = {self.sha(name): name for name in self.revisions}
        found = [
            name for c, name in commits.items() if len(revision) > 6 and c.startswith(revision)
        ]
        return found[0] if found else None


@dataclass
class Fault:
    match: str
    times: float
    status: int = 0
    code: str = ""
    message: str = ""
    after: int = 0
    reset: bool = False

    def strikes(self, line: str) -> bool:
        if self.times <= 0 or self.match not in line:
            return False
        self.times -= 1
        return True


class HubServer:
    """A Hub that runs while the `with` block does.

    Args:
        repos: folders by id: "owner/name", "datasets/owner/name", and with a revision
            "owner/name@refs/pr/7"; without one it is main.
        private, gated: ids that want TOKEN, or that no token opens.
    """

    def __init__(
        self,
        repos: Mapping[str, Path] | None = None,
        *,
        private: tuple[str, ...] = (),
        gated: tuple[str, ...] = (),
    ) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.created: dict[str, dict[str, Any]] = {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, File] = {}
        self.ignores_ranges = False
        self.hides_checksums = False
        self._failures: list[Fault] = []
        self._cuts: list[Fault] = []
        self._damages: list[Fault] = []
        for key, folder in (repos or {}).items():
            repo_id, _, revision = key.partition("@")
            files = [
                File(path.relative_to(folder).as_posix(), path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            repo = self.repos.setdefault(repo_id, Repo(repo_id in private, repo_id in gated))
            repo.revisions[revision or "main"] = {file.name: file for file in files}
            self.objects |= {file.sha256: file for file in files if file.large}

    def __enter__(self) -> "HubServer":
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self  # type: ignore[attr-defined]
            server.is_storage = server is self._servers[1]  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        close_session()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def isolate(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Point huggingface_hub of this process, and of its children, at this Hub and at `home`.

        The library reads its environment when it is imported, so both are set.
        """
        point_library_at(self.endpoint, monkeypatch, home)

    def fail(
        self, status: int, match: str, *, times: float = 1e9, code: str = "", message: str = ""
    ) -> None:
        """Answer `status` where `match` is a part of "METHOD /path"."""
        self._failures.append(Fault(match, times, status, code, message))

    def cut(self, name: str, after: int, *, times: float = 1, reset: bool = False) -> None:
        """End the connection once `after` bytes of the file `name` are sent."""
        self._cuts.append(Fault(name, times, after=after, reset=reset))

    def damage(self, name: str, *, times: float = 1) -> None:
        """Send the file `name` with its first byte changed."""
        self._damages.append(Fault(name, times))

    def lines(self, match: str = "") -> list[str]:
        """The requests so far as "METHOD /path", those that hold `match`."""
        lines = [f"{request.method} {request.path}" for request in self.requests]
        return [line for line in lines if match in line]

    def commit(self, key: str, files: dict[str, File]) -> str:
        repo = self.repos[key]
        repo.revisions["main"] = repo.revisions.get("main", {}) | files
        contents = {name: b"".join(file.chunks()) for name, file in files.items()}
        self.uploaded.setdefault(key, {}).update(contents)
        return repo.sha("main")


def point_library_at(endpoint: str, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Give huggingface_hub an endpoint, an empty home, no token, no Xet, and no word to others."""
    close_session()
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    for name, value in {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name, setting in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", setting)


REPO = r"(?P<prefix>(?:datasets/)?)(?P<id>[^/]+(?:/[^/]+)?)"
API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+(?:/[^/]+)?)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"{API}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<rev>[^/]+)", "commit"),
    ("GET", rf"{API}/tree/(?P<rev>[^/]+)", "tree"),
    ("GET", rf"{API}/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"{API}", "info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("GET|HEAD", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<name>.+)", "resolve"),
]
STORAGE_ROUTES = [
    ("GET|HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", "stored"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
]


class _RefusalError(Exception):
    """An answer other than 2xx or 3xx: status, the Hub's code for it, and a message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 10

    def handle_any(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        storage: bool = self.server.is_storage  # type: ignore[attr-defined]
        self.hub, path = hub, urlsplit(self.path).path
        authorization = self.headers.get("Authorization")
        line = f"{self.command} {path}"
        self.token = (authorization or "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(
            Request(self.command, path, self.headers.get("Range"), bool(authorization), storage)
        )
        try:
            for fault in hub._failures:
                if fault.strikes(line):
                    raise _RefusalError(fault.status, fault.code, fault.message or "Fault by order")
            for methods, pattern, name in STORAGE_ROUTES if storage else ROUTES:
                if self.command in methods.split("|") and (found := re.fullmatch(pattern, path)):
                    groups = {key: unquote(value) for key, value in found.groupdict().items()}
                    getattr(self, f"answer_{name}")(**groups)
                    return
            raise _RefusalError(404, "", f"No such page: {line}")
        except _RefusalError as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send({"error": message}, status, {k: v for k, v in headers.items() if v})
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def send(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    # who may do what

    def find_repo(self, key: str, *, files: bool = False) -> Repo:
        """The repo, if this request may see it. Only users are told that there is none."""
        if self.token and self.token not in (TOKEN, READ_TOKEN):
            raise _RefusalError(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(key)
        if repo is None or (repo.private and not self.token):
            if not self.token:
                raise _RefusalError(401, "", "Invalid username or password.")
            raise _RefusalError(404, "RepoNotFound", "Repository not found")
        if files and repo.gated:
            status = 403 if self.token else 401
            raise _RefusalError(status, "GatedRepo", f"Access to {key} is restricted.")
        return repo

    def find_branch(self, repo: Repo, revision: str) -> str:
        branch = repo.find(revision)
        if branch is None:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return branch

    def want_writer(self) -> None:
        if self.token == READ_TOKEN:
            raise _RefusalError(403, "", "You don't have the rights to write here")
        if self.token != TOKEN:
            raise _RefusalError(401, "", "Invalid credentials in Authorization header")

    # reading

    def answer_whoami(self) -> None:
        if self.token not in (TOKEN, READ_TOKEN):
            raise _RefusalError(401, "", "Invalid credentials in Authorization header")
        self.send({"type": "user", "name": USER, "orgs": []})

    def answer_info(self, kind: str, id: str, rev: str = "main") -> None:
        repo = self.find_repo(id if kind == "models" else f"datasets/{id}")
        branch = self.find_branch(repo, rev)
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for file in repo.revisions[branch].values():
            sibling: dict[str, Any] = {"rfilename": file.name}
            if blobs and not self.hub.hides_checksums:
                sibling |= {"size": file.size, "blobId": file.blob_id}
                if file.large:
                    sibling["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": 134}
            siblings.append(sibling)
        self.send(
            {
                "id": id,
                "sha": repo.sha(branch),
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "siblings": siblings,
            }
        )

    def answer_tree(self, kind: str, id: str, rev: str) -> None:
        repo = self.find_repo(id if kind == "models" else f"datasets/{id}")
        entries = []
        for file in repo.revisions[self.find_branch(repo, rev)].values():
            entry = {"type": "file", "path": file.name, "size": file.size, "oid": file.blob_id}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        self.send(entries)

    def answer_resolve(self, prefix: str, id: str, rev: str, name: str) -> None:
        repo = self.find_repo(prefix + id, files=True)
        branch = self.find_branch(repo, rev)
        commit = {"X-Repo-Commit": repo.sha(branch)}
        file = repo.revisions[branch].get(name)
        if file is None:
            raise _RefusalError(404, "EntryNotFound", f"Entry not found: {name}")
        if not file.large:
            self.send_file(file, commit)
            return
        location = f"{self.hub.storage}/storage/{file.sha256}?name={name}&signature=0"
        linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        self.send({}, 302, commit | linked | {"Location": location})

    def answer_stored(self, oid: str) -> None:
        self.send_file(self.hub.objects[oid], {})

    def send_file(self, file: File, headers: Mapping[str, str]) -> None:
        ranges = "" if self.hub.ignores_ranges else self.headers.get("Range", "")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ranges)
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else file.size
        if asked and start >= file.size:
            raise _RefusalError(416, "", "Range Not Satisfiable")
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{file.size}")
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, start, stop)

    def send_body(self, file: File, start: int, stop: int) -> None:
        cut = next((fault for fault in self.hub._cuts if fault.strikes(file.name)), None)
        damaged = any(fault.strikes(file.name) for fault in self.hub._damages)
        for chunk in file.chunks(start, min(stop, start + cut.after) if cut else stop):
            self.wfile.write(bytes([chunk[0] ^ 1]) + chunk[1:] if damaged else chunk)
            damaged = False
        if cut:
            self.wfile.flush()
            if cut.reset:
                time.sleep(0.2)  # a reset takes away what the other side has not read
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()  # the socket closes once nothing reads from it
                self.connection.close()
            self.close_connection = True

    # writing

    def answer_create(self) -> None:
        self.want_writer()
        asked = json.loads(self.body)
        id = f"{asked['organization'] or USER}/{asked['name']}"
        key = f"datasets/{id}" if asked.get("type") == "dataset" else id
        url = {"url": f"{self.hub.endpoint}/{key}"}
        if key in self.hub.repos:
            self.send(url | {"error": "You already created this repo"}, 409)
            return
        self.hub.created[key] = asked
        private = asked.get("visibility") == "private"
        self.hub.repos[key] = Repo(private, revisions={"main": {}})
        self.send(url)

    def answer_validate(self) -> None:
        self.send({"errors": [], "warnings": []})

    def answer_preupload(self, kind: str, id: str, rev: str) -> None:
        self.want_writer()
        repo = self.find_repo(id if kind == "models" else f"datasets/{id}")
        there = repo.revisions[self.find_branch(repo, rev)]
        files = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
            oid = there[asked["path"]].etag if asked["path"] in there else None
            files.append(asked | {"uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": files})

    def answer_lfs_batch(self, prefix: str, id: str) -> None:
        self.want_writer()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.hub.storage}/storage/{asked['oid']}?signature=0"
            actions = {"actions": {"upload": {"href": href}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else actions))
        self.send({"transfer": "basic", "objects": objects})

    def answer_store(self, oid: str) -> None:
        file = File("upload.bin", self.body)
        if file.sha256 != oid:
            raise _RefusalError(400, "", "The bytes are not those of the object id")
        self.hub.objects[oid] = file
        self.send({})

    def answer_commit(self, kind: str, id: str, rev: str) -> None:
        self.want_writer()
        key = id if kind == "models" else f"datasets/{id}"
        self.find_repo(key)
        files = {}
        for row in map(json.loads, self.body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                content: bytes | Path = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]].source
            else:
                continue
            files[value["path"]] = File(value["path"], content)
        sha = self.hub.commit(key, files)
        url = f"{self.hub.endpoint}/{key}/commit/{sha}"
        self.send({"success": True, "commitOid": sha, "commitUrl": url})
