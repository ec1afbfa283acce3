"""Sources of studies: real small trees of every layout, their faults, and the real data where it is present."""

import csv
import gzip
import importlib.util
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from section_rules import made_up_reports, published_findings

from saerad.core import UserError
from saerad.studies.record import SPLITS, Draft, Problem, Source, StudiesConfig, Study, View, ViewError, finish_source, split_of, standing_in_train
from saerad.studies.sources import READERS, describe_source, open_source, read_report, register_reader

DATA = Path(os.environ.get("SAERAD_DATA", Path(__file__).parents[3] / "shared" / "data"))
OPENI, HANNOVER = DATA / "openi" / "NLMCXR_reports.tgz", DATA / "hannover"
needs_openi = pytest.mark.skipif(not OPENI.is_file(), reason=f"the OpenI tarball is not at {OPENI}")
needs_pydicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")
needs_hannover = pytest.mark.skipif(not HANNOVER.is_dir(), reason=f"the Hannover films are not at {HANNOVER}")


def film(path, seed=0, size=24, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def table(folder, rows, name="t.csv"):
    path = folder / name
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def open_table(path, **kw):
    return open_source(StudiesConfig(source=f"table:{path}", **kw))


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_gives_grey_values_whatever_the_file(tmp_path):
    for mode, name in (("L", "a.png"), ("RGB", "b.png"), ("L", "c.jpg"), ("RGBA", "d.png")):
        pixels = View.from_file(film(tmp_path / name, mode=mode)).array()
        assert pixels.dtype == np.uint8 and pixels.shape == (24, 24)


def test_sixteen_bits_are_stretched_and_not_clipped(tmp_path):
    deep = np.arange(1000, 1000 + 64, dtype=np.uint16).reshape(8, 8) * 60
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = View.from_file(tmp_path / "deep.png").array()
    assert pixels.min() == 0 and pixels.max() == 255 and (np.diff(pixels.ravel().astype(int)) >= 0).all()


def ramp(low, high, dtype):
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize("low, high, dtype", [(0, 1, "f4"), (-1000, 3000, "f4"), (0.2, 0.4, "f4"), (7, 4095, "u2"), (-50, 70000, "i4")])
def test_numbers_of_every_kind_are_stretched_over_the_greys(tmp_path, low, high, dtype):
    Image.fromarray(ramp(low, high, dtype)).save(tmp_path / "deep.tif")
    pixels = View.from_file(tmp_path / "deep.tif").array()
    assert np.abs(pixels.astype(int) - ramp(0, 255, "f8")).max() <= 1.5


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_a_tiff_whose_zero_is_white_is_turned_round(tmp_path, dtype):
    Image.fromarray(ramp(0, 255 if dtype == "u1" else 4095, dtype)).save(tmp_path / "plain.tif")
    one, zero = (b"\x06\x01\x03\x00\x01\x00\x00\x00" + bytes([value, 0]) for value in (1, 0))    # the tag's name, type, count and value
    plain = (tmp_path / "plain.tif").read_bytes()
    assert plain.count(one) == 1
    (tmp_path / "white.tif").write_bytes(plain.replace(one, zero))
    white, black = (View.from_file(tmp_path / f"{name}.tif").array().astype(int) for name in ("white", "plain"))
    assert (white + black == 255).all()


def test_what_is_no_number_is_black_and_a_film_of_nothing_else_is_constant(tmp_path):
    deep = ramp(0, 1, "f4")
    deep[0, 3], deep[0, 4] = np.nan, np.inf
    Image.fromarray(deep).save(tmp_path / "holes.tif")
    pixels = View.from_file(tmp_path / "holes.tif").array()
    assert pixels[0, 3] == pixels[0, 4] == 0 and pixels[7, 7] == 255
    for value in (np.nan, 0.5):
        Image.fromarray(np.full((8, 8), value, "f4")).save(tmp_path / "none.tif")
        with pytest.raises(ViewError, match="same grey value everywhere"):
            View.from_file(tmp_path / "none.tif").array()


@pytest.mark.parametrize("name", ["film.jpg", "film.png", "film.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_a_file_notes_is_obeyed(tmp_path, name, orientation):
    upright = np.zeros((40, 24), np.uint8)
    upright[:8], upright[:, :6] = 255, 128    # a bright edge at the top, a grey one at the left
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]    # the transposition that undoes what the note asks for
    stored = Image.fromarray(upright) if back is None else Image.fromarray(upright).transpose(Image.Transpose(back))
    note = Image.Exif()
    note[0x0112] = orientation
    stored.save(tmp_path / name, exif=note, quality=95)
    shown = View.from_file(tmp_path / name).array()
    assert shown.shape == (40, 24) and np.abs(shown.astype(int) - upright)[2:-2, 9:-2].mean() < 12


def dicom(path, pixels, photometric="MONOCHROME2", **more):
    """A DICOM file as a machine writes it, of 16-bit numbers that nothing compresses."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape[-2:]
    if pixels.ndim == 3: file.NumberOfFrames = len(pixels)
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, photometric, 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    for name, value in more.items(): setattr(file, name, value)
    file.PixelData = pixels.astype("<u2").tobytes()
    file.save_as(path, enforce_file_format=True)
    return View.from_file(path)


@needs_pydicom
def test_a_dicom_file_is_rescaled_windowed_and_bright_where_the_body_is(tmp_path):
    deep = ramp(0, 4000, "u2")
    plain = dicom(tmp_path / "plain.dcm", deep).array()
    assert np.abs(plain.astype(int) - ramp(0, 255, "f8")).max() <= 1.5
    assert np.abs(dicom(tmp_path / "inverted.dcm", deep, "MONOCHROME1").array().astype(int) + plain - 255).max() <= 1
    # rescaled to -1000 ... 3000; a window of 1000 around 500 goes from black at 0 to white at 1000
    windowed = dicom(tmp_path / "window.dcm", deep, RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=500, WindowWidth=1000).array()
    assert (windowed[deep <= 995] == 0).all() and (windowed[deep >= 2005] == 255).all()
    assert (np.diff(windowed[(deep > 1010) & (deep < 1990)].astype(int)) > 0).all()


@needs_pydicom
def test_a_dicom_file_without_one_film_says_so(tmp_path):
    with pytest.raises(ViewError, match="two.dcm is a DICOM file with more than one grey image"):
        dicom(tmp_path / "two.dcm", np.stack([ramp(0, 4000, "u2")] * 2)).array()
    cut = dicom(tmp_path / "cut.dcm", ramp(0, 4000, "u2")).path
    cut.write_bytes(cut.read_bytes()[:-60])
    with pytest.raises(ViewError, match="cut.dcm is a DICOM file without pixels that can be read") as e:
        View.from_file(cut).check()
    assert e.value.kind == "not an image" and "\n" not in str(e.value)


@needs_pydicom
def test_films_of_a_table_may_be_dicom(tmp_path):
    dicom(tmp_path / "a.dcm", ramp(0, 4000, "u2"))
    source = open_table(table(tmp_path, [dict(study="s", patient="p", image="a", findings="Clear.")]))
    assert source["s"].views["frontal"].array().shape == (8, 8)


def test_without_pydicom_a_dicom_file_is_named_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "film").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    with pytest.raises(ViewError, match=r"film is a DICOM file, which needs pydicom; install it with: pip install .saerad\[dicom\]"):
        View.from_file(tmp_path / "film").check()


def test_a_film_that_was_replaced_by_another_of_its_size_is_noticed(tmp_path):
    path = table(tmp_path, [dict(study="s", patient="p", image="a.bmp", findings="Clear.")])
    def now(**kw): return open_table(path, **kw).hash()
    film(tmp_path / "a.bmp", seed=1)
    size, before, unlooked = (tmp_path / "a.bmp").stat().st_size, now(), now(check_pictures=False)
    film(tmp_path / "a.bmp", seed=2)
    assert (tmp_path / "a.bmp").stat().st_size == size and now() != before and now(check_pictures=False) == unlooked
    film(tmp_path / "a.bmp", seed=1)
    assert now() == before, "the same film again, though written later"


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda p: p.write_text("<html>404</html>", encoding="utf-8"), "not an image"),
        (lambda p: p.write_bytes(b""), "not an image"),
        (lambda p: Image.fromarray(np.full((9, 9), 7, np.uint8)).save(p, "PNG"), "constant image"),
        (lambda p: None, "missing image"),
    ],
)
def test_a_film_that_cannot_be_used_says_which_and_why(tmp_path, make, kind):
    make(tmp_path / "film.jpg")
    for look in ("array", "check"):
        with pytest.raises(ViewError, match="film.jpg") as e:
            getattr(View.from_file(tmp_path / "film.jpg"), look)()
        assert e.value.kind == kind


def test_a_truncated_film_is_found_by_the_quick_look_too(tmp_path):
    path = film(tmp_path / "film.jpg", size=400)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ViewError, match="not an image"):
        View.from_file(path).check()


# ---- splits ---------------------------------------------------------------------------------------------------------


@given(st.text(), st.tuples(*[st.floats(0.01, 1)] * 3))
def test_a_split_is_always_one_of_three_and_always_the_same(patient, fractions):
    assert split_of(patient, fractions) in SPLITS
    assert split_of(patient, fractions) == split_of(patient, fractions)


@given(st.text())
def test_an_empty_split_gets_nobody_and_a_full_one_everybody(patient):
    assert split_of(patient, (0, 1, 0)) == "validation"


@given(st.text(), st.floats(0.1, 0.8), st.floats(0, 0.1))
def test_a_larger_training_share_only_adds_training_patients(patient, share, more):
    before = split_of(patient, (share, 0, 1 - share))
    assert before != "train" or split_of(patient, (share + more, 0, 1 - share - more)) == "train"


def test_shares_of_splits_are_those_asked_for():
    drawn = Counter(split_of(f"p{i}", (0.7, 0.1, 0.2)) for i in range(5000))
    assert abs(drawn["train"] / 5000 - 0.7) < 0.03 and abs(drawn["test"] / 5000 - 0.2) < 0.03


def test_splits_do_not_depend_on_who_else_is_there(tmp_path):
    rows = [dict(study=f"s{i}", patient=f"p{i}", findings="Clear.") for i in range(60)]
    everybody = {s.study: s.split for s in open_table(table(tmp_path, rows))}
    some = {s.study: s.split for s in open_table(table(tmp_path, rows[::3]))}
    assert some == {k: everybody[k] for k in some} and len(set(everybody.values())) == 3


def test_fractions_must_add_up():
    with pytest.raises(ValueError, match="add up to 1"):
        StudiesConfig(fractions=(0.5, 0.1, 0.1))


# ---- tables ---------------------------------------------------------------------------------------------------------


def rows_of(*patients, **more):
    return [dict(study=f"s{i}", patient=p, findings=f"Finding {i}.", **more) for i, p in enumerate(patients)]


def test_a_table_with_films_priors_and_other_names(tmp_path):
    for name in ("a.jpg", "b.png", "a-lat.jpg"):
        film(tmp_path / "films" / name)
    rows = [
        dict(exam="2", pid="x", when="2020-02-01", pic="b.png", lat="", text="Second.", ap="ap"),
        dict(exam="1", pid="x", when="2020-01-01", pic="a", lat="a-lat.jpg", text=" First.\n ", ap="pa"),
        dict(exam="3", pid="y", when="", pic="b", lat="", text="Third.", ap="swimmer"),
    ]
    names = dict(
        study="exam", patient="pid", order="when", image="pic", lateral="lat", findings="text", projection="ap"
    )
    source = open_table(table(tmp_path, rows), columns=names, images=str(tmp_path / "films"))
    assert source["2"].prior is source["1"] and source["2"].prior_report == "First." and source["1"].prior is None
    assert list(source["1"].views) == ["frontal", "lateral"] and list(source["2"].all_views) == ["frontal", "prior"]
    assert [source[i].projection for i in "123"] == ["PA", "AP", ""]
    assert source["1"].views["frontal"].array().shape == (24, 24) and not source.problems and not source.may_leave


def test_numbers_order_as_numbers(tmp_path):
    rows = [
        dict(study=s, patient="p", order=o, findings=f"Report {s}.") for s, o in (("a", "9"), ("b", "10"), ("c", "-2"))
    ]
    source = open_table(table(tmp_path, rows))
    assert [s.study for s in source] == ["c", "a", "b"] and source["b"].prior.study == "a"


def test_without_an_order_there_is_no_prior(tmp_path):
    assert all(s.prior is None for s in open_table(table(tmp_path, rows_of("p", "p"))))


def test_ids_that_a_table_has_turned_into_fractions(tmp_path):
    ids = (("1.0", "123.0"), ("2.0", "007"), ("x1.0", "1.50"))
    rows = [dict(study=study, patient=patient, findings="Clear.") for study, patient in ids]
    assert [(s.study, s.patient) for s in open_table(table(tmp_path, rows))] == [("1", "123"), ("2", "007"), ("x1.0", "1.50")]
    numbers = pa.table({"study": [1, 2], "patient": pa.array([123.0, 124.0]), "findings": ["A.", "B."]})
    pq.write_table(numbers, tmp_path / "t.parquet")
    assert [s.patient for s in open_table(tmp_path / "t.parquet")] == ["123", "124"]


@pytest.mark.parametrize("nothing", [float("nan"), None])
def test_patients_whom_nobody_knows_are_not_one_patient(tmp_path, nothing):
    unknown = pa.table({"study": ["a", "b", "c"], "patient": pa.array([123.0, nothing, nothing]), "findings": ["A.", "B.", "C."]})
    pq.write_table(unknown, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 2 .study b. has no patient"):
        open_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "<NA>", "NaT", "#N/A", ""])
@pytest.mark.parametrize("column, message", [("patient", "has no patient"), ("study", "has no study")])
def test_words_for_nothing_are_no_id(tmp_path, word, column, message):
    with pytest.raises(UserError, match=message):
        open_table(table(tmp_path, [dict(study="a", patient="p", findings="A.") | {column: word}]))


@pytest.mark.parametrize("word", ["nan", "NaN", "NULL", "<NA>", "NaT", "#N/A"])
def test_words_for_nothing_are_no_report_and_no_film(tmp_path, word):
    rows = [dict(study="a", patient="p", findings=word), dict(study="b", patient="q", findings="B.", image=word, split=word, technique=word)]
    source = open_table(table(tmp_path, [*rows, dict(study="c", patient="r", findings="C.", comparison="None")]))
    assert [(p.kind, p.where) for p in source.problems] == [("empty report", "a")]
    assert source["b"].sections == {"findings": "B."} and not source["b"].views and source["c"].sections["comparison"] == "None"


@pytest.mark.parametrize(
    "patients, message",
    [
        (("1.23E+11", "p"), "has the patient '1.23E.11', a number that has lost digits"),
        (("1e+18", "1.2345678901234568e+18"), "has lost digits"),
        (("9007199254740993.0", "p"), "has lost digits"),
        (("12", "12.0"), "the patient 12 in two spellings, '12' and '12.0'"),
    ],
)
def test_ids_that_could_be_two_people_are_refused(tmp_path, patients, message):
    with pytest.raises(UserError, match=message):
        open_table(table(tmp_path, rows_of(*patients)))


@pytest.mark.parametrize(
    "orders, expected",
    [
        (("3.0", "nan", "1.0"), "bca"),
        (("2024-02-01", "", "2024-01-31T23:59"), "bca"),
        (("2024-03-01T01:00+02:00", "2024-02-29T23:30:00Z", "2024-02-29 17:30-05:00"), "cab"),
        (("1e3", "-5", "999.5"), "bca"),
    ],
)
def test_orders_with_gaps_and_time_zones(tmp_path, orders, expected):
    rows = [dict(study=s, patient="p", order=o, findings=f"{s}.") for s, o in zip("abc", orders, strict=True)]
    assert "".join(s.study for s in open_table(table(tmp_path, rows))) == expected


@pytest.mark.parametrize(
    "orders, message",
    [
        (("12", "2024-12-31"), "row 1 has a number for its order, and t.csv, row 2 a date;"),
        (("2024-12-31T10:00", "2024-12-31T10:00Z"), "a date for its order, and t.csv, row 2 a date with a time zone"),
        (("2024-13-45", "1"), "order '2024-13-45'"),
        (("2024-12-31 and later", "1"), "order '2024-12-31 and later'"),
        (("inf", "1"), "order 'inf'"),
        (("31.12.2024", "1"), "order '31.12.2024'"),
    ],
)
def test_orders_that_cannot_be_sorted_are_refused(tmp_path, orders, message):
    rows = [dict(study=s, patient="p", order=o, findings=f"{s}.") for s, o in zip("ab", orders, strict=True)]
    with pytest.raises(UserError, match=message):
        open_table(table(tmp_path, rows))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_column_that_stands_twice_is_refused(tmp_path, name):
    columns, values = ["study", "patient", "findings", "findings"], ["a", "p", "First.", "Second."]
    if name == "t.parquet": pq.write_table(pa.Table.from_arrays([pa.array([v]) for v in values], columns), tmp_path / name)
    else: (tmp_path / name).write_text("\n".join(("\t" if name == "t.tsv" else ",").join(row) for row in (columns, values)), encoding="utf-8")
    with pytest.raises(UserError, match="has the column 'findings' twice"):
        open_table(tmp_path / name)


def test_columns_without_a_name_may_be_many(tmp_path):
    (tmp_path / "t.csv").write_text("study,patient,findings,,\na,p,Clear.,,\n", encoding="utf-8")
    assert len(open_table(tmp_path / "t.csv")) == 1


def test_reports_that_stand_in_train_too_are_told_and_can_be_left_out(tmp_path):
    said = [("a", "train", "Clear lungs."), ("b", "test", "CLEAR  lungs."), ("c", "test", "Effusion."), ("d", "validation", "Clear lungs.")]
    path = table(tmp_path, [dict(study=s, patient=s, split=split, findings=text) for s, split, text in said])
    kept, without = open_table(path), open_table(path, duplicates="train_only")
    assert [s.study for s in standing_in_train(kept)] == ["b", "d"] and [s.study for s in without] == ["a", "c"]
    assert "1 of 1 in validation (100.0%), 1 of 2 in test (50.0%)" in describe_source(kept)
    assert "word for word in train: no findings" in describe_source(without) and "stands in train (test): 1 (b)" in describe_source(without)
    assert kept.hash() != without.hash()


def test_what_is_left_out_for_its_words_is_still_the_visit_before(tmp_path):
    rows = [dict(study="t", patient="p", split="train", order="1", findings="Clear.")]
    rows += [dict(study=f"s{i}", patient="q", split="test", order=str(i), findings=text) for i, text in enumerate(("Clear.", "Effusion."))]
    source = open_table(table(tmp_path, rows), duplicates="train_only")
    assert [s.study for s in source] == ["t", "s1"] and source["s1"].prior_report == "Clear."


def test_phantom_obeys_the_setting_too():
    sizes = dict(source="phantom:0", train_patients=30, validation_patients=3, test_patients=6)
    kept, without = (open_source(StudiesConfig(**sizes, duplicates=d)) for d in ("keep", "train_only"))
    assert len(kept) - len(without) == len(standing_in_train(kept)) and not standing_in_train(without)


def test_parquet_gzip_and_tsv_read_like_csv(tmp_path):
    rows = rows_of(*"abcdef")
    plain = open_table(table(tmp_path, rows)).hash()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    with gzip.open(tmp_path / "t.csv.gz", "wt", newline="") as f:
        f.write(text)
    (tmp_path / "t.tsv").write_text(text.replace(",", "\t"), encoding="utf-8")
    assert {open_table(tmp_path / name).hash() for name in ("t.parquet", "t.csv.gz", "t.tsv")} == {plain}


def test_given_splits_are_kept_and_reach_the_whole_patient(tmp_path):
    rows = [
        dict(study="a", patient="p", split="test", findings="A."),
        dict(study="b", patient="p", split="", findings="B."),
        dict(study="c", patient="q", split="validate", findings="C."),
    ]
    assert {s.study: s.split for s in open_table(table(tmp_path, rows))} == {
        "a": "test",
        "b": "test",
        "c": "validation",
    }


def test_caps_hold_for_patients_and_are_nested(tmp_path):
    path = table(tmp_path, rows_of(*[f"p{i // 2}" for i in range(400)]))
    small, large = (open_table(path, train_patients=n, test_patients=3) for n in (20, 40))
    assert len({s.patient for s in small.split("train")}) == 20 and len(small.split("train")) == 40
    assert {s.study for s in small} < {s.study for s in large} and len({s.patient for s in small.split("test")}) == 3


def test_faults_of_single_studies_are_named_skipped_and_counted(tmp_path):
    film(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>", encoding="utf-8")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "black.png")
    pictures = ("good.png", "page.jpg", "black.png", "gone.png", "good.png")
    rows = [
        dict(study=f"s{i}", patient=f"p{i}", image=image, findings="" if i == 4 else "Clear.")
        for i, image in enumerate(pictures)
    ]
    source = open_table(table(tmp_path, [*rows, rows[0]]))
    assert [s.study for s in source] == ["s0"]
    assert {(p.kind, p.where) for p in source.problems} == {
        ("not an image", "s1"),
        ("constant image", "s2"),
        ("missing image", "s3"),
        ("empty report", "s4"),
        ("duplicate study", "s0"),
    }
    assert "problems: 5" in describe_source(source) and "constant image: 1 (s2)" in describe_source(source)


def test_a_bad_film_is_nobodys_prior(tmp_path):
    film(tmp_path / "a.png"), (tmp_path / "b.png").write_text("no", encoding="utf-8"), film(tmp_path / "c.png")
    rows = [dict(study=n, patient="p", order=str(i), image=f"{n}.png", findings=f"{n}.") for i, n in enumerate("abc")]
    source = open_table(table(tmp_path, rows))
    assert source["c"].prior is source["a"]


def test_a_visit_without_findings_is_still_the_visit_before(tmp_path):
    rows = [
        dict(study=n, patient="p", order=str(i), findings=text)
        for i, (n, text) in enumerate(zip("ab", ("", "B."), strict=True))
    ]
    source = open_table(table(tmp_path, rows))
    assert [s.study for s in source] == ["b"] and source["b"].prior.study == "a" and source["b"].prior_report is None


def test_an_impression_can_stand_in_for_findings(tmp_path):
    path = table(
        tmp_path,
        [
            dict(study="a", patient="p", findings="", impression="Normal."),
            dict(study="b", patient="q", findings="Clear.", impression="Normal."),
        ],
    )
    assert [s.study for s in open_table(path)] == ["b"]
    both = open_table(path, findings_from="findings or impression")
    assert (both["a"].sections["findings"], both["b"].sections["findings"]) == ("Normal.", "Clear.")


def test_text_of_a_table_leaves_only_when_the_config_says_so(tmp_path):
    path = table(tmp_path, rows_of("p"))
    assert not open_table(path).may_leave and open_table(path, text_may_leave=True).may_leave


@pytest.mark.parametrize(
    "rows, kw, message",
    [
        ([dict(study="a", patient="", findings="x")], {}, "row 1 .study a. has no patient"),
        ([dict(study="", patient="p", findings="x")], {}, "row 1 has no study"),
        (
            [
                dict(study="a", patient="p", split="test", findings="x"),
                dict(study="b", patient="p", split="train", findings="x"),
            ],
            {},
            "Patient p is in two splits, test and train",
        ),
        ([dict(study="a", patient="p", split="holdout", findings="x")], {}, "split 'holdout'"),
        ([dict(study="a", pateint="p", findings="x")], {}, "no column 'patient'"),
        (
            [dict(study="a", pid="p", findings="x")],
            dict(columns={"patient": "pdi"}),
            "no column 'pdi'; did you mean 'pid'",
        ),
        (
            [dict(study="a", patient="p", findings="x")],
            dict(columns={"finding": "findings"}),
            "did you mean 'findings'",
        ),
        ([dict(study="a", patient="p", Findings="x")], {}, "no reports and no images.*did you mean 'Findings'"),
        ([dict(study="a", patient="p", order="soon", findings="x")], {}, "order 'soon'"),
        ([dict(study="a", patient="p", findings=" ")], {}, r"no study that can be used \(empty report: 1\)"),
        ([], {}, "no rows"),
    ],
)
def test_faults_of_the_whole_table_stop_with_one_sentence(tmp_path, rows, kw, message):
    path = table(tmp_path, rows or [])
    with pytest.raises(UserError, match=message) as e:
        open_table(path, **kw)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", b"study,patient,findings\na,p\n", "row 1 has more or fewer cells"),
        ("t.csv", b"study,patient,findings\na,p,x,y\n", "row 1 has more or fewer cells"),
        ("t.csv", b"study,patient,findings\na,p,\xff\xfe\n", "not a readable table"),
        ("t.csv.gz", b"not gzip", "not a readable table"),
        ("t.parquet", b"PAR0", "not a readable table"),
    ],
)
def test_damaged_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_table(tmp_path / name)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "table:",
        "openi",
        "dicom:x",
        "phantom:abc",
        "phantom:",
        "table:/no/such.csv",
        "openi:/no/such.tgz",
        "mimic-cxr:/no/such",
    ],
)
def test_what_is_no_source_says_so(spec):
    with pytest.raises(UserError):
        open_source(spec)


# ---- OpenI ----------------------------------------------------------------------------------------------------------


def xml(uid="CXR1", images=(), **sections):
    parts = "".join(f'<AbstractText Label="{k.upper()}">{v}</AbstractText>' for k, v in sections.items())
    figures = "".join(f'<parentImage id="{i}"/>' for i in images)
    return f'<eCitation><uId id="{uid}"/><Abstract>{parts}</Abstract>{figures}</eCitation>'


def tarball(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"ecgen-radiology/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


REPORTS = {
    "1.xml": xml("CXR1", indication="Cough", findings="Clear  lungs.", comparison="", impression="Normal."),
    "2.xml": xml("CXR2", impression="Normal."),
    "3.xml": xml("CXR3"),
    "4.xml": xml("CXR4", findings="x")[:-7],
    "5.xml": xml("CXR5", findings="A &lt;b&gt; c."),
}


def test_tarball_and_folder_give_the_same_studies(tmp_path):
    folder = tmp_path / "xml"
    folder.mkdir()
    for name, text in REPORTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    packed, unpacked = open_source(f"openi:{tarball(tmp_path / 'r.tgz', REPORTS)}"), open_source(f"openi:{folder}")
    assert packed.hash() == unpacked.hash() and packed.may_leave
    assert {s.study: s.sections for s in packed} == {
        "CXR1": {"indication": "Cough", "findings": "Clear lungs."},
        "CXR5": {"findings": "A <b> c."},
    }
    assert {(p.kind, p.where) for p in packed.problems} == {
        ("impression only", "CXR2"),
        ("empty report", "CXR3"),
        ("XML does not parse", "4.xml"),
    }


def test_openi_films_are_found_by_the_xml_and_named_by_the_list(tmp_path):
    for name in ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"):
        film(tmp_path / "png" / f"{name}.png")
    path = tarball(
        tmp_path / "r.tgz", {"1.xml": xml(images=("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"), findings="Clear.")}
    )
    cfg = StudiesConfig(source=f"openi:{path}", images=str(tmp_path / "png"))
    assert open_source(cfg)["CXR1"].views["frontal"].name == "CXR1_1_IM-0001-3001.png"
    (tmp_path / "png" / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,1_IM-0001-3001.dcm.png,Lateral\n1,1_IM-0001-4001.dcm.png,Frontal\n"
    , encoding="utf-8")
    views = open_source(cfg)["CXR1"].views
    assert (views["frontal"].name, views["lateral"].name) == ("CXR1_1_IM-0001-4001.png", "CXR1_1_IM-0001-3001.png")


@pytest.mark.parametrize("keep", [0, 60, -40])
def test_a_broken_tarball_stops_the_work(tmp_path, keep):
    path = tarball(tmp_path / "r.tgz", REPORTS)
    path.write_bytes(path.read_bytes()[:keep] or b"<html>")
    with pytest.raises(UserError, match="r.tgz is not a whole tarball"):
        open_source(f"openi:{path}")


def test_a_tarball_of_something_else_and_a_report_without_a_patient(tmp_path):
    with pytest.raises(UserError, match="no XML report"):
        open_source(f"openi:{tarball(tmp_path / 'r.tgz', {'a.txt': 'x'})}")
    path = tarball(tmp_path / "q.tgz", {"9.xml": xml(findings="Clear.").replace('<uId id="CXR1"/>', "")})
    with pytest.raises(UserError, match="9.xml .* has no patient"):
        open_source(f"openi:{path}")


@needs_openi
def test_the_real_openi_collection():
    source = open_source(f"openi:{OPENI}")
    assert (len(source), len(source.patients), Counter(p.kind for p in source.problems)) == (3425, 3425, {"impression only": 502, "empty report": 28})
    assert Counter(s.split for s in standing_in_train(source)) == {"validation": 92, "test": 89}
    assert "89 of 348 in test" in describe_source(source)
    assert all(s.sections["findings"] == s.sections["findings"].strip() != "" for s in source)
    assert (
        len(open_source(StudiesConfig(source=f"openi:{OPENI}", findings_from="findings or impression"))) == 3425 + 502
    )


# ---- MIMIC-CXR ------------------------------------------------------------------------------------------------------

MIMIC = [  # patient, study, split, date, time, films (id, position), report
    (
        "10000001",
        "50000003",
        "train",
        "21800301",
        "80556.875",
        (("d1", "AP"), ("d2", "PA"), ("d3", "LL")),
        "Third visit.",
    ),
    ("10000001", "50000001", "train", "21800301", "75000.5", (("d4", "AP"),), "First visit."),
    ("10000001", "50000002", "train", "21800229", "235959.0", (("d5", "LATERAL"),), "Earliest visit."),
    ("11000002", "51000001", "validate", "21900101", "120000", (("e1", "PA"),), "Other patient."),
    ("12000003", "52000001", "test", "21900101", "", (("g1", "AP"),), "Test patient."),
]


def mimic(root, films=True, tables=True, zipped=False, rows=MIMIC):
    metadata, splits = [], []
    for patient, study, split, date, time, pictures, text in rows:
        folder = root / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_suffix(".txt").write_text(
            f"                 FINAL REPORT\n INDICATION:  Cough.\n\n FINDINGS: \n \n {text}\n"
        , encoding="utf-8")
        for image, position in pictures:
            if films:
                film(folder / f"{image}.jpg", seed=len(metadata))
            metadata.append(
                dict(
                    dicom_id=image,
                    subject_id=patient,
                    study_id=study,
                    ViewPosition=position,
                    StudyDate=date,
                    StudyTime=time,
                )
            )
            splits.append(dict(dicom_id=image, study_id=study, subject_id=patient, split=split))
    for name, lines in (("metadata", metadata), ("split", splits)) if tables else ():
        path = table(root, lines, f"mimic-cxr-2.0.0-{name}.csv")
        if zipped:
            path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    return open_source(f"mimic-cxr:{root}")


@pytest.mark.parametrize("zipped", [False, True])
def test_the_official_layout(tmp_path, zipped):
    source = mimic(tmp_path, zipped=zipped)
    assert [s.study for s in source if s.patient == "p10000001"] == ["s50000002", "s50000001", "s50000003"]
    third = source["s50000003"]
    assert third.prior_report == "First visit." and third.prior.prior is source["s50000002"]
    assert (
        third.views["frontal"].name == "d2.jpg" and third.views["lateral"].name == "d3.jpg" and third.projection == "PA"
    )
    assert list(third.all_views) == ["frontal", "lateral", "prior"] and third.views["frontal"].array().shape == (24, 24)
    assert list(source["s50000001"].all_views) == ["frontal"], "the visit before has no frontal film"
    assert {s.patient: s.split for s in source} == {
        "p10000001": "train",
        "p11000002": "validation",
        "p12000003": "test",
    }
    assert third.sections == {"indication": "Cough.", "findings": "Third visit."}
    assert not source.may_leave and not source.problems


def test_tables_that_a_tool_has_written_again_still_fit_the_folders(tmp_path):
    whole = mimic(tmp_path).hash()
    for path in tmp_path.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as f: rows = list(csv.DictReader(f))
        table(tmp_path, [row | {name: row[name] + ".0" for name in ("subject_id", "study_id")} for row in rows], path.name)
    assert open_source(f"mimic-cxr:{tmp_path}").hash() == whole


def test_mimic_text_never_may_leave_whatever_the_config_says(tmp_path):
    mimic(tmp_path)
    assert not open_source(StudiesConfig(source=f"mimic-cxr:{tmp_path}", text_may_leave=True)).may_leave


def test_films_and_tables_may_lie_elsewhere(tmp_path):
    mimic(tmp_path / "jpg")
    text = tmp_path / "text"
    for report in sorted((tmp_path / "jpg").rglob("s*.txt")):
        target = text / "mimic-cxr-reports" / report.relative_to(tmp_path / "jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        report.rename(target)
    source = open_source(StudiesConfig(source=f"mimic-cxr:{text}", images=str(tmp_path / "jpg")))
    assert len(source) == 5 and "frontal" in source["s50000003"].all_views


def test_without_films_the_studies_are_text_only(tmp_path):
    source = mimic(tmp_path, films=False)
    assert len(source) == 5 and not any(s.views for s in source) and source["s50000003"].prior_report == "First visit."


def test_without_tables_the_absence_is_said(tmp_path):
    source = mimic(tmp_path, tables=False)
    assert [p.kind for p in source.problems] == ["missing table"] * 2 and not any(s.prior for s in source)
    assert all(s.split == split_of(s.patient) for s in source)


def test_a_film_of_the_table_that_is_not_on_disk(tmp_path):
    mimic(tmp_path)
    next(tmp_path.rglob("e1.jpg")).unlink()
    source = open_source(f"mimic-cxr:{tmp_path}")
    assert [(p.kind, p.where) for p in source.problems] == [("missing image", "s51000001")] and len(source) == 4


def test_a_mimic_patient_in_two_splits(tmp_path):
    torn = [MIMIC[0], (*MIMIC[1][:2], "test", *MIMIC[1][3:])]
    with pytest.raises(UserError, match="10000001 is in two splits, train and test"):
        mimic(tmp_path, rows=torn)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UserError, match="unpack mimic-cxr-reports.zip"):
        open_source(f"mimic-cxr:{tmp_path}")


@pytest.mark.parametrize(
    "report, expected",
    [
        (
            " FINAL REPORT\n HISTORY:  Fall.\n\n FINDINGS AND IMPRESSION:  Clear.\n",
            {"indication": "Fall.", "findings": "Clear."},
        ),
        (" WET READ: FINDINGS: Old.\n FINAL REPORT\n FINDINGS: New.", {"findings": "New."}),
        (
            " FINDINGS:\n Heart size: normal. NO EFFUSION.\n\n NOTIFICATION:  Called.\n",
            {"findings": "Heart size: normal. NO EFFUSION."},
        ),
        (
            " COMPARISONS:  ___.\n IMPRESSION: \n 1. One.\n 2. Two.",
            {"comparison": "___.", "impression": "1. One. 2. Two."},
        ),
        (" FINDINGS:\n\n IMPRESSION:  Only this.", {"impression": "Only this."}),
        (" FINAL REPORT\n Portable film of the chest.", {}),
        ("", {}),
    ],
)
def test_sections_of_reports(report, expected):
    assert read_report(report) == expected


@pytest.mark.parametrize(
    "report, findings",
    [
        (" PA AND LATERAL VIEWS OF THE CHEST:\n The lungs are clear.\n\n IMPRESSION:  Normal.", "The lungs are clear."),
        (" AP CHEST, 5:13 A.M., ___:  The lungs are clear.", "The lungs are clear."),
        ("Chest, two views: The lungs are clear.", "The lungs are clear."),
        (" TWO-VIEW CHEST:  The lungs are clear.", "The lungs are clear."),
        (" UPRIGHT PA CHEST WITH COMPARISON TO ___:  The lungs are clear.", "The lungs are clear."),
        (" CHEST RADIOGRAPH PERFORMED ON ___ AT 5:13:  The lungs are clear.", "The lungs are clear."),
        (" FINAL REPORT\n COMPARISON CHEST RADIOGRAPH:  ___.\n IMPRESSION:  Normal.", None),
        (" FINDINGS:  As in the FINAL REPORT of ___.\n Clear.", "As in the FINAL REPORT of ___. Clear."),
        (" FINDINGS:  Clear.\n\n **** ADDENDUM ****\n Also a nodule.", "Clear."),
        (" CHEST, PA AND LATERAL:  ___.\n\n FINDINGS:  Small effusion.", "Small effusion."),
        (" PORTABLE CHEST:  AP view at 5:13 a.m.\n IMPRESSION:  Edema.", None),
        (" TECHNIQUE:  Chest, PA and lateral.\n\n FINDINGS:  Clear.\n CHEST TUBE:  Removed.", "Clear. CHEST TUBE: Removed."),
        ("Findings: clear.\nImpression: normal.", "clear."),
        ("findings and impression: clear.", "clear."),
        (" FINDINGS\n The lungs are clear.\n\n IMPRESSION\n Normal.", "The lungs are clear."),
        (" FINDINGS:\n The findings: as above.\n Heart size: normal.", "The findings: as above. Heart size: normal."),
        (" FINDINGS:\xa0\xa0Clear.\f\n\xa0IMPRESSION:\u2003Normal.\r\n", "Clear."),
        (" FINDINGS: Clear\n (Over)\n\f\n DATE: ___\n FINAL REPORT\n (Cont)\n lungs.\n IMPRESSION: Normal.", "Clear lungs."),
        (" FINAL REPORT\n FINDINGS: Old.\n COMPARISON: ___.\n FINAL REPORT\n FINDINGS: New.", "New."),
        (" FINAL REPORT\n FINDINGS: Clear.\n\n ADDENDUM  Called at noon.", "Clear."),
        (" FINAL REPORT\n FINDINGS: Clear.\n FINAL REPORT\n ADDENDUM:\n FINDINGS: The tube is high.", "Clear."),
        (" FINAL REPORT\n IMPRESSION: Clear.\n FINAL REPORT\n ADDENDUM:\n FINDINGS: The tube is high.", "The tube is high."),
        (" REASON FOR EXAMINATON: Cough.\n STUDY: Chest, two views.\n LUNGS AND PLEURA: Clear.", "LUNGS AND PLEURA: Clear."),
        (" FINAL REPORT\n ADDENDUM: Called.\n FINAL REPORT\n FINDINGS: Clear.", "Clear."),
        (" COMPARISON: None.\n LUNGS: Clear.\n HEART: Normal.\n IMPRESSION: Normal.", "LUNGS: Clear. HEART: Normal."),
        (" FINDINGS: Clear.\n\n RECOMMENDATION(S): None.\n\n NOTIFICATION: Called.", "Clear."),
        (" INDICATION: Cough.\n FINDINGS: \n\n IMPRESSION: Normal.", None),
        (" REASON FOR EXAM: Cough.\n \n The lungs are clear.\n", None),
    ],
)
def test_findings_are_what_a_radiologist_wrote_under_whatever_heading(report, findings):
    assert read_report(report).get("findings") == findings


def test_an_indication_never_swallows_the_findings():
    assert read_report(" REASON FOR EXAM: Cough.\n \n The lungs are clear.\n")["indication"] == "Cough."
    assert read_report(" INDICATION: Cough.\n LINES: Unchanged.\n")["indication"] == "Cough."


BITS = (" FINDINGS:", "IMPRESSION: ", "FINAL REPORT", "\n", " ", "\f", "ET TUBE: ", "Clear.", "ADDENDUM", "(Over)", "(Cont)", "CHEST:", "é")


@given(st.lists(st.sampled_from(BITS)))
def test_no_report_is_too_odd_to_be_read(parts):
    sections = read_report("".join(parts))
    assert all(text == " ".join(text.split()) != "" for text in sections.values())
    assert not {"findings", "impression"} & sections.keys() or "last_paragraph" not in sections


def test_a_hundred_reports_beside_the_published_rules():
    right = {}
    for construction, report, findings in made_up_reports():
        ours, theirs = right.setdefault(construction, (0, 0))
        right[construction] = (ours + (read_report(report).get("findings", "") == findings), theirs + (published_findings(report) == findings))
    assert sum(1 for _ in made_up_reports()) == 100 and all(ours == 10 for ours, _ in right.values())
    chapter = json.loads((Path(__file__).parents[2] / "nbs/studies/sources.ipynb").read_text(encoding="utf-8"))
    rows = [line.strip().strip("|").split(" | ") for cell in chapter["cells"] for line in cell["source"] if line.startswith("| ")]
    table = {name.strip(): (int(ours), int(theirs)) for name, ours, theirs in (row for row in rows if len(row) == 3) if name.strip() in right}
    assert table == right, "the chapter's table says what is measured here"


def test_what_remains_without_findings_is_counted_by_its_reason(tmp_path):
    texts = {"1": " FINDINGS: Clear.", "2": " IMPRESSION: Normal.", "3": " ADDENDUM: Called.", "4": " Portable film.",
             "5": " HISTORY: Fall.\n \n No fracture.\n", "6": " HISTORY: Fall.", "7": ""}
    for number, text in texts.items():
        path = tmp_path / f"files/p10/p1000000{number}/s5000000{number}.txt"
        path.parent.mkdir(parents=True)
        path.write_text(f" FINAL REPORT\n{text}" if text else "", encoding="utf-8")
    source = open_source(f"mimic-cxr:{tmp_path}")
    assert {p.where[-1]: p.kind for p in source.problems if p.kind != "missing table"} == {
        "2": "impression only", "3": "addendum only", "4": "no heading", "5": "findings without a heading", "6": "no findings", "7": "empty report"}
    assert len(source) == 1 and "findings without a heading: 1 (s50000005)" in describe_source(source)
    both = open_source(StudiesConfig(source=f"mimic-cxr:{tmp_path}", findings_from="findings or impression"))
    assert {s.study[-1]: s.sections["findings"] for s in both} == {"1": "Clear.", "2": "Normal.", "5": "No fracture."}


@needs_pydicom
def test_the_official_layout_with_dicom_files(tmp_path):
    mimic(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        dicom(path.with_suffix(".dcm"), ramp(0, 4000, "u2"))
        path.unlink()
    source = open_source(f"mimic-cxr:{tmp_path}")
    assert not source.problems and source["s50000003"].views["frontal"].name == "d2.dcm" and source["s50000003"].views["frontal"].array().max() == 255


# ---- sources --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_change():
    def source(**kw):
        study = (
            dict(
                study="a",
                patient="p",
                split="train",
                sections={"findings": "Clear."},
                projection="PA",
                views={"frontal": View("f", lambda: None, "1")},
                prior=Study("0", "p", "train", {}),
            )
            | kw
        )
        return Source("x", [Study(**study)]).hash()

    changes = (
        dict(study="b"),
        dict(patient="q"),
        dict(split="test"),
        dict(sections={"findings": "Not."}),
        dict(views={}),
        dict(prior=None),
        dict(projection="AP"),
        dict(views={"frontal": View("f", lambda: None, "2")}),
    )
    assert len({source(), *(source(**c) for c in changes)}) == 1 + len(changes) and source() == source()


def test_describe_counts(tmp_path):
    source = mimic(tmp_path)
    source.problems += [Problem("XML does not parse", f"{i}.xml") for i in range(7)]
    text = describe_source(source, named=2)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line and "views:" not in line}
    assert (
        lines["train"] == ["3", "60.0%", "1"]
        and lines["frontal"] == ["4", "80.0%"]
        and lines["prior"] == ["1", "20.0%"]
    )
    assert lines["findings"] == ["5", "100.0%", "2"] and lines["technique"] == ["0", "0.0%", "–"]
    assert "XML does not parse: 7 (0.xml, 1.xml, …)" in text and "may not leave" in text


@needs_hannover
def test_the_real_films_of_hannover():
    names = dict(study="image_id", patient="patient_id", image="image_id", order="admission_offset")
    source = open_source(
        StudiesConfig(source=f"table:{HANNOVER / 'data.csv'}", columns=names, images=str(HANNOVER / "images512"))
    )
    assert len(source) == 243 and Counter(s.projection for s in source) == {"AP": 194, "PA": 49} and not source.problems
    assert all(s.prior is None or s.prior.patient == s.patient for s in source) and not source.studies[0].sections


# ---- readers of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def readers():
    before = dict(READERS)
    yield
    READERS.clear()
    READERS.update(before)


def test_a_registered_reader_is_opened_by_its_word_and_named_in_the_sentence(readers, tmp_path):
    @register_reader("ward-7")
    def read_ward(place, cfg):
        return finish_source([Draft("a line", "s1", "p1", {"findings": f"From {place.name}."})], [], cfg, may_leave=False)

    source = open_source(f"ward-7:{tmp_path / 'letters'}")
    assert [s.sections["findings"] for s in source] == ["From letters."] and not source.may_leave
    with pytest.raises(UserError, match="ward-8:x' is not a source; use phantom:SEED.* or ward-7:PATH"):
        open_source("ward-8:x")


@pytest.mark.parametrize("prefix, words", [("openi", "choose another prefix"), ("C:", "cannot name a source"), ("", "cannot name a source")])
def test_a_reader_cannot_take_what_is_taken_or_no_word(readers, prefix, words):
    with pytest.raises(UserError, match=words):
        register_reader(prefix)(lambda place, cfg: None)


def test_a_reader_may_be_written_again_in_its_own_module(readers):
    first, second = (lambda place, cfg: 1), (lambda place, cfg: 2)
    register_reader("mine")(first)
    assert register_reader("mine")(second) is READERS["mine"] is second
