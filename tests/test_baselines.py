"""Rivals of RASA: LEACE is its authors', planted position goes on new draws, one pass fits all as alone."""
import pytest
import torch
from concept_erasure import LeaceFitter
from hypothesis import given, settings, strategies as st

from rasa_nb.baselines import LEACE, BlankSVD, MeanThenRASA, RemovePCA, ShiftAverage, leace_fitter, roster
from rasa_nb.measures import RidgeProbe
from rasa_nb.moments import Moments, orthonormal_targets, position_targets
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import RASA, PositionMean, fit_together
from rasa_nb.scenes import Scenes, planted_tokens
from rasa_nb.trained import TrainedRASA

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda grid: grid[0] * grid[1] > 3)
SETTINGS = settings(max_examples=20, deadline=None)


def mixed(n=200, grid=(5, 7), d=24, seed=0):
    "Planted tokens whose content is correlated and not orthogonal to the planted directions, float64."
    tokens, content, _ = planted_tokens(n, grid, d, strength=3, seed=seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(1))
    return (content @ mix + tokens - content).double()


@SETTINGS
@given(grid=GRIDS, d=st.integers(3, 9), targets=st.sampled_from(["coords", "fourier"]),
       seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_leace_is_the_package_s(grid, d, targets, seed, cuts):
    z, t = mixed(60, grid, d, seed), orthonormal_targets(position_targets(grid, targets))
    exact = dict(affine=False, constrain_cov_trace=False, svd_tol=1e-6, dtype=torch.float64)
    theirs = LeaceFitter(d, t.shape[-1], **exact)
    for part in z.tensor_split(sorted(cuts)):
        places = t.expand(len(part), -1, -1, -1)
        if len(part): theirs.update(part.flatten(0, 2), places.flatten(0, 2))
    ours = leace_fitter(Moments.of(z), t)
    assert torch.allclose(ours.sigma_xx, theirs.sigma_xx, atol=1e-7)
    assert torch.allclose(ours.sigma_xz, theirs.sigma_xz, atol=1e-9)
    assert torch.allclose(ours.eraser.P, theirs.eraser.P, atol=1e-6)


@pytest.mark.parametrize("targets", ["coords", "fourier"])
def test_leace_leaves_no_linear_predictor(targets):
    moments = Moments.of(mixed())
    p = LEACE(targets).solve(moments)[0]
    assert (p @ moments.cross(position_targets((5, 7), targets))).abs().max() < 1e-8
    assert torch.allclose(p @ p, p, atol=1e-8)


def test_leace_changes_tokens_less_than_an_orthogonal_projection():
    z = mixed()
    moments = Moments.of(z)
    centered = (z - moments.mean).float()
    def moved(remover): return (remover.fit_moments(moments).transform(centered) - centered).square().mean()
    assert moved(LEACE()) < moved(RASA(rank=2))


def by_moments():
    "The names of methods that learn from moments of photographs and promise that no linear trace is left."
    return [name for name, r in roster().items() if r.needs == "moments" and not isinstance(r, RemovePCA)]


@pytest.mark.parametrize("name", by_moments())
def test_planted_position_goes_on_new_draws(name):
    moments = Moments.of(mixed(1000), apart=True)
    remover, new = roster()[name].fit_moments(moments), mixed(seed=1).float()
    before, after = (RidgeProbe((5, 7), 24).update(z).score() for z in (new, remover.transform(new)))
    assert min(before) > .5 and max(after) < .05 and remover.left_ < .05


def test_mean_then_rasa_is_both():
    z = mixed(60, (4, 5), 10).float()
    moments = Moments.of(z)
    mean, rasa, both = (r.fit_moments(moments) for r in (PositionMean(), RASA("fourier"), MeanThenRASA()))
    assert torch.allclose(both.transform(z), rasa.transform(mean.transform(z)), atol=1e-4)


def test_blank_svd_learns_from_one_image_of_the_encoder():
    along = torch.linalg.qr(torch.randn(8, 8))[0][:, :5]
    def tokens(model, x):
        color = 9 + torch.nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1)    # black is something, too
        place = position_targets(color.shape[1:3]).float()
        return color @ along[:, :3].T + 2 * place @ along[:, 3:].T
    encoder = PatchEncoder(torch.nn.Identity(), tokens, 8, 8, 32, name="color and place")
    blank, images = BlankSVD(2).fit(encoder), torch.rand(40, 3, 32, 32)
    before, after = (e(images).mean(0).std((0, 1)).max() for e in (encoder, blank.attach(encoder)))
    assert after < .15 < before
    assert blank.head_.metadata["fitted_on"]["data"] == dict(name="one blank image", images=1)
    assert BlankSVD(.25).fit(encoder).basis_.shape == (8, 2)


def test_all_shifts_leave_no_position_of_a_blank_image(tiny):
    every = ShiftAverage(tiny, 12)    # 3 x 4 patches
    assert (every(torch.zeros(1, 3, 24, 32)).std((1, 2)) < 1e-5).all()
    images = torch.rand(2, 3, 24, 32)
    of_shifted, shifted = every(images.roll((8, 16), (2, 3))), every(images).roll((1, 2), (1, 2))
    assert torch.allclose(of_shifted, shifted, atol=1e-4)


def test_a_shift_average_is_an_encoder_like_its_base(tiny):
    average = ShiftAverage(tiny, 3)
    assert (average.name, average.embed_dim, average.license) == ("tiny+ShiftAverage", 192, tiny.license)
    assert torch.equal(average.mean, tiny.mean) and len(average.shifts((2, 5))) == 3
    assert average.at(2)(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2, 192)


def test_one_pass_fits_all_as_each_alone(tiny, monkeypatch):
    short = TrainedRASA.released(n_heads=1, epochs=1)
    methods = {"LEACE": LEACE("fourier"), "RASA": RASA(), "blank": BlankSVD(10), "trained": short,
               "mean, then RASA": MeanThenRASA()}
    calls, forward = [], type(tiny).forward
    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)
    with monkeypatch.context() as patched:
        patched.setattr(type(tiny), "forward", counted)
        together = fit_together(methods, tiny, Scenes(n=30), 48)
    assert sum(calls) == 30 + 1 and list(together) == list(methods)    # one pass, and one blank image
    for name, method in methods.items():
        alone = type(method)(**method.get_params()).fit(tiny, Scenes(n=30), 48)
        assert torch.allclose(together[name].head.projector, alone.projector_, atol=1e-5), name


def test_one_pass_takes_one_random_state(tiny):
    two = {"a": LEACE(), "b": LEACE(random_state=3)}
    with pytest.raises(ValueError, match="random_state .0, 3.: methods that share one pass"):
        fit_together(two, tiny, Scenes(n=30), 48)


def test_methods_of_the_roster_take_the_random_state():
    assert {r.random_state for r in roster(random_state=7).values()} == {7}


TOKENS = planted_tokens(40, (4, 4), 6)[0]
MOMENTS = Moments.of(TOKENS)


@pytest.mark.parametrize("call, match", [
    (lambda: BlankSVD(2.5).fit_moments(MOMENTS), "n_directions=2.5"),
    (lambda: LEACE("fourier").fit_moments(MOMENTS), "targets 'fourier': 7 of 6 dimensions go"),
    (lambda: RemovePCA(6).fit_moments(MOMENTS), "n_components=6: expected 1 to 5"),
    (lambda: BlankSVD(1).fit_moments(Moments.of(torch.ones(1, 1, 1, 6))), "no position to learn"),
    (lambda: RemovePCA(0).fit_moments(MOMENTS), "n_components=0"),
    (lambda: RemovePCA(by="size").fit_moments(MOMENTS), "by='size'"),
    (lambda: LEACE("polar").fit_moments(MOMENTS), "'polar'")])
def test_bad_input_gives_an_error_that_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


FOUR = LEACE(lambda grid: torch.randn(*grid, 4))


@pytest.mark.parametrize("remover", [BlankSVD(4), RemovePCA(4), RASA("fourier", 4), FOUR])
def test_more_than_half_of_the_dimensions_is_warned_of(remover):
    with pytest.warns(UserWarning, match="4 of 6 dimensions go, and the content along them"):
        remover.fit_moments(MOMENTS)
