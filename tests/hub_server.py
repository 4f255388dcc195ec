# SPDX-License-Identifier: MIT
"""A small Hub on this machine: as much of the Hub's HTTP interface as publishing and loading a model needs.

A Space is kept under the name spaces/owner/name, and asked for under the same addresses as a model.

The real huggingface_hub client talks to it through HF_ENDPOINT, with HF_HUB_DISABLE_XET=1: it knows LFS, and only how
to fail of Xet.
Faults are ordered with `HubServer.fail`, and every request is kept in `HubServer.requests`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants

# Who may do what; the value of a token is its holder's name.
TOKENS = {"hf_WriterSecretToken123": "org", "hf_ReaderSecretToken456": "reader", "hf_MySecretToken789": "me"}
WRITER, READER, MINE = TOKENS

LFS_SUFFIXES = (".safetensors", ".png", ".jpg", ".bin")
SDKS = {"gradio", "docker", "static"}
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "other"}

Files = dict[str, bytes]


@dataclass
class Commit:
    oid: str
    title: str
    files: Files
    changed: set[str]


@dataclass
class Repository:
    """Branches are lists of commits, oldest first. The Hub makes the first one itself, with .gitattributes in it."""

    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: Files, changed: set[str]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        seed = f"{self.name} {branch} {len(commits)} {title} {sorted(files)}"
        commits.append(Commit(hashlib.sha1(seed.encode()).hexdigest(), title, dict(files), changed))
        return commits[-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD path` the pattern is found in."""

    pattern: str
    status: int | None = None  # None: the body breaks off in its middle, though its whole length is announced
    times: int = 1
    message: str = "Internal error"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # before it answers at all, while others are answered
    slow: bool = False  # a byte every half second
    content: bytes | None = None  # the body, and what is announced of it, are of this


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """All that the Hub knows. `url` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by digest
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Large files lie with another host, as they do with the Hub. It must never see a token.
        self.storage_url = f"http://localhost:{self.http.server_port}"

    def fail(self, pattern: str, status: int | None = None, times: int = 1, **more: Any) -> None:
        self.faults.append(Fault(pattern, status, times, **more))

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """What was pushed, without the commit that the Hub made when it made the repository."""
        return self.repositories[repo_id].branches[branch][1:]

    def files(self, repo_id: str, branch: str = "main") -> Files:
        return self.repositories[repo_id].branches[branch][-1].files

    def add(self, repo_id: str, files: Files, private: bool = False) -> Commit:
        """Put files there without a client."""
        repository = self.repositories.setdefault(repo_id, Repository(repo_id, private))
        before = repository.branches["main"][-1].files if repository.branches else {}
        return repository.commit("main", "added", before | files, set(files))


@contextmanager
def serve() -> Iterator[HubServer]:
    hub = HubServer()
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()


@contextmanager
def connect(hub: HubServer, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Let this process take it for the Hub, with an empty cache in `home`, and with a login that may write.

    The client reads its settings when it is imported; the tests import it offline.
    """
    with pytest.MonkeyPatch.context() as patch:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        patch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
        patch.setenv("HF_TOKEN", WRITER)
        yield patch


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        # The rest is the same for a Space and for a model.
        self.kind = "spaces/" if re.match(r"/(api/)?spaces/", address.path) else ""
        path = re.sub(r"^/(api/)?spaces/", lambda found: "/api/models/" if found[1] else "/", address.path)
        self.query = parse_qs(address.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, dict(self.headers)))
            self.fault = self._take_fault(f"{self.command} {unquote(address.path)}")
        if self.fault:
            self.hub.closing.wait(self.fault.seconds)
        with self.hub.lock:
            try:
                if self.fault and self.fault.status:
                    raise Refusal(self.fault.status, self.fault.message)
                self._user()
                self._route(path)
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal), **(self.fault.headers if self.fault else {})}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _take_fault(self, request: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.content is not None and self.command != "HEAD":
            body = self.fault.content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.slow:
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.hub.closing.wait(0.5):
                    break
            self.close_connection = True
        elif self.fault and self.fault.status is None and not self.fault.seconds and self.fault.content is None:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    # --- Who asks ---

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = TOKENS.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _require_writer(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != repo_id.split("/")[0]:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(self.kind + repo_id)
        if repository is None or (repository.private and self._user() != repo_id.split("/")[0]):
            # As the Hub does: without a token, nobody is told whether there is a private one.
            raise Refusal(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repo_id: str, revision: str) -> Commit:
        commit = self._repository(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- What is asked ---

    def _route(self, path: str) -> None:
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                return
        raise Refusal(404, f"This Hub does not know {self.command} {path}")

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self._send_json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self) -> None:
        asked = self.json
        if self._user() is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or self._user()}/{asked['name']}"
        self._require_writer(repo_id)
        if asked.get("type") == "space":
            if asked.get("sdk") not in SDKS:
                raise Refusal(400, f'"sdk" must be one of {sorted(SDKS)}')
            repo_id = f"spaces/{repo_id}"
        if repo_id in self.hub.repositories:
            self._send_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(repo_id, bool(private))
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, set())
        self._send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _create_branch(self, repo: str, branch: str) -> None:
        self._require_writer(repo)
        branches = self._repository(repo).branches
        if branch in branches:
            raise Refusal(409, "Reference already exists")
        branches[branch] = [branches["main"][0]]
        self._send_json({})

    def _validate_yaml(self) -> None:
        errors = metadata_errors(self.json["content"], self.json["repoType"])
        self._send_json(
            {"errors": [{"message": message} for message in errors], "warnings": []}, 400 if errors else 200
        )

    def _preupload(self, repo: str, revision: str) -> None:
        self._require_writer(repo)
        self._commit(repo, revision)
        modes = {file["path"]: _mode(file["path"]) for file in self.json["files"]}
        self._send_json(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def _lfs_batch(self, repo: str) -> None:
        self._require_writer(repo)
        objects = []
        for asked in self.json["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.storage_url}/lfs-storage/{asked['oid']}?Signature=signed-for-{repo}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify/{repo}"},
            }
            there = asked["oid"] in self.hub.objects
            objects.append({**asked, **({} if there else {"actions": actions})})
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content has another digest")
        self.hub.objects[oid] = self.body
        self._send(200)

    def _lfs_verify(self, repo: str) -> None:
        self._require_writer(repo)
        stored = self.hub.objects.get(self.json["oid"])
        if stored is None or len(stored) != self.json["size"]:
            raise Refusal(404, "There is no such object")
        self._send_json({})

    def _push(self, repo: str, revision: str) -> None:
        self._require_writer(repo)
        repository = self._repository(repo)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, changed, title = dict(repository.branches[revision][-1].files), set(), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
                continue
            changed.add(value["path"])
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"Your push was rejected: {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        commit = repository.commit(revision, title, files, changed)
        self._send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid})

    def _info(self, repo: str, revision: str = "main") -> None:
        repository, commit = self._repository(repo), self._commit(repo, revision or "main")
        card = metadata(commit.files.get("README.md", b"").decode()) or {}
        self._send_json(
            {
                "_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": repository.private,
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
                "tags": card.get("tags", []), "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"), "cardData": card, "downloads": 0, "likes": 0,
            }
        )  # fmt: skip

    def _tree(self, repo: str, revision: str, path: str = "") -> None:
        files = self._commit(repo, revision).files
        prefix = f"{path}/" if path else ""
        entries = []
        for name, content in sorted(files.items()):
            if not name.startswith(prefix) or ("/" in name[len(prefix) :] and "recursive" not in self.query):
                continue
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
            if _mode(name) == "lfs":
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        if prefix and not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self._send_json(entries)

    def _commits(self, repo: str, revision: str) -> None:
        self._commit(repo, revision)
        commits = self._repository(repo).branches.get(revision, [])
        date = "2025-01-01T00:00:00.000Z"
        self._send_json(
            [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": date} for c in reversed(commits)]
        )

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        content = commit.files.get(path)
        if content is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        if _mode(path) == "lfs":
            # Large files live elsewhere: the Hub answers with where, how large and what digest.
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            # A client that knows Xet asks there for the parts, which are not to be had here.
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.url}/xet-token"}
            self.hub.objects[digest] = content
            self._send(
                302, b"", {**headers, "Location": f"{self.hub.storage_url}/cdn/{digest}?Signature=signed-for-{repo}"}
            )
            return
        self._send_range(content, {**headers, "ETag": f'"{_git_oid(content)}"'})

    def _xet_token(self) -> None:
        place = {"X-Xet-Cas-Url": f"{self.hub.url}/xet", "X-Xet-Access-Token": "signed"}
        self._send(200, b"", {**place, "X-Xet-Token-Expiration": "4000000000"})

    def _cdn(self, oid: str) -> None:
        self._send_range(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler._create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler._push),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>\w+)", _Handler._lfs_upload),
    ("POST", rf"/lfs-verify/{_REPO}", _Handler._lfs_verify),
    ("GET", rf"/api/models/{_REPO}", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler._tree),
    ("GET", rf"/api/models/{_REPO}/commits/{_REVISION}", _Handler._commits),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
    ("GET HEAD", r"/cdn/(?P<oid>\w+)", _Handler._cdn),
    ("GET", "/xet-token", _Handler._xet_token),
]


def _mode(path: str) -> str:
    return "lfs" if path.endswith(LFS_SUFFIXES) else "regular"


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata(card: str) -> Any:
    """The YAML block on top of a card."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def metadata_errors(card: str, repo_type: str = "model") -> list[str]:
    """What the Hub would refuse in a card's metadata, as far as it is documented."""
    content = metadata(card)
    if not isinstance(content, dict):
        return ['"metadata" must be of type object']
    errors = []
    if repo_type == "space":
        if content.get("sdk") not in SDKS:
            errors.append(f'"sdk" must be one of {sorted(SDKS)}')
        for name in ("title", "sdk_version", "python_version", "app_file"):
            if not isinstance(content.get(name, ""), str):
                errors.append(f'"{name}" must be a string')
    license = content.get("license")
    if license is not None and license not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if license == "other" and not content.get("license_name"):
        errors.append('"license_name" is required when "license" is "other"')
    for name in ("library_name", "pipeline_tag", "license"):
        if not isinstance(content.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    base_model = content.get("base_model", "org/name")
    if not isinstance(base_model, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
        errors.append('"base_model" must be the id of a model')
    for model in content.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append('"model-index[0]" needs a name and results')
        for result in model.get("results", []):
            for part, names in (("task", ["type"]), ("dataset", ["type", "name"])):
                for name in names:
                    if not isinstance(result.get(part, {}).get(name), str):
                        errors.append(f'"model-index[0].results.{part}.{name}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                    errors.append('"model-index[0].results.metrics" needs a type and a value')
    return errors
