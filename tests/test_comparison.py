"""Many methods in one table: the record of an earlier version is read, the rule picks what it should."""
import json
from pathlib import Path

import pytest

from rasa_nb.baselines import ShiftAverage, roster
from rasa_nb.comparison import Comparison, choose_default, compare_methods
from rasa_nb.matching import LEOPART
from rasa_nb.scenes import Scenes

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "methods.json"


@pytest.fixture(scope="module")
def record(): return [Comparison.from_dict(c) for c in json.loads(RECORD.read_text()).values()]


def test_removers_and_ready_encoders_share_one_table(tiny):
    methods = {"LEACE, coords": roster()["LEACE, coords"], "two shifts": ShiftAverage(tiny, 2)}
    methods["attached"] = roster()["RASA, coords"].fit(tiny, Scenes(n=30), 48).attach(tiny)
    quick = LEOPART.replace(n_init=1, max_iter=5)
    score = Scenes("val", 8, size=48)
    seen = compare_methods(tiny, Scenes(n=30), score, methods, 12, (0, 1), 48, protocol=quick)
    assert list(seen.table.index) == ["none", *methods]
    assert seen.rank == {"none": 0, "LEACE, coords": 2, "two shifts": None, "attached": 2}
    assert len(seen.miou["two shifts"][12]) == 2 and seen.learned["images"] == 30
    assert json.loads(json.dumps(seen.to_dict()))["encoder"] == "tiny"


def test_a_record_with_methods_that_are_gone_is_shown_as_it_was(record):
    assert [c.encoder for c in record] == ["tiny", "mae", "deit", "no-position", "random"]
    tiny, gone = record[0], ["RASA, sgd, global basis", "RASA, coords, ridge 0.1", "shift averaging, 10"]
    assert set(gone) <= set(tiny.table.index)
    text = tiny.to_markdown()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.split("\n")]
    cells = {row[1]: row[2:] for row in rows if len(row) > 2}
    assert cells["RASA"][:2] == ["14", "-0.014"] and cells["shift averaging, 10"][0] == "-"
    assert "1000 images of scenes-train" in text and "(with n_init=1, max_iter=30)" in text
    assert all(name in tiny._repr_html_() for name in gone)


def test_the_figure_draws_the_table(record):
    tiny, methods = record[0], list(record[0].miou)
    axes = tiny.show().axes
    assert len(axes) == 4 and [t.get_text() for t in axes[0].get_yticklabels()] == methods
    drawn = axes[1].containers[0].lines[0].get_xdata()
    assert drawn[methods.index("RASA")] == pytest.approx(tiny.mean("RASA", 12) - tiny.mean("none", 12))


def test_the_rule_takes_rasa_from_the_record(record):
    choice = choose_default(record)
    assert choice.method == "RASA" and choice.table.gain["RASA"] == pytest.approx(3.99, abs=.01)
    assert "shift averaging, 10" not in choice.table.index    # no map of tokens
    assert json.dumps(choice.to_dict()) and "<b>RASA</b>" in choice._repr_html_()
    assert len(choice.show().axes) == 1


def compared(name, leak, rank=0, left=0., **miou):
    "A comparison of made-up scores, K=24 and a std of half a point."
    r2 = {m: leak if m == "none" else left for m in miou}
    ranks = {m: 0 if m == "none" else rank for m in miou}
    runs = {m: {24: [value - .5, value + .5]} for m, value in miou.items()}
    return Comparison(name, {}, {}, ranks, {"ridge augmented": r2}, runs, {})


@pytest.mark.parametrize("comparisons, method", [
    ([compared("leaky", .8, none=20, a=19.9)], None),                # harmless, but gains nothing
    ([compared("leaky", .8, rank=None, none=20, a=25)], None),       # no map of tokens
    ([compared("leaky", .8, left=.03, none=20, a=25)], None),        # leaves position where it leaks
    ([compared("leaky", .8, none=20, a=22), compared("quiet", .09, left=.09, none=30, a=30)], "a")])
def test_a_method_that_breaks_a_clause_is_not_taken(comparisons, method):
    assert choose_default(comparisons).method == method


def test_the_table_says_where_a_method_harms():
    leaky, tight = compared("leaky", .8, none=20, a=22, b=25), compared("tight", .02, none=30, a=29.6, b=28)
    assert list(choose_default([leaky, tight]).table.harms) == ["", "tight K=24"]
