"""A small hub on localhost: as much of the Hugging Face API as huggingface_hub asks for.

Files ending in .safetensors, and tokenizer.json, are served as the hub serves LFS files: a redirect
from /resolve/ to a content address on another host name, which knows ranges. The rest is served in
place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34
GOOD_TOKEN = "hf_" + "good" * 8
NARROW_TOKEN = "hf_" + "weak" * 8  # valid, but without the right to read

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_LFS = re.compile(r"/lfs/(?P<sha256>[0-9a-f]{64})")


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None
    token: str | None
    bytes_sent: int = 0


@dataclass
class FakeHub:
    """The hub's content and faults, and a record of what was asked."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    drop_after: dict[str, list[int]] = field(default_factory=dict)  # file: bytes, per connection
    hang_after: dict[str, int] = field(default_factory=dict)  # file: bytes, then silence
    corrupt: set[str] = field(default_factory=set)  # files sent with their last bit flipped
    broken: int | None = None  # HTTP status of every answer
    ignore_ranges: bool = False
    pause_after: int | None = None  # bytes of any file, then a second to let the client hang up
    requests: list[Request] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def storage_url(self) -> str:
        """Another name of this server: clients must not send their token there."""
        return self.url.replace("127.0.0.1", "localhost")

    def fetched(self) -> Counter[str]:
        """Bytes of content sent, by file name."""
        sent: Counter[str] = Counter()
        for request in self.requests:
            name = self.name_of(request.path)
            if name and request.bytes_sent:
                sent[name] += request.bytes_sent
        return sent

    def ranges(self, name: str) -> list[str | None]:
        """Range headers of the content requests for one file, in order."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET"
            and self.name_of(request.path) == name
            and (_LFS.fullmatch(request.path) or not is_lfs(name))
        ]

    def name_of(self, path: str) -> str | None:
        """The file a content path stands for."""
        if match := _RESOLVE.fullmatch(path):
            return match["name"]
        if match := _LFS.fullmatch(path):
            return next(
                name
                for files in self.repos.values()
                for name, content in files.items()
                if sha256(content) == match["sha256"]
            )
        return None


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the hub in a thread; its address is hub.url."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, args=(0.05,)).start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


def client_environment(hub: FakeHub, cache: Path) -> dict[str, str]:
    """Environment of a process whose huggingface_hub talks to this hub and no other."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    return inherited | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def is_lfs(name: str) -> bool:
    """Whether the hub keeps this file outside git."""
    return name.endswith(".safetensors") or name == "tokenizer.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.record = Request(self.command, path, self.headers.get("Range"), self._token())
        self.hub.requests.append(self.record)
        if self.hub.broken:
            self._error(self.hub.broken, message="out of order")
        elif match := _LFS.fullmatch(path):
            self._lfs(match["sha256"])
        else:
            match = _TREE.fullmatch(path) or _INFO.fullmatch(path) or _RESOLVE.fullmatch(path)
            if match is None:
                self._error(404, message="no such page")
            elif self._may_see(match["repo"], match["revision"]):
                self._repo_request(match)

    def _token(self) -> str | None:
        authorization = self.headers.get("Authorization")
        return authorization.removeprefix("Bearer ") if authorization else None

    def _may_see(self, repo: str, revision: str | None) -> bool:
        token = self._token()
        if token not in (None, GOOD_TOKEN, NARROW_TOKEN):
            self._error(401, message="Invalid credentials in Authorization header")
        elif repo not in self.hub.repos:
            self._error(404 if token else 401, code="RepoNotFound", message="Repository not found")
        elif token == NARROW_TOKEN:
            self._error(403, message="Forbidden: read access is missing")
        elif revision not in (None, "main", COMMIT):
            self._error(404, code="RevisionNotFound", message="Invalid rev id")
        else:
            return True
        return False

    def _repo_request(self, match: re.Match[str]) -> None:
        repo = match["repo"]
        files = self.hub.repos[repo]
        if match.re is _INFO:
            siblings = [self._sibling(name, content) for name, content in files.items()]
            info = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False,
                    "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            self._json(info)
        elif match.re is _TREE:
            self._json([self._tree_entry(name, content) for name, content in files.items()])
        elif match["name"] not in files:
            self._error(404, code="EntryNotFound", message="Entry not found")
        elif repo in self.hub.gated:
            self._error(
                403 if self._token() else 401, code="GatedRepo", message="Access is restricted"
            )
        else:
            self._resolve(match["name"], files[match["name"]])

    def _sibling(self, name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": name, "size": len(content)}
        entry["blobId"] = blob_id(content)
        if is_lfs(name):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _tree_entry(self, name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = blob_id(content)
        if is_lfs(name):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, name: str, content: bytes) -> None:
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        if is_lfs(name):
            headers["X-Linked-Etag"] = f'"{sha256(content)}"'
            headers["Location"] = f"{self.hub.storage_url}/lfs/{sha256(content)}"
            self._send(302, headers, b"")
        else:
            self._send(200, headers | {"ETag": f'"{blob_id(content)}"'}, content)

    def _lfs(self, digest: str) -> None:
        name = self.hub.name_of(self.record.path) or ""
        content = next(
            files[name] for files in self.hub.repos.values()
            if name in files and sha256(files[name]) == digest
        )  # fmt: skip
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range or "")
        if not asked or self.hub.ignore_ranges:
            self._send(200, headers, content, name)
            return
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if start >= len(content):
            self._send(416, headers | {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        part = content[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self._send(206, headers, part, name)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, *, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, name: str = "") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        drops = self.hub.drop_after.get(name)
        hang = self.hub.hang_after.get(name)
        limit = drops.pop(0) if drops else hang if hang is not None else len(body)
        self._write(body[:limit])
        if hang is not None and limit < len(body) and not self.hub.released.is_set():
            self.hub.hanging.set()
            self.hub.released.wait(30)
        if limit < len(body):
            self.close_connection = True

    def _write(self, body: bytes) -> None:
        step = 1 << 14
        for start in range(0, len(body), step):
            if self.hub.pause_after and start <= self.hub.pause_after < start + step:
                time.sleep(1)
            try:
                self.wfile.write(body[start : start + step])
            except OSError:  # the client has read enough
                self.close_connection = True
                return
            self.record.bytes_sent += len(body[start : start + step])
