"""A real HTTP server that keeps repositories of models as the Hugging Face hub does: making one, uploading in a commit, listing, downloading."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub: hub.url`, to be given to a process as HF_ENDPOINT; `hub.repositories[name][path]` are bytes."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.url = {}, f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        """A number that changes with the content, as a commit's does."""
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def reply(self, content: object, status: int = 200, **headers: str):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items(): self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)

    def nothing(self): self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            self.server.repositories.setdefault(name, {})
            return self.reply({"url": f"{self.server.url}/{name}", "name": name})
        how, = re.findall(r"^/api/(validate-yaml|models/.+/(?:preupload|commit)/)", self.path) or [""]
        if how == "validate-yaml": return self.reply({"errors": [], "warnings": []})
        name = re.sub(r"^models/|/(preupload|commit)/$", "", how)
        if name not in self.server.repositories: return self.nothing()
        if how.endswith("/preupload/"):
            files = [f["path"] for f in json.loads(body)["files"]]
            return self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in files]})
        lines = [json.loads(line) for line in body.splitlines() if line]
        files = [x["value"] for x in lines if x["key"] == "file"]
        self.server.repositories[name] |= {f["path"]: base64.b64decode(f["content"]) for f in files}
        number = self.server.commit(name)
        return self.reply({"success": True, "commitOid": number, "commitUrl": f"{self.server.url}/{name}/commit/{number}"})

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
            if found[1] not in self.server.repositories: return self.nothing()
            files = self.server.repositories[found[1]]
            return self.reply({"id": found[1], "sha": self.server.commit(found[1]), "siblings": [{"rfilename": p} for p in files]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/.*)?", path):
            files = self.server.repositories[found[1]]
            return self.reply([{"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in files.items()])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = found and self.server.repositories.get(found[1], {}).get(found[2])
        if content is None: return self.nothing()
        return self.reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.server.commit(found[1]))

    do_HEAD = do_GET
