"""Published rows beside what comes out here: where the truth is planted, where nothing follows, and by command."""
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rasa_nb.matching import FRANCA, LEOPART
from rasa_nb.published import KNOBS, PUBLISHED, Published, find_row, list_published, read_published
from rasa_nb.reproduction import Reproduction, difference_to, main, prepare, reproduce, row_protocol
from rasa_nb.scenes import Scenes

small = LEOPART.replace(image_size=96, n_init=1, max_iter=20)


# The file of published numbers

@pytest.mark.parametrize("row, k, before, protocol, images", [
    ("franca/dinov2_vitb", 100, 39.2, LEOPART, 1449), ("franca/dinov2_vitb", 300, 52.5, LEOPART, 1449),
    ("franca/franca_vitl14", 300, 58.9, LEOPART, 1449), ("removing-pos-vit-bias/vitb", 300, 68.03, FRANCA.replace(images=640), 640),
    ("neco/neco_vits14_reg", 500, 68.9, LEOPART.replace(images=1440), 1440), ("hummingbird/dinov2_vits", None, 77.0, None, 1449),
    ("dinov3-linear/vitb", None, 51.8, None, 2000)])
def test_a_number_has_its_protocol_and_its_images(row, k, before, protocol, images):
    number, = (n for n in find_row(row) if n.k == k)
    assert (number.before, number.protocol, number.images) == (before, protocol, images)


def test_every_name_that_a_row_is_loaded_by_is_one(monkeypatch):
    from rasa_nb.encoders import check_name
    for name in {n.load for n in PUBLISHED if n.load}: check_name(name)
    assert {n.dataset for n in PUBLISHED} <= {"voc", "ade20k"} and set(KNOBS) == {k for n in PUBLISHED for k in n.knobs}
    assert list_published().row.is_unique and set(list_published().row) == {n.row for n in PUBLISHED}


def test_a_file_that_is_broken_is_refused(tmp_path):
    from importlib.resources import files
    told = json.loads((files("rasa_nb") / "static" / "published.json").read_text())
    for change, why in ((lambda t: t["tables"]["franca"].update(source=""), "franca/dinov2_vitb names no source"),
                        (lambda t: t["knobs"].pop("matching"), r"knobs \['matching'\] are not explained")):
        broken = json.loads(json.dumps(told))
        change(broken)
        (tmp_path / "p.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=why): read_published(tmp_path / "p.json")


# Differences

def test_the_interval_is_that_of_two_samples_where_both_are_known():
    "Against the two-sample t interval of scipy: its spread is pooled, ours is of our seeds, so equal spreads agree."
    mine, theirs = np.array([1., 2, 3, 4, 5]), np.array([11., 12, 13, 14, 15])
    mean, low, high = difference_to(theirs.mean(), mine, 5)
    both = stats.ttest_ind(mine, theirs).confidence_interval(.95)
    wider = stats.t.ppf(.975, 4) / stats.t.ppf(.975, 8)   # the spread is known from five, not from ten
    assert mean == -10 and np.isclose(high - mean, (both.high - -10) * wider)
    one = difference_to(13, mine, 1)
    assert one[2] - one[1] > high - low and np.isnan(difference_to(13, mine[:1], 5)[1])


@pytest.fixture(scope="module")
def measured(tiny):
    rows = [Published(k=k, before=0., model="tiny", protocol=small, images=24, data="scenes-val", row="invented/tiny",
                      knobs=("matching",), source="none") for k in (12, 20)]
    return reproduce(rows, tiny, Scenes("val", 24), seeds=3)


def planted(made, shift, **change):
    "What was measured, with the truth planted so far from it."
    means = made.result.frame.groupby("k").miou.mean()
    rows = [replace(n, before=means[n.k] + shift, **change) for n in made.numbers]
    return Reproduction(rows, made.result, made.differs)


def test_a_number_is_as_published_or_differs(measured, tmp_path):
    assert planted(measured, 0).verdicts == ["as published"] * 2 and "Nothing differs" in planted(measured, 0).notes[0]
    far = planted(measured, 20)
    assert far.verdicts == ["differs"] * 2 and far.notes[2] == f"- matching: {KNOBS['matching']}"
    kept = json.loads(far.save(tmp_path / "r.json").read_text())
    assert kept["row"] == "invented/tiny" and len(kept["scores"]) == 6 and kept["table"][0]["verdict"] == "differs"
    assert "| differs" in far.to_markdown() and "a cluster per image" in far.notes[0] and f"{far.table.published[0]}" in repr(far)


@pytest.mark.parametrize("change, said", [
    (dict(images=25), "images 24 (published: 25)"), (dict(data="voc-val"), "data scenes-val (published: voc-val)")])
def test_nothing_is_judged_where_the_question_is_another(measured, tiny, change, said):
    rows = [replace(n, **change) for n in measured.numbers]
    from rasa_nb.reproduction import _differences
    differs = _differences(rows[0], row_protocol(rows, 3), measured.result)
    made = planted(Reproduction(rows, measured.result, differs), 20)
    assert made.verdicts == ["not compared"] * 2 and said in made.notes[0] and len(made.notes) == 2


def test_a_number_with_rasa_is_shown_and_not_judged(measured, tiny):
    rows = [replace(n, after=n.before) for n in planted(measured, 0).numbers[:1]]
    made = reproduce(rows, tiny, Scenes("val", 24), after=tiny, seeds=2)
    assert made.verdicts[1] == "another removal" and made.table.encoder.tolist() == ["encoder", "with RASA"]


# By command

def options(*words):
    from rasa_nb.reproduction import _parser
    return vars(_parser().parse_args(words))


def test_the_list_shows_every_row(capsys):
    assert main(["--list"]) is None
    said = capsys.readouterr().out
    assert all(n.row in said for n in PUBLISHED)


@pytest.mark.parametrize("words, why", [
    ([], "which row"), (["franca/dinov2_vitx"], "Nearest: franca/dinov2_vitl"),
    (["hummingbird/dinov2_vits"], "of the task 'in_context'"), (["franca/eva_clip_vitb"], "--model NAME names one"),
    (["leopart/leopart_vits16"], "--checkpoint FILE names yours"),
    (["franca/dinov2_vitb", "--data_root", "/no/where", "--download", "--no-download"], "no images of voc-val below")])
def test_what_cannot_be_made_again_is_told(words, why, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and why in capsys.readouterr().err


def test_the_row_decides_protocol_encoder_and_data():
    config, how, changed = prepare(find_row("removing-pos-vit-bias/vits"), options("x"))
    assert (config.model, config.data, config.pixels, config.ks, config.method) == ("vits", "voc", 224, (21, 100, 300), "released")
    assert not how and not changed
    _, how, changed = prepare(find_row("franca/dinov2_vitb"), options("x", "--random_weights", "--resampling", "library"))
    assert how == dict(pretrained=False, resampling="library") and set(changed) == {"weights", "resampling"}


def test_a_rehearsal_by_command_on_a_random_encoder(tmp_path, voc_tree, capsys, monkeypatch):
    "A small stand-in for a row, on a tree of the official layout."
    stand_in = Published("vit_tiny_patch16_224", 22, 50., protocol=LEOPART.replace(image_size=64, n_init=1), row="a/b",
                         source="none", knobs=("matching",), load="vit_tiny_patch16_224")
    monkeypatch.setattr("rasa_nb.reproduction.find_row", lambda name: [stand_in])
    out = tmp_path / "made.json"
    code = main(["a/b", "--random_weights", "--data_root", str(voc_tree), "--seeds", "2", "--device", "cpu", "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 0 and "weights random (published: the model's own)" in said and "images 2 (published: 1449)" in said
    assert json.loads(out.read_text())["differs"]["images"] == [2, 1449]
