"""Questions of one's own: what a sentence, a radiograph and a study make the features do; at a prompt, and over a server for its own pages alone."""
import html
import http.client
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml
from conftest import Browser, violations
from PIL import Image

from saerad.activations.extraction import residuals
from saerad.core import UserError
from saerad.run.cli import main
from saerad.sae.model import MatryoshkaSAE
from saerad.show.ask import (
    Asker,
    AtlasServer,
    compare_answers,
    finding_named,
    own_port,
    part_that_differs,
    question_of,
    serve_atlas,
    without_images,
    word_by_word,
)
from saerad.show.atlas import write_atlas
from saerad.show.lab import open_run
from saerad.subjects.subject import layers_path

SENTENCE, NASTY = "There is a small left pleural effusion.", "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The bundled mini, an SAE that has learned nothing, and its atlas."
    folder = tmp_path_factory.mktemp("asked")
    studies = {"source": "phantom:0", "train_patients": 2, "validation_patients": 1, "test_patients": 12}
    settings = {"studies": studies, "subject": {"model": "mini"}, "extraction": {"layer": 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    torch.manual_seed(0)
    sae = MatryoshkaSAE(256, [32, 96], 8)
    sae.threshold.fill_(0.03)
    sae.scale.fill_(20.0)
    sae.save(folder / "sae")
    write_atlas(folder)
    return open_run(folder)


@pytest.fixture(scope="module")
def asker(run): return run.asker


@pytest.fixture(scope="module")
def answer(asker): return asker.ask(SENTENCE)


# ---- what is asked --------------------------------------------------------------------------------------------------

def test_an_answer_is_what_the_sae_makes_of_every_token(asker, answer):
    prompt = answer.reading.prompt
    assert "".join(answer.reading.tokens[i] for i in answer.places()).strip() == SENTENCE and (prompt.section == "image").sum() == 64
    z = asker.sae.encode(residuals(asker.subject, [prompt], 4)[0].float()).numpy()
    rows = answer.features()
    mine = z[answer.places()]
    assert set(rows.feature) == set(np.flatnonzero(mine.max(0))) and np.allclose(rows.peak, mine.max(0)[rows.feature], atol=1e-4)
    assert (rows.words == (mine > 0).sum(0)[rows.feature]).all() and rows.telling.is_monotonic_decreasing
    for feature, word in zip(rows.feature[:5], rows.strongest[:5], strict=True):
        assert answer.reading.tokens[answer.places()[mine[:, feature].argmax()]] == word
    place = answer.places()[3]
    assert dict(answer.on_token(place, 999)) == pytest.approx({f: z[place, f] for f in np.flatnonzero(z[place])}, abs=1e-4)


def test_the_radiograph_is_the_studys_own_anothers_a_files_or_none(asker, tmp_path):
    own = asker.ask(SENTENCE, study="p000059-s2")
    assert "p000059-s2" in own.shown and "indication" in own.reading.prompt.section
    other = asker.ask(SENTENCE, study="p000059-s2", view="p000013-s1")
    assert "p000013-s1" in other.shown and other.laid_out.prior is None and len(compare_answers(own, other, "image"))
    Image.fromarray(asker.run.source["p000013-s1"].views["frontal"].array()).save(tmp_path / "film.png")
    file = asker.ask(SENTENCE, study="p000059-s2", view=str(tmp_path / "film.png"))
    assert not len(compare_answers(other, file, "image")) and file.shown == "the image film.png"
    none = asker.ask(SENTENCE, view="none")
    assert not (none.reading.prompt.section == "image").any() and "not trained" in none.shown and np.isfinite(none.reading.z.data).all()
    assert none.films() == [] and none.reading.z.nnz


def test_one_film_of_a_study_can_be_shown_and_two_of_one_study_compared(asker):
    study = asker.run.source["p000059-s2"]
    now, before = (asker.ask(SENTENCE, study=study.study, view=f"{study.study}/{film}") for film in ("frontal", "prior"))
    assert before.shown == "the prior film of study p000059-s2" and [film["view"] for film in before.films()] == ["frontal"]
    assert (before.laid_out.views["frontal"].array() == study.prior.views["frontal"].array()).all() and before.laid_out.truth is study.prior.truth
    assert part_that_differs(now, before) == "image" and len(compare_answers(now, before)) and now.laid_out.truth is study.truth
    with pytest.raises(UserError, match="p000059-s2 has no film 'oblique'; it has frontal"): asker.ask(SENTENCE, view="p000059-s2/oblique")


def test_a_radiograph_and_none_are_compared_on_what_the_words_have_seen(asker):
    film, none = asker.ask(SENTENCE), asker.ask(SENTENCE, view="none")
    found = compare_answers(film, none)
    fired = {*film.features().feature, *none.features().feature}
    assert part_that_differs(film, none) == "report" and len(found) and set(found.feature) <= fired
    assert not len(compare_answers(none, asker.ask(SENTENCE, view="none"))) and not len(compare_answers(none, none, "image"))
    both = asker.reply({"text": SENTENCE, "against": {"text": SENTENCE, "view": "none"}})
    assert both["part"] == "report" and [d["feature"] for d in both["differences"]] == found.feature.tolist()


def test_each_word_has_a_line_with_its_features(answer):
    lines = word_by_word(answer, 2).split("\n")
    assert [line.split()[0] for line in lines] == [answer.reading.tokens[i].strip() for i in answer.places()]
    for line, place in zip(lines, answer.places(), strict=True):
        assert re.findall(r" (\d+) \(", line) == [str(f) for f, _ in answer.on_token(place, 2)]


def test_a_study_alone_is_read_with_its_own_findings(asker):
    study = asker.run.source["p000059-s1"]
    assert asker.ask(study=study.study).text == study.sections["findings"]


def test_a_painted_finding_changes_the_patches_and_not_the_words_that_were_given(asker):
    plain, made = (asker.ask(SENTENCE, view="p000059-s2", paint=paint) for paint in (None, "left effusion"))
    changed = compare_answers(plain, made, "image", None)
    assert len(changed) and "painted left effusion" in made.shown and plain.text == made.text
    again = compare_answers(made, plain, "image", None).set_index("feature").change
    assert (again + changed.set_index("feature").change == 0).all()
    assert [box["name"] for film in made.films() if film["view"] == "frontal" for box in film["boxes"]] == ["left effusion"]


def test_what_differs_is_in_the_order_of_what_it_tells(asker, answer):
    found = compare_answers(answer, asker.ask("There is no left pleural effusion."), count=None)
    assert np.allclose(found.change, found.second - found["first"])
    assert found.change.abs().is_monotonic_decreasing, "nobody has counted densities here, so all features are worth the same"
    assert not len(compare_answers(answer, asker.ask(SENTENCE)))


@pytest.mark.parametrize("asked, words", [({"text": "  "}, "no text"), ({"study": "nobody"}, "has no study nobody"),
                                          ({"text": "A.", "view": "nobody"}, "neither a study"),
                                          ({"text": "A.", "view": "x" * 5000}, "neither a study"),
                                          ({"text": "word " * 3000}, "shorten it"),
                                          ({"text": "A.", "paint": "left dragon"}, "no finding that can be painted"),
                                          ({"text": "An <image> here."}, "special token"), ({}, "no text")])
def test_what_cannot_be_asked_is_said_in_one_sentence(asker, asked, words):
    with pytest.raises(UserError, match=words) as told: asker.ask(**asked)
    assert str(told.value).count("\n") == 0


def test_only_the_phantoms_radiographs_can_be_painted(asker, tmp_path):
    Image.fromarray(np.arange(112 * 112, dtype=np.uint8).reshape(112, 112)).save(tmp_path / "film.png")
    with pytest.raises(UserError, match="only the phantom's"): asker.ask(SENTENCE, view=str(tmp_path / "film.png"), paint="left effusion")
    assert finding_named("Endotracheal Tube").kind == "endotracheal_tube" and finding_named("right nodule").side == "right"


def test_image_tokens_are_cut_with_all_that_belongs_to_them(asker, answer):
    cut = without_images(answer.reading.prompt)
    keep = answer.reading.prompt.section != "image"
    assert len(cut) == keep.sum() == len(cut.section) == len(cut.start) and cut.pixels is None and cut.views == ()
    assert cut.ids.tolist() == answer.reading.prompt.ids[torch.from_numpy(keep)].tolist()


def test_a_question_costs_one_pass_of_the_model(asker):
    """How long it takes is measured by `saerad bench questions`."""
    passes, layers = [], asker.subject.model.get_submodule(layers_path(asker.subject.model))
    hooks = [layers[i].register_forward_pre_hook(lambda *_, i=i: passes.append(i)) for i in (0, asker.layer, asker.layer + 1)]
    try:
        for text in ("No pneumothorax.", SENTENCE): asker.ask(text).as_json()
    finally:
        for hook in hooks: hook.remove()
    assert passes == 2 * [0, asker.layer], "the layers above the SAE's are not needed"


def test_a_pair_is_measured_on_the_weights(asker):
    w = asker.sae.W_dec.detach()
    found = asker.pair(3, 40)
    assert found["decoder_cosine"] == pytest.approx(float(torch.cosine_similarity(w[3], w[40], dim=0)), abs=1e-5) and "tokens" not in found
    with pytest.raises(UserError, match="no feature 128"): asker.pair(3, 128)


def test_text_stays_text_in_a_notebook(asker):
    shown = asker.ask(f"A {NASTY} effusion")._repr_html_()
    assert "<img" not in shown and "&lt;" in shown and NASTY in html.unescape(re.sub("<[^>]*>", "", shown))


# ---- at a prompt ----------------------------------------------------------------------------------------------------

def test_the_prompt_answers_in_lines_and_in_json(run, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end: main(["ask", str(run.folder), *arguments])
        return end.value.code, capsys.readouterr()
    code, out = call(SENTENCE, "--count", "3")
    assert code == 0 and out.out.count("\n") == 9 and f'"{SENTENCE}"' in out.out and "index.html#feature=NUMBER" in out.out
    code, out = call(SENTENCE, "--against", "No effusion.", "--json")
    found = json.loads(out.out)
    assert code == 0 and found["text"] == SENTENCE and found["against"]["text"] == "No effusion."
    code, out = call(SENTENCE, "--against-view", "none", "--words")
    assert code == 0 and "peaks on the words of the report" in out.out and re.search(r"(?m)^effusion +\d+ \(", out.out)
    code, out = call(SENTENCE, "--study", "nobody")
    assert code == 2 and out.err.startswith("saerad: ") and out.err.count("\n") == 1
    assert call()[0] == 2


# ---- in the browser -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(asker):
    one = AtlasServer(asker)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


def request(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read().decode("utf-8", "replace"), dict(reply.getheaders())


def ask(server, question, **headers): return request(server, "POST", "/ask", json.dumps(question), **{"Content_Type": "application/json"} | headers)


def test_the_server_answers_as_the_run_does(server, answer):
    status, text, headers = ask(server, {"text": SENTENCE})
    found = json.loads(text)
    assert status == 200 and [f["feature"] for f in found["features"]] == answer.features(count=40).feature.tolist()
    assert "default-src 'self'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert "".join(t for t, s in zip(found["tokens"], found["sections"], strict=True) if s == "findings").strip() == SENTENCE
    both = json.loads(ask(server, {"text": SENTENCE, "against": {"text": "No effusion."}})[1])
    assert both["part"] == "report" and both["differences"] and both["against"]["text"] == "No effusion."


@pytest.mark.parametrize("headers", [{"Origin": "https://elsewhere.example"}, {"Host": "elsewhere.example"}, {"Host": "elsewhere.example:80"},
                                     {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
                                     {"Content_Type": "text/plain"}, {"Content_Type": "application/x-www-form-urlencoded"}])
def test_pages_of_others_get_no_answer(server, headers):
    status, text, _ = ask(server, {"text": SENTENCE}, **headers)
    assert status in (403, 415) and "features" not in text


def test_a_page_of_another_server_cannot_read_the_atlas_as_a_script(server, chromium, tmp_path):
    """The atlas's data are calls of functions, which any page could define for itself and then ask for the script."""
    address = server.url.replace("index.html", "data/table.js")
    script = "var saerad = { start: table => { document.title = table.rows.length; } };"
    (tmp_path / "index.html").write_text(f"<title>nothing</title><script>{script}</script><script src='{address}'></script>", encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"http://localhost:{other.server_port}/index.html")
        assert page.title() == "nothing"
        page.close()
        other.shutdown()
    for site, mode, dest, status in (("cross-site", "no-cors", "script", 403), ("same-site", "no-cors", "image", 403),
                                     ("same-origin", "no-cors", "script", 200), ("cross-site", "navigate", "iframe", 403),
                                     ("cross-site", "navigate", "document", 200), ("none", "navigate", "document", 200)):
        headers = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": dest}
        got, _, sent = request(server, "GET", "/atlas/data/table.js", **headers)
        assert (got, sent["Cross-Origin-Resource-Policy"]) == (status, "same-origin"), headers


def test_a_run_is_served_at_the_same_address_each_time_and_elsewhere_where_that_is_taken(asker, monkeypatch):
    """What a browser keeps, it keeps by address."""
    ports = []
    monkeypatch.setattr(AtlasServer, "serve_forever", lambda self: ports.append(self.server_port))
    for _ in range(2): serve_atlas(asker.run, show=False)
    with AtlasServer(asker, own_port(asker.run)): serve_atlas(asker.run, show=False)
    assert ports[:2] == [own_port(asker.run)] * 2 and ports[2] != ports[0]
    with AtlasServer(asker) as taken, pytest.raises(UserError, match=f"port {taken.server_port} cannot be had"):
        serve_atlas(asker.run, taken.server_port, show=False)


@pytest.mark.parametrize("path", ["/config.yaml", "/atlas/../config.yaml", "/atlas/%2e%2e/config.yaml", "//etc/passwd", "/sae/sae.safetensors",
                                  "/atlas/..%2fconfig.yaml", "/atlas", "/nothing", "/atlas/%00"])
def test_nothing_but_the_atlas_is_given_out(server, path):
    status, text, _ = request(server, "GET", path)
    assert status == 404 and "studies" not in text


@pytest.mark.parametrize("sent", [b"{", b"[]", b'{"words": "a"}', b'{"text": 3}', b'{"text": "' + b"a" * 30_000 + b'"}', b'{"text": ""}',
                                  b'{"text": "A.", "view": "/etc/passwd"}',
                                  b'{"text": "A.", "view": "' + b"a" * 9_000 + b'"}', b'{"text": "A.", "against": 3}', b""])
def test_a_broken_question_is_refused_in_one_sentence(server, sent):
    status, text, _ = request(server, "POST", "/ask", sent, Content_Type="application/json")
    assert status == 400 and len(json.loads(text)["error"]) > 10


def test_a_published_edition_answers_without_studies(run, asker):
    with AtlasServer(asker) as server:
        server.private = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = json.loads(ask(server, {"text": SENTENCE})[1])
        assert found["films"] == [] and "study" not in found["shown"] and found["features"]
        for question in ({"study": "p000059-s1"}, {"text": "A.", "view": "p000059-s1"}, {"text": "A.", "against": {"view": "p000059-s1"}}):
            assert ask(server, question)[0] == 400
        assert request(server, "GET", "/ask/study?id=p000059-s1")[0] == 400 and json.loads(request(server, "GET", "/ask/studies")[1]) == []
        server.shutdown()


@pytest.fixture
def served(chromium, server):
    "A browser that may ask this server and nobody else."
    one = Browser(chromium)
    yield one
    for page in chromium.pages: page.close()
    assert one.errors == [] and all(url.startswith((server.url.partition("/atlas")[0], "data:", "blob:", "about:")) for url in one.asked)


def test_a_sentence_is_asked_on_the_first_page(served, server, answer):
    page = served.page()
    page.goto(server.url)
    page.fill("#sentence", SENTENCE)
    page.keyboard.press("Enter")
    page.wait_for_selector("#page .firing tbody tr")
    rows = [int(a) for a in page.locator("#page .firing th a").all_inner_texts()]
    assert rows == answer.features(count=15).feature.tolist() and page.locator("#page .film").count() == 1
    page.click("#page .reading .token >> text=effusion")
    place = [i for i in answer.places() if "eff" in answer.reading.tokens[i]][0]
    assert [int(a) for a in page.locator("#page .says a").all_inner_texts()] == [f for f, _ in answer.on_token(place)]
    page.fill("#page textarea", f"A {NASTY} effusion")
    page.keyboard.press("Enter")
    page.wait_for_selector("#page .reading >> text=onerror")
    assert page.locator("#page .reading img").count() == 0 and "broken" not in page.title()
    page.go_back()
    page.wait_for_selector(f"#page textarea >> text={SENTENCE}")


def test_two_radiographs_any_study_and_a_pair_are_asked_in_the_browser(served, server):
    page = served.page()
    page.goto(server.url + "#page=ask&q=An+effusion.&q-view=p000059-s2&q2-paint=left+effusion")
    page.wait_for_selector("#page table")
    assert "patches of the radiographs" in page.inner_text("#page") and page.locator("#page .film").count() == 2
    changed = page.inner_text("#page tbody tr >> nth=0").split()[0]
    assert [select.input_value() for select in page.locator("#page .many select").all()] == [changed] * 2, "what differs is on both films"
    assert len(set(page.locator("#page .scale").all_inner_texts())) == 1, "and on one scale"
    page.goto(server.url + "#page=study&id=p000013-s1")
    page.wait_for_selector("#page .reading")
    assert page.inner_text("#page h1") == "Study p000013-s1" and "Patient p000013" in page.inner_text("#page")
    page.goto(server.url + "#page=compare&a=3&b=40")
    page.wait_for_selector("#page >> text=encoder columns: cosine")
    page.goto(server.url + "#page=ask&q=A.&q-study=nobody")
    page.wait_for_selector("#page >> text=has no study nobody")
    served.errors[:] = [e for e in served.errors if "400" not in e]


@pytest.mark.parametrize("where, ready", [("", "#sentence"), ("#page=ask&q=An+effusion.", ".firing"), ("#page=study&id=p000013-s1", ".firing"),
                                          ("#page=ask&q=An+effusion.&q-view=p000059-s2&q2-paint=left+effusion", ".firing"),
                                          ("#page=compare&a=3&b=40", "#page >> text=encoder columns")])
def test_answers_are_for_everybody(served, server, axe, where, ready):
    """Pages that a server fills: no violation of WCAG, and nothing wider than a phone."""
    page = served.page(width=1280)
    page.goto(server.url + where)
    page.wait_for_selector(ready)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert violations(page, axe) == [] and page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_asker_refuses_a_run_without_an_sae(tmp_path):
    with pytest.raises(UserError, match="saerad train"): Asker(tmp_path)


def test_keys_of_a_question_are_those_of_ask():
    assert question_of({"text": "A.", "view": ""}) == {"text": "A.", "study": None, "view": None, "paint": None}
