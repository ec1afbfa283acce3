"""A real OpenAI-compatible server that judges pairs of reports by whether they are equal."""
import json
import threading
from http.server import ThreadingHTTPServer

from word_server import Handler, completion


class JudgeServer(ThreadingHTTPServer):
    """`with JudgeServer(trouble) as server: server.url`; `trouble(number, body)` gives None or (status, headers, text) to send instead."""
    daemon_threads, request_queue_size, latency = True, 256, 0.0

    def __init__(self, trouble=lambda number, body: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.bodies, self.keys, self.paths, self.started, self.headers = threading.Lock(), [], set(), set(), [], {}
        self.trouble = lambda number, body: trouble(number, body) or (200, {}, completion(self.verdict(body["messages"][1]["content"])))
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    @staticmethod
    def verdict(text: str) -> str:
        """The answer of a judge that can only tell whether two texts are equal."""
        first, second = text.split("Baseline:\n")[1].split("\n\nSecond report:\n")
        return json.dumps({"outcome": "unchanged" if first == second else "mixed", "direction": int(len(second) > len(first))})

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
        self.thread.join()
