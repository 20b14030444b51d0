"""A stand-in of the hub on loopback: repositories in memory, as far as its client asks for them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """What was pushed, by repository and file name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Asked(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._send(body, status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                     for one in files]  # fmt: skip
            self._answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": one["oid"], "size": one["size"], "authenticated": True,
                        "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            self._answer({"transfer": "basic", "objects": objects})
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            for line in body.decode().splitlines():
                row = json.loads(line)
                path = row["value"].get("path")
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    self.server.repositories[name][path] = content
                elif row["key"] == "lfsFile":
                    kept = self.server.large[row["value"]["oid"]]
                    self.server.repositories[name][path] = kept
            self._answer({"success": True, "commitOid": COMMIT,
                          "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}"})  # fmt: skip
        else:
            self._answer({"error": f"not here: {self.path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        self.server.large[self.path.rpartition("/")[2]] = content
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self._send(b"", 200, {})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if path.startswith("api/models/"):
            self._about("/".join(parts[2:4]), parts[4:])
            return
        files = self.server.repositories.get("/".join(parts[:2]), {})
        name = "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or name not in files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(b"", 404, missing)
            return
        digest = hashlib.sha256(files[name]).hexdigest()
        self._send(files[name], 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _about(self, name: str, asked: list[str]) -> None:
        if name not in self.server.repositories:
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "No such"})
            return
        files = self.server.repositories[name]
        listed = [{"rfilename": path} for path in files]
        if asked[:1] == ["tree"]:
            self._answer([{"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                          for path, content in files.items()])  # fmt: skip
            return
        self._answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": listed, "tags": [],
                      "private": False, "downloads": 0, "likes": 0})  # fmt: skip


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve an empty hub."""
    with Hub() as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()
