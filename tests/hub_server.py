"""A stand-in of the Hugging Face Hub for the real client: in memory, on a loopback port, without LFS and xet.

Start a process with HF_ENDPOINT set to `.url` (huggingface_hub reads it at import) and it takes this for the Hub.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"


class Repo:
    """Branches, tags and commits; a commit is all of its files."""

    def __init__(self, repo_id: str):
        self.id = repo_id
        self.commits: dict[str, dict] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": b""}, "initial commit")

    def commit(self, changes: dict[str, bytes | None], message: str = "commit", branch: str = "main") -> str:
        """Adds files, removes those that are `None`, and returns the new commit's hash."""
        parent = self.branches.get(branch)
        files = dict(self.commits[parent]["files"]) if parent else {}
        files |= changes
        files = {path: content for path, content in files.items() if content is not None}
        contents = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
        oid = hashlib.sha1(json.dumps([self.id, parent, message, contents]).encode()).hexdigest()
        self.commits[oid] = {"parent": parent, "message": message, "files": files}
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """Branch, tag or hash -> hash."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]["files"]


class Hub(ThreadingHTTPServer):
    """`repos` by id; `static` is served under /static/; `requests` has the method and path of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.static: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = Lock()

    def create(self, repo_id: str, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id)
        repo.commit(files or {})
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        with self.server.lock:
            self.server.requests.append((self.command, "/".join(path)))
            writes = self.command == "POST" and path != ["api", "validate-yaml"]
            if writes and not self.headers.get("Authorization", "").startswith("Bearer "):
                self._json({"error": "a token is needed to write"}, 401)
            else:
                self._route(path, body)

    do_GET = do_HEAD = do_POST = do_DELETE = _handle

    def _route(self, path: list[str], body: bytes) -> None:
        match path:
            case ["static", name] if name in self.server.static:
                self._send(self.server.static[name])
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest, body)
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._error("EntryNotFound", "no such endpoint")

    def _create(self, request: dict) -> None:
        repo_id = f"{request['organization'] or 'me'}/{request['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            self._json({"error": "You already created this model repo", **answer}, 409)
        else:
            self.server.repos[repo_id] = Repo(repo_id)
            self._json(answer)

    def _api(self, repo_id: str, rest: list[str], body: bytes) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            return self._error("RepoNotFound", "Repository not found")
        verb, revision = (rest + ["info", "main"][len(rest) :])[:2]
        verb = "info" if verb == "revision" else verb
        if verb == "refs":
            return self._json({kind: self._refs(repo, kind) for kind in ("branches", "tags", "converts")})
        if self.command == "POST" and verb == "branch":
            return self._point(repo.branches, revision, repo.resolve(json.loads(body).get("startingPoint", "main")))
        oid = repo.resolve(revision)
        if oid is None:
            return self._error("RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]["files"]
        match self.command, verb:
            case "POST", "tag":
                return self._point(repo.tags, json.loads(body)["tag"], oid)
            case "POST", "preupload":
                # "regular" puts the bytes into the commit itself: neither LFS nor xet is asked for.
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                asked = [file["path"] for file in json.loads(body)["files"]]
                return self._json({"files": [{"path": path, **modes} for path in asked]})
            case "POST", "commit":
                return self._commit(repo, revision, body)
            case "GET", "info":
                siblings = [{"rfilename": path} for path in files]
                info = {"_id": repo.id, "id": repo.id, "modelId": repo.id, "sha": oid, "siblings": siblings}
                info |= {"private": False, "gated": False, "disabled": False, "lastModified": DATE, "createdAt": DATE}
                return self._json(info | {"downloads": 0, "likes": 0, "tags": []})
            case "GET", "tree":
                return self._json(self._tree(files, "/".join(rest[2:])))
            case "GET", "commits":
                log = []
                while oid:
                    commit = repo.commits[oid]
                    entry = {"id": oid, "title": commit["message"], "message": "", "date": DATE}
                    log.append(entry | {"authors": [{"user": "me"}]})
                    oid = commit["parent"]
                return self._json(log)
        return self._error("EntryNotFound", "no such endpoint")

    @staticmethod
    def _refs(repo: Repo, kind: str) -> list[dict]:
        prefix = {"branches": "heads", "tags": "tags"}.get(kind)
        refs = getattr(repo, kind) if prefix else {}
        return [{"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    def _point(self, refs: dict[str, str], name: str, oid: str | None) -> None:
        if oid is None or name in refs:
            return self._json({"error": f"{name} exists, or there is nothing to point it at"}, 409)
        refs[name] = oid
        return self._json({})

    def _commit(self, repo: Repo, branch: str, body: bytes) -> None:
        if branch not in repo.branches:
            return self._error("RevisionNotFound", f"no branch {branch}")
        changes, message = {}, ""
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                changes[value["path"]] = None
            else:
                return self._json({"error": f"{key} is not supported"}, 400)
        oid = repo.commit(changes, message, branch)
        return self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo.id}/commit/{oid}"}
        )

    @staticmethod
    def _tree(files: dict[str, bytes], folder: str) -> list[dict]:
        inside = {path: content for path, content in files.items() if not folder or path.startswith(folder + "/")}
        entries = [{"type": "file", "path": path, "size": len(content)} for path, content in inside.items()]
        return [entry | {"oid": hashlib.sha1(inside[entry["path"]]).hexdigest()} for entry in entries]

    def _resolve(self, repo_id: str, revision: str, file: str) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None:
            return self._error("RepoNotFound", "Repository not found")
        oid = repo.resolve(revision)
        if oid is None:
            return self._error("RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in repo.files(oid):
            return self._error("EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
        content = repo.files(oid)[file]
        return self._send(content, headers={"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _error(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        # The client tells a missing repository, revision and file apart by this header.
        self._json({"error": message}, 404, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
