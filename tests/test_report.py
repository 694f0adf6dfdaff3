"""The report against numbers recomputed from run.json, and against files that cannot be trusted."""
import copy
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rasa_nb.matching import FRANCA, LEOPART
from rasa_nb.report import PUBLISHED, Report, Setting, group_runs, keep_record, published_for, read_runs

stored = Path(__file__).parent.parent / "benchmarks" / "results"


def record(before, after, seed=0, model="dinov2_vitb", images=1449, method="rasa", protocol=LEOPART, learned=1464):
    "A record with scores {k: [one per K-means seed]}."
    scores = [dict(encoder=e, k=k, seed=s, miou=float(v)) for e, some in (("before", before), ("after", after)) for k, values in some.items() for s, v in enumerate(values)]
    miou = {e: {str(k): dict(mean=float(np.mean(v)), std=float(np.std(v)), per_seed=list(map(float, v))) for k, v in some.items()} for e, some in (("before", before), ("after", after))}
    return dict(format="rasa_nb.run.1", parameters=dict(model=model, method=method, seed=seed), protocol=asdict(protocol), data=dict(name="voc-val", images=images, num_classes=21),
                absent_classes=[], encoder=dict(name=model), head=dict(method="RASA", params=dict(random_state=seed), fitted_on=dict(encoder_hash="0", data=dict(name="voc-train", images=learned))),
                position_r2=dict(mean=dict(before=.9, after=.0)), miou=miou, scores=scores)


def write(folder, **records):
    for name, r in records.items(): (folder / name).mkdir(); (folder / name / "run.json").write_text(json.dumps(r))
    return folder


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
def test_every_number_follows_from_the_stored_scores(seeds, fits, draw):
    rng = np.random.default_rng(draw)
    before, after = rng.uniform(10, 60, seeds), rng.uniform(10, 60, (fits, seeds))
    setting, = group_runs([record({100: before}, {100: after[f]}, seed=f) for f in range(fits)])
    row = setting.table.loc[100]
    assert np.isclose(row.before, before.mean()) and np.isclose(row.before_std, before.std()) and np.isclose(row.after, after.mean()) and np.isclose(row.after_std, after.std())
    assert np.isclose(row.difference, row.after - row.before) and np.isclose(row.between_fits, (after - before).mean(1).std())
    if seeds == 1: assert np.isnan(row.low) and np.isnan(row.high)
    else: assert np.allclose([row.low, row.high], stats.ttest_rel(after.mean(0), before).confidence_interval(.95))


def test_the_stored_records_are_whole_and_shown():
    report = Report.read(stored)
    assert report.settings and not report.left_out
    for s in report.settings:
        raw = [r["miou"] for r in s.records]
        for k in s.table.index:
            assert np.isclose(s.table.before[k], np.mean([r["before"][str(k)]["mean"] for r in raw]))
            assert np.isclose(s.table.difference[k], np.mean([np.subtract(r["after"][str(k)]["per_seed"], r["before"][str(k)]["per_seed"]) for r in raw]))
            assert f"{s.table.before[k]:.1f} ± {s.table.before_std[k]:.1f}" in report.to_markdown()


def test_a_part_of_the_split_and_a_single_seed_are_marked():
    setting = Setting([record({21: [10]}, {21: [12]}, images=160, learned=100)])
    assert setting.marks == ["part of the split: 160 of 1449 images", "fitted on part of the split: 100 of 1464 images", "one K-means seed: the spread is not known"]
    for text in (Report([setting]).to_markdown(), Report([setting]).to_html()): assert "†" in text and "160 of 1449" in text and "±" not in text.replace("mean ± std", "")
    assert r"$\dagger$" in Report([setting]).to_latex()
    assert Setting([record({21: [10, 11]}, {21: [12, 13]})]).marks == [] and "†" not in Report([Setting([record({21: [10, 11]}, {21: [12, 13]})])]).to_markdown()


def broken(change):
    r = copy.deepcopy(record({21: [10., 12.]}, {21: [13., 17.]})); change(r)
    return r


@pytest.mark.parametrize("change, why", [
    (lambda r: r["miou"].update(before=r["miou"]["after"], after=r["miou"]["before"]), "states a mean of 15"),   # two cells swapped
    (lambda r: r["scores"].pop(), "missing"), (lambda r: r["scores"].clear(), "no scores"), (lambda r: r.pop("head"), "incomplete"), (lambda r: r.update(format="rasa_nb.run.7"), "expected 'rasa_nb.run.1'"),
    (lambda r: r["scores"][0].update(miou=None), "missing, or not numbers"), (lambda r: r.update(data=[]), "incomplete"), (lambda r: r["miou"]["after"].clear(), "incomplete")])
def test_records_that_cannot_be_trusted_are_named_and_left_out(tmp_path, change, why):
    found = read_runs(write(tmp_path, good=record({21: [10., 12.]}, {21: [13., 17.]}), bad=broken(change)))
    assert len(found.records) == 1 and why in found.left_out["bad"]
    assert "| bad " in Report.read(tmp_path).to_markdown()


def test_files_that_are_none(tmp_path):
    write(tmp_path, good=record({21: [10., 12.]}, {21: [13., 17.]}))
    for name, text in dict(cut='{"format": "rasa', text="no json", empty="", number="3").items(): (tmp_path / name).mkdir(); (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "nothing").mkdir(); (tmp_path / ".unfinished-ab").mkdir(); (tmp_path / "loose.json").write_text("{"); (tmp_path / "other.json").write_text('{"runs": []}')
    (tmp_path / ".sweep").mkdir(); (tmp_path / ".sweep" / "gone.failed.json").write_text('{"why": "ValueError: k"}')
    found = read_runs(tmp_path)
    assert len(found.records) == 1 and set(found.left_out) == {"cut", "text", "empty", "number", "nothing", ".unfinished-ab", "loose.json", "gone"}
    assert found.left_out["gone"] == "failed: ValueError: k" and "unfinished" in found.left_out["nothing"]
    with pytest.raises(FileNotFoundError, match="no such folder; runs are made by"): read_runs(tmp_path / "none")


def test_a_folder_of_runs_among_runs_is_named(tmp_path):
    "Version 0.1.0 made such for a model called owner/name."
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner", run=record({21: [10., 12.]}, {21: [13., 17.]}))
    assert read_runs(tmp_path).left_out == dict(owner="no run, but a folder of 1: read it by itself")
    assert len(read_runs(tmp_path / "owner").records) == 1


@pytest.mark.parametrize("model, shown", [("/home/me/dino v2", "dino v2"), ("../weights", "weights"),
                                          ("facebook/dinov2-base", "facebook/dinov2-base")])
def test_kept_records_name_models_but_no_folders(tmp_path, model, shown):
    run = record({21: [1, 2]}, {21: [2, 3]}, model=model)
    run["head"]["fitted_on"]["encoder"] = model
    kept = json.loads(keep_record(write(tmp_path, run=run) / "run", tmp_path / "kept").read_text())
    assert kept["parameters"]["model"] == kept["encoder"]["name"] == kept["head"]["fitted_on"]["encoder"] == shown


def test_a_folder_without_runs(tmp_path):
    report = Report.read(tmp_path)
    assert report.to_markdown() == "No runs." and report.frame.empty and report.to_latex() == ""
    with pytest.raises(ValueError, match="no runs to show"): report.figure()


@pytest.mark.parametrize("model, images, protocol, stands", [("dinov2_vitb", 1449, LEOPART, True), ("dinov2_vitb", 640, LEOPART, False), ("dinov2_vitb", 1449, LEOPART.replace(image_size=224), False),
    ("dinov2_vitb", 1449, FRANCA, False), ("vits", 640, FRANCA, True), ("vits", 1449, LEOPART, False), ("tiny", 1449, LEOPART, False)])
def test_published_numbers_stand_beside_ours_under_the_same_protocol_only(model, images, protocol, stands):
    beside, apart = published_for(Setting([record({100: [10, 11]}, {100: [12, 13]}, model=model, images=images, protocol=protocol)]))
    assert (100 in beside) == stands and bool(apart) == (not stands and model != "tiny")
    text = Report([Setting([record({100: [10, 11]}, {100: [12, 13]}, model=model, images=images, protocol=protocol)])]).to_markdown()
    assert ("published val mIoU" in text) == stands and ("Not comparable" in text) == (not stands and model != "tiny")


def test_published_numbers_have_a_source():
    assert all(p.source and 0 < p.before < 100 and p.images and p.knobs for p in PUBLISHED) and len({(p.row, p.k) for p in PUBLISHED}) == len(PUBLISHED)


class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.open, self.cells, self.tables = [], 0, 0
    def handle_starttag(self, tag, attributes): self.open.append(tag); self.cells += tag == "td"; self.tables += tag == "table"
    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_html_and_latex_are_well_formed(tmp_path):
    nasty = record({21: [10., 12.], 100: [20, 21]}, {21: [13., 17.], 100: [22, 23]}, model="a_b<c>&%$#{}~^\\", images=640)
    report = Report.read(write(tmp_path, one=nasty, two=record({100: [20, 21]}, {100: [22, 23]}), bad=broken(lambda r: r.pop("head"))))
    tags = Tags(); tags.feed(report.to_html())
    assert tags.open == [] and tags.tables == 3 and tags.cells == 2 * 4 + 1 * 5 + 1 * 2
    latex = report.to_latex()
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 3 and latex.isascii()
    for environment in latex.split(r"\begin{tabular}{")[1:]:
        columns, body = environment.split("}", 1)
        for row in body.split(r"\end{tabular}")[0].splitlines():
            if row.endswith(r"\\"): assert row.replace(r"\&", "").count("&") == len(columns) - 1
    bare = latex.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    depth = np.cumsum([(c == "{") - (c == "}") for c in bare])
    assert depth.min() >= 0 and depth[-1] == 0


def test_the_same_run_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two records of the same run, seed 0"): Report.read(write(tmp_path, a=record({21: [1, 2]}, {21: [2, 3]}), b=record({21: [1, 2]}, {21: [2, 3]})))


def test_only_and_kept_records(tmp_path):
    runs = write(tmp_path / "runs" if (tmp_path / "runs").mkdir() is None else None, a=record({21: [1, 2]}, {21: [2, 3]}), b=record({21: [1, 2]}, {21: [2, 3]}, model="vits"))
    assert [s.model for s in Report.read(runs).only(model="vits").settings] == ["vits"]
    with pytest.raises(ValueError, match="no run matches"): Report.read(runs).only(model="vits", method="trained")
    raw = json.loads((runs / "a" / "run.json").read_text()); raw["parameters"].update(checkpoint="/home/me/w.pth", data_dir="/data/x", out_dir="/out/runs")
    (runs / "a" / "run.json").write_text(json.dumps(raw))
    kept = keep_record(runs / "a", tmp_path)
    assert "/" not in json.dumps(json.loads(kept.read_text())["parameters"]) and Report.read(tmp_path).settings[0].model == "dinov2_vitb"


def test_runs_of_0_0_1_are_read_under_the_names_of_today(tmp_path):
    old = record({21: [1, 2]}, {21: [2, 3]})
    old["parameters"] = dict(model="tiny", solver="closed_form", targets="auto", seed=0)
    sgd = record({21: [1, 2]}, {21: [2, 3]}, model="vits")
    sgd["parameters"] = dict(model="vits", solver="sgd", seed=0)
    report = Report.read(write(tmp_path, a=old, b=sgd))
    assert [s.method for s in report.settings] == ["rasa", "trained"] and list(report.frame.method) == ["rasa", "trained"]


def on_data(name, learned="voc-train", whole=2000, **options):
    "A record of another dataset, of ten of its images."
    made = record({21: [1., 2.]}, {21: [2., 4.]}, images=10, **options)
    made["data"] |= dict(name=name, of=whole)
    made["head"]["fitted_on"]["data"]["name"] = learned
    return made


def test_each_dataset_has_a_table_of_its_own_and_says_what_was_learned_from(tmp_path):
    whole = record({21: [1., 2.]}, {21: [2., 4.]}, model="vits")
    report = Report.read(write(tmp_path, a=on_data("ade20k-validation"), b=whole,
                               c=on_data("ade20k-validation", "ade20k-training", seed=1)))
    tables = report.by_data
    assert {name: len(table) for name, table in tables.items()} == {"ade20k-validation": 2, "voc-val": 1}
    assert set(tables["ade20k-validation"]["learned on"]) == {"voc-train", "ade20k-training"}
    text = report.to_markdown()
    assert text.index("### ade20k-validation") < text.index("### voc-val")
    assert text.count("**dinov2_vitb, rasa, learned on voc-train †**") == 1 and "10 of 2000 images" in text
    assert "dinov2_vitb †" in set(tables["ade20k-validation"].model) and tables["voc-val"].model[0] == "vits"
    for form in (report.to_html(), report.to_latex()): assert "ade20k-validation" in form


def test_published_numbers_of_other_tasks_stand_beside_no_clusters():
    linear = [p for p in PUBLISHED if p.task == "linear"]
    assert linear and {p.model for p in linear} & {"dinov2_vitb"}
    beside, apart = published_for(Setting([on_data("ade20k-validation")]), linear)
    assert not beside and not apart
