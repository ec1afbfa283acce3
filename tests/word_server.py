"""A real OpenAI-compatible server for tests and benchmarks: it answers by words, and misbehaves on request."""
import json
import math
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WordServer(ThreadingHTTPServer):
    """`with WordServer(trouble) as server: server.url`. `trouble(number, body)` gives None, or (status, headers, text) to send instead.

    It explains a feature by the marked words that tell active excerpts from the others, and finds a context active when it holds them.
    `slots` is how many calls it works on at once, each for `latency` seconds (None: all); `models` what it says it has (None: it does not say).
    """
    daemon_threads, request_queue_size = True, 256

    def __init__(self, trouble=lambda number, body: None, latency: float = 0.0, slots: int | None = None, models=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.latency, self.lock = trouble, latency, threading.Lock()
        self.slots, self.models, self.worked = threading.Semaphore(slots or 10_000), models, []      # when it worked: (start, end)
        self.bodies, self.keys, self.paths, self.started, self.refused, self.headers = [], set(), set(), [], 0, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up or are killed are part of the tests; anything else is told."""
        if not isinstance(sys.exc_info()[1], ConnectionError): super().handle_error(request, client_address)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
        self.thread.join()


LINE = re.compile(r"^\d+\. (?:\[([^\]]*)\] )?(.*)$")


def excerpts(text: str) -> dict[str, list[tuple[set, list, set]]]:
    """For each heading of a prompt its numbered lines: all words, those marked, and what the line's brackets say."""
    found, head = {}, ""
    for line in text.splitlines():
        if m := LINE.match(line.replace("[image]", "(image)")):
            marked = [w for part in re.findall(r"<<([^>]*)>>", m[2]) for w in split(part)]
            found.setdefault(head, []).append((set(split(m[2])), marked, {t for part in (m[1] or "").split("; ") for t in part.split(", ")} - {""}))
        elif line.endswith(":"): head = line[:-1]
    return found


def split(text: str) -> list[str]:
    """Lower-case words and full stops, without marks and levels."""
    return re.findall(r"[a-z]+|\(image\)|\.", re.sub(r"<<|>>\d*", "", text).lower())


def explain(text: str) -> str:
    """Up to four marked words, or a word with something in brackets, that tell active lines from the others best."""
    groups = excerpts(text)
    active, others = groups["Active excerpts"], [line for head, lines in groups.items() if head != "Active excerpts" for line in lines]
    counts = {}
    for _, marked, _ in active:
        for w in set(marked): counts[w] = counts.get(w, 0) + 1
    words = sorted(counts, key=lambda w: (-counts[w], w))[:8]
    told = sorted({t for line in active for t in line[2]})
    options = [(w, t) for w in words for t in ["", *told]]
    def f1(rule):
        hits, wrong = (sum(any(holds(c, words, tags) for c in rule) for words, _, tags in lines) for lines in (active, others))
        return 2 * hits / max(len(active) * (1 + wrong / max(len(others), 1)) + hits, 1)
    rule = []
    while options and len(rule) < 4:
        best = max(options, key=lambda c: (f1([*rule, c]), not c[1]))
        if f1([*rule, best]) < f1(rule) + 0.03: break
        rule.append(best)
    return "; ".join(" + ".join(part for part in c if part) for c in rule or [(words or ["nothing"])[0:1]])


def holds(clause, words: set, tags: set) -> bool:
    return clause[0] in words and (len(clause) < 2 or not clause[1] or clause[1] in tags)


def answer(body: dict) -> str:
    """The reply of a model that can count words."""
    content = body["messages"][1]["content"]
    text = content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content)
    structured = "response_format" in body
    if text.startswith("Active excerpts"):
        said = explain(text)
        return json.dumps({"explanation": said}) if structured else f"They share something.\n[EXPLANATION]: {said}"
    description = re.search(r"^Description: (.*)$", text, re.M)[1]
    rule = [tuple(part.split(" + ")) for part in description.split("; ")]
    lines = [line for group in excerpts(text).values() for line in group]
    fuzzing = "<<" in text
    told = [int(any(holds(c[:1] if fuzzing else c, set(marked) if fuzzing else words, tags) for c in rule)) for words, marked, tags in lines]
    return json.dumps({"active": told}) if structured else str(told)


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
        server.paths.add(self.path)
        assert self.path.split("?")[0].endswith("/chat/completions")
        wrong = server.trouble(number, body)
        if wrong == "drop": return self._drop()
        with server.slots:
            began = time.monotonic()
            time.sleep(server.latency)
            server.worked.append((began, time.monotonic()))
        usage = sum(len(str(m["content"])) for m in body["messages"]) // 4
        self._send(*(wrong or (200, server.headers, completion(answer(body), usage=usage))))

    def do_GET(self):
        if self.path != "/v1/models" or self.server.models is None: return self._send(404, {}, '{"detail": "Not Found"}')
        self._send(200, {}, json.dumps({"object": "list", "data": [{"id": m, "object": "model"} for m in self.server.models]}))

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
    finish, usage, logprobs = message.pop("finish_reason", "stop"), message.pop("usage", 1), message.pop("logprobs", None)
    return json.dumps({"id": "c", "object": "chat.completion", "created": 0, "model": "words",
                       "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message},
                                    "logprobs": logprobs}],
                       "usage": {"prompt_tokens": usage, "completion_tokens": 1, "total_tokens": usage + 1}})


def logprobs(text: str, sure: float) -> dict:
    """Log-probabilities of a reply whose every 0 or 1 was chosen with the probability `sure`, and a letter between."""
    def place(c):
        options = {c: math.log(sure), {"0": "1", "1": "0"}.get(c, "?"): math.log(1 - sure)}
        return {"token": c, "logprob": options[c], "top_logprobs": [{"token": t, "logprob": p} for t, p in options.items()]}
    return {"content": [place(c) for c in text], "refusal": None}


class BatchServer(ThreadingHTTPServer):
    """The files and batches of an OpenAI-compatible endpoint: a batch is done at the `patience`-th question about it."""
    daemon_threads = True

    def __init__(self, patience: int = 2):
        super().__init__(("127.0.0.1", 0), Batches)
        self.files, self.batches, self.patience = {}, {}, patience
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Batches(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def do_POST(self):
        data = self.rfile.read(int(self.headers["content-length"]))
        number = str(len(self.server.files) + len(self.server.batches))
        if self.path == "/v1/files":
            lines = [line for line in data.decode().splitlines() if line.startswith('{"custom_id"')]
            self.server.files[number] = [json.loads(line) for line in lines]
            return self._send({"id": number, "object": "file", "bytes": 1, "created_at": 0, "filename": "q",
                               "purpose": "batch", "status": "processed"})
        assert self.path == "/v1/batches"
        self.server.batches[number] = {"file": json.loads(data)["input_file_id"], "asked": 0}
        self._send(self._batch(number, "validating"))

    def do_GET(self):
        parts = self.path.split("/")
        if parts[2] == "batches":
            batch = self.server.batches[parts[3]]
            batch["asked"] += 1
            return self._send(self._batch(parts[3], "completed" if batch["asked"] >= self.server.patience else "in_progress"))
        asked = self.server.files[parts[3].removeprefix("out-")]
        lines = [{"custom_id": q["custom_id"], "response": {"status_code": 200, "body": json.loads(completion(answer(q["body"])))}} for q in asked]
        self._send("\n".join(map(json.dumps, lines)))

    def _batch(self, number: str, status: str) -> dict:
        file = self.server.batches[number]["file"]
        return {"id": number, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": file, "completion_window": "24h",
                "created_at": 0, "status": status, "output_file_id": f"out-{file}" if status == "completed" else None}

    def _send(self, value):
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(200)
        for k, v in {"content-type": "application/json", "content-length": str(len(data))}.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)
