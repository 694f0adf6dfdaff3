"""What must hold for any tokens: position goes, the rest stays, and nothing goes where nothing leaks."""
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rasa_nb.baselines import BlankSVD
from rasa_nb.data import First, VOCSegmentation
from rasa_nb.reading import Reading
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import (Moments, inverse_scale, kept_apart, orthonormal_targets, position_targets,
                             ridge_r2)
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import PositionMean, PositionRemover, RASA, _strongest, complement, cross_covariance_basis
from rasa_nb.rasa import fit_together, position_evidence
from rasa_nb.scenes import Scenes, planted_tokens
from rasa_nb.store import write_safetensors
from rasa_nb.trained import TrainedRASA

grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda g: g[0] * g[1] > 1)
kinds = st.sampled_from(["coords", "fourier", "grid"])
SETTINGS = settings(max_examples=30, deadline=None)


def blended_tokens(grid, d, seed=0):
    "Noisy planted tokens whose channels are blended, so that content and position share them; float64."
    g, (z, _, _) = torch.Generator().manual_seed(seed), planted_tokens(60, grid, d, seed=seed)
    return (z + torch.randn(z.shape, generator=g)).double() @ torch.randn(d, d, generator=g).double()


def smooth_tokens(seed, n=160, grid=(8, 8), d=32, share=0., rank=2):
    "Tokens alike in neighboring patches, as real ones are, with `rank` planted directions of position."
    g = torch.Generator().manual_seed(seed)
    z = F.interpolate(torch.randn(n, d, 4, 4, generator=g), grid, mode="bilinear")
    z = z.permute(0, 2, 3, 1) @ torch.randn(d, d, generator=g)
    t = orthonormal_targets(position_targets(grid, "fourier"))[..., :rank].float()
    return z + share * t @ torch.randn(rank, d, generator=g)


def loudness(d, seed, lowest=-3, highest=3):
    "How loud each channel is, from a thousandth to a thousand [D], float64."
    drawn = torch.rand(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 10 ** (lowest + (highest - lowest) * drawn)


def explained(moments, targets):
    "Variance of each target that the best linear predictor explains on the tokens that were summed."
    unit = inverse_scale(moments.scale)
    cov, cross = unit[:, None] * moments.cov * unit, unit[:, None] * moments.cross(targets)
    return (cross * (torch.linalg.pinv(cov, rtol=1e-9) @ cross)).sum(0)


# What is removed is gone

@SETTINGS
@given(grid=grids, d=st.integers(3, 9), targets=kinds, seed=st.integers(0, 99))
def test_the_map_removes_every_linear_predictor_and_is_a_projector_orthogonal_in_standardized_units(
        grid, d, targets, seed):
    m, t = Moments.of(blended_tokens(grid, d, seed) * loudness(d, seed)), position_targets(grid, targets)
    rasa = RASA(targets=targets, rank="all")
    spanned = cross_covariance_basis(m, t).shape[1]
    if spanned == d:
        with pytest.raises(ValueError, match="nothing is left of the tokens"): rasa.solve(m)
        return
    p, b, s = quietly(rasa.solve, m)[0], rasa.basis_, rasa.scale_
    assert (explained(m.mapped(p), t) <= 1e-10 * t.flatten(0, 1).var(0, correction=0).clamp_min(1e-12)).all()
    standard = p / s[:, None] * s
    assert torch.allclose(standard, standard.T, atol=1e-9)
    assert torch.allclose(standard @ standard, standard, atol=1e-9)
    assert b.shape[1] == spanned and int(torch.linalg.matrix_rank(standard, atol=1e-6)) == d - spanned
    assert torch.allclose(b.T @ b, torch.eye(spanned).double(), atol=1e-9)


@SETTINGS
@given(grid=grids, d=st.integers(3, 9), seed=st.integers(0, 99))
def test_louder_channels_change_nothing_but_the_units(grid, d, seed):
    "Tokens scaled by a diagonal A give A P A^-1 and an offset scaled by A, with the same rank."
    z, a = blended_tokens(grid, d, seed), loudness(d, seed)
    for method in (RASA(), PositionMean()):
        p, offset = quietly(method.solve, Moments.of(z))
        rank = method.evidence_.rank
        q, louder = quietly(method.solve, Moments.of(z * a))
        assert method.evidence_.rank == rank
        assert torch.allclose(q.double() / a[:, None] * a, p.double(), atol=1e-6)
        if offset is not None: assert torch.allclose(louder / a, offset, atol=1e-6)


def quietly(function, *args):
    "A call whose warnings are of no interest here: few dimensions of these small tokens are left."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@SETTINGS
@given(grid=grids, seed=st.integers(0, 99))
def test_after_the_position_mean_no_function_of_the_cell_is_left(grid, seed):
    z, t = blended_tokens(grid, 6, seed), position_targets(grid, "grid")
    m, mean = Moments.of(z), PositionMean("all")
    left = Moments.of(z - mean.solve(m)[1])                                    # in float64, as solved
    assert (explained(left, t) <= 1e-10 * t.flatten(0, 1).var(0, correction=0)).all()
    left = Moments.of(mean.fit_moments(m).transform(z.float()))                # in float32, as applied
    assert left.cross(t).abs().max() < 1e-5 and torch.allclose(left.mean, m.mean, atol=1e-4)


def test_the_basis_is_the_column_space_of_numpys_correlations():
    z, t = blended_tokens((4, 5), 8), position_targets((4, 5))
    both = np.corrcoef(z.flatten(0, 2).T, t.expand(60, -1, -1, -1).flatten(0, 2).T)[:8, 8:]
    q, _ = np.linalg.qr(both)
    ours = cross_covariance_basis(Moments.of(z), t).numpy()
    assert np.allclose(ours @ ours.T, q @ q.T, atol=1e-8)


def test_content_in_other_channels_survives():
    content = torch.randn(80, 5, 6, 10)
    place = position_targets((5, 6)).float().expand(80, -1, -1, -1)
    z = torch.cat([content - content.mean(0), place], -1)    # content that no accident ties to cells
    loud = loudness(12, 0).float()
    after = RASA().fit_moments(Moments.of(z * loud)).transform(z * loud) / loud
    assert torch.allclose(after[..., :10], z[..., :10], atol=1e-5) and (after[..., 10:] == 0).all()


def test_a_channel_that_never_changes_stays_as_it_is():
    z = blended_tokens((4, 5), 8).float()
    z[..., 3] = 7
    for method in (RASA("coords", 2), PositionMean()):
        rasa = method.fit_moments(Moments.of(z))
        assert rasa.scale_[3] == 0 and (rasa.transform(z)[..., 3] == 7).all()


def test_no_linear_trace_is_left_of_a_real_encoder_on_photographs(deit_file, voc_root):
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=deit_file, device="cpu")
    rasa = RASA("coords", "all").fit(encoder, First(VOCSegmentation(voc_root, "val"), 24))
    m, coords = rasa.moments_, position_targets((14, 14))
    assert ridge_r2(m, m, coords).min() > .1
    assert explained(m.mapped(rasa.solve(m)[0]), coords).max() < 1e-12


def test_a_grid_of_one_row_has_a_column_only():
    z = torch.randn(50, 1, 8, 6) + torch.linspace(0, 4, 8).view(8, 1)
    for remover in (RASA("coords", "all"), RASA("coords"), RASA()):
        assert remover.fit_moments(Moments.of(z)).basis_.shape == (6, 1)
    r2 = ridge_r2(Moments.of(z[:25]), Moments.of(z[25:]), position_targets((1, 8)))
    assert math.isnan(r2[0]) and r2[1] > .5


# Evidence

@pytest.mark.parametrize("unequal", [False, True])
def test_rank_is_zero_where_nothing_leaks_and_the_planted_one_where_it_does(unequal):
    "At most 5 of 100 draws may be wrong, also where one channel is a million times louder than another."
    t = position_targets((5, 5), "grid")
    for rank, share in ((0, 0.), (3, 1.)):
        found = []
        for seed in range(100):
            z = smooth_tokens(seed, 64, (5, 5), 12, share, rank=3)
            if unequal: z = z * loudness(12, seed).float()
            found.append(position_evidence(Moments.of(z), t).rank)
        assert sum(r != rank for r in found) <= 5, found


@pytest.mark.parametrize("targets, planted", [("coords", 2), ("fourier", 3)])
def test_few_targets_find_the_planted_rank_too(targets, planted):
    t = position_targets((8, 8), targets)
    draws = (Moments.of(smooth_tokens(seed, share=.6, rank=planted)) for seed in range(10))
    ranks = [position_evidence(m, t).rank for m in draws]
    assert ranks.count(planted) >= 9


def test_the_mean_subtracts_only_what_is_beyond_chance():
    "Its evidence is that of a target for every cell, whose error rates are above."
    leaky = PositionMean().fit_moments(Moments.of(smooth_tokens(1, share=.6, rank=3)))
    offset = leaky.head_.offset.flatten(0, 1)
    assert leaky.evidence_.rank == 3 == int((torch.linalg.svdvals(offset) > 1e-4).sum())
    assert PositionMean().fit_moments(Moments.of(smooth_tokens(1))).head_.offset is None


def test_what_is_beyond_chance_is_what_goes():
    for seed in range(20):
        m = Moments.of(smooth_tokens(seed, share=.2, n=40))
        e = position_evidence(m, position_targets((8, 8), "fourier"))
        assert [s > e.chance for s in e.strength] == [p <= e.level for p in e.p]


def test_rank_by_evidence_by_number_or_all():
    m = Moments.of(smooth_tokens(0, share=.6))
    ranks = [RASA("fourier", rank).fit_moments(m).basis_.shape[1] for rank in ("evidence", "all", 1, 0)]
    assert ranks == [2, 7, 1, 0]


def test_the_default_takes_every_direction_in_which_the_proven_mean_moves():
    m = Moments.of(smooth_tokens(0, share=.6, rank=3))
    rasa, mean = RASA().fit_moments(m), PositionMean().fit_moments(m)
    offset = mean.head_.offset
    moved = (offset @ rasa.projector_.T).abs().max()
    assert rasa.basis_.shape == (32, 3) and moved < 1e-5 < offset.abs().max()


def test_chance_is_the_same_by_gram_matrix_and_by_lanczos():
    "Above 64 dimensions the strongest direction of chance comes from another algorithm."
    for d in (3, 64, 65, 130):
        a = torch.randn(3, d, 140, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
        a[2] = 0
        for matrices in (a, a.mT): assert torch.allclose(_strongest(matrices), torch.linalg.svdvals(a)[:, 0])
    two = torch.zeros(1, 100, 140, dtype=torch.float64)
    two[0, 0, 0], two[0, 0, 1] = 1, -1   # no row of it sees a vector of ones
    assert torch.allclose(_strongest(two), torch.tensor([2.]).double().sqrt())


def test_position_in_every_direction_is_warned_of():
    place = orthonormal_targets(position_targets((8, 8), "fourier"))[..., :3]
    m = Moments.of(3 * place + .1 * torch.randn(60, 8, 8, 3))
    with pytest.warns(UserWarning, match="rank='evidence'.* nothing is left"): RASA().fit_moments(m)


# What is left

class Nothing(PositionRemover):
    "Removes nothing, and remembers what it was shown."
    def solve(self, moments):
        self.shown = moments.count
        return torch.eye(moments.embed_dim), None

    def solve_again(self, moments):
        self.shown_again = moments.count
        return super().solve_again(moments)


def test_position_that_is_left_on_images_kept_apart_is_measured_and_warned_of(tmp_path):
    z = smooth_tokens(0, share=.6)
    m = Moments.of(z, apart=True)
    with pytest.warns(UserWarning, match=r"Nothing: .* off images that were kept apart, R² 0\.\d+"):
        nothing = Nothing().fit_moments(m)
    assert (nothing.shown, nothing.shown_again) == (160, 144)
    one, other = [z[kept_apart(torch.arange(160), part)].flatten(0, 2) for part in range(2)]
    r2 = np.mean([probed(one, other), probed(other, one)], 0).max()
    assert nothing.left_ == nothing.head_.metadata["left"] == pytest.approx(r2, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = [r.fit_moments(m) for r in (RASA(), PositionMean(), RASA("fourier", "all"))]
    assert all(r.left_ < .1 for r in fitted)
    fitted[0].save(tmp_path / "h.safetensors")
    assert RASA.load(tmp_path / "h.safetensors").left_ == fitted[0].left_


def probed(learn, score):
    "R² of row and column by scikit-learn, on tokens [n * 64, D]."
    def places(z): return position_targets((8, 8)).flatten(0, 1).repeat(len(z) // 64, 1)
    probe = make_pipeline(StandardScaler(), Ridge(.1 * len(learn))).fit(learn, places(learn))
    return r2_score(places(score), probe.predict(score), multioutput="raw_values")


def test_nine_tenths_learn_as_many_directions_as_all():
    rasa = RASA().fit_moments(Moments.of(smooth_tokens(0, share=.6, rank=3), apart=True))
    p, _ = rasa.solve_again(rasa.moments_.rest)
    assert 32 - int(torch.linalg.matrix_rank(p, atol=1e-6)) == rasa.evidence_.rank == 3
    assert not torch.allclose(p.float(), rasa.projector_, atol=1e-3)


def test_what_is_left_is_not_told_where_too_few_images_are_apart():
    few = Moments.of(smooth_tokens(0, n=24, share=.6), apart=True)    # two are needed for 32 dimensions
    rasa = RASA().fit_moments(few)
    assert [part.count for part in few.apart] == [1, 1]
    assert rasa.left_ is None and "left" not in rasa.head_.metadata


# The verbs

def test_methods_are_estimators_of_scikit_learn():
    rasa = RASA(rank=3, random_state=1)
    assert clone(rasa).get_params() == dict(targets="grid", rank=3, level=.01, random_state=1)
    assert str(rasa.set_params(rank="all")) == "RASA(random_state=1, rank='all')"
    assert rasa._repr_html_ is None and rasa._repr_mimebundle_ is None


def test_a_method_comes_back_with_its_basis(tmp_path):
    m = Moments.of(smooth_tokens(0, share=.6))
    rasa = RASA(targets=lambda grid: position_targets(grid, "coords"), random_state=3).fit_moments(m)
    rasa.save(tmp_path / "h.safetensors")
    again = RASA.load(tmp_path / "h.safetensors")
    for name in ("basis_", "scale_", "projector_"):
        assert torch.equal(getattr(again, name), getattr(rasa, name))
    assert again.random_state == 3 and again.targets == "<function <lambda>>"   # code is not saved
    with pytest.raises(ValueError, match="targets='<function <lambda>>'"): again.fit_moments(m)


def test_closed_forms_of_version_0_0_1_are_read(tmp_path):
    "Parameters that are gone stay in the metadata."
    old = dict(solver="closed_form", targets="auto", n_harmonics=1, rank="evidence", level=.05, ridge=.1,
               n_iter=9, basis="global", lr=.002, epochs=5, batch_size=128, tol=0.,
               augment_every_epoch=False, random_state=2)
    basis = torch.linalg.qr(torch.randn(4, 1).double())[0]     # in units of the tokens
    tensors = dict(projector=complement(basis).float(), basis=basis)
    metadata = dict(method="RASA", params=old, fitted_on=dict(encoder="tiny", licence="MIT", random_state=2))
    write_safetensors(tmp_path / "rasa.safetensors", tensors, "rasa_nb.head.1", metadata)
    rasa = RASA.load(tmp_path / "rasa.safetensors")
    assert rasa.get_params() == dict(targets="grid", rank="evidence", level=.05, random_state=2)
    assert torch.equal(rasa.basis_, basis) and rasa.head_.metadata == metadata and not hasattr(rasa, "scale_")
    z = torch.randn(2, 3, 3, 4)
    assert torch.equal(rasa.transform(z), z @ tensors["projector"].T)
    metadata = dict(method="PositionMean", params=dict(rank="all", level=.01, random_state=0), fitted_on={})
    tensors = dict(projector=torch.eye(4), offset=torch.randn(2, 2, 4))
    write_safetensors(tmp_path / "mean.safetensors", tensors, "rasa_nb.head.1", metadata)
    mean = PositionMean.load(tmp_path / "mean.safetensors")
    assert mean.rank == "all" and torch.equal(mean.head_.offset, tensors["offset"])
    with pytest.raises(ValueError, match="holds PositionMean, not RASA; RASAHead.load reads any"):
        RASA.load(tmp_path / "mean.safetensors")


def test_a_method_of_your_own_needs_a_class_and_solve(tiny, tmp_path):
    class MeanDirections(PositionRemover):
        def __init__(self, k=2): self.k = k

        def solve(self, moments):
            cell_means = (moments.cell_mean - moments.mean).flatten(0, 1)
            return complement(torch.linalg.svd(cell_means, full_matrices=False)[2][:self.k].T), None

    own = clone(MeanDirections(3)).fit(tiny, Scenes("train", 8))
    own.save(tmp_path / "h.safetensors")
    again = MeanDirections.load(tmp_path / "h.safetensors")
    assert again.k == 3 and torch.equal(again.projector_, own.projector_)
    assert int(torch.linalg.matrix_rank(own.projector_, atol=1e-4)) == 192 - 3
    assert own.attach(tiny).name == "tiny+MeanDirections"


# Several methods from one pass

class Counting(PatchEncoder):
    "Counts the images it sees, the single picture that tells encoders apart left out."
    seen = 0
    def forward(self, images):
        if len(images) > 1: self.seen += len(images)
        return super().forward(images)


def test_methods_fitted_together_are_those_fitted_alone(tiny):
    quick, scenes = dict(n_heads=1, epochs=1, batch_size=8), Scenes("train", 16)
    methods = {"sums": RASA("coords"), "blank": BlankSVD(2),
               "tokens": TrainedRASA(**quick), "anew": TrainedRASA(reaugment=True, **quick)}
    together = fit_together({name: clone(r) for name, r in methods.items()}, tiny, scenes, Reading(64))
    for name, remover in methods.items():
        alone = remover.fit(tiny, scenes, 64).head_
        assert torch.allclose(together[name].head.projector, alone.projector, atol=1e-6), name
        if name != "blank": assert together[name].head.metadata == alone.metadata


def test_one_pass_serves_all_and_has_one_augmentation():
    colors, scenes = (lambda model, x: model(x).permute(0, 2, 3, 1)), Scenes("train", 20)
    encoder = Counting(torch.nn.AvgPool2d(8), colors, 3, 8, image_size=96)
    methods = {"a": RASA("coords", "all"), "b": PositionMean("all"), "c": TrainedRASA(1, epochs=1)}
    fit_together(methods, encoder, scenes)
    assert encoder.seen == 20
    methods["b"].set_params(random_state=1)
    with pytest.raises(ValueError, match=r"random_state \[0, 1\]: methods that share one pass"):
        fit_together(methods, encoder, scenes)
    fit_together(methods, encoder, scenes, Reading(seed=5))
    assert methods["a"].head_.metadata["fitted_on"]["seed"] == 5


def test_what_nothing_can_be_learned_from():
    z = planted_tokens(60, (4, 4), 6)[0]
    m = Moments.of(z)
    refusals = [
        (lambda: RASA().fit_moments(Moments.of(z[:, :1, :1])), "the grid is a single patch"),
        (lambda: RASA().fit_moments(Moments((4, 4), 6)), "0 images are too few"),
        (lambda: RASA().fit_moments(Moments.of(z[:10])), "10 images are too few .* at least 16"),
        (lambda: RASA(level=1e-5).fit_moments(m), "level=1e-05: 16 groups of images are too few"),
        (lambda: RASA("polar").fit_moments(m), "targets='polar'"),
        (lambda: RASA(rank="most").fit_moments(m), "rank='most': expected 'evidence', 'all' or a number"),
        (lambda: RASA(rank=6).fit_moments(m), "rank=6: expected .* from 0 to 5"),
        (lambda: RASA(rank="all").fit_moments(m), "rank='all', targets 'grid': 6 of 6 dimensions go"),
        (lambda: PositionMean("some").fit_moments(m), "rank='some': expected 'evidence' or 'all'")]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message): call()
