"""A hub of one's own on the loopback interface: what `huggingface_hub` 2.4 asks for, kept in memory.

`create_repo`, `upload_folder`, `from_pretrained("user/model", revision=…)`, `load_dataset("user/pairs", config, split)`
and streaming from it work unmodified in a process of `HubServer.run` or with its `environment(...)`: `HF_ENDPOINT`
is read when `huggingface_hub` is imported, so a test cannot point its own process here.

    with HubServer() as hub:
        hub.add_dataset("user/pairs", {"math/train.jsonl": b"..."})
        hub.run(script, cache=tmp_path / "cache")
        assert hub.files("user/trained")["config.json"]

Uploads take the paths of the real hub: small text goes into the commit itself, weights through git-LFS (the server
refuses bytes that are not those of their sha256); xet is switched off. Writing needs a token that the hub knows, and
so does reading what is private. Each request is kept, so that a test can look for a token where none may be.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.environment import without_rendezvous
from tests.hub_repo import Commit, HubError, Repo, paths_info, read_folder, tree, upload_modes

REPOSITORY = Path(__file__).resolve().parent.parent
USER = "user"
# The shape of a real token, so that what redacts by shape is tested too.
TOKEN = "hf_TestsOwnTokenThatNobodyElseHas00"
DATE = "2026-01-01T00:00:00.000Z"
HOLD_SECONDS = 240.0  # of a commit that a test holds back: one that never lets go fails, and does not hang


@dataclass(frozen=True)
class Request:
    """What came in; `token` is that of the Authorization header."""

    method: str
    path: str
    token: str | None
    body: bytes


class HubServer:
    """The server, in a thread of the test's process. Use as a context manager.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        requests: all requests so far.
        refuse_writes: answer uploads and new repositories with 403, as for a token that may only read.
        is_down: close every connection without an answer.
        commits_pass: while this event is cleared, commits wait (a hub that hangs).

    A process that the test has started turns the same switches by `POST /switch/<refuse|down|hold>/<on|off>`.
    """

    def __init__(self, *, user: str = USER, token: str = TOKEN) -> None:
        self.users = {token: user}
        self.requests: list[Request] = []
        self.refuse_writes = False
        self.is_down = False
        self.commits_pass = threading.Event()
        self.commits_pass.set()
        self._repos: dict[tuple[str, str], Repo] = {}
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.commits_pass.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, *, cache: Path) -> dict[str, str]:
        """The environment of a process for which this is the hub.

        Args:
            cache: folder for all that it downloads, and for its token file.
        """
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
        }
        inherited = {
            name: value for name, value in without_rendezvous().items() if not name.startswith("HF_")
        }
        return inherited | ours | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def run(self, script: str, *words: object, cache: Path) -> subprocess.CompletedProcess[str]:
        """Run a Python script in the repository, in a process for which this is the hub; the caller judges its status.

        Args:
            script: its text.
            words: its arguments.
            cache: as in `environment`.
        """
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, words)],
            cwd=REPOSITORY,
            env=self.environment(cache=cache),
            capture_output=True,
            text=True,
            check=False,
        )

    # ------------------------------------------------------------------ what a test puts in and looks at

    def add_model(self, name: str, folder: str | Path, *, revision: str = "main") -> Commit:
        """Put a folder's files on a branch (made if new) of a model repository; returns the commit."""
        return self._add("model", name, read_folder(Path(folder)), revision)

    def add_dataset(self, name: str, files: Mapping[str, bytes], *, revision: str = "main") -> Commit:
        """Put files on a branch (made if new) of a dataset repository; a README.md with `configs` names them."""
        return self._add("dataset", name, files, revision)

    def repo(self, name: str, *, kind: str = "model") -> Repo:
        """A repository.

        Raises:
            HubError: there is none.
        """
        with self._lock:
            if (kind, name) not in self._repos:
                raise HubError(404, "Repository not found", code="RepoNotFound")
            return self._repos[kind, name]

    def files(self, name: str, *, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by their paths."""
        return dict(self.repo(name, kind=kind).commit_of(revision).files)

    def messages(self, name: str, *, kind: str = "model", revision: str = "main") -> list[str]:
        """The messages of a branch's commits, oldest first, less the hub's own first one."""
        return [commit.message for commit in self.repo(name, kind=kind).branches[revision][1:]]

    def _add(self, kind: str, name: str, files: Mapping[str, bytes], revision: str) -> Commit:
        repo = self._created(kind, name, private=False)
        repo.branches.setdefault(revision, repo.branches["main"][:1])
        return repo.commit(revision, files, message="put there by a test")

    def _created(self, kind: str, name: str, *, private: bool) -> Repo:
        with self._lock:
            return self._repos.setdefault((kind, name), Repo(kind, name, private))

    # ------------------------------------------------------------------ what a client asks

    def answer(self, request: Request) -> Any:
        """The JSON of an answer, or `(oid, bytes)` of a file with its commit.

        Raises:
            HubError: the answer is an error.
        """
        url = urlsplit(request.path)
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        if words[0] == "api":
            return self._api(request, words[1:], parse_qs(url.query))
        if words[0] == "switch":
            return self._switch(words[1], on=words[2] == "on")
        if words[0] == "lfs":
            return self._lfs_object(request, words[1])
        if words[-3:] == ["lfs", "objects", "batch"]:
            return self._lfs_batch(request)
        kind = "dataset" if words[0] == "datasets" else "model"
        name, words = _take_name(words[1:] if kind == "dataset" else words)
        if words[:1] == ["resolve"] and request.method in ("GET", "HEAD"):
            commit = self._readable(request, kind, name).commit_of(words[1])
            path = "/".join(words[2:])
            if path not in commit.files:
                raise HubError(404, f"Entry not found: {path}", code="EntryNotFound")
            return commit.oid, commit.files[path]
        raise HubError(404, f"this hub does not answer {request.method} {request.path}")

    def _api(self, request: Request, words: list[str], query: Mapping[str, list[str]]) -> Any:
        if words == ["whoami-v2"]:
            return {"type": "user", "name": self._user(request), "fullname": "A test", "orgs": []}
        if words == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if words == ["repos", "create"]:
            return self._create(request)
        kind = {"models": "model", "datasets": "dataset"}.get(words[0])
        if kind is None:
            raise HubError(404, f"this hub does not answer {request.method} {request.path}")
        name, words = _take_name(words[1:])
        repo = self._readable(request, kind, name)
        match request.method, words:
            case "GET", [] | ["revision", _]:
                return self._info(repo, repo.commit_of(words[1] if words else "main"))
            case "GET", ["tree", revision, *path]:
                recursive = query.get("recursive", ["false"])[0].lower() == "true"
                return tree(repo.commit_of(revision), "/".join(path), recursive=recursive)
            case "POST", ["paths-info", revision]:
                asked = _form_or_json(request.body).get("paths", [])
                return paths_info(repo.commit_of(revision), asked)
            case "GET", ["refs"]:
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
                    for branch, commits in repo.branches.items()
                ]
                return {"branches": branches, "converts": [], "tags": []}
            case "POST", ["branch", branch]:
                self._writer(request)
                if branch in repo.branches:
                    raise HubError(409, f"Reference already exists: {branch}")
                repo.branches[branch] = list(repo.branches["main"])
                return {}
            case "POST", ["preupload", revision]:
                self._writer(request)
                return upload_modes(repo.commit_of(revision), json.loads(request.body)["files"])
            case "POST", ["commit", revision]:
                return self._commit(request, repo, revision)
        raise HubError(404, f"this hub does not answer {request.method} {request.path}")

    def _user(self, request: Request) -> str:
        if request.token not in self.users:
            raise HubError(401, "Invalid username or password.")
        return self.users[request.token]

    def _writer(self, request: Request) -> str:
        user = self._user(request)
        if self.refuse_writes:
            raise HubError(403, "Forbidden: pass a token with write access")
        return user

    def _readable(self, request: Request, kind: str, name: str) -> Repo:
        repo = self.repo(name, kind=kind)
        if repo.private and request.token not in self.users:
            raise HubError(401, "Repository not found", code="RepoNotFound")
        return repo

    def _create(self, request: Request) -> Any:
        user = self._writer(request)
        wanted = json.loads(request.body)
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        with self._lock:
            exists = (kind, name) in self._repos
        self._created(kind, name, private=wanted.get("visibility") == "private")
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if exists:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        return {"url": url, "name": name, "id": name}

    def _commit(self, request: Request, repo: Repo, branch: str) -> Any:
        self._writer(request)
        self.commits_pass.wait(HOLD_SECONDS)
        lines = [json.loads(line) for line in request.body.splitlines()]
        with self._lock:
            files = dict(repo.commit_of(branch).files)
            for line in lines[1:]:
                entry = line["value"]
                match line["key"]:
                    case "file":
                        files[entry["path"]] = base64.b64decode(entry["content"])
                    case "lfsFile":
                        files[entry["path"]] = self._blobs[entry["oid"]]
                    case "deletedFile":
                        del files[entry["path"]]
                    case "deletedFolder":
                        files = {
                            path: data for path, data in files.items() if not path.startswith(entry["path"])
                        }
            made = repo.commit(branch, files, message=lines[0]["value"]["summary"])
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.url}/{repo.name}/commit/{made.oid}",
        }

    def _switch(self, name: str, *, on: bool) -> Any:
        match name:
            case "refuse":
                self.refuse_writes = on
            case "down":
                self.is_down = on
            case "hold":
                self.commits_pass.clear() if on else self.commits_pass.set()
        return {}

    def _lfs_batch(self, request: Request) -> Any:
        self._writer(request)
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            found: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._blobs:
                found["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def _lfs_object(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"{oid} is not the sha256 of these {len(request.body)} bytes")
        self._blobs[oid] = request.body
        return {}

    def _info(self, repo: Repo, commit: Commit) -> Any:
        return {
            "id": repo.name,
            "modelId": repo.name,
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }


def _take_name(words: list[str]) -> tuple[str, list[str]]:
    return "/".join(words[:2]), words[2:]


def _form_or_json(body: bytes) -> dict[str, Any]:
    return json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The HTTP around `HubServer.answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            authorization = self.headers.get("Authorization", "")
            token = authorization.removeprefix("Bearer ") or None
            request = Request(self.command, self.path, token, self._body())
            hub.requests.append(request)
            if hub.is_down and not self.path.startswith("/switch/"):
                self.close_connection = True
                return
            try:
                answer = hub.answer(request)
            except HubError as error:
                headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                answer = {"error": str(error), **error.details}
                self._send(error.status, json.dumps(answer).encode(), headers)
                return
            if isinstance(answer, tuple):
                self._send_file(*answer)
            else:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def _send_file(self, oid: str, data: bytes) -> None:
            headers = {
                "X-Repo-Commit": oid,
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            }
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            if not wanted:
                self._send(200, data, headers)
                return
            first, _, last = wanted.partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            if start > end:
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            self._send(
                206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            )

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output to itself; `hub.requests` has it all."""

    return Handler
