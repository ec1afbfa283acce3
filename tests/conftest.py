"""What several tests share: a small dictionary, and a real browser (tests of pages are skipped, with the reason, where there is none)."""
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available(): os.environ["TRITON_INTERPRET"] = "1"       # before anything imports Triton, for the tests of its kernels

from saerad.sae.model import MatryoshkaSAE, SAEConfig

gc.set_threshold(50_000, 20, 100)      # what torch and others hold for good is looked through less often: a twelfth of a small run
# Tests of one room use worlds that those of another have made.
sys.path += [str(folder) for folder in Path(__file__).parent.iterdir() if folder.is_dir()]

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None)


def pytest_runtest_setup(item):
    """Where `SAERAD_LATE` says when it gets late (.ci/run), what cannot begin before is skipped and says so."""
    if time.time() > float(os.environ.get("SAERAD_LATE", "inf")): pytest.skip("no time left; `make test` runs it")


class Browser:
    """Pages whose errors and requests are written down."""
    def __init__(self, context):
        self.context, self.errors, self.asked = context, [], []

    def page(self, width=1400):
        page = self.context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: self.asked.append(r.url))
        return page


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None: pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    profile = tempfile.mkdtemp()
    with api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS, accept_downloads=True)
        yield context
        context.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def browser(chromium):
    """A browser that must end without an error on the console and without a request that leaves the disk."""
    one = Browser(chromium)
    yield one
    for page in chromium.pages: page.close()
    assert one.errors == [] and all(url.startswith(("file:", "data:", "blob:", "about:")) for url in one.asked)


AXE = "axe-core@4.10.3"       # MPL-2.0; half a megabyte that only these tests need, so it is fetched and not kept here
AXE_SHA256 = "880970c081707360e64f34cea25ff91892f5bc95675b0776925b9709dd8a68bb"


@pytest.fixture(scope="session")
def axe(pytestconfig) -> str:
    """The source of axe-core, which finds violations of WCAG in a page; from npm once, then from the tests' cache."""
    kept = pytestconfig.cache.mkdir("axe") / f"{AXE}.js"
    if not kept.is_file():
        if not shutil.which("npm"): pytest.skip("no npm on this machine to fetch axe-core with")
        with tempfile.TemporaryDirectory() as folder:
            try: subprocess.run(["npm", "pack", AXE, "--silent"], cwd=folder, check=True, timeout=90, capture_output=True)
            except (subprocess.SubprocessError, OSError): pytest.skip("npm could not fetch axe-core")
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as package: source = package.extractfile("package/axe.min.js").read()
        kept.write_bytes(source)
    source = kept.read_bytes()
    assert hashlib.sha256(source).hexdigest() == AXE_SHA256, "this is not the axe-core that was chosen"
    return source.decode()


WCAG = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")


def violations(page, axe: str, rule: str = "") -> list[tuple[str, str, str]]:
    """(rule, first place, why) of everything on the page that violates WCAG 2.2 A or AA, or one `rule` of axe-core."""
    page.evaluate(f"() => {{ if (!window.axe) {{ {axe}; }} }}")
    only = {"type": "rule", "values": [rule]} if rule else {"type": "tag", "values": list(WCAG)}
    found = page.evaluate("only => axe.run(document, { preload: false, resultTypes: ['violations'], runOnly: only })", only)
    return [(v["id"], v["nodes"][0]["html"][:150], v["nodes"][0]["failureSummary"]) for v in found["violations"]]


@pytest.fixture
def sae() -> MatryoshkaSAE:
    """A small dictionary of five levels, none of whose numbers is a default."""
    sae = MatryoshkaSAE.from_config(16, SAEConfig(k=8, level_weights=(1, 1, 2, 2, 4)), seed=3)
    draw = torch.Generator().manual_seed(1)
    sae.b_dec.data = torch.randn(16, generator=draw) * 0.1
    sae.b_enc.data = torch.randn(64, generator=draw) * 0.1
    sae.threshold.fill_(0.2)
    sae.scale.fill_(7.5)
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 3


class Rows:
    """What is asked of a store by those who only read its rows."""
    def __init__(self, x): self.x, self.d = x, x.shape[1]
    def __len__(self): return len(self.x)
    def read(self, rows): return self.x[rows]
