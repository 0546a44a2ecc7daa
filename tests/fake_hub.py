"""A Hugging Face hub on this machine, as much of it as downloading a model's files takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants


class FakeHub:
    """repos: repository name -> its files; refuses: repository name -> the error of every download."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.downloaded: list[str] = []

    def add(self, repo: str, folder: Path) -> None:
        """The files below the folder become the repository's newest commit."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repos[repo] = {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        place = path.partition("?")[0].removeprefix("/")
        owner, name, *rest = place.removeprefix("api/models/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = self.repos[repo]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if rest[:1] == ["resolve"]:
            if repo in self.refuses:
                status, code = self.refuses[repo]
                return status, {"X-Error-Code": code} if code else {}, b""
            content = files["/".join(rest[2:])]
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content
        if rest[:1] == ["tree"]:
            listed: object = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        else:
            listed = {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Names on the hub mean this one while it runs; what is downloaded goes to `cache` by default."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._send(with_body=False)

        def do_GET(self) -> None:
            self._send(with_body=True)

        def _send(self, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)
                if status == 200 and "/resolve/" in self.path:
                    hub.downloaded.append(self.path.split("/resolve/")[1].partition("/")[2])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
