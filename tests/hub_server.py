"""A hub on this machine: what huggingface_hub and datasets ask of one, for repositories that a test makes."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """commits: hash -> path -> content; token: what a request must carry, None: nothing"""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit


@dataclass
class HubServer:
    """repositories: "models/owner/name" -> it; asked: method and path of each request; headers: of each"""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    # Every answer is 503.
    broken: bool = False

    def __enter__(self) -> HubServer:
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, name: str) -> Repository:
        return self.repositories.setdefault(f"{kind}/{name}", Repository())

    def fetched(self) -> list[str]:
        """The names of files whose content was asked for, in order."""
        found = [line.split(" ")[1] for line in self.asked if line.startswith("GET ")]
        return [path.rsplit("/", 1)[1] for path in found if "/resolve/" in path]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class _Server(ThreadingHTTPServer):
    hub: HubServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = urlsplit(self.path)
        self.server.hub.asked.append(f"{self.command} {asked.path}")
        self.server.hub.headers.append({key.title(): value for key, value in self.headers.items()})
        parts = [unquote(part) for part in asked.path.strip("/").split("/")]
        if self.server.hub.broken:
            self._send(503, b"", {})
        elif parts[0] == "api":
            self._api(parts[1:], parse_qs(body.decode()))
        else:
            kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
            self._file(kind, rest)

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.server.hub.repositories.get(f"{kind}/{name}")
        allowed = found is not None and found.token in (
            None,
            (self.headers.get("Authorization") or "").removeprefix("Bearer "),
        )
        if not allowed:
            self._error(401, "RepoNotFound")
            return None
        return found

    def _api(self, parts: list[str], given: dict[str, list[str]]) -> None:
        kind, owner, name, *rest = [*parts, *[""] * (3 - len(parts))]
        repository = self._repository(kind, f"{owner}/{name}")
        if repository is None:
            return
        what, revision, *under = [*rest, *["", "main"][len(rest) :]]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in files.items()
        ]
        if what == "tree":
            prefix = "/".join(under)
            entries = [e for e in entries if str(e["path"]).startswith(prefix)]
            self._json(entries)
        elif what == "paths-info":
            self._json([e for e in entries if e["path"] in given["paths"]])
        else:
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries
            ]
            known = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            self._json(known | {"private": False, "tags": [], "downloads": 0, "likes": 0})

    def _file(self, kind: str, parts: list[str]) -> None:
        owner, name, _, revision, *path = parts
        repository = self._repository(kind, f"{owner}/{name}")
        if repository is None:
            return
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound")
            return
        content = repository.commits[commit].get("/".join(path))
        at = {"X-Repo-Commit": commit}
        if content is None:
            self._error(404, "EntryNotFound", at)
        else:
            size = {"X-Linked-Size": str(len(content))}
            self._send(200, content, at | size | {"ETag": f'"{_oid(content)}"'})

    def _error(self, status: int, code: str, more: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} | (more or {}))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
