"""HTTP servers for tests: a real vLLM server on a tiny model, and a scripted reward server."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from grpo.run.addresses import free_port

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@contextlib.contextmanager
def serve_vllm(model_dir, folder, *, name="teacher", template=CHAT_TEMPLATE):
    """Starts a real vLLM server on a copy of a model and yields its URL.

    Args:
        model_dir: Directory of the model.
        folder: Existing directory for the copy, the chat template and the log.
        name: The model's name in requests.
        template: The chat template. None: that of the model.

    Raises:
        AssertionError: The server is not ready within 180 s. The message is the end of its log.
    """
    model = shutil.copytree(model_dir, folder / "model")
    port = free_port()
    options = {"model": str(model), "served-model-name": name, "port": str(port)}
    if template is not None:
        (folder / "template").write_text(template)
        options["chat-template"] = str(folder / "template")
    log_file = folder / "log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            _vllm_command(options),
            stdout=log,
            stderr=log,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log_file)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _vllm_command(options):
    options = {
        **options,
        "host": "127.0.0.1",
        "dtype": "float32",
        "block-size": "32",
        "max-model-len": "256",
        "kv-cache-memory-bytes": str(50 * 2**20),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


def _wait_until_healthy(url, process, log_file):
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            log_end = log_file.read_text()[-2000:]
            assert process.poll() is None, log_end
            assert time.monotonic() < deadline, log_end
            time.sleep(0.5)


class JudgeServer(NamedTuple):
    """A running reward server.

    Attributes:
        url: Base URL with `/v1`.
        requests: `(path, body)` of every POST request, in order.
        handler: Set `handler.error_status = 400` to answer every POST request with this status, or
            `handler.response = {...}` to answer with this JSON object.
    """

    url: str
    requests: list
    handler: type


@contextlib.contextmanager
def serve_judge():
    """Serves one model, "rm", as a judge, a classifier and a pooling model; yields a JudgeServer.

    The judge's grade is 8 if the last message contains "good"; otherwise it gives no grade. The
    classifier returns the probabilities 0.9 and 0.25, and the pooling model 1.0 and -2.5. A request
    whose last message contains "too long" has the status 400.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        error_status = None
        response = None

        def do_GET(self):
            model = {"id": "rm", "object": "model", "created": 0, "owned_by": "us"}
            self.send_json({"object": "list", "data": [model]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body))
            text = body["messages"][-1]["content"]
            if Handler.error_status is not None:
                self.send_error(Handler.error_status, "no")
            elif "too long" in text:
                self.send_error(400, "the prompt is longer than the context")
            elif Handler.response is not None:
                self.send_json(Handler.response)
            else:
                self.send_json(_reward_response(self.path, text))

        def send_json(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield JudgeServer(f"http://127.0.0.1:{server.server_port}/v1", requests, Handler)
    server.shutdown()


def _reward_response(path, text):
    if path == "/v1/classify":
        return {"data": [{"index": 0, "label": "x", "probs": [0.9, 0.25]}]}
    if path == "/v1/pooling":
        return {"data": [{"index": 0, "object": "pooling", "data": [[1.0], [-2.5]]}]}
    if "good" in text:
        return judge_response("I like it. Grade: 3 at first\nGrade: 8")
    return judge_response("I cannot say.")


def judge_response(content, finish_reason="stop"):
    """Returns the response of a chat model that writes `content`."""
    message = {"role": "assistant", "content": content}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "rm",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
    }
