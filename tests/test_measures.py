"""Planted truth: measures return the share of position that tokens were given, and about zero without it."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from rasa_nb.data import SegmentationData
from rasa_nb.reading import Evaluation, Reading, Transformed
from rasa_nb.measures import (CellSums, RidgeProbe, cluster_position, cluster_tokens, cosine_gap, layer_r2,
                              position_r2, position_report, token_norms, variance_share)
from rasa_nb.moments import position_targets
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.scenes import Scenes

GRID, SHARES = (4, 6), (0., .3, .7)
UPRIGHT = Reading(augment="none")
GRIDS = st.tuples(st.integers(1, 4), st.integers(2, 5))
SETTINGS = settings(max_examples=25, deadline=None)
PROBED = {"ridge_row", "ridge_col", "mlp_row", "mlp_col"}
COMPARED = PROBED | {"variance_share", "cosine_gap", "cluster_information"}
NUMBERS = COMPARED | {"spatial_entropy", "norm_median", "norm_max", "norm_outliers"}


class Blank(SegmentationData):
    "Images that are never looked at."
    name = "blank"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def load(self, i): return torch.zeros(3, 16, 16, dtype=torch.uint8), None


def encoder_of(tokens, grid=GRID, d=2, patch=8, name="planted"):
    "An encoder whose tokens are `tokens(n)`, whatever the images show."
    size = patch * grid[0], patch * grid[1]
    return PatchEncoder(torch.nn.Identity(), lambda _, x: tokens(len(x)), d, patch, size, name=name)


def coordinates(share, n, grid=GRID):
    "Row and column [n, gh, gw, 2] of unit variance, hidden in noise: they are `share` of the variance."
    place = position_targets(grid).float()
    place = (place - place.mean((0, 1))) / place.std((0, 1), correction=0)
    return share**.5 * place + (1 - share)**.5 * torch.randn(n, *grid, 2)


def one_hot(share, n, grid=GRID, d=64):
    "A direction per cell, `share` of the squared length; the rest is random, in `d` further dimensions."
    cells = math.prod(grid)
    place = torch.eye(cells).view(1, *grid, cells).expand(n, -1, -1, -1)
    rest = F.normalize(torch.randn(n, *grid, d), dim=-1)
    return torch.cat([share**.5 * place, (1 - share)**.5 * rest], -1)


def prototypes(share, n, grid=GRID):
    "Each token is the prototype of its own cell with chance `share`, else that of any cell."
    cells = torch.arange(math.prod(grid)).view(grid)
    any_cell = torch.randint(cells.numel(), (n, *grid))
    label = torch.where(torch.rand(n, *grid) < share, cells, any_cell)
    return torch.eye(cells.numel())[label] + .03 * torch.randn(n, *grid, cells.numel())


def own_cell(share, cells):
    "Chances that such a token has the prototype of its own cell, and that of a certain other one."
    return share + (1 - share) / cells, (1 - share) / cells


@pytest.mark.parametrize("share", SHARES)
def test_r2_and_variance_return_the_planted_share(share):
    z = coordinates(share, 400)
    for r2 in RidgeProbe(GRID, 2).update(z[:300]).update(z[300:]).score(): assert abs(r2 - share) < .03
    assert abs(variance_share(z) - share) < .02


@SETTINGS
@given(share=st.floats(0, 1), grid=GRIDS, d=st.integers(1, 4), seed=st.integers(0, 99))
def test_variance_share_is_exact_where_the_sample_holds_no_accident(share, grid, d, seed):
    "Noise in pairs of opposite sign, so that no cell mean moves and no image mean is left but by design."
    gh, gw = grid
    torch.manual_seed(seed)
    signal, noise = torch.randn(gh, gw, d).double(), torch.randn(10, gh, gw, d).double()
    signal = signal - signal.mean((0, 1))
    signal = signal / signal.square().sum(-1).mean()**.5
    noise = torch.cat([noise, -noise])
    noise = noise / noise.square().sum(-1).mean()**.5
    n, cells = 20, gh * gw
    interaction = n * cells - float(noise.sum((1, 2)).square().sum()) / cells    # of noise alone
    position = share - (1 - share) * interaction / (n - 1) / (n * cells)
    rest = (1 - share) * n / (n - 1)
    found = variance_share(share**.5 * signal + (1 - share)**.5 * noise)
    assert math.isclose(found, position / (position + rest), abs_tol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_cosine_gap_is_its_closed_form(share):
    z, cells = one_hot(share, 300), 24
    raw = cosine_gap(z, center=False)
    assert abs(raw.gap - share) < .005 and abs(raw.other) < .005    # orthogonal places of length sqrt(share)
    centered = cosine_gap(z)    # a mean token of 1 / cells in each place is gone
    assert abs(centered.gap - share * cells / (cells - 1)) < .01
    assert abs(centered.other + share / (cells - 1)) < .01


@SETTINGS
@given(n=st.integers(2, 6), grid=GRIDS, center=st.booleans(), seed=st.integers(0, 99))
def test_cosine_gap_agrees_with_all_pairs(n, grid, center, seed):
    gh, gw = grid
    torch.manual_seed(seed)
    z = torch.randn(n, gh, gw, 5).double() + torch.randn(gh, gw, 5) + 2
    if center: found, z = cosine_gap(z), z - z.mean((1, 2), keepdim=True)
    else: found = cosine_gap(z, center=False)
    u = F.normalize(z, dim=-1).flatten(1, 2)
    cosines = torch.einsum("icd,jed->ijce", u, u)[~torch.eye(n, dtype=bool)]
    same = torch.eye(gh * gw, dtype=bool)
    assert math.isclose(found.same, cosines[:, same].mean(), abs_tol=1e-9)
    assert math.isclose(found.other, cosines[:, ~same].mean(), abs_tol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_clusters_return_the_information_of_their_construction(share):
    "With q and r the chances of `own_cell`: I = log C + q log q + (C - 1) r log r, both entropies log C."
    q, r = own_cell(share, 24)
    information = 1 + (q * math.log(q) + 23 * r * math.log(r)) / math.log(24)
    z = prototypes(share, 500)
    found = cluster_position(z.argmax(-1))
    assert abs(found.information - information) < .01 and abs(found.entropy - (1 - information)) < .01
    assert found.nmi > found.information - .01
    split = cluster_position(cluster_tokens(z, 72))    # room for every prototype
    assert abs(split.entropy - (1 - information)) < .03


def test_cluster_information_agrees_with_scikit_learn_on_independent_labels():
    labels, cell = torch.randint(7, (30, 3, 5)), torch.arange(15).expand(30, -1).flatten()
    found = cluster_position(labels, n_shuffles=200)
    assert math.isclose(found.nmi, normalized_mutual_info_score(labels.flatten(), cell), abs_tol=1e-9)
    assert abs(found.information - adjusted_mutual_info_score(labels.flatten(), cell)) < .01


def test_spatial_entropy_of_each_cluster():
    labels = torch.zeros(50, 2, 4).long()
    labels[:, 0, 0], labels[:, 1, :2] = 3, 1    # cluster 3 in one cell, 1 in two, 0 in five; 2 is empty
    of = cluster_position(labels).of_cluster
    assert np.allclose(of[:2] + of[3:], [math.log(5) / math.log(8), 1 / 3, 0], atol=1e-9)
    assert math.isnan(of[2])


@pytest.fixture(scope="module")
def report():
    "Encoders of growing share, with two kinds of plant on two grids."
    torch.manual_seed(0)
    encoders = {f"coordinates {s}": encoder_of(lambda n, s=s: coordinates(s, n)) for s in SHARES}
    def coarse(s): return encoder_of(lambda n: prototypes(s**.5, n, (2, 3)), d=6, patch=16)
    encoders |= {f"prototypes {s}": coarse(s) for s in SHARES}
    return position_report(encoders, Blank(120), (32, 48), k=12)


@pytest.mark.parametrize("plant", ["coordinates", "prototypes"])
@pytest.mark.parametrize("kind", ["augmented", "upright"])
def test_measures_are_near_zero_without_position_and_grow_with_it(report, plant, kind):
    table = report.table[kind].loc[[f"{plant} {s}" for s in SHARES]]
    few = {"mlp_row", "mlp_col"} if plant == "prototypes" else set()    # six cells are too few for a network
    for name in COMPARED - few:
        assert abs(table[name].iloc[0]) < .08 and (np.diff(table[name]) > .05).all(), name
    spread = table.spatial_entropy
    assert abs(spread.iloc[0] - 1) < .03 and (np.diff(spread) < -.03).all()


def test_a_report_returns_the_planted_shares(report):
    "Coordinates are `share` of the variance; prototypes kept with chance p are p squared of it."
    for kind in ("augmented", "upright"):
        for share in SHARES:
            one = report.table[kind].loc[f"coordinates {share}"]
            other = report.table[kind].loc[f"prototypes {share}"]
            for name in PROBED | {"variance_share"}: assert abs(one[name] - share) < .08, name
            for name in ("ridge_row", "ridge_col", "variance_share"):
                assert abs(other[name] - share) < .12, name
            q, r = own_cell(share**.5, 6)
            assert abs(other.spatial_entropy + (q * math.log(q) + 5 * r * math.log(r)) / math.log(6)) < .06


def test_a_report_holds_what_the_single_measures_say(tiny):
    data = Scenes("val", 12)
    row = position_report({"tiny": tiny}, data, k=10, mlp=False).table["upright"].loc["tiny"]
    z = torch.cat([t for t, _ in tiny.encode(Transformed(data, Evaluation(96, 96)))])
    r2, norms = position_r2(tiny, data, UPRIGHT), token_norms(z)
    clusters = cluster_position(cluster_tokens(z, 10, 1))
    expected = dict(ridge_row=r2.row["tiny"], ridge_col=r2.col["tiny"], variance_share=variance_share(z),
                    cosine_gap=cosine_gap(z).gap, cluster_information=clusters.information,
                    spatial_entropy=clusters.entropy, norm_median=norms.median, norm_max=norms.max)
    for name, value in expected.items():
        assert math.isclose(row[name], value, rel_tol=1e-4, abs_tol=1e-4), name
    assert not any(name.startswith("mlp") for name in row.index)


def test_a_report_shows_itself(report):
    assert report.table.shape == (6, 2 * len(NUMBERS)) and set(report.table["upright"]) == NUMBERS
    again = json.loads(json.dumps(report.to_dict()))["measures"]["augmented"]["prototypes 0.3"]
    assert again["variance_share"] == report.table["augmented"].variance_share["prototypes 0.3"]
    for text in ("prototypes 0.7", "cluster information", "120 images"): assert text in report._repr_html_()


def test_the_figure_of_a_report_draws_its_table(report):
    fig = report.show()
    assert len(fig.axes) == 8 and [t.get_text() for t in fig.axes[0].get_yticklabels()] == report.encoders
    for ax, name in ((fig.axes[0], "ridge_row"), (fig.axes[4], "variance_share")):
        drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
        for kind, table in report.measures.items():
            assert np.allclose(drawn[f"{kind} images"], [of[name] for of in table.values()])


@pytest.mark.parametrize("measure", [
    lambda: position_r2(FINE, Blank(8)), lambda: cosine_gap(coordinates(.5, 8)),
    lambda: cluster_position(torch.randint(4, (8, 2, 2))), lambda: token_norms(coordinates(.5, 8))])
def test_every_result_has_a_table_a_dictionary_and_a_figure(measure):
    result = measure()
    assert "<table" in result._repr_html_() and json.dumps(result.to_dict())
    assert len(result.show().axes) == result.table.shape[1]


def test_encoders_share_one_pass_and_keep_their_own_grid():
    calls = []
    def counted(n):
        calls.append(n)
        return coordinates(.5, n)
    fine = encoder_of(counted)
    coarse = encoder_of(lambda n: one_hot(.5, n, (2, 3), 16), d=22, patch=16)
    position_report({"a": fine, "b": fine, "coarse": coarse}, Blank(24), k=5, mlp=False)
    assert sum(calls) == 48    # augmented and upright, once each, for both names
    both = position_r2({"fine": fine, "coarse": coarse}, Blank(60))
    assert abs(both.row["fine"] - .5) < .1 and both.row["coarse"] > .9    # each on its own grid


def test_layers_are_those_of_the_encoder_at_each_layer(tiny):
    data = Scenes("val", 8)
    found = layer_r2(tiny, data, layers=(1, -1), norm=False)
    for i in (1, 5):
        one = position_r2(tiny.at(i, norm=False), data)
        assert math.isclose(found.row["tiny"][i], *one.row.values(), abs_tol=1e-6)
        assert math.isclose(found.col["tiny"][i], *one.col.values(), abs_tol=1e-6)
    assert list(found.table.index) == [("tiny", 1), ("tiny", 5)] and len(found.show().axes) == 2


def test_one_row_has_no_row_to_tell():
    line = encoder_of(lambda n: coordinates(.5, n, (1, 8))[..., 1:], (1, 8), d=1)
    for probe in ("ridge", "mlp"):
        r2 = position_r2(line, Blank(100), probe=probe)
        assert math.isnan(r2.row["planted"]) and abs(r2.col["planted"] - .5) < .1
        assert r2.mean["planted"] == r2.col["planted"]


def test_norms_find_planted_outliers_and_nothing_else():
    z = F.normalize(torch.randn(40, 5, 5, 8), dim=-1)
    assert token_norms(z).outliers == 0
    z[:10, 2, 2] *= 8
    found = token_norms(z)
    assert found.outliers == 10 / 1000 and abs(found.max - 8) < 1e-4 and abs(found.median - 1) < 1e-5
    assert token_norms(z, times=9).outliers == 0


def test_sums_do_not_depend_on_batches():
    z = torch.randn(50, 3, 4, 5)
    parts = CellSums((3, 4), 5)
    for part in z.split(7): parts.update(part)
    assert parts.count == 50 and math.isclose(variance_share(z), variance_share(parts), abs_tol=1e-12)


def test_a_token_without_direction_gives_no_number():
    z = torch.randn(5, 3, 3, 4)
    z[2, 1, 1] = 0
    assert math.isnan(cosine_gap(z, center=False).gap) and not math.isnan(cosine_gap(z).gap)


def broken(n):
    z = coordinates(.5, n)
    if n < 32: z[5, 0, 0, 0] = math.nan    # in the second batch of 40 images: image 37
    return z


def constant(n): return torch.full((n, *GRID, 2), .1)


FINE, DATA = encoder_of(lambda n: coordinates(.5, n)), Blank(40)
FEW_CELLS = encoder_of(lambda n: coordinates(.5, n, (2, 2)), (2, 2))


@pytest.mark.parametrize("call, match", [
    (lambda: position_report({}, DATA), "no encoder was given"),
    (lambda: position_r2({}, DATA), "no encoder was given"),
    (lambda: layer_r2({}, DATA), "no encoder was given"),
    (lambda: position_report(FINE, DATA, 8), "planted: an image of 8 px is a single patch.*size of 16 or"),
    (lambda: position_report(FINE, DATA, k=1000), "k=1000: expected 2 to 192 clusters for 960 tokens"),
    (lambda: position_report(FINE, DATA, UPRIGHT), "augment='none': the report has upright"),
    (lambda: position_report({"bad": encoder_of(broken)}, DATA), "bad: tokens of image 37 are not finite"),
    (lambda: position_r2({"bad": encoder_of(broken)}, DATA, probe="mlp"), "bad: tokens of image 37 are not"),
    (lambda: position_r2(FINE, DATA, probe="oracle"), "probe='oracle': expected 'ridge' or 'mlp'"),
    (lambda: position_r2(FEW_CELLS, DATA.first(8), probe="mlp"), "16 tokens are too few to fit the mlp"),
    (lambda: position_r2(encoder_of(constant), DATA), "constant: nothing to probe"),
    (lambda: layer_r2(FINE, DATA), "no blocks to choose from"),
    (lambda: variance_share(constant(5)), "constant: no variance"),
    (lambda: variance_share(torch.randn(1, 2, 2, 3)), "1 images are too few"),
    (lambda: cosine_gap(torch.randn(5, 1, 1, 3)), "a grid of a single cell"),
    (lambda: cosine_gap(torch.randn(5, 4, 3)), "expected .n, gh, gw, D."),
    (lambda: cosine_gap(broken(10)), "tokens of image 5 are not finite"),
    (lambda: cluster_tokens(broken(10), 3), "tokens of image 5 are not finite"),
    (lambda: cluster_tokens(coordinates(.5, 4), 1), "k=1: expected 2 to 19"),
    (lambda: cluster_position(torch.zeros(5, 2, 2).long()), "at least two different ones"),
    (lambda: cluster_position(torch.full((5, 2, 2), -1)), "cluster labels from -1"),
    (lambda: token_norms(torch.randn(0, 2, 2, 3)), "0 images are too few")])
def test_bad_input_gives_an_error_that_says_what_to_do(call, match):
    with pytest.raises((ValueError, TypeError), match=match): call()
