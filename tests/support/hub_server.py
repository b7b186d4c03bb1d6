"""A local server that speaks the protocol of the Hugging Face hub."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "a" * 40
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class _Hub(ThreadingHTTPServer):
    """Attributes:
    repositories: the content of each file by name, of each model or data set by id.
    num_bytes_sent: size of all file contents sent so far.
    """

    repositories: dict[str, dict[str, bytes]]
    num_bytes_sent = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_GET(self):
        self.respond(has_body=True)

    def do_HEAD(self):
        self.respond(has_body=False)

    def do_POST(self):
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        files = self.server.repositories[self.find_repository(self.path)]
        found = {name: files[name] for name in form.get("paths", []) if name in files}
        self.send(200, {}, _tree(found), has_body=True)

    def respond(self, *, has_body):
        path = unquote(self.path.partition("?")[0])
        repository = self.find_repository(path)
        files = self.server.repositories.get(repository, {})
        if "owner/gated" in path:
            self.send(403, {"X-Error-Code": "GatedRepo"})
        elif repository is None:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            self.send_file(files.get(name), has_body=has_body)
        elif "/tree/" in path:
            folder = path.partition("/tree/")[2].partition("/")[2]
            recursive = "recursive=false" not in self.path.lower()
            self.send_tree(files, folder, recursive=recursive, has_body=has_body)
        elif "/api/" in path:
            self.send(200, {}, _info(repository, files), has_body=has_body)
        else:
            self.send(404, {})

    def find_repository(self, path):
        """Returns the id of the repository in a path, None without one."""
        for name in self.server.repositories:
            if f"/{name}/" in f"{path}/":
                return name
        return None

    def send_tree(self, files, folder, *, recursive, has_body):
        prefix = f"{folder}/" if folder else ""
        contents = {}
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            first, slash, _ = name.removeprefix(prefix).partition("/")
            if slash and not recursive:
                contents[prefix + first] = None  # a folder
            else:
                contents[name] = content
        if contents:
            self.send(200, {}, _tree(contents), has_body=has_body)
        else:
            self.send(404, {"X-Error-Code": "EntryNotFound"})

    def send_file(self, content, *, has_body):
        if content is None:
            self.send(404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        requested = RANGE.fullmatch(self.headers.get("Range", ""))
        if requested:
            status = 206
            start = int(requested[1])
            end = int(requested[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        if has_body:
            self.server.num_bytes_sent += len(content)
        self.send(status, headers, content, has_body=has_body)

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
def serve_repositories(folders):
    """Serves models or data sets: the files of a folder for each id. Yields the server."""
    server = _Hub(("127.0.0.1", 0), _Handler)
    server.repositories = {name: _read_files(folder) for name, folder in folders.items()}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


@contextlib.contextmanager
def serve_hub(model_dir):
    """Serves a model as owner/tiny, owner/gated without access, and no other model.

    Yields the address.
    """
    with serve_repositories({"owner/tiny": model_dir}) as server:
        yield server.url


def _read_files(folder):
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(folder))] = file.read_bytes()
    return files


def _info(repository, files):
    siblings = [{"rfilename": name} for name in files]
    return json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()


def _tree(contents):
    """Returns the list of files, and of folders, whose content is None."""
    entries = []
    for name, content in contents.items():
        oid = hashlib.sha1(name.encode() + (content or b"")).hexdigest()
        if content is None:
            entries.append({"type": "directory", "path": name, "size": 0, "oid": oid})
        else:
            entries.append({"type": "file", "path": name, "size": len(content), "oid": oid})
    return json.dumps(entries).encode()
