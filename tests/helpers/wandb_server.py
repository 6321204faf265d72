"""A W&B server on the loopback interface that keeps what a real client sends it.

It answers what the client asks while a run logs: GraphQL, the file stream, uploads. It can be shut down, come
back at the same address, and be slowed down at any time. Nothing but 127.0.0.1 is ever asked.
"""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import wandb

ENTITY = "someone"
#: What the client takes for a key.
API_KEY = "0" * 40


@dataclass
class WandbServer:
    """What has arrived, and how the server behaves.

    Attributes:
        url: where it listens.
        history: rows of the run in order, as the client sent them.
        config: the run's configuration as last sent.
        tags: of the run.
        files: by the name under which they were uploaded.
        alerts: what was sent, in order.
        artifacts: name and type of each, with the files of those that were uploaded.
        views: saved workspaces.
        delay: seconds before each answer; those that are waiting notice when it is changed.
        status: of each answer; from 400 on it refuses.
        requests: number of them so far.
        unknown: GraphQL operations that nobody has taught it.
    """

    url: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    delay: float = 0.0
    status: int = 200
    requests: int = 0
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._http: ThreadingHTTPServer | None = None
        self._port = 0

    def start(self) -> None:
        """Listen, at the address of the first time."""
        http = _http(self, self._port)
        self._http, self._port = http, http.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Hang up: connections are refused from now on."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def settings(self, **changes: Any) -> wandb.Settings:
        """Of a run that logs here, quietly, and tries again soon."""
        return wandb.Settings(
            mode="online",
            base_url=self.url,
            api_key=API_KEY,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
            init_timeout=30,
            silent=True,
            x_file_stream_retry_wait_max_seconds=1,
            x_file_transfer_retry_wait_max_seconds=1,
            x_graphql_retry_wait_max_seconds=1,
            **changes,
        )

    def answer(self, operation: str, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of a GraphQL answer."""
        match operation:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}"}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "UpsertBucket":
                return {"upsertBucket": {"bucket": self._run(asked), "inserted": True}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(asked)
                return {"notifyScriptableRunAlert": {"success": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": None}  # of a name that is not taken
            case "CreateArtifact":
                return {"createArtifact": {"artifact": self._artifact(asked["input"])}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest":
                name = f"{operation[0].lower()}{operation[1:]}"
                upload = {"uploadUrl": f"{self.url}/upload/manifest", "uploadHeaders": []}
                manifest = {"id": "m", "file": {"id": "f", "name": "manifest", "displayName": "", **upload}}
                return {name: {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                return {"createArtifactFiles": {"files": {"edges": self._slots(asked["input"])}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
            case "UpsertView2":
                self.views.append(asked)
                return {"upsertView": {"view": {"id": "v", "name": asked["name"]}, "inserted": True}}
        self.unknown.append(operation)
        return {}

    def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("config"):
            self.config = {name: item["value"] for name, item in json.loads(asked["config"]).items()}
        self.tags = asked.get("tags") or self.tags
        project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": ENTITY}}
        return {
            "id": base64.b64encode(b"Run:v1:1").decode(),
            "name": asked["name"],
            "displayName": "a-run-1",
            "project": project,
            "historyLineCount": 0,
        }

    def _artifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        number = f"artifact-{len(self.artifacts)}"
        name, kind = asked["artifactCollectionName"], asked["artifactTypeName"]
        self.artifacts.append({"id": number, "name": name, "type": kind, "metadata": asked["metadata"]})
        return {"id": number, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}

    def _slots(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        nodes = []
        for file in asked["artifactFiles"]:
            where = f"{file['artifactID']}/{file['name']}"
            nodes.append(
                {
                    "id": "f",
                    "name": file["name"],
                    "displayName": file["name"],
                    "uploadUrl": f"{self.url}/upload/{where}",
                    "uploadHeaders": [],
                    "artifact": {"id": file["artifactID"]},
                }
            )
        return [{"node": node} for node in nodes]

    def stream(self, files: dict[str, Any]) -> None:
        """Take lines of the file stream; those that are sent again replace what was there."""
        chunk = files.get("wandb-history.jsonl")
        if chunk is not None:
            rows = [json.loads(line) for line in chunk["content"]]
            self.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server in a thread of its own."""
    server = WandbServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _http(server: WandbServer, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _handle(self) -> None:
            body = self._body()
            server.requests += 1
            begun = time.monotonic()
            while time.monotonic() < begun + server.delay:  # until it is told to hurry
                time.sleep(0.02)
            answer: dict[str, Any] = {}
            if server.status != 200:
                answer = {"errors": [{"message": "permission denied"}]}
            elif self.path == "/graphql":
                asked = json.loads(body)
                query = asked["query"]
                operation = asked.get("operationName") or query.split("(")[0].split("{")[0].split()[-1]
                answer = {"data": server.answer(operation, query, asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(json.loads(body).get("files") or {})
            elif self.path.startswith("/upload/"):
                server.files[self.path.removeprefix("/upload/")] = body
            data = json.dumps(answer).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # the client hangs up when it has heard enough

    return Quiet(("127.0.0.1", port), Handler)
