"""A stand-in for the Hugging Face hub on the loopback interface.

It speaks as much of the hub's protocol as huggingface_hub needs to download a model: information
with the list of files, the tree with sizes, and `resolve`, where small files are sent and large
ones (safetensors, pickle) are a redirect, with the linked ETag, to a host of another name. It never
redirects to Xet storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

_LARGE = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class FakeRepository:
    """One model: `commits` maps hash to files, `refs` names of branches and tags to hashes."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class FakeHub:
    """The server; `requests` collects "METHOD path" of everything it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, FakeRepository] = {}
        self.requests: list[str] = []
        self.answer_to_all: Answer | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def sent(self) -> set[str]:
        """Names of the files whose content was asked for."""
        asked = {request.removeprefix("GET ") for request in self.requests if request[0] == "G"}
        resolved = {unquote(path.rpartition("/")[2]) for path in asked if "/resolve/" in path}
        linked = {path.split("/")[2] for path in asked if path.startswith("/large/")}
        return resolved | {
            name
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for name, content in files.items()
            if hashlib.sha256(content).hexdigest() in linked
        }

    def push(
        self, repo_id: str, files: Mapping[str, bytes], *refs: str, gated: bool = False
    ) -> str:
        """Add a commit that holds `files` to a repository and let `refs` (main) point to it."""
        repository = self.repositories.setdefault(repo_id, FakeRepository())
        text = repr((repo_id, len(repository.commits), sorted(files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs.update(dict.fromkeys(refs or ("main",), commit))
        repository.gated = gated
        return commit

    def stop(self) -> None:
        """Be a hub that cannot be reached."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, path: str) -> Answer:
        """What a GET of `path` gives."""
        if self.answer_to_all is not None:
            return self.answer_to_all
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["large", digest]:
                return Answer(200, self._large_files()[digest])
            case ["api", "models", org, name]:
                return self._information(f"{org}/{name}", "main")
            case ["api", "models", org, name, "revision", revision]:
                return self._information(f"{org}/{name}", revision)
            case ["api", "models", org, name, "tree", revision]:
                return self._tree(f"{org}/{name}", revision)
            case [org, name, "resolve", revision, *rest] if rest:
                return self._resolve(f"{org}/{name}", revision, "/".join(rest))
        return Answer(404)

    def _information(self, repo_id: str, revision: str) -> Answer:
        found = self._find(repo_id, revision)
        if isinstance(found, Answer):
            return found
        commit, files = found
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repo_id, "sha": commit, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> Answer:
        found = self._find(repo_id, revision, content=True)
        if isinstance(found, Answer):
            return found
        entries = []
        for name, content in found[1].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
            entry["oid"] = hashlib.sha1(content).hexdigest()
            if name.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return _json(entries)

    def _resolve(self, repo_id: str, revision: str, name: str) -> Answer:
        found = self._find(repo_id, revision, content=True)
        if isinstance(found, Answer):
            return found
        commit, files = found
        if name not in files:
            return Answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        if name.endswith(_LARGE):
            digest = hashlib.sha256(content).hexdigest()
            return Answer(
                302,
                headers={
                    "Location": f"{self.endpoint.replace('127.0.0.1', 'localhost')}/large/{digest}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(content)),
                },
            )
        etag = hashlib.sha1(content).hexdigest()
        return Answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _find(
        self, repo_id: str, revision: str, *, content: bool = False
    ) -> tuple[str, dict[str, bytes]] | Answer:
        repository = self.repositories.get(repo_id)
        if repository is None:
            return _refused(404, "RepoNotFound", "Repository not found")
        if content and repository.gated:
            return _refused(403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        commit = repository.commit_of(revision)
        if commit is None:
            return _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _large_files(self) -> dict[str, bytes]:
        return {
            hashlib.sha256(content).hexdigest(): content
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for content in files.values()
        }


def use_only(endpoint: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub know this hub alone, and keep cache and tokens below `home` alone.

    It reads its environment when it is imported, which may have happened already. As a second lock,
    no name but the loopback's can be looked up.
    """
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
        "HF_HUB_OFFLINE": False,
    }.items():
        assert hasattr(constants, name)
        patch.setattr(constants, name, value)
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            patch.delenv(name)
    look_up = socket.getaddrinfo

    def loopback_only(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in {"127.0.0.1", "localhost"}:
            raise AssertionError(f"a test looked up {host}")
        return look_up(host, *rest, **more)

    patch.setattr(socket, "getaddrinfo", loopback_only)
    huggingface_hub.close_session()  # its client may have been made with a proxy


def _json(value: object) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _refused(status: int, code: str, message: str) -> Answer:
    return Answer(status, headers={"X-Error-Code": code, "X-Error-Message": message})


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(with_body=True)

        def do_HEAD(self) -> None:
            self._send(with_body=False)

        def _send(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            answer = hub.answer(path)
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
