"""Planted truth: tokens with a known share of position. Every measure returns it, is near zero without it, and grows with it."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from rasa_nb.measures import (CellSums, cluster_position, cluster_tokens, cosine_gap, layer_r2, position_r2, position_report, ridge_r2, token_norms,
                          variance_share)
from rasa_nb.data import Evaluation, Scenes, SegmentationData, Transformed
from rasa_nb.encoders import PatchEncoder
from rasa_nb.moments import Moments, position_targets

GRID, SHARES = (4, 6), (0., .25, .5, .75)
SETTINGS = settings(max_examples=25, deadline=None)
NUMBERS = {"ridge_row", "ridge_col", "mlp_row", "mlp_col", "variance_share", "cosine_gap", "cluster_information", "spatial_entropy", "norm_median", "norm_max", "norm_outliers"}


class Blank(SegmentationData):
    "Images that are never looked at."
    name = "blank"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def load(self, i): return torch.zeros(3, 16, 16, dtype=torch.uint8), None


def encoder_of(tokens, grid=GRID, d=2, patch=8, name="planted"):
    "An encoder whose tokens are `tokens(n)`, whatever the images show."
    class Fake(torch.nn.Module):
        def forward(self, x): return tokens(len(x))
    return PatchEncoder(Fake(), lambda model, x: model(x), d, patch, image_size=(patch * grid[0], patch * grid[1]), name=name)


def coordinates(share, n, grid=GRID):
    "Row and column, each of unit variance and hidden in noise such that they are `share` of the variance: [n, gh, gw, 2]."
    t = position_targets(grid).float(); t = (t - t.mean((0, 1))) / t.std((0, 1), correction=0)
    return share**.5 * t + (1 - share)**.5 * torch.randn(n, *grid, 2)


def one_hot(share, n, grid=GRID, d=64):
    "A direction for each cell, weight `share` of the squared length; the rest a random unit vector in `d` further dimensions."
    cells = grid[0] * grid[1]
    place = torch.eye(cells).view(1, *grid, cells).expand(n, -1, -1, -1)
    return torch.cat([share**.5 * place, (1 - share)**.5 * F.normalize(torch.randn(n, *grid, d), dim=-1)], -1)


def prototypes(share, n, grid=GRID):
    "Each token is the prototype of its own cell with chance `share`, else that of any cell; a little noise tells equal ones apart."
    cells = torch.arange(grid[0] * grid[1]).view(grid)
    label = torch.where(torch.rand(n, *grid) < share, cells, torch.randint(cells.numel(), (n, *grid)))
    return torch.eye(cells.numel())[label] + .03 * torch.randn(n, *grid, cells.numel())


@pytest.mark.parametrize("share", SHARES)
def test_r2_and_variance_return_the_planted_share(share):
    r2 = position_r2(encoder_of(lambda n: coordinates(share, n)), Blank(400), augmented=False)
    assert abs(r2.row["planted"] - share) < .03 and abs(r2.col["planted"] - share) < .03
    assert abs(variance_share(coordinates(share, 400)) - share) < .02


@SETTINGS
@given(share=st.floats(0, 1), gh=st.integers(1, 5), gw=st.integers(2, 5), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_variance_share_is_exact_where_the_sample_holds_no_accident(share, gh, gw, d, seed):
    "Noise in pairs of opposite sign, so that no cell mean moves and no image mean is left but by design."
    torch.manual_seed(seed)
    signal = torch.randn(gh, gw, d).double(); signal = signal - signal.mean((0, 1)); signal = signal / signal.square().sum(-1).mean()**.5
    noise = torch.randn(10, gh, gw, d).double(); noise = torch.cat([noise, -noise]); noise = noise / noise.square().sum(-1).mean()**.5
    n, cells = 20, gh * gw
    interaction = n * cells - float(noise.sum((1, 2)).square().sum()) / cells        # of noise alone
    p, rest = share - (1 - share) * interaction / (n - 1) / (n * cells), (1 - share) * n / (n - 1)
    assert math.isclose(variance_share(share**.5 * signal + (1 - share)**.5 * noise), p / (p + rest), abs_tol=1e-9)


def test_variance_share_is_zero_on_average_whatever_ties_the_tokens_of_an_image():
    for blocks in (0, 3.):
        found = [variance_share(torch.randn(6, 3, 3, 4) + blocks * torch.randn(6, 1, 1, 4)) for _ in range(300)]
        assert abs(np.mean(found)) < 4 * np.std(found) / 300**.5 and np.std(found) < .1


@pytest.mark.parametrize("share", SHARES)
def test_cosine_gap_is_its_closed_form(share):
    z, cells = one_hot(share, 300), 24
    raw = cosine_gap(z, center=False)
    assert abs(raw.gap - share) < .005 and abs(raw.other) < .005         # orthogonal places of length sqrt(share)
    centered = cosine_gap(z)                                                # a mean token of 1 / cells in each place is gone
    assert abs(centered.gap - share * cells / (cells - 1)) < .01 and abs(centered.other + share / (cells - 1)) < .01


@SETTINGS
@given(n=st.integers(2, 6), gh=st.integers(1, 3), gw=st.integers(2, 4), center=st.booleans(), seed=st.integers(0, 99))
def test_cosine_gap_agrees_with_all_pairs(n, gh, gw, center, seed):
    torch.manual_seed(seed)
    z = torch.randn(n, gh, gw, 5).double() + torch.randn(gh, gw, 5) + 2
    u = F.normalize(z - z.mean((1, 2), keepdim=True) if center else z, dim=-1).flatten(1, 2)
    pairs = {True: [], False: []}
    for i, j in ((i, j) for i in range(n) for j in range(n) if i != j):
        for (c, a), (e, b) in ((x, y) for x in enumerate(u[i]) for y in enumerate(u[j])): pairs[c == e].append(float(a @ b))
    found = cosine_gap(z, center)
    assert math.isclose(found.same, np.mean(pairs[True]), abs_tol=1e-9) and math.isclose(found.other, np.mean(pairs[False]), abs_tol=1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_clusters_return_the_information_of_their_construction(share):
    "Chance q of a token's cell having its own cluster, r of each other: I = log C + q log q + (C - 1) r log r, both entropies log C."
    cells = 24
    q, r = share + (1 - share) / cells, (1 - share) / cells
    information = 1 + (q * math.log(q) + (cells - 1) * r * math.log(r)) / math.log(cells)
    z = prototypes(share, 500)
    found = cluster_position(z.argmax(-1))
    assert abs(found.information - information) < .01 and abs(found.entropy - (1 - information)) < .01 and found.nmi > found.information - .01
    split = cluster_position(cluster_tokens(z, 3 * cells))     # K-means with room for every prototype: the same up to clusters that share one
    assert abs(split.entropy - (1 - information)) < .03


def test_cluster_information_agrees_with_scikit_learn():
    labels, cell = torch.randint(7, (30, 3, 5)), torch.arange(15).expand(30, -1).flatten()
    found = cluster_position(labels, n_shuffles=200)
    assert math.isclose(found.nmi, normalized_mutual_info_score(labels.flatten(), cell), abs_tol=1e-9)
    assert abs(found.information - adjusted_mutual_info_score(labels.flatten(), cell)) < .01     # labels are independent here, so both nulls are one


def test_cluster_information_is_zero_on_average_where_images_are_of_one_piece():
    "Each image is one cluster or half and half: shuffling all labels would take off far too much."
    found, full = [], []
    for _ in range(40):
        two = torch.randint(8, (20, 2)); half = torch.rand(20, 4, 4) < .5 * (torch.rand(20, 1, 1) < .5)
        labels = torch.where(half, two[:, :1, None], two[:, 1:, None])
        found.append(cluster_position(labels).information); full.append(adjusted_mutual_info_score(labels.flatten(), torch.arange(16).repeat(20)))
    assert abs(np.mean(found)) < 4 * np.std(found) / 40**.5 + .002 and np.mean(full) < -.05


def test_spatial_entropy_of_each_cluster():
    labels = torch.zeros(50, 2, 4).long(); labels[:, 0, 0] = 3; labels[:, 1, :2] = 1     # cluster 3 in one cell, 1 in two, 0 in five; 2 is empty
    of = cluster_position(labels).of_cluster
    assert np.allclose(of[:2] + of[3:], [math.log(5) / math.log(8), 1 / 3, 0], atol=1e-9) and math.isnan(of[2])


@pytest.mark.parametrize("probe, found", [("ridge", False), ("mlp", True)])
def test_only_the_network_finds_a_quadratic_leak(probe, found):
    "Row and column with a random sign: every mean is zero, the squares tell all."
    def squares(n):
        t = position_targets(GRID).float() + .5
        return t * (torch.randint(2, (n, *GRID, 2)) * 2 - 1)
    r2 = position_r2(encoder_of(squares), Blank(150), augmented=False, probe=probe)
    for score in (r2.row["planted"], r2.col["planted"]): assert score > .8 if found else abs(score) < .05


@pytest.fixture(scope="module")
def reports():
    "One report of encoders of growing share, with two kinds of plant and two grids."
    torch.manual_seed(0)
    encoders = {f"coordinates {s}": encoder_of(lambda n, s=s: coordinates(s, n)) for s in SHARES}
    encoders |= {f"prototypes {s}": encoder_of(lambda n, s=s: prototypes(s**.5, n, (2, 3)), d=6, patch=16) for s in SHARES}
    return position_report(encoders, Blank(150), k=12, image_size=(32, 48))


@pytest.mark.parametrize("plant", ["coordinates", "prototypes"])
@pytest.mark.parametrize("kind", ["augmented", "upright"])
def test_every_measure_is_near_zero_without_position_and_grows_with_it(reports, plant, kind):
    table = reports.table[kind].loc[[f"{plant} {s}" for s in SHARES]]
    few = {"mlp_row", "mlp_col"} if plant == "prototypes" else set()      # six cells an image are too few to train a network on
    for m in NUMBERS - {"spatial_entropy", "norm_median", "norm_max", "norm_outliers"} - few: assert abs(table[m].iloc[0]) < .06 and (np.diff(table[m]) > .03).all(), (m, table[m].tolist())
    assert abs(table.spatial_entropy.iloc[0] - 1) < .03 and (np.diff(table.spatial_entropy) < -.03).all()


def test_report_returns_the_planted_shares(reports):
    "Coordinates are `share` of the variance; prototypes kept with chance p move a cell's mean by p, so p squared is the share."
    for kind in ("augmented", "upright"):
        for s in SHARES:
            one, other = reports.table[kind].loc[f"coordinates {s}"], reports.table[kind].loc[f"prototypes {s}"]
            for m in ("ridge_row", "ridge_col", "mlp_row", "mlp_col", "variance_share"): assert abs(one[m] - s) < .07, (m, one[m], s)
            for m in ("ridge_row", "ridge_col", "variance_share"): assert abs(other[m] - s) < .12, (m, other[m], s)
            q, r = s**.5 + (1 - s**.5) / 6, (1 - s**.5) / 6
            assert abs(other.spatial_entropy - -(q * math.log(q) + 5 * r * math.log(r)) / math.log(6)) < .06


def test_report_holds_what_the_single_measures_say(tiny):
    data, encoders = Scenes("val", 12), {"tiny": tiny}
    report = position_report(encoders, data, k=10, mlp=False)
    z = torch.cat([t for t, _ in tiny.encode(Transformed(data, Evaluation(96, 96)))])
    row, r2 = report.table["upright"].loc["tiny"], position_r2(tiny, data, augmented=False)
    clusters, norms = cluster_position(cluster_tokens(z, 10, 1)), token_norms(z)
    for found, expected in [(row.ridge_row, r2.row["tiny"]), (row.ridge_col, r2.col["tiny"]), (row.variance_share, variance_share(z)), (row.cosine_gap, cosine_gap(z).gap),
                            (row.cluster_information, clusters.information), (row.spatial_entropy, clusters.entropy), (row.norm_median, norms.median), (row.norm_max, norms.max)]:
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-4)
    assert not any(m.startswith("mlp") for m in row.index)


def test_report_shows_itself(reports):
    assert reports.table.shape == (8, 2 * len(NUMBERS)) and set(reports.table["upright"]) == NUMBERS and not reports.table.isna().any(axis=None)
    assert json.loads(json.dumps(reports.to_dict()))["measures"]["augmented"]["prototypes 0.5"]["variance_share"] == reports.table["augmented"].variance_share["prototypes 0.5"]
    assert "prototypes 0.75" in reports._repr_html_() and "cluster information" in reports._repr_html_() and "150 images" in repr(reports)
    fig = reports.show()
    assert len(fig.axes) == 8 and [t.get_text() for t in fig.axes[0].get_yticklabels()] == reports.encoders and fig.get_figwidth() <= 9.5
    for ax, m in ((fig.axes[0], "ridge_row"), (fig.axes[4], "variance_share")):     # what is drawn is what is in the table
        drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
        for kind in ("augmented", "upright"): assert np.allclose(drawn[f"{kind} images"], reports.table[kind][m])


def test_encoders_share_one_pass_and_keep_their_own_grid():
    calls = []
    def counted(n): calls.append(n); return coordinates(.5, n)
    fine = encoder_of(counted)
    coarse = encoder_of(lambda n: one_hot(.5, n, (2, 3), 16), d=22, patch=16)
    position_report({"a": fine, "b": fine, "coarse": coarse}, Blank(24), k=5, mlp=False)
    assert sum(calls) == 48     # augmented and upright, once each, for both names
    both = position_r2({"fine": fine, "coarse": coarse}, Blank(60))
    assert abs(both.row["fine"] - .5) < .1 and both.row["coarse"] > .9     # the cell's direction tells the row of its own grid


def test_layers_are_those_of_the_encoder_at_each_layer(tiny):
    data = Scenes("val", 8)
    found = layer_r2(tiny, data, layers=(1, -1), norm=False)
    for i in (1, 5):
        one = position_r2(tiny.at(i, norm=False), data)
        assert math.isclose(found.row["tiny"][i], *one.row.values(), abs_tol=1e-6) and math.isclose(found.col["tiny"][i], *one.col.values(), abs_tol=1e-6)
    assert list(found.table.index) == [("tiny", 1), ("tiny", 5)] and len(found.show().axes) == 2
    with pytest.raises(ValueError, match="between -6 and 5"): layer_r2(tiny, data, layers=(6,))
    with pytest.raises(TypeError, match="no blocks to choose from"): layer_r2(encoder_of(lambda n: coordinates(0, n)), data)


def test_one_row_has_no_row_to_tell():
    line = encoder_of(lambda n: coordinates(.5, n, (1, 8))[..., 1:], (1, 8), d=1)
    for probe in ("ridge", "mlp"):
        r2 = position_r2(line, Blank(100), probe=probe)
        assert math.isnan(r2.row["planted"]) and abs(r2.col["planted"] - .5) < .1 and r2.mean["planted"] == r2.col["planted"]


def test_norms_find_planted_outliers_and_nothing_else():
    z = F.normalize(torch.randn(40, 5, 5, 8), dim=-1)
    assert token_norms(z).outliers == 0
    z[:10, 2, 2] *= 8
    found = token_norms(z)
    assert found.outliers == 10 / 1000 and abs(found.max - 8) < 1e-4 and abs(found.median - 1) < 1e-5
    assert token_norms(z, times=9).outliers == 0


def test_sums_do_not_depend_on_batches():
    z = torch.randn(50, 3, 4, 5)
    whole, parts = CellSums.of(z), CellSums((3, 4), 5)
    for part in z.split(7): parts.update(part)
    assert parts.count == 50 and math.isclose(variance_share(whole), variance_share(parts), abs_tol=1e-12)


def test_a_token_without_direction_gives_no_number():
    z = torch.randn(5, 3, 3, 4); z[2, 1, 1] = 0
    assert math.isnan(cosine_gap(z, center=False).gap) and not math.isnan(cosine_gap(z).gap)


def broken(n):
    z = coordinates(.5, n)
    if n < 32: z[5, 0, 0, 0] = math.nan       # in the second batch of 40 images: image 37
    return z


def constant(n): return torch.full((n, *GRID, 2), .1)


FINE, DATA = (lambda n: coordinates(.5, n)), Blank(40)


@pytest.mark.parametrize("call, match", [
    (lambda: position_report(encoder_of(FINE), Blank(3)), "3 images are too few: at least 4"),
    (lambda: position_report({}, DATA), "no encoder was given"),
    (lambda: position_r2({}, DATA), "no encoder was given"),
    (lambda: layer_r2({}, DATA), "no encoder was given"),
    (lambda: position_report(encoder_of(FINE), DATA, image_size=8), "planted: an image of 8 px is a single patch.*image_size=16 or more"),
    (lambda: position_report(encoder_of(FINE), DATA, image_size=20), "nearest to 20: 16 or 24"),
    (lambda: position_report(encoder_of(FINE), DATA, k=1000), "k=1000: expected 2 to 192 clusters for 960 tokens"),
    (lambda: position_report({"bad": encoder_of(broken)}, DATA), "bad: tokens of image 37 are not finite"),
    (lambda: position_r2({"bad": encoder_of(broken)}, DATA, probe="mlp"), "bad: tokens of image 37 are not finite"),
    (lambda: position_r2(encoder_of(FINE), DATA, probe="oracle"), "probe='oracle': expected 'ridge' or 'mlp'"),
    (lambda: position_r2(encoder_of(lambda n: coordinates(.5, n, (2, 2)), (2, 2)), DATA.first(8), probe="mlp"), "16 tokens are too few to fit the mlp"),
    (lambda: position_r2(encoder_of(constant), DATA), "constant: nothing to probe"),
    (lambda: ridge_r2(Moments(GRID, 2).update(constant(5)), Moments(GRID, 2).update(constant(5)), position_targets(GRID)), "constant: nothing to probe"),
    (lambda: variance_share(constant(5)), "constant: no variance"),
    (lambda: variance_share(torch.randn(1, 2, 2, 3)), "1 images are too few"),
    (lambda: cosine_gap(torch.randn(5, 1, 1, 3)), "a grid of a single cell"),
    (lambda: cosine_gap(torch.randn(5, 4, 3)), "expected .n, gh, gw, D."),
    (lambda: cosine_gap(broken(10)), "tokens of image 5 are not finite"),
    (lambda: cluster_tokens(broken(10), 3), "tokens of image 5 are not finite"),
    (lambda: cluster_tokens(FINE(4), 1), "k=1: expected 2 to 19"),
    (lambda: cluster_position(torch.zeros(5, 2, 2).long()), "at least two different ones"),
    (lambda: cluster_position(torch.full((5, 2, 2), -1)), "cluster labels from -1"),
    (lambda: token_norms(torch.randn(0, 2, 2, 3)), "0 images are too few")])
def test_bad_input_gives_an_error_that_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()
