"""Many methods in one table: controls, records of this and earlier versions, a rule that picks what it should."""
import json
from pathlib import Path

import pytest
import torch

from rasa_nb.baselines import ShiftAverage, roster
from rasa_nb.data import how_many
from rasa_nb.comparison import Comparison, RandomSubspace, choose_default, compare_methods
from rasa_nb.matching import LEOPART
from rasa_nb.moments import Moments
from rasa_nb.scenes import Scenes, planted_tokens

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "methods.json"


@pytest.fixture(scope="module")
def record(): return json.loads(RECORD.read_text())


def comparisons(record, part):
    return [Comparison.from_dict(of[part]) for name, of in record.items() if part in of and name != "choice"]


def test_removers_and_ready_encoders_share_one_table(tiny, tmp_path):
    methods = {"LEACE, coords": roster()["LEACE, coords"], "two shifts": ShiftAverage(tiny, 2)}
    methods["attached"] = roster()["RASA, coords"].fit(tiny, Scenes(n=30), 48).attach(tiny)
    quick = LEOPART.replace(n_init=1, max_iter=5)
    asked = tiny, Scenes(n=30), Scenes("val", 8, size=48), methods, 12, (0, 1), 48
    seen = compare_methods(*asked, protocol=quick, folder=tmp_path)
    assert list(seen.table.index) == ["none", *methods]
    assert seen.rank == {"none": 0, "LEACE, coords": 2, "two shifts": None, "attached": 2}
    assert len(seen.held_out["two shifts"][12]) == 2 and seen.learned["images"] == 30
    assert json.loads(json.dumps(seen.to_dict()))["encoder"] == "tiny"
    again = compare_methods(*asked, protocol=quick, folder=tmp_path)    # from the runs that were kept
    assert again.to_dict() == seen.to_dict()


@pytest.mark.parametrize("loud", [1., 300.])
def test_a_random_subspace_has_rasas_rank_and_standardized_units(loud):
    tokens = planted_tokens(200)[0]
    tokens[..., 0] *= loud
    moments = Moments.of(tokens)
    control = RandomSubspace(rank=3).fit_moments(moments)
    p, scale = control.projector_.double(), moments.cov.diagonal().sqrt()
    standardized = p / scale[:, None] * scale
    torch.testing.assert_close(standardized, standardized.T, atol=1e-5, rtol=0)    # orthogonal there
    torch.testing.assert_close(p @ p, p, atol=1e-4 * loud, rtol=0)
    assert round(float(p.trace())) == len(p) - 3


def earlier(record):
    "What version 0.1 wrote of a comparison: no score by other images, no intervals, no controls."
    new = record["tiny"]["report"]
    kept = "encoder", "learned", "scored", "rank", "r2", "miou", "protocol", "mean", "std"
    return {name: new[name] for name in kept}


def test_a_record_of_version_0_1_is_shown_as_it_was_and_not_judged(record):
    c = Comparison.from_dict(earlier(record))
    assert not any("held out" in column for column in c.table) and c.mean("RASA", 12) > 0
    assert c.to_markdown() and c._repr_html_() and len(c.show().axes) == 1 + len(c.ks)
    with pytest.raises(ValueError, match="run compare_methods anew"): choose_default([c])


def test_the_record_has_every_case_and_its_captions_say_what_was_run(record):
    reported = comparisons(record, "report")
    assert len(reported) == len(comparisons(record, "pick")) == 8
    for c in reported:
        assert f"{how_many(c.learned)} of {c.learned['name']}" in c.title
        assert "n_init=1" in c.title and f"{len(c.miou['none'][c.ks[0]])} K-means seeds" in c.title
    for c in comparisons(record, "full"): assert "n_init" not in c.title and "K-means seeds" in c.title


def test_markdown_and_figure_say_what_the_table_says(record):
    tiny = Comparison.from_dict(record["tiny"]["report"])
    rows = [[cell.strip() for cell in line.split("|")] for line in tiny.to_markdown().split("\n")]
    cells = {row[1]: row[2:] for row in rows if len(row) > 2}
    assert cells["RASA"][0] == str(tiny.rank["RASA"]) and cells["raw pixels"][0] == "-"
    assert set(tiny.controls) < set(cells)
    axes, methods = tiny.show().axes, list(tiny.miou)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == methods
    published, held_out = (bars.lines[0].get_xdata() for bars in axes[1].containers)
    at = methods.index("RASA") - 1
    assert published[at] == pytest.approx(tiny.mean("RASA", 12) - tiny.mean("none", 12), abs=1e-3)
    of = [tiny.mean(name, 12, "held_out") for name in ("RASA", "none")]
    assert held_out[at] == pytest.approx(of[0] - of[1], abs=1e-3)


def test_the_answer_in_the_record_is_the_rules(record):
    choice = choose_default(comparisons(record, "pick"))
    assert choice.method == record["choice"]["method"] and choice.reason == record["choice"]["reason"]
    assert json.dumps(choice.to_dict()) and len(choice.show().axes) == 1


def compared(name, leak, rank=0, left=0., wide=1., **score):
    "A comparison of made-up scores, K=24; the intervals of changes are `wide` points to either side."
    r2 = {m: leak if m == "none" else left for m in score}
    ranks = {m: 0 if m == "none" else rank for m in score}
    runs = {m: {24: [value - .5, value + .5]} for m, value in score.items()}
    moved = {m: value - score["none"] for m, value in score.items()}
    change = {m: {24: dict(mean=d, seeds=[d - .1, d + .1], images=[d - wide, d + wide])}
              for m, d in moved.items()}
    both = dict(miou=change, held_out=change)
    return Comparison(name, {}, {}, ranks, {"ridge augmented": r2}, runs, {}, runs, both)


@pytest.mark.parametrize("comparisons, method", [
    ([compared("leaky", .8, none=20, a=19.9)], None),                # harmless, but gains nothing
    ([compared("leaky", .8, rank=None, none=20, a=25)], None),       # no map of tokens
    ([compared("leaky", .8, left=.03, none=20, a=25)], None),        # leaves position where it leaks
    ([compared("leaky", .8, none=20, a=22), compared("quiet", .09, left=.09, none=30, a=30)], "a")])
def test_a_method_that_breaks_a_clause_is_not_taken(comparisons, method):
    assert choose_default(comparisons).method == method


def test_a_loss_counts_where_both_intervals_hold_it():
    leaky, tight = compared("leaky", .8, none=20, a=22, b=25), compared("tight", .02, none=30, a=29.6, b=28)
    assert list(choose_default([leaky, tight]).table.harms) == ["", "tight K=24"]
    unsure = compared("tight", .02, wide=3., none=30, a=29.6, b=28)    # over images it may be chance
    assert choose_default([leaky, unsure]).method == "b"
