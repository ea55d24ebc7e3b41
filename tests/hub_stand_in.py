"""A local stand-in of the Hub's HTTP interface: the routes that pushing and loading tokens use, in memory.

Files are stored as regular ones; the Hub itself may ask for large files and safetensors by another protocol.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

WRITE, READ = "hf_write", "hf_read"
"""Access tokens that may write, and only read."""


_ROUTE = re.compile(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:/(revision|tree|resolve)/([\w.-]+)(?:/(.*))?)?")


class Hub(ThreadingHTTPServer):
    """Repositories by id, each files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.downloads: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, repo: str) -> str:
        """Commit of a repository's present files."""
        return hashlib.sha1(repr(sorted(self.repositories[repo].items())).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, text):
        self.answer(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b"".join(self.chunks())
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        access = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if access != WRITE:
            return self.refuse(403 if access == READ else 401, "", "Forbidden" if access == READ else "Unauthorized")
        if self.path == "/api/repos/create":
            given = json.loads(content)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            status = 409 if repo in self.server.repositories else 200
            self.server.repositories.setdefault(repo, {})
            self.server.private.setdefault(repo, given.get("visibility") == "private" or given.get("private", False))
            return self.answer(status, {"url": f"{self.server.address}/{repo}", "id": repo})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(content)["files"]
            ]
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            return self.commit(found[1], content)
        return self.refuse(404, "", "no such route")

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def commit(self, repo, content):
        for line in content.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                self.server.commits.append(item["value"]["summary"])
            else:
                assert item["key"] == "file"
                file = item["value"]
                self.server.repositories[repo][file["path"]] = base64.b64decode(file["content"])
        commit = self.server.revision(repo)
        url = f"{self.server.address}/{repo}/commit/{commit}"
        return self.answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        found = _ROUTE.fullmatch(path)
        if found is None:
            return self.refuse(404, "", "no such route")
        repo, route, revision, name = found.groups()
        if repo not in self.server.repositories:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        files, commit = self.server.repositories[repo], self.server.revision(repo)
        if revision not in (None, "main", commit):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if route == "tree":
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": oids[path]} for path in files]
            return self.answer(200, entries)
        if route != "resolve":
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, {"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if self.command == "GET":
            self.server.downloads.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
