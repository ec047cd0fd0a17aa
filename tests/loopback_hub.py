"""A stand-in for the Hub on 127.0.0.1: enough of its API for one commit up and `from_pretrained` down. Stdlib only.

Weights go by LFS, everything else inside the commit, as on the real one. It is a server and no mocked client, so
huggingface_hub 1.x (httpx) and 2.x (httpx2) both talk to it.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_loopback"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.branches = {"main": {}}  # name -> {path: bytes}
        self.commits = []  # (branch, message, number of files)

    def sha(self, branch: str) -> str:
        return hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()

    def files(self, revision: str):
        """The files of a branch, or of the commit at its tip; None where there is no such revision."""
        return next((f for name, f in self.branches.items() if revision in (name, self.sha(name))), None)


class LoopbackHub:
    """`with LoopbackHub() as hub:`; `hub.repos` holds what was pushed, `hub.fail` what goes wrong, `hub.log` every
    request.
    """

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        # regular expression over "METHOD path" -> status, "hang up", "lose the answer"
        self.fail: dict[str, int | str] = {}
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, cache) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        names = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_TOKEN": TOKEN}
        off = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        return names | off | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args): ...

    def reply(self, body, code=200, headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what):
        self.reply({"error": what}, 404, {"X-Error-Code": what, "X-Error-Message": what})

    def answer(self):
        url = urlparse(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        line = f"{self.command} {self.route}"
        self.hub.log.append(line)
        problem = next((what for pattern, what in self.hub.fail.items() if re.search(pattern, line)), None)
        size = int(self.headers.get("Content-Length") or 0)
        self.cut = problem == "hang up" and self.command == "GET"  # in the middle of the answer
        if problem == "hang up" and not self.cut:
            self.rfile.read(size // 2)  # in the middle of the body
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.data = self.rfile.read(size) if size else b""
        if problem == "lose the answer":  # what was asked for is done, but nobody hears of it
            self.close_connection = True
            self.reply = lambda *args, **kwargs: self.connection.shutdown(socket.SHUT_RDWR)
        elif problem is not None and not self.cut:
            return self.reply({"error": f"the loopback Hub answers {problem}"}, problem)
        writes = self.command in ("POST", "DELETE") and not self.route.endswith("validate-yaml")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in method:
                return function(self, *found.groups())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    # ---- repositories ----------------------------------------------------------------------------------------------

    def create(self):
        asked = json.loads(self.data)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def delete(self):
        asked = json.loads(self.data)
        del self.hub.repos[f"{asked.get('organization') or 'me'}/{asked['name']}"]
        return self.reply({})

    def branch(self, repo, name):
        branches = self.hub.repos[repo].branches
        if name in branches:
            return self.reply({"error": "Reference already exists"}, 409)
        branches[name] = dict(branches["main"])
        return self.reply({})

    def whoami(self):
        self.reply(
            {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}
        )

    # ---- up --------------------------------------------------------------------------------------------------------

    def preupload(self, repo, revision):
        if repo not in self.hub.repos:
            return self.missing("RepoNotFound")
        if self.hub.repos[repo].files(revision) is None:
            return self.missing("RevisionNotFound")
        files = [
            {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
            for f in json.loads(self.data)["files"]
            for mode in ["lfs" if f["path"].endswith(".safetensors") else "regular"]
        ]
        return self.reply({"files": files})

    def lfs_batch(self, repo):
        objects = []
        for wanted in json.loads(self.data)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def put_blob(self, oid):
        if hashlib.sha256(self.data).hexdigest() != oid:
            return self.reply({"error": "checksum"}, 400)
        self.hub.blobs[oid] = self.data
        return self.reply({})

    def commit(self, repo, revision):
        repository = self.hub.repos[repo]
        target, pull_request = revision, "create_pr" in self.query
        if pull_request:
            target = f"refs/pr/{1 + sum(name.startswith('refs/pr') for name in repository.branches)}"
        files = dict(repository.branches["main" if pull_request else revision])
        lines = [json.loads(line) for line in self.data.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repository.branches[target] = files
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        repository.commits.append((target, summary, len(lines) - 1))
        sha = repository.sha(target)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}
        self.reply(answer | {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/1"} if pull_request else answer)

    # ---- down ------------------------------------------------------------------------------------------------------

    def info(self, repo, revision=None):
        if repo not in self.hub.repos:
            return self.missing("RepoNotFound")
        repository, revision = self.hub.repos[repo], revision or "main"
        files = repository.files(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        sha = revision if revision not in repository.branches else repository.sha(revision)
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "tags": []}
        return self.reply(about | {"siblings": siblings})

    def tree(self, repo, revision):
        if repo not in self.hub.repos:
            return self.missing("RepoNotFound")
        files = self.hub.repos[repo].files(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        entries = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files.items()]
        return self.reply(entries)

    def resolve(self, repo, revision, path):
        if repo not in self.hub.repos:
            return self.missing("RepoNotFound")
        repository = self.hub.repos[repo]
        files = repository.files(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        if path not in files:
            return self.missing("EntryNotFound")
        sha = revision if revision not in repository.branches else repository.sha(revision)
        etag = hashlib.sha1(files[path]).hexdigest()
        return self.reply(files[path], headers={"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"})


_REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", lambda handler: handler.reply({"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", Handler.branch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/blobs/([0-9a-f]+)", Handler.put_blob),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET HEAD", rf"/api/models/{_REPO}/tree/([^/]+|refs/pr/\d+)", Handler.tree),
    ("GET HEAD", rf"/api/models/{_REPO}/revision/(.+)", Handler.info),
    ("GET HEAD", rf"/api/models/{_REPO}", Handler.info),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+|refs/pr/\d+)/(.+)", Handler.resolve),
]
