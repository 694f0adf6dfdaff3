"""What must hold for any tokens: moments add up, position goes, the rest stays, heads come back as they were saved."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rasa_nb.measures import position_r2, ridge_r2
from rasa_nb.data import Scenes, augmentation
from rasa_nb.encoders import PatchEncoder, load_encoder
from rasa_nb.moments import Moments, collect_moments, orthonormal_targets, position_targets
from rasa_nb.head import DebiasedEncoder, RASAHead, encode_together
from rasa_nb.rasa import PositionMean, RASA, _strongest, cross_covariance_basis, position_evidence

grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda g: g[0] * g[1] > 1)
kinds = st.sampled_from(["coords", "fourier", "grid"])
SETTINGS = settings(max_examples=30, deadline=None)


def tokens_of(grid, d, n=60, seed=0):
    "Correlated tokens with position in them, in float64 [n, gh, gw, d]."
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, *grid, d, generator=g).double() @ torch.randn(d, d, generator=g).double()
    t = position_targets(grid, "fourier")
    return z + 3 * t @ torch.randn(t.shape[-1], d, generator=g).double()


def moments_of(z): return Moments(z.shape[1:3], z.shape[3]).update(z)


@SETTINGS
@given(grid=grids, d=st.integers(1, 9), cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 99))
def test_moments_agree_in_any_order(grid, d, cuts, seed):
    z = tokens_of(grid, d, seed=seed)
    whole, order = moments_of(z), torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    parts = [Moments(grid, d).update(p) for p in z[order].tensor_split(sorted(cuts))]
    merged = sum(parts[1:], parts[0])
    assert merged.count == 60
    for a, b in ((merged.cov, whole.cov), (merged.cell_mean, whole.cell_mean), (merged.mean, whole.mean)): assert torch.allclose(a, b, atol=1e-9)


@SETTINGS
@given(grid=grids, d=st.integers(2, 9), targets=kinds, seed=st.integers(0, 99))
def test_no_linear_predictor_is_left(grid, d, targets, seed):
    m = moments_of(tokens_of(grid, d, seed=seed)); t = position_targets(grid, targets)
    basis = cross_covariance_basis(m, t)
    kept = torch.linalg.qr(torch.cat([basis, torch.eye(d)], 1).double())[0][:, basis.shape[1]:]   # the rest of the space
    cov, cross = kept.T @ m.cov @ kept, kept.T @ m.cross(t)
    explained = (cross * (torch.linalg.pinv(cov, rtol=1e-9) @ cross)).sum(0)
    variance = t.flatten(0, 1).var(0, correction=0)
    assert (explained <= 1e-10 * variance.clamp_min(1e-12)).all()


@SETTINGS
@given(grid=grids, d=st.integers(2, 9), targets=kinds)
def test_projector_is_a_projector(grid, d, targets):
    rasa, m = RASA(targets=targets, rank="all"), moments_of(tokens_of(grid, d))
    if cross_covariance_basis(m, position_targets(grid, targets)).shape[1] == d:   # nothing would be left
        with pytest.raises(ValueError, match="nothing is left of the tokens"): rasa.fit_moments(m)
        return
    p, b = rasa.fit_moments(m).projector_, rasa.basis_
    assert torch.allclose(p, p.T, atol=1e-6) and torch.allclose(p @ p, p, atol=1e-6)
    assert int(torch.linalg.matrix_rank(p, atol=1e-4)) == d - b.shape[1] and torch.allclose(b.T @ b, torch.eye(b.shape[1]).double(), atol=1e-9)
    z = torch.randn(2, *grid, d)
    assert torch.allclose(rasa.transform(rasa.transform(z)), rasa.transform(z), atol=1e-5)


@SETTINGS
@given(grid=grids, seed=st.integers(0, 99))
def test_after_the_position_mean_no_function_of_the_cell_is_left(grid, seed):
    z = tokens_of(grid, 6, seed=seed)
    left, t = moments_of(z - PositionMean("all")._solve(moments_of(z))[1]), position_targets(grid, "grid")   # in float64, as solved
    explained = (left.cross(t) * (torch.linalg.pinv(left.cov, rtol=1e-9) @ left.cross(t))).sum(0)
    assert (explained <= 1e-10 * t.flatten(0, 1).var(0, correction=0)).all()
    left = moments_of(PositionMean("all").fit_moments(moments_of(z)).transform(z.float()))                  # and as applied
    assert left.cross(position_targets(grid, "grid")).abs().max() < 1e-5
    assert torch.allclose(left.mean, moments_of(z).mean, atol=1e-4)   # the overall mean stays


def test_basis_is_the_column_space_of_the_cross_covariance_of_numpy():
    z, t = tokens_of((4, 5), 8), position_targets((4, 5))
    both = np.cov(z.flatten(0, 2).T, t.expand(60, -1, -1, -1).flatten(0, 2).T)[:8, 8:]
    q, _ = np.linalg.qr(both)
    ours = cross_covariance_basis(moments_of(z), t).numpy()
    assert np.allclose(ours @ ours.T, q @ q.T, atol=1e-8)


def test_content_orthogonal_to_position_survives():
    g = torch.Generator().manual_seed(3); u = torch.linalg.qr(torch.randn(12, 2, generator=g))[0]
    content = torch.randn(80, 5, 6, 12, generator=g); content -= content @ u @ u.T
    t = position_targets((5, 6)).float(); t = t - t.mean((0, 1))
    content -= content.mean(0)                      # no accident of the sample ties content to cells
    rasa = RASA().fit_moments(moments_of(content + 4 * t @ u.T))
    assert (rasa.transform(content + 4 * t @ u.T) - content).abs().max() < 1e-5


def test_one_row_grid_has_a_column_only():
    z = torch.randn(50, 1, 8, 6) + torch.linspace(0, 4, 8).view(8, 1)
    for kwargs in (dict(targets="coords", rank="all"), dict(targets="coords"), {}): assert RASA(**kwargs).fit_moments(moments_of(z)).basis_.shape == (6, 1)
    r2 = ridge_r2(moments_of(z[:25]), moments_of(z[25:]), position_targets((1, 8)))
    assert math.isnan(r2[0]) and r2[1] > .5


def test_global_basis_removes_all_it_learned_and_pairwise_writes_back():
    z = tokens_of((6, 6), 40, n=80).float() / 10
    bases = {b: RASA("sgd", basis=b, epochs=1, batch_size=40).fit_tokens(z) for b in ("global", "pairwise")}
    gone = {k: int((torch.linalg.svdvals(r.projector_) < 1e-3).sum()) for k, r in bases.items()}
    assert gone["global"] == 18 and gone["pairwise"] < 18
    for name, back in (("global", False), ("pairwise", True)):   # is there anything along the first head's directions in what comes out?
        assert ((bases[name].basis_[:, :2].T @ bases[name].projector_).norm() > .05) == back


def test_sgd_is_repeatable_and_remembers_nothing():
    z = tokens_of((4, 4), 12).float() / 10
    rasa = RASA("sgd", n_iter=2, epochs=1)
    first = rasa.fit_tokens(z).projector_.clone()
    rasa.fit_tokens(torch.randn(20, 4, 4, 12))
    assert torch.equal(rasa.fit_tokens(z).projector_, first) and len(rasa.history_) == 2


def test_sgd_stops_when_nothing_is_left_to_learn():
    "Position in two directions only: the second head has nothing to find, nor has any after it."
    t = position_targets((6, 6)) - .5
    z = torch.randn(300, 6, 6, 24); z[..., :2] = (8 * t).float()
    assert len(RASA("sgd", epochs=30, lr=.05, tol=.05).fit_tokens(z).history_) < 4
    assert len(RASA("sgd", epochs=1).fit_tokens(z).history_) == 9


def test_sgd_learns_the_same_from_memory_from_a_file_and_close_to_it_when_augmenting_anew(tiny, tmp_path):
    recipe, data = dict(solver="sgd", n_iter=1, epochs=2, batch_size=16), Scenes(n=48)
    memory, file = RASA(**recipe).fit(tiny, data), RASA(**recipe).fit(tiny, data, cache_dir=tmp_path)
    assert torch.allclose(memory.projector_, file.projector_, atol=2e-3) and list(tmp_path.iterdir()) == []   # float16 rounds
    calls = []
    class Counting(PatchEncoder):
        def forward(self, images): calls.append(len(images)); return super().forward(images)
    counting = Counting(torch.nn.AvgPool2d(8), lambda m, x: m(x).permute(0, 2, 3, 1), 3, 8, image_size=96)
    RASA(**recipe).fit(counting, data, batch_size=16); cached = sum(calls); calls.clear()
    RASA(**recipe, augment_every_epoch=True).fit(counting, data)
    assert cached == 48 and sum(calls) == 48 * 2


def test_sgd_on_a_single_row_learns_the_column_only():
    "The row is the same everywhere: a head for it would learn, and take away, what all tokens share."
    z = torch.randn(200, 1, 8, 12) + 5 * torch.eye(12)[0] + torch.linspace(-3, 3, 8).view(8, 1) * torch.eye(12)[1]
    rasa = RASA("sgd", n_iter=2, lr=2e-2, batch_size=8).fit_tokens(z)
    assert rasa.basis_.shape == (12, 2) and rasa.basis_[1].norm() > .9 and rasa.transform(z).mean((0, 1, 2))[0] > 4


def test_sgd_refuses_what_the_closed_form_refuses(tiny):
    z = torch.randn(20, 4, 4, 12)
    class Broken(torch.nn.Module):
        def forward(self, x): return torch.nn.functional.avg_pool2d(x, 8).log()   # of what is below 0: not a number
    broken = PatchEncoder(Broken(), lambda m, x: m(x).permute(0, 2, 3, 1), 3, 8, 96)
    for call, match in [(lambda: RASA("sgd", n_iter=1).fit_tokens(z[:1]), "1 images are too few"), (lambda: RASA("sgd", n_iter=1).fit_tokens(z[:0]), "0 images are too few"),
                        (lambda: RASA("sgd", n_iter=1).fit_tokens(torch.ones(20, 4, 4, 12)), "constant"),
                        (lambda: RASA("sgd", n_iter=1).fit_tokens(z[:, :1, :1]), "single patch"), (lambda: RASA().fit_moments(moments_of(z[:, :1, :1])), "single patch"),
                        (lambda: RASA("sgd", n_iter=1, augment_every_epoch=True).fit(broken, Scenes(n=12)), "tokens of image .* are not finite")]:
        with pytest.raises(ValueError, match=match): call()
    with pytest.raises(TypeError, match="takes no batch_size"): RASA("sgd", augment_every_epoch=True).fit(tiny, Scenes(n=12), batch_size=4)


def test_sgd_with_one_basis_is_a_projector_too():
    p = RASA("sgd", epochs=1).fit_tokens(tokens_of((6, 6), 40).float() / 10).projector_
    assert torch.allclose(p, p.T, atol=1e-6) and torch.allclose(p @ p, p, atol=1e-6)


def test_nothing_left_is_an_error_or_a_warning():
    z = tokens_of((8, 8), 6)
    with pytest.raises(ValueError, match="all 6 dimensions go"): RASA(rank="all").fit_moments(moments_of(z))
    with pytest.raises(ValueError, match="n_iter=100: all 6 dimensions go"): RASA(targets="coords", rank="all", ridge=.1, n_iter=100).fit_moments(moments_of(z))
    with pytest.warns(UserWarning, match="evidence of position in every direction"): RASA().fit_moments(moments_of(3 * orthonormal_targets(position_targets((8, 8), "fourier"))[..., :3] + .1 * z[..., :3]))


def test_presets(tiny):
    assert (RASA.released().lr, RASA.released().basis, RASA.released().n_iter) == (2e-4, "pairwise", 9)
    assert (RASA.paper().lr, RASA.paper().basis) == (2e-3, "pairwise") and RASA.released(n_iter=3).n_iter == 3


def test_attached_encoder_is_the_head_after_the_encoder(tiny):
    images = torch.rand(2, 3, 64, 96)
    for remover in (RASA().fit(tiny, Scenes(n=30)), PositionMean().fit(tiny, Scenes(n=30))):
        debiased = remover.attach(tiny)
        assert torch.equal(debiased(images), remover.transform(tiny(images))) and debiased(images).shape == (2, 8, 12, 192)
        twice = debiased(images), next(encode_together({"a": debiased, "b": tiny}, [(i, None) for i in images], 2))[0]
        assert torch.equal(twice[1]["a"], twice[0]) and torch.equal(twice[1]["b"], tiny(images))


def test_shared_forward_runs_once(tiny):
    calls = []
    counting = PatchEncoder(torch.nn.AvgPool2d(8), lambda m, x: (calls.append(1), m(x).permute(0, 2, 3, 1))[1], 3, 8)
    head = RASAHead(torch.eye(3))
    encoders = {"a": counting, "b": DebiasedEncoder(counting, head), "c": DebiasedEncoder(DebiasedEncoder(counting, head), head)}
    list(encode_together(encoders, [(torch.rand(3, 16, 16), None)] * 4, 2))
    assert len(calls) == 2


@pytest.mark.parametrize("offset", [None, torch.randn(3, 4, 5)])
def test_heads_come_back_as_saved(tmp_path, offset):
    head = RASAHead(torch.randn(5, 5), offset, dict(method="RASA", note="ä"))
    head.save(tmp_path / "h.safetensors"); again = RASAHead.load(tmp_path / "h.safetensors")
    z = torch.randn(2, 6, 7, 5)
    assert torch.equal(again(z), head(z)) and again.metadata == head.metadata and len(list(tmp_path.iterdir())) == 1


def test_a_method_comes_back_with_its_basis(tmp_path):
    rasa = RASA(targets=lambda g: position_targets(g, "coords"), random_state=3).fit_moments(moments_of(smooth_tokens(0, share=.6)))
    rasa.save(tmp_path / "h.safetensors"); again = RASA.load(tmp_path / "h.safetensors")
    assert torch.equal(again.basis_, rasa.basis_) and torch.equal(again.projector_, rasa.projector_) and again.random_state == 3
    with pytest.raises(ValueError, match="targets='<function <lambda>>'"): again.fit_moments(rasa.moments_)   # code is not saved


def test_bad_heads(tmp_path, tiny, deit_file):
    RASAHead(torch.eye(5)).save(tmp_path / "h.safetensors")
    whole = (tmp_path / "h.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-20])
    for call, match in [(lambda: RASAHead.load(tmp_path / "cut.safetensors"), "is it whole"),
                        (lambda: RASAHead.load(deit_file), "is no rasa_nb.head.1 file"),
                        (lambda: RASA.load(tmp_path / "h.safetensors"), "holds None, not RASA"),
                        (lambda: DebiasedEncoder(tiny, RASAHead(torch.eye(5))), "head is for D=5, tiny has D=192"),
                        (lambda: RASAHead(torch.eye(5))(torch.zeros(1, 2, 2, 6)), "D=6, this head was fitted for D=5"),
                        (lambda: RASAHead(torch.zeros(5, 4)), "expected .D, D."), (lambda: RASAHead(torch.eye(5), torch.zeros(2, 2, 4)), "expected .gh, gw, 5.")]:
        with pytest.raises(ValueError, match=match): call()


def test_bad_input():
    z = tokens_of((4, 4), 6).float()
    bad = z.clone(); bad[17, 0, 0, 0] = math.inf
    for call, match in [(lambda: moments_of(bad), "image 17 are not finite"),
                        (lambda: RASA().fit_moments(moments_of(torch.ones(50, 4, 4, 6))), "constant"),
                        (lambda: RASA().fit_moments(moments_of(z[:1])), "1 images are too few"),
                        (lambda: RASA().fit_moments(Moments((4, 4), 6)), "0 images are too few"),
                        (lambda: RASA("sgd", n_iter=4).fit_tokens(z), "n_iter=4: expected 1 to 3"),
                        (lambda: RASA("sgd", "fourier", n_iter=1).fit_tokens(z), "n_iter=1: expected 1 to 0, since each head takes 7 of the 6"),
                        (lambda: RASA(n_harmonics=2).fit_moments(moments_of(z)), "n_harmonics=2 belongs to targets='fourier', not 'grid'"),
                        (lambda: RASA(n_iter=0).fit_moments(moments_of(z)), "n_iter=0: expected at least 1"),
                        (lambda: RASA(ridge=-1).fit_moments(moments_of(z)), "ridge=-1: expected None or a number from 0"),
                        (lambda: PositionMean("some").fit_moments(moments_of(z)), "rank='some': expected 'evidence' or 'all'"),
                        (lambda: augmentation(96, "none"), "augment='none': expected 'published' or 'turns'"),
                        (lambda: RASA("sgd").fit_moments(moments_of(z)), "use fit"),
                        (lambda: RASA(basis="all").fit_moments(moments_of(z)), "basis='all'"),
                        (lambda: RASA(targets="polar").fit_moments(moments_of(z)), "'polar'"),
                        (lambda: RASA(targets=lambda g: torch.zeros(2, 2)).fit_moments(moments_of(z)), "expected .4, 4, T."),
                        (lambda: moments_of(z) + Moments((2, 8), 6), "do not add up"),
                        (lambda: Moments((2, 8), 6).update(z), "do not fit")]:
        with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize("share", [0., .2, .8])
def test_probe_returns_the_planted_share(share):
    "One dimension = sqrt(share) * row + sqrt(1 - share) * noise, both of unit variance: R² of the row is the share."
    class Planted(torch.nn.Module):
        def forward(self, x):
            row = position_targets((12, 12))[..., :1].float(); row = (row - row.mean()) / row.std(correction=0)
            return share**.5 * row + (1 - share)**.5 * torch.randn(len(x), 12, 12, 1)
    encoder = PatchEncoder(Planted(), lambda m, x: m(x), 1, 8, image_size=96)
    assert abs(position_r2(encoder, Scenes("val", 150)).row["encoder"] - share) < .02


def smooth_tokens(seed, n=160, grid=(8, 8), d=32, share=0., rank=2):
    "Tokens that are alike in neighboring patches, as real ones are, with `rank` planted directions of position."
    g = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.interpolate(torch.randn(n, d, 4, 4, generator=g), grid, mode="bilinear").permute(0, 2, 3, 1)
    z = z @ torch.randn(d, d, generator=g)
    t = orthonormal_targets(position_targets(grid, "fourier"))[..., :rank].float()
    return z + share * t @ torch.randn(rank, d, generator=g)


def test_rank_is_zero_where_nothing_leaks_and_the_planted_one_where_it_does():
    "In 100 draws each, for two, for seven and for 64 targets, one a cell: at most 5 wrong."
    for targets, planted in (("coords", 2), ("fourier", 3), ("grid", 3)):
        t, found = position_targets((8, 8), targets), {0: [], planted: []}
        for rank in found:
            for seed in range(100): found[rank].append(position_evidence(moments_of(smooth_tokens(seed, share=.6 * (rank > 0), rank=planted)), t).rank)
        for rank, ranks in found.items(): assert sum(r != rank for r in ranks) <= 5, (targets, rank, ranks)


def test_rank_by_evidence_number_or_all():
    z = smooth_tokens(0, share=.6)
    assert [RASA(targets="fourier", rank=r).fit_moments(moments_of(z)).basis_.shape[1] for r in ("evidence", "all", 1, 0)] == [2, 7, 1, 0]
    with pytest.raises(ValueError, match="rank='most'"): RASA(rank="most").fit_moments(moments_of(z))
    with pytest.raises(ValueError, match="6 images are too few for D=32 on a grid of .8, 8.: at least 16 are needed"): RASA().fit_moments(moments_of(z[:6]))


def test_evidence_is_the_same_by_gram_matrix_and_by_lanczos():
    "Above 64 dimensions the strongest direction of chance comes from another algorithm."
    for d in (3, 64, 65, 130):
        a = torch.randn(3, d, 140, dtype=torch.float64, generator=torch.Generator().manual_seed(d)); a[2] = 0
        assert torch.allclose(_strongest(a), torch.linalg.svdvals(a)[:, 0]) and torch.allclose(_strongest(a.mT), _strongest(a))
    two = torch.zeros(1, 100, 140, dtype=torch.float64); two[0, 0, 0], two[0, 0, 1] = 1, -1   # no row of it sees a vector of ones
    assert torch.allclose(_strongest(two), torch.tensor([2.]).double().sqrt())


def test_what_is_beyond_chance_is_what_goes():
    for seed in range(20):
        e = position_evidence(moments_of(smooth_tokens(seed, share=.2, n=40)), position_targets((8, 8), "fourier"))
        assert [s > e.chance for s in e.strength] == [p <= e.level for p in e.p]
    with pytest.raises(ValueError, match="10 images in 10 groups are too few"): position_evidence(moments_of(smooth_tokens(0, n=10)), position_targets((8, 8)))


def test_default_takes_every_direction_in_which_the_proven_mean_moves():
    m = moments_of(smooth_tokens(0, share=.6, rank=3))
    rasa, mean = RASA().fit_moments(m), PositionMean().fit_moments(m)
    assert rasa.basis_.shape == (32, 3) and (mean.head_.offset @ rasa.projector_).abs().max() < 1e-5 < mean.head_.offset.abs().max()


def test_the_mean_subtracts_only_what_is_beyond_chance():
    "In 40 draws each: nothing where nothing leaks, and three components where three were planted; at most 2 wrong."
    found = {share: [len([p for p in PositionMean().fit_moments(moments_of(smooth_tokens(seed, share=share, rank=3))).evidence_.p if p <= .01]) for seed in range(40)] for share in (0., .6)}
    assert sum(r != 0 for r in found[0.]) <= 2 and sum(r != 3 for r in found[.6]) <= 2, found


def test_ridge_leads_from_least_squares_to_the_cross_covariance():
    z = smooth_tokens(0, share=.6); m, t = moments_of(z), orthonormal_targets(position_targets((8, 8)))
    basis = lambda ridge, **kw: RASA(targets="coords", rank="all", ridge=ridge, **kw).fit_moments(m).basis_
    same_plane = lambda a, b: float(torch.linalg.svdvals(a.T @ b).min()) > 1 - 1e-6
    solved = np.linalg.lstsq((z - z.mean((0, 1, 2))).flatten(0, 2).numpy().astype(float), t.expand(len(z), -1, -1, -1).flatten(0, 2).numpy(), rcond=None)[0]
    assert same_plane(basis(0, n_iter=1), torch.linalg.qr(torch.from_numpy(solved))[0])
    assert same_plane(basis(1e9, n_iter=1), basis(None)) and not same_plane(basis(0, n_iter=1), basis(None))
    assert basis(0, n_iter=4).shape[1] == 8 and torch.allclose(basis(0, n_iter=4).T @ basis(0, n_iter=4), torch.eye(8).double(), atol=1e-9)
    left = lambda ridge: float(ridge_r2(*(moments_of(RASA(targets="coords", ridge=ridge).fit_moments(m).transform(smooth_tokens(s, share=.6))) for s in (0, 1)), position_targets((8, 8))).mean())
    assert left(None) < .05
    assert RASA(targets="coords", ridge=.1).fit_moments(moments_of(smooth_tokens(0))).basis_.shape[1] == 0   # nothing to find: no round begins


def test_harmonics_are_targets_too():
    m = moments_of(tokens_of((6, 6), 16))
    for n, targets in ((1, 7), (2, 11)): assert RASA(targets="fourier", n_harmonics=n, rank="all").fit_moments(m).basis_.shape[1] == min(targets, 16)
    assert RASA().get_params()["n_harmonics"] == 1


def test_turns_keep_every_pixel_and_are_remembered(tiny):
    pixel = PatchEncoder(torch.nn.Identity(), lambda m, x: m(x).permute(0, 2, 3, 1), 3, 1, image_size=96)
    scenes = Scenes("train", 16)
    total = lambda augment: collect_moments(pixel, scenes, augment=augment)
    assert torch.allclose(total("turns").mean, torch.stack([scenes[i][0].double().mean((1, 2)) / 127.5 - 1 for i in range(16)]).mean(0), atol=1e-5)
    assert not torch.allclose(total("published").mean, total("turns").mean, atol=1e-6) and total("turns").source["augment"] == "turns"
    head = RASA(rank="all").fit(tiny, Scenes("train", 20), augment="turns").head_
    assert head.metadata["fitted_on"]["augment"] == "turns"


def test_a_head_meets_its_own_encoder_without_a_word(tiny, recwarn):
    RASA(rank="all").fit(tiny, Scenes("train", 20)).attach(tiny)
    assert not [w for w in recwarn if "not the same encoder" in str(w.message)]


def test_options_of_the_other_solver_are_refused(tiny, tmp_path):
    scenes = Scenes("train", 10)
    for remover, options, match in [(RASA(), dict(cache_dir=tmp_path), "cache_dir is for the tokens of solver='sgd'"),
                                    (RASA("sgd"), dict(moments_file=tmp_path / "m"), "moments_file is for the closed form"),
                                    (RASA("sgd", augment_every_epoch=True), dict(cache_dir=tmp_path), "made anew in every epoch")]:
        with pytest.raises(ValueError, match=match): remover.fit(tiny, scenes, **options)
    assert not list(tmp_path.iterdir())


def test_moments_of_two_encoders_do_not_add_up(tiny):
    other = load_encoder("tiny", pretrained=False); scenes = Scenes("train", 4)
    with pytest.raises(ValueError, match="do not add up: two encoders"): collect_moments(tiny, scenes) + collect_moments(other, scenes)
    both = collect_moments(tiny, scenes) + collect_moments(tiny, scenes, augment="turns")
    assert both.count == 8 and both.source["augment"] == ["published", "turns"]
