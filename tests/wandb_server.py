"""A server that answers W&B's client as far as a run needs it, and that can fall silent."""

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


def answer_query(variables: dict[str, Any]) -> dict[str, Any]:
    """An answer to any GraphQL query; the run's id is the one that the client chose."""
    project = {"id": "1", "name": "project", "entity": {"id": "1", "name": "entity"}}
    bucket = {"id": "1", "name": variables.get("name"), "displayName": "name", "config": "{}", "project": project}
    return {
        "viewer": {"id": "1", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}},
        "upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True},
        "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []},
        "project": {"run": None},
        "model": {"bucket": None},
        "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
    }


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """What it was sent, and whether it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[int, dict[str, Any]] = {}
        """Rows by their place in the run's history."""
        self.talks = threading.Event()
        self.talks.set()
        self.received = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that no longer wait for an answer are what the tests are about."""

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client use this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.talks.wait()
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            answer = {"data": answer_query(json.loads(body).get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self._take(json.loads(body).get("files", {}).get("wandb-history.jsonl"))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _take(self, history: dict[str, Any] | None) -> None:
        if history is not None:
            rows = enumerate(history["content"], start=history["offset"])
            self.server.history |= {k: json.loads(row) for k, row in rows}
            self.server.received.set()

    do_GET = do_PUT = do_POST


@contextmanager
def serve() -> Iterator[Server]:
    """A server for the time of the `with` block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.talks.set()
        server.shutdown()
        server.server_close()
        thread.join()
