"""A loopback server that speaks as much of the Hugging Face hub's protocol as its client needs to fetch a model."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 12
"""Bytes that are sent at a time."""


@dataclass
class Hub:
    """Repositories by id, each the files of a folder at one commit, and what was asked of them."""

    folders: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """Repository -> a branch that has its files; `main` by default."""
    gets: list[tuple[str, str, bool]] = field(default_factory=list)
    """Repository, file, and whether only a part was asked for."""
    halfway: Callable[[str, str], None] = lambda repository, name: None
    """Called when half of a file that was asked for as a whole has been sent."""
    endpoint: str = ""

    def commit(self, repository: str) -> str:
        """Its only commit."""
        return hashlib.sha1(repository.encode()).hexdigest()

    def fetched(self, repository: str) -> list[str]:
        """Files that were asked for as a whole, in order."""
        return [name for each, name, partly in self.gets if each == repository and not partly]

    def shards(self, repository: str) -> list[str]:
        """Of these, weights."""
        return [name for name in self.fetched(repository) if name.endswith((".safetensors", ".bin"))]


class _Gone(Exception):
    """No such thing: the client's code for it."""


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Callable[[], None]]:
    """Serve it at `hub.endpoint` while the block runs; yields what cuts every connection and lets no new one in."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            try:
                parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                repository, *rest = ("/".join(parts[2:4]), *parts[4:]) if api else ("/".join(parts[:2]), *parts[2:])
                if repository not in hub.folders:
                    raise _Gone("RepoNotFound")
                revision = rest[1] if rest else "main"
                if revision not in (hub.commit(repository), hub.branches.get(repository, "main")):
                    raise _Gone("RevisionNotFound")
                if api:
                    self._send(self._info(repository), "application/json", with_body=with_body)
                else:
                    self._file(repository, "/".join(rest[2:]), with_body=with_body)
            except _Gone as error:
                self.send_response(404)
                self.send_header("X-Error-Code", str(error))
                self.send_header("Content-Length", "0")
                self.end_headers()
            except OSError:
                self.close_connection = True

        def _info(self, repository: str) -> bytes:
            folder = hub.folders[repository]
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            siblings = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
            return json.dumps({"id": repository, "sha": hub.commit(repository), "siblings": siblings}).encode()

        def _file(self, repository: str, name: str, *, with_body: bool) -> None:
            path = hub.folders[repository] / name
            if not path.is_file():
                raise _Gone("EntryNotFound")
            data, size = path.read_bytes(), path.stat().st_size
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.commit(repository), "Accept-Ranges": "bytes"}
            asked = self.headers.get("Range")
            if asked:
                first, last = asked.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last or size), size - 1) + 1
                data, headers["Content-Range"] = data[start:stop], f"bytes {start}-{stop - 1}/{size}"
            if with_body:
                hub.gets.append((repository, name, asked is not None))
            watch = (lambda: None) if asked else (lambda: hub.halfway(repository, name))
            self._send(data, "application/octet-stream", headers, watch, status=206 if asked else 200, with_body=with_body)

        def _send(
            self,
            data: bytes,
            kind: str,
            headers: dict[str, str] | None = None,
            halfway: Callable[[], None] = lambda: None,
            *,
            status: int = 200,
            with_body: bool,
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                halfway()
                self.wfile.write(data[len(data) // 2 :])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    dead = threading.Event()

    def die() -> None:
        if not dead.is_set():
            dead.set()
            server.shutdown()
            server.server_close()
        raise ConnectionAbortedError

    try:
        yield die
    finally:
        if not dead.is_set():
            server.shutdown()
            server.server_close()
        thread.join()
