"""A stand-in for the Hugging Face hub on a loopback address: as much of it as the real huggingface_hub and
`datasets` ask for when they fetch models and data sets.

    with StandIn() as hub:
        commit = hub.put("datasets", "me/sums", {"train.jsonl": b"..."}, tag="v1")
        ... hub.endpoint, hub.asked ...
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def sha1(content):
    return hashlib.sha1(content).hexdigest()


class StandIn:
    """Repositories with commits and refs; a record of what was asked; and what may go wrong on the way."""

    def __init__(self):
        self.commits = {}           # (kind, name) -> commit -> path -> content
        self.refs = {}              # (kind, name) -> branch or tag -> commit
        self.asked = []             # (method, path, Range or "")
        self.refusals = {}          # name -> (status, X-Error-Code)
        self.cuts = {}              # path in a repository -> bytes after which its first answer breaks off

    def put(self, kind, name, files, tag=None):
        """A commit on main, and under a tag -> its digits."""
        commit = sha1(repr(sorted(files.items())).encode())
        self.commits.setdefault((kind, name), {})[commit] = files
        refs = self.refs.setdefault((kind, name), {})
        refs["main"] = commit
        if tag:
            refs[tag] = commit
        return commit

    def downloads(self):
        """The files that were asked for, each as often as it was."""
        return [path.split("/resolve/")[1].partition("/")[2] for method, path, _ in self.asked
                if method == "GET" and "/resolve/" in path]

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("For", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()      # seconds
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.route()

    def do_GET(self):
        self.route()

    def do_POST(self):
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.route()

    def route(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        api, file = API.fullmatch(path), RESOLVE.fullmatch(path)
        if api:
            kind, name, what, revision, inside = api.groups()
        elif file:
            kind, name, revision, inside = file.groups()
            kind, what = kind.strip("/") or "models", "file"
        else:
            return self.refuse(404, "")
        if name in self.hub.refusals:
            return self.refuse(*self.hub.refusals[name])
        if (kind, name) not in self.hub.refs:
            return self.refuse(401, "RepoNotFound")
        refs, commits = self.hub.refs[kind, name], self.hub.commits[kind, name]
        commit = refs.get(revision or "main", revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        files = commits[commit]
        if what == "file":
            return self.file(files, commit, inside)
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self.json({"id": name, "sha": commit, "siblings": siblings, "private": False,
                              "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})
        if what == "paths-info":
            wanted = self.form["paths"]
            return self.json([entry for entry in entries(files, "", True) if entry["path"] in wanted])
        found = entries(files, inside or "", parse_qs(url.query).get("recursive") == ["true"])
        return self.json(found) if found else self.refuse(404, "EntryNotFound")

    def file(self, files, commit, path):
        if path not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        content, start, status = files[path], 0, 200
        size = len(content)
        if self.headers.get("Range"):
            start, status = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]), 206
        self.send_response(status)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{sha1(content)}"')
        self.send_header("Content-Length", str(size - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.hub.cuts:
            self.wfile.write(content[start:self.hub.cuts.pop(path)])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, headers=()):
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "Content-Length": "0", **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()


def entries(files, folder, recursive):
    """What the hub lists of a folder: files, and the folders in it."""
    prefix, found, folders = f"{folder}/" if folder else "", [], set()
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folders.add(prefix + "/".join(parts[:depth]))
        if recursive or len(parts) == 1:
            found.append({"type": "file", "path": path, "size": len(content), "oid": sha1(content)})
    for folder in sorted(folders):
        found.append({"type": "directory", "path": folder, "oid": sha1(folder.encode())})
    return found
