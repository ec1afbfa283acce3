"""A real OpenAI-compatible server for tests and benchmarks: it answers by words, and misbehaves on request."""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WordServer(ThreadingHTTPServer):
    """`with WordServer(trouble) as server: server.url`. `trouble(number, body)` gives None, or (status, headers, text) to send instead.

    It explains a feature by the words that are marked most, and finds a context active when it holds one of the words of the description.
    """
    daemon_threads, request_queue_size = True, 256

    def __init__(self, trouble=lambda number, body: None, latency: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.latency, self.lock = trouble, latency, threading.Lock()
        self.bodies, self.keys, self.started, self.refused = [], set(), [], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
        self.thread.join()


def answer(body: dict) -> str:
    """The reply of a model that can count words."""
    text = body["messages"][1]["content"]
    if text.startswith("Active excerpts"):
        marked = re.findall(r"<<([^>]*)>>", text)
        words = [w for part in marked for w in part.lower().split() if w.isalpha() or w == "[image]"] or ["?"]
        return "They share a word.\n[EXPLANATION]: the words " + " ".join(sorted(set(words), key=lambda w: -words.count(w))[:5])
    description = set(text.splitlines()[0].lower().split())
    return str([int(bool(description & (set(line.lower().replace(".", " ").split()[1:]) - {"the"}))) for line in text.splitlines()[2:]])


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *args): pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.keys.add(self.headers.get("authorization"))
            server.started.append(time.monotonic())
        assert self.path == "/v1/chat/completions"
        wrong = server.trouble(number, body)
        if wrong == "drop": return self._drop()
        time.sleep(server.latency)
        self._send(*(wrong or (200, {}, completion(answer(body)))))

    def _send(self, status: int, headers: dict, text: str):
        data = text.encode()
        self.send_response(status)
        for k, v in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def _drop(self):
        self.close_connection = True
        self.connection.shutdown(2)


def completion(text: str | None, **message) -> str:
    """A chat completion as JSON."""
    finish = message.pop("finish_reason", "stop")
    return json.dumps({"id": "c", "object": "chat.completion", "created": 0, "model": "words",
                       "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
                       "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
