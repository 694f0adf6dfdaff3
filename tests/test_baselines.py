"""Rivals of RASA: the package's LEACE from our sums, planted position that goes, one pass for all, and a choice that does no harm."""
import json

import pytest
import torch
from concept_erasure import LeaceFitter
from hypothesis import given, settings, strategies as st

from rasa_nb.baselines import (Auto, BlankSVD, Comparison, LEACE, MeanThenRASA, RemovePCA, ShiftAverage, choose_default,
                               compare_methods, content_in, fit_together, leace_fitter, roster)
from rasa_nb.measures import ridge_r2
from rasa_nb.data import Scenes
from rasa_nb.encoders import PatchEncoder
from rasa_nb.moments import Moments, orthonormal_targets, position_targets
from rasa_nb.head import RASAHead
from rasa_nb.rasa import PositionMean, RASA

grids = st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda g: g[0] * g[1] > 3)
SETTINGS = settings(max_examples=20, deadline=None)


def tokens_of(grid, d, n=60, seed=0, strength=3.):
    "Correlated tokens, row and column along two directions, float64 [n, gh, gw, d]."
    g = torch.Generator().manual_seed(seed)
    mix, along = torch.randn(d, d, generator=torch.Generator().manual_seed(1)).double(), torch.randn(2, d, generator=torch.Generator().manual_seed(2)).double()
    return torch.randn(n, *grid, d, generator=g).double() @ mix + strength * position_targets(grid) @ along


def moments_of(z): return Moments(z.shape[1:3], z.shape[3]).update(z)


@SETTINGS
@given(grid=grids, d=st.integers(2, 9), targets=st.sampled_from(["coords", "fourier"]), cuts=st.lists(st.integers(0, 60), max_size=3), seed=st.integers(0, 99))
def test_leace_is_the_package_s(grid, d, targets, cuts, seed):
    z, t = tokens_of(grid, d, seed=seed), orthonormal_targets(position_targets(grid, targets))
    theirs = LeaceFitter(d, t.shape[-1], affine=False, constrain_cov_trace=False, svd_tol=1e-6, dtype=torch.float64)
    for part in z.tensor_split(sorted(cuts)):
        if len(part): theirs.update(part.flatten(0, 2), t.expand(len(part), -1, -1, -1).flatten(0, 2))
    ours = leace_fitter(moments_of(z), t)
    assert torch.allclose(ours.sigma_xx, theirs.sigma_xx, atol=1e-8) and torch.allclose(ours.sigma_xz, theirs.sigma_xz, atol=1e-10)
    assert torch.allclose(ours.eraser.P, theirs.eraser.P, atol=1e-6)


@pytest.mark.parametrize("targets", ["coords", "fourier"])
def test_leace_leaves_no_linear_predictor(targets):
    z = tokens_of((5, 7), 24, n=200); m = moments_of(z); p = LEACE(targets)._solve(m)[0]
    assert (p @ m.cross(position_targets((5, 7)))).abs().max() < 1e-9
    assert torch.allclose(p @ p, p, atol=1e-8)


def test_leace_changes_tokens_less_than_an_orthogonal_projection():
    z = tokens_of((5, 7), 24, n=200); m = moments_of(z)
    moved = {type(r).__name__: float((r.fit_moments(m).transform((z - m.mean).float()) - (z - m.mean).float()).square().mean()) for r in (LEACE(), RASA(rank=2))}
    assert moved["LEACE"] < moved["RASA"]


@pytest.mark.parametrize("name", [n for n, r in roster().items() if "shift" not in n and getattr(r, "solver", "") != "sgd" and "blank" not in n and "PCA" not in n])
def test_planted_position_goes_on_new_draws(name):
    left = {}
    for remover in (roster()[name].fit_moments(moments_of(tokens_of((6, 6), 20, n=200))), None):
        z = [tokens_of((6, 6), 20, n=200, seed=s).float() for s in (1, 2)]
        a, b = (moments_of(remover.transform(x) if remover else x) for x in z)
        left[remover is None] = float(ridge_r2(a, b, position_targets((6, 6))).mean())
    assert left[True] > .5 and left[False] < .05


def test_mean_then_rasa_is_both():
    z = tokens_of((4, 5), 10).float(); m = moments_of(z)
    mean, rasa, both = PositionMean().fit_moments(m), RASA(targets="fourier").fit_moments(m), MeanThenRASA().fit_moments(m)
    assert torch.allclose(both.transform(z), rasa.transform(mean.transform(z)), atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (1, 8)])
def test_content_is_the_variance_within_cells(grid):
    z = tokens_of(grid, 7); m = moments_of(z)
    assert abs(content_in(m) - float(z.var(0, correction=0).mean((0, 1)).sum())) < 1e-8
    assert abs(content_in(moments_of(z + 9 * position_targets(grid, "fourier")[..., :7])) - content_in(m)) < 1e-8


def additive(strength):
    "An encoder of mean color per patch in 3 of 8 dimensions, and position in others."
    g = torch.Generator().manual_seed(0); along = torch.linalg.qr(torch.randn(8, 8, generator=g))[0][:, :5]
    def tokens(m, x):
        z = 9 + torch.nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1)   # bias: a black patch is something too
        return z @ along[:, :3].T + .05 * torch.randn(*z.shape[:3], 8) + strength * position_targets(z.shape[1:3]).float() @ along[:, 3:].T
    return PatchEncoder(torch.nn.Identity(), tokens, 8, 8, 32, name="additive")


def test_blank_svd_finds_the_directions_of_an_additive_leak():
    encoder = additive(2.)
    blank = BlankSVD(2).fit(encoder)
    z = blank.attach(encoder)(torch.rand(40, 3, 32, 32))
    assert blank.projector_.shape == (8, 8) and z.mean(0).std((0, 1)).max() < .15 < encoder(torch.rand(40, 3, 32, 32)).mean(0).std((0, 1)).max()
    assert blank.head_.metadata["fitted_on"]["data"] == dict(name="one blank image", images=1)
    assert BlankSVD(.5).fit(encoder).basis_.shape[1] == 4


def test_all_shifts_leave_no_position_and_one_shift_is_the_encoder(tiny):
    black = torch.zeros(1, 3, 24, 32)
    assert torch.equal(ShiftAverage(1).attach(tiny)(black), tiny(black))
    assert (ShiftAverage(12).attach(tiny)(black).std((1, 2)) < 1e-5).all()
    images = torch.rand(2, 3, 24, 32)
    averaged = ShiftAverage(12).attach(tiny)
    assert torch.allclose(averaged(images.roll((8, 16), (2, 3))), averaged(images).roll((1, 2), (1, 2)), atol=1e-4)   # a shifted image, shifted tokens


def test_one_pass_fits_all_as_each_alone(tiny):
    data, methods = Scenes(n=30), {k: r for k, r in roster().items() if k != "shift averaging, 10"}
    for r in methods.values():
        if getattr(r, "solver", None) == "sgd": r.n_iter, r.epochs = 1, 1
    calls, forward = [], type(tiny).forward
    try:
        type(tiny).forward = lambda self, x: (calls.append(len(x)), forward(self, x))[1]
        together = fit_together(methods, tiny, data, 48)
    finally: type(tiny).forward = forward
    assert sum(calls) == 30 + 3 and set(together) == set(methods)   # one pass, and one blank image for each blank-image SVD
    for name in ("LEACE, fourier", "position mean + RASA, fourier", "RASA", "blank-image SVD, 10", "RASA as released"):
        alone = roster()[name]
        if name == "RASA as released": alone.n_iter, alone.epochs = 1, 1
        assert torch.allclose(together[name].head.projector, alone.fit(tiny, data, 48).projector_, atol=1e-5), name


def test_one_pass_takes_one_random_state(tiny):
    with pytest.raises(ValueError, match="random_state .0, 3.: methods that share one pass"): fit_together({"a": LEACE(), "b": LEACE(random_state=3)}, tiny, Scenes(n=30), 48)
    together = fit_together({"a": LEACE(random_state=3)}, tiny, Scenes(n=30), 48)["a"].head
    assert torch.allclose(together.projector, LEACE(random_state=3).fit(tiny, Scenes(n=30), 48).projector_, atol=1e-5) and together.metadata["fitted_on"]["random_state"] == 3


def test_auto_removes_where_position_leaks_and_only_there():
    for strength, chosen in ((2., True), (0., False)):
        auto = Auto().fit(additive(strength), Scenes(n=60))
        assert (auto.choice_.method is not None) == chosen and auto.choice_.reason
        assert chosen != torch.equal(auto.head_(torch.ones(1, 4, 4, 8)), torch.ones(1, 4, 4, 8))
    assert auto.head_.metadata["fitted_on"]["data"]["images"] == 60
    with pytest.raises(ValueError, match="20 images are too few for Auto, which splits them in three: at least 48"): Auto().fit(additive(1), Scenes(n=20))


def test_comparison_and_its_table(tiny):
    methods = {k: roster()[k] for k in ("LEACE, coords", "shift averaging, 10")}
    seen = compare_methods(tiny, Scenes(n=30), Scenes("val", 8), methods, k=12, seeds=(0, 1), image_size=48)
    assert list(seen.table.index) == ["none", "LEACE, coords", "shift averaging, 10"] and seen.rank == {"none": 0, "LEACE, coords": 2, "shift averaging, 10": None}
    assert len(seen.miou["LEACE, coords"][12]) == 2 and json.loads(json.dumps(seen.to_dict()))["encoder"] == "tiny"
    text = seen.to_markdown()
    assert "| LEACE, coords | 2 |" in text and "30 images of scenes-train" in text and "seeds" in text


def comparison(name, r2, rank=0, left=0., **miou):
    return Comparison(name, {}, {}, {m: 0 if m == "none" else rank for m in miou}, {"ridge augmented": {m: r2 if m == "none" else left for m in miou}},
                      {m: {24: [v - .5, v + .5]} for m, v in miou.items()}, {})


def test_rule_of_the_default():
    leaky, tight = comparison("leaky", .8, none=20, a=22, b=25), comparison("tight", .02, none=30, a=29.6, b=28)
    assert choose_default([leaky, tight]).method == "a" and "tight K=24" in choose_default([leaky, tight]).table.harms["b"]
    assert choose_default([leaky]).method == "b" and choose_default([tight]).method is None
    assert choose_default([comparison("leaky", .8, none=20, a=19.9)]).method is None            # harmless, but gains nothing
    assert choose_default([comparison("leaky", .8, rank=None, none=20, a=25)]).method is None   # no map of tokens
    assert choose_default([comparison("leaky", .8, left=.03, none=20, a=25)]).method is None    # leaves position where it leaks
    assert choose_default([leaky, comparison("quiet", .09, left=.09, none=30, a=30, b=30)]).method == "b"   # and where it does not, that is no matter


def test_saved_methods_come_back(tmp_path):
    z = tokens_of((4, 4), 8).float()
    for remover in (LEACE("fourier"), RemovePCA(1), MeanThenRASA()):
        remover.fit_moments(moments_of(z)).save(tmp_path / "h.safetensors")
        head = RASAHead.load(tmp_path / "h.safetensors")
        assert torch.equal(head(z), remover.transform(z)) and head.metadata["params"] == remover.get_params()


def test_bad_input():
    z = tokens_of((4, 4), 6).float(); m = moments_of(z)
    for call, match in [(lambda: BlankSVD(0).fit_moments(m), "n_directions=0"), (lambda: BlankSVD(7).fit_moments(m), "from 1 to 6"), (lambda: BlankSVD(2.5).fit_moments(m), "n_directions=2.5"),
                        (lambda: BlankSVD(1).fit_moments(moments_of(torch.ones(1, 1, 1, 6))), "no position to learn"),
                        (lambda: RemovePCA(0).fit_moments(m), "n_components=0"), (lambda: RemovePCA(by="size").fit_moments(m), "by='size'"),
                        (lambda: LEACE().fit_moments(moments_of(z[:1])), "1 images are too few"), (lambda: LEACE("polar").fit_moments(m), "'polar'"),
                        (lambda: Auto().fit_moments(m), "expected three"), (lambda: ShiftAverage(0).attach(additive(0))(torch.rand(1, 3, 32, 32)), "n_shifts=0"),
                        (lambda: ShiftAverage().attach(additive(0))(torch.rand(1, 3, 30, 32)), "no multiple of the patch size")]:
        with pytest.raises(ValueError, match=match): call()
    with pytest.raises(TypeError, match="use attach"): ShiftAverage().transform(z)


def test_auto_where_a_method_takes_all_there_is():
    "Tokens of two dimensions that are position and little else: some candidate removes both, which is no reason to fail, nor to be chosen."
    def parts():
        for seed in range(3):
            z = torch.randn(60, 6, 6, 2, generator=torch.Generator().manual_seed(seed))
            yield moments_of(.3 * z + 3 * orthonormal_targets(position_targets((6, 6))).float())
    auto = Auto().fit_moments(*parts())
    assert auto.choice_.table.content.min() == 0 and auto.choice_.table.content[auto.choice_.method] > .5
