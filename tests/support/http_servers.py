"""Servers behind HTTP: a real vLLM server on a tiny model, and one that answers as a judge does."""

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

from grpo.run.addresses import free_port


@contextlib.contextmanager
def serve_vllm(model_dir, folder):
    """Yields the URL of a real vLLM server on a model."""
    model = shutil.copytree(model_dir, folder / "model")
    (folder / "template").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    port = free_port()
    options = {
        "model": str(model),
        "served-model-name": "teacher",
        "port": str(port),
        "host": "127.0.0.1",
        "dtype": "float32",
        "block-size": "32",
        "chat-template": str(folder / "template"),
        "max-model-len": "256",
        "kv-cache-memory-bytes": str(50 * 2**20),
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enforce-eager",
        *flags,
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "log"
                ).read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def serve_judge():
    """Answers as a judge (grades by the answer's length), a classifier and a pooler.

    `fail` makes it refuse.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        fail = False

        def do_GET(self):
            self.answer(
                {
                    "object": "list",
                    "data": [{"id": "rm", "object": "model", "created": 0, "owned_by": "us"}],
                }
            )

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            if Handler.fail:
                self.send_error(400, "no")
                return
            text = body["messages"][-1]["content"]
            if self.path == "/v1/classify":
                self.answer({"data": [{"index": 0, "label": "x", "probs": [0.9, 0.25]}]})
            elif self.path == "/v1/pooling":
                self.answer({"data": [{"index": 0, "object": "pooling", "data": [[1.0], [-2.5]]}]})
            else:
                words = (
                    "I like it. Grade: 3 at first\n**Grade: 8**"
                    if "good" in text
                    else "I cannot say."
                )
                message = {"role": "assistant", "content": words}
                self.answer(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "rm",
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    }
                )

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked, Handler
    http.shutdown()
