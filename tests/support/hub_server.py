"""A local server that speaks the protocol of the Hugging Face hub."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class _Hub(ThreadingHTTPServer):
    """Attributes: files, the content of each file of owner/tiny by name."""

    files: dict[str, bytes]


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_GET(self):
        self.respond(has_body=True)

    def do_HEAD(self):
        self.respond(has_body=False)

    def respond(self, *, has_body):
        path = self.path.partition("?")[0]
        files = self.server.files
        if "owner/gated" in path:
            self.send(403, {"X-Error-Code": "GatedRepo"})
        elif "owner/tiny" not in path:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            content = files[path.rpartition("/")[2]]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            self.send(200, headers, content, has_body=has_body)
        elif "/tree/" in path:
            self.send(200, {}, _tree(files), has_body=has_body)
        else:
            self.send(200, {}, _model_info(files), has_body=has_body)

    def send(self, status, headers, content=b"", *, has_body=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve_hub(model_dir):
    """Serves a model as owner/tiny, owner/gated without access, and no other model.

    Yields the address.
    """
    server = _Hub(("127.0.0.1", 0), _Handler)
    server.files = {file.name: file.read_bytes() for file in model_dir.iterdir() if file.is_file()}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _model_info(files):
    siblings = [{"rfilename": name} for name in files]
    return json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()


def _tree(files):
    entries = []
    for name, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        entries.append({"type": "file", "path": name, "size": len(content), "oid": oid})
    return json.dumps(entries).encode()
