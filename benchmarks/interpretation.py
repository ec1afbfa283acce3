"""The share of an endpoint's limit that is held: a server on this machine answers after 300 ms and refuses calls above its rate."""
import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from _bench import report

RATE, LATENCY = 50.0, 0.3     # calls a second, seconds
REPLY = {"id": "x", "object": "chat.completion", "created": 0, "model": "bench",
         "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "[1, 0, 1, 0, 1]"}}]}


class Limited(BaseHTTPRequestHandler):
    """Answers at most `RATE` calls a second, from a bucket that holds a fifth of a second, and 429 above that."""
    bucket, filled, lock = RATE / 5, time.monotonic(), threading.Lock()
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *args): pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        with Limited.lock:
            now = time.monotonic()
            Limited.bucket = min(RATE / 5, Limited.bucket + (now - Limited.filled) * RATE)
            Limited.filled, allowed = now, Limited.bucket >= 1
            if allowed: Limited.bucket -= 1
        if allowed: time.sleep(LATENCY)
        body = json.dumps(REPLY if allowed else {"error": {"message": "slow down"}}).encode()
        self.send_response(200 if allowed else 429)
        headers = {"content-type": "application/json", "content-length": str(len(body))} | ({} if allowed else {"retry-after": "0.5"})
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def serve(port):
    """Run the server in a process of its own, so that it takes no time from ours."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Limited)
    port.put(server.server_port)
    server.serve_forever()


def measure(quick):
    from saerad.endpoint import Endpoint, EndpointConfig, Ledger
    calls, port = 1200 if quick else 6000, multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.sqlite")
            config = EndpointConfig(base_url=f"http://127.0.0.1:{port.get(timeout=30)}/v1", model="bench", attempts=50)
            endpoint = Endpoint(config, ledger, may_leave=True)
            begin = time.perf_counter()
            with ThreadPoolExecutor(config.concurrency) as pool:
                list(pool.map(lambda i: endpoint.ask([{"role": "user", "content": f"context {i}"}], 20), range(calls)))
            rate = calls / (time.perf_counter() - begin)
            asked = endpoint.asked
            ledger.close()
    finally: server.terminate()
    return (f"{calls} calls, limit {RATE:g} a second, {1000 * LATENCY:g} ms each; answers a second from first to last, calls sent per answer",
            {"endpoint_rate": rate, "sent_per_answer": asked / calls}, {"endpoint_rate": RATE}, {"endpoint_rate": rate / RATE})


if __name__ == "__main__": report("interpretation", measure)
