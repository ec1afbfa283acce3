"""An endpoint used to its limit, faults survived, kills without a repeated call, tokens of two protocols; against servers on this machine."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
from _bench import report

from saerad.core import read_table, write_table
from saerad.interpretation.endpoint import Endpoint, EndpointConfig, Ledger
from saerad.interpretation.exemplars import ExemplarsConfig, collect_exemplars
from saerad.interpretation.hard_negatives import add_hard_negatives
from saerad.interpretation.interpret import InterpretationConfig, interpret

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from word_server import WordServer, completion  # noqa: E402
from word_world import make_sae, make_store  # noqa: E402

OPEN = SimpleNamespace(may_leave=True)
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


def held_rate(calls):
    """Answers a second from first to last, and calls sent per answer."""
    port = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.sqlite")
            config = EndpointConfig(base_url=f"http://127.0.0.1:{port.get(timeout=60)}/v1", model="bench", attempts=50)
            endpoint = Endpoint(config, ledger, may_leave=True)
            begin = time.perf_counter()
            with ThreadPoolExecutor(config.concurrency) as pool:
                list(pool.map(lambda i: endpoint.ask([{"role": "user", "content": f"context {i}"}], 20), range(calls)))
            taken, asked = time.perf_counter() - begin, endpoint.asked
            ledger.close()
    finally: server.terminate()
    return calls / taken, asked / calls


def world(folder, features=None):
    """Exemplars of the word world, of the first `features` that have enough contexts."""
    store, sae = make_store(folder / "store"), make_sae()
    cfg = ExemplarsConfig(min_explain=5, min_score=5, explain_from="deciles")
    collect_exemplars(store, sae, cfg, 0, folder / "exemplars")
    add_hard_negatives(store, sae, cfg, 0, folder / "exemplars")
    keep(folder / "exemplars", features)
    return folder / "exemplars"


def keep(exemplars, features):
    """Leave only some features that may be interpreted."""
    table = read_table(exemplars / "features.parquet").to_pandas()
    rest = table.index[table.status == "ok"][features:] if features else []
    table.loc[rest, "status"] = "dead"
    write_table(exemplars / "features.parquet", pa.Table.from_pandas(table, preserve_index=False))


def settings(server, **changes):
    fields = {"interpreter": "openai", "model": "words", "base_url": server.url, "concurrency": 8, "requests_per_second": 500.0, "bootstrap": 50,
              "timeout_s": 2.0, **changes}
    return InterpretationConfig(**fields)


FAULTS = {"429": (429, {"retry-after": "0.05"}, "{}"), "500": (500, {}, "oops"), "time-out": "late", "dropped": "drop",
          "cut JSON": (200, {}, completion("[1, 0")[:40]), "refusal": (200, {}, completion(None, refusal="I cannot.")),
          "wrong length": (200, {}, completion("[1, 0, 1]"))}


def survive(folder, exemplars):
    """One reply in five goes wrong, each kind in turn: {kind: times} and how the features ended."""
    sent, lock = Counter(), threading.Lock()
    def trouble(number, body):
        if number % 5: return None
        kind = list(FAULTS)[number // 5 % len(FAULTS)]
        with lock: sent[kind] += 1
        if FAULTS[kind] == "late": time.sleep(2.5)
        return None if FAULTS[kind] == "late" else FAULTS[kind]
    with WordServer(trouble) as server: table = interpret(exemplars, settings(server), 0, OPEN, folder / "faults")
    ok = read_table(exemplars / "features.parquet").to_pandas().status == "ok"
    ended = table[ok.to_numpy()]
    named = (ended.status == "scored") | (ended.reason != "")
    return sent, {"features": len(ended), "scored": int((ended.status == "scored").sum()), "lost": int((~named).sum()),
                  "parse_failures": int(ended.parse_failures.sum()), "refusals": int(ended.refusals.sum())}


KILLED = """
import sys
from types import SimpleNamespace
from saerad.interpretation.interpret import InterpretationConfig, interpret
interpret(sys.argv[2], InterpretationConfig.model_validate_json(sys.argv[1]), 0, SimpleNamespace(may_leave=True), sys.argv[3])
"""


def known(ledger):
    """Requests whose answers are in a ledger."""
    if not ledger.exists(): return set()
    book = Ledger(ledger)
    rows = {row[0] for row in book.db.execute("SELECT request FROM calls")}
    book.close()
    return rows


def kill_and_go_on(folder, exemplars, kills):
    """Answers asked for again after `kills` kills at random moments, calls of the replay, and calls in all against those of a run in peace."""
    out, repeated = folder / "cut", 0
    with WordServer(latency=0.03) as server:
        cfg = settings(server, concurrency=4, shuffled=False, timeout_s=20.0)
        run = [sys.executable, "-c", KILLED, cfg.model_dump_json(), str(exemplars), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for i in range(kills):
            before, asked = known(out / "ledger.sqlite"), len(server.bodies)
            process = subprocess.Popen(run, env=environment, stdout=subprocess.DEVNULL)
            wanted = asked + random.Random(i).randint(3, 25)
            while len(server.bodies) < wanted and process.poll() is None: time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            repeated += sum(json.dumps(b, ensure_ascii=False, sort_keys=True) in before for b in server.bodies[asked:])
        interpret(exemplars, cfg, 0, OPEN, out)
        whole = len(server.bodies)
        interpret(exemplars, cfg, 0, OPEN, out)
        replay, answers = len(server.bodies) - whole, len(known(out / "ledger.sqlite"))
        return {"kills": kills, "repeated": repeated, "calls": whole, "answers": answers, "replay": replay}


def phantom(folder, features):
    """Exemplars of a small phantom run, for each protocol as it wants them."""
    from saerad.activations.extraction import ExtractionConfig, extract
    from saerad.sae.model import SAEConfig
    from saerad.sae.training import TrainingConfig, train_sae
    from saerad.studies.record import StudiesConfig
    from saerad.studies.sources import open_source
    from saerad.subjects.subject import SubjectConfig, open_subject
    source = open_source(StudiesConfig(source="phantom:0", train_patients=120, validation_patients=4, test_patients=60))
    store = extract(source, open_subject(SubjectConfig(model="mini")), ExtractionConfig(layer=4), folder / "activations")
    sae = train_sae(store, SAEConfig(), TrainingConfig(steps=250, batch_size=1024, lr=2e-3, threshold_beta=0.95), 0, folder / "sae")
    for name, order in (("paper", "top"), ("saerad", "deciles")):
        cfg = ExemplarsConfig(explain_from=order)
        collect_exemplars(store, sae, cfg, 0, folder / name)
        add_hard_negatives(store, sae, cfg, 0, folder / name)
        keep(folder / name, features)


def tokens(folder, features):
    """Tokens sent a feature (characters over 3.5) and median F1, with and without near misses, of both protocols, by the same small mind."""
    phantom(folder, features)
    found = {}
    for name in ("paper", "saerad"):
        with WordServer() as server:
            table = interpret(folder / name, settings(server, protocol=name, timeout_s=20.0), 0, OPEN, folder / f"said-{name}")
        scored = table[table.status == "scored"]
        sent = sum(len(m["content"]) for b in server.bodies for m in b["messages"]) / 3.5 / max(len(scored), 1)
        found[name] = {"tokens": sent, "calls": len(server.bodies) / max(len(scored), 1), "f1": scored.f1, "near_f1": scored.near_f1}
    return found


def measure(quick):
    rate, sent = held_rate(600 if quick else 3000)
    mine, peers = {"endpoint_rate": rate, "sent_per_answer": sent}, {"endpoint_rate": RATE}
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        exemplars = world(folder / "world", 2 if quick else 12)
        faults, ended = survive(folder, exemplars)
        mine |= {f"fault {k}": n for k, n in faults.items()} | ended | kill_and_go_on(folder, exemplars, 2 if quick else 10)
        if not quick:
            both = tokens(folder / "phantom", 40)
            for name, side in (("saerad", mine), ("paper", peers)):
                said = both[name]
                side |= {"tokens a feature": said["tokens"], "calls a feature": said["calls"], "median F1": float(said["f1"].median())}
            mine["near F1"] = float(both["saerad"]["near_f1"].median())
            mine["F1 difference"] = float((both["saerad"]["f1"] - both["paper"]["f1"]).mean())
    shape = f"limit {RATE:g} calls a second, {1000 * LATENCY:g} ms each; one reply in five faulty; `peers` holds the paper's protocol"
    return shape, mine, peers, {"endpoint_rate": rate / RATE}


if __name__ == "__main__": report("interpretation", measure)
