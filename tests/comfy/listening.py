"""A client of ComfyUI's websocket, as its page is one: which nodes run, which are cached."""

import base64
import json
import os
import socket
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

SECONDS = 300
TEXT_FRAME, BINARY_FRAME = 1, 2
PROGRESS_TEXT = 3  # the kind of a binary message


@dataclass
class Run:
    """How one workflow ran: its nodes in the order they started, those that were cached, how it ended."""

    ran: list[str] = field(default_factory=list)
    cached: set[str] = field(default_factory=set)
    outputs: dict[str, dict] = field(default_factory=dict)
    progress: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # (value, max) by node
    ended: str = ""
    ended_at: str = ""  # the node that failed or was interrupted

    def hear(self, kind: str, data: dict) -> None:
        if kind == "execution_cached":
            self.cached = set(data["nodes"])
        elif kind == "executing":
            self.ran.append(data["node"])
        elif kind == "executed":
            self.outputs[data["node"]] = data["output"]
        elif kind == "progress":
            self.progress.setdefault(data["node"], []).append((data["value"], data["max"]))
        elif kind in ("execution_success", "execution_error", "execution_interrupted"):
            self.ended, self.ended_at = kind.removeprefix("execution_"), data.get("node_id", "")


class Listener:
    """Queues workflows and hears about them. Every message is (type, data)."""

    def __init__(self, url: str):
        address = urlsplit(url)
        self.url, self.client = url, uuid.uuid4().hex
        self.texts: dict[str, list[str]] = {}  # what was said below each node
        self._connection = socket.create_connection((address.hostname, address.port), timeout=SECONDS)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET /ws?clientId={self.client} HTTP/1.1", f"Host: {address.netloc}", "Upgrade: websocket",
            "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        ]  # fmt: skip
        self._connection.sendall("\r\n".join(lines).encode())
        self._stream = self._connection.makefile("rb")
        assert b" 101 " in self._stream.readline()
        while self._stream.readline().strip():  # the other headers
            pass

    def close(self) -> None:
        self._stream.close()
        self._connection.close()

    def messages(self) -> Iterator[tuple[str, dict]]:
        """What the server says, as it says it, lines below a node as ("progress_text", {node, text});
        previews and pings are left out.
        """
        while True:
            kind, length = self._stream.read(2)  # a server masks nothing
            if length >= 126:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8))
            payload = self._stream.read(length)
            if kind & 0x0F == TEXT_FRAME:
                message = json.loads(payload)
                yield message["type"], message["data"]
            elif kind & 0x0F == BINARY_FRAME and int.from_bytes(payload[:4]) == PROGRESS_TEXT:
                end = 8 + int.from_bytes(payload[4:8])
                node, text = payload[8:end].decode(), payload[end:].decode()
                self.texts.setdefault(node, []).append(text)
                yield "progress_text", {"node": node, "text": text}

    def post(self, path: str, body: dict) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def queue(self, prompt: dict) -> str:
        """Queue a workflow; its id."""
        return json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.client}))["prompt_id"]

    def run(self, prompt: dict) -> Run:
        """Queue a workflow and hear it to its end."""
        return self.until_ended(self.queue(prompt))

    def until_ended(self, prompt_id: str) -> Run:
        run = Run()
        for kind, data in self.messages():
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "executing" and data["node"] is None:
                return run
            run.hear(kind, data)
        raise ConnectionError("ComfyUI hung up")


@contextmanager
def listening(url: str) -> Iterator[Listener]:
    """A listener that hangs up at the end."""
    listener = Listener(url)
    try:
        yield listener
    finally:
        listener.close()
