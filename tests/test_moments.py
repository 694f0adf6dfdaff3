"""Sums of tokens: they add up in any order, come back from files, and give the R² of a probe."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rasa_nb import moments
from rasa_nb.reading import Reading
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import Moments, collect_moments, position_targets, ridge_r2, sums_device
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.scenes import Scenes, planted_tokens
from rasa_nb.store import write_safetensors

grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda g: g[0] * g[1] > 1)
seeds = st.integers(0, 99)


def largest_error(moments, tokens):
    "Of the covariance, in units of the channels' standard deviations; numpy in float64 is right."
    right = torch.from_numpy(np.cov(tokens.double().flatten(0, 2).numpy().T, bias=True))
    std = right.diagonal().sqrt()
    return float(((moments.cov - right).abs() / std[:, None] / std).max())


@settings(max_examples=30, deadline=None)
@given(grid=grids, d=st.integers(3, 9), cuts=st.lists(st.integers(0, 60), max_size=4), seed=seeds)
def test_moments_agree_in_any_order_and_in_any_number_of_parts(grid, d, cuts, seed):
    z = planted_tokens(60, grid, d, seed=seed)[0].double() + 100
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    pieces = order.tensor_split(sorted(cuts))
    parts = [Moments(grid, d).update(z[some], some) for some in pieces]
    merged, whole = sum(parts[1:], parts[0]), Moments.of(z)
    assert merged.count == 60 and torch.equal(merged.counts, whole.counts)
    for name in ("cov", "mean", "cell_mean"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), atol=1e-9)
    targets = position_targets(grid, "grid")
    assert torch.allclose(merged.group_cross(targets), whole.group_cross(targets), atol=1e-9)


@pytest.mark.parametrize("products", [None, torch.float64])
@pytest.mark.parametrize("mean", [0, 100, 10_000])
def test_sums_are_right_to_a_millionth_of_the_spread(mean, products, monkeypatch):
    "Also where means are far above it, and whichever type a device multiplies in."
    if products: monkeypatch.setattr(moments, "product_dtype", lambda tokens: products)
    loudness = torch.logspace(-3, 3, 24)
    z = (torch.randn(90, 8, 8, 24) + mean) * loudness
    m = Moments((8, 8), 24)
    for batch in z.split(13): m.update(batch)
    assert largest_error(m, z) < 1e-6 and m.cov.dtype == m.cell_mean.dtype == torch.float64
    assert ((m.mean - z.double().mean((0, 1, 2))).abs() < 1e-6 * loudness).all()


@pytest.mark.parametrize("d", [127, 128, 300])    # more channels than are multiplied at a time
def test_second_moments_are_whole_and_symmetric_however_many_channels(d):
    z = torch.randn(40, 5, 6, d) + torch.linspace(-9, 9, d)
    m = Moments((5, 6), d)
    for batch in z.split(9): m.update(batch)
    assert largest_error(m, z) < 1e-6 and torch.equal(m.second, m.second.T)


def test_short_cuts_that_a_user_switched_on_are_off_and_then_on_again():
    z = torch.randn(90, 4, 4, 8) + 3
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            m = Moments.of(z)
            assert (z[0, 0] @ z[0, 0].T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision("highest")
    assert largest_error(m, z) < 1e-6


def test_tokens_of_half_precision_are_summed_as_they_are():
    z = (torch.randn(90, 4, 4, 8) + 30).bfloat16()
    assert largest_error(Moments.of(z), z) < 1e-6


def test_sums_are_kept_where_float64_is():
    kept = {name: sums_device(torch.device(name)).type for name in ("cpu", "cuda", "mps")}
    assert kept == dict(cpu="cpu", cuda="cuda", mps="cpu")


@settings(max_examples=20, deadline=None)
@given(d=st.integers(2, 6), seed=seeds)
def test_the_scale_of_a_channel_knows_of_no_other(d, seed):
    g = torch.Generator().manual_seed(seed)
    z, loudness = torch.randn(30, 3, 3, d, generator=g), 10 ** (12 * torch.rand(d, generator=g) - 6)
    z[..., 0] = 5
    scale, louder = Moments.of(z).scale, Moments.of(z * loudness).scale
    assert torch.allclose(louder, scale * loudness, rtol=1e-5, atol=0) and scale[0] == 0 < scale[1:].min()


def test_turns_keep_every_pixel_and_are_remembered():
    pixel = PatchEncoder(torch.nn.Identity(), lambda model, x: x.permute(0, 2, 3, 1), 3, 1, image_size=96)
    scenes = Scenes("train", 16)
    turned = collect_moments(pixel, scenes, Reading(augment="turns"))
    published = collect_moments(pixel, scenes, Reading(augment="published"))
    colors = torch.stack([scenes[i][0].double().mean((1, 2)) / 127.5 - 1 for i in range(16)]).mean(0)
    assert torch.allclose(turned.mean, colors, atol=1e-5) and turned.source["augment"] == "turns"
    assert not torch.allclose(published.mean, colors, atol=1e-3)


def test_moments_of_two_encoders_do_not_add_up_and_of_two_readings_do(tiny):
    scenes = Scenes("train", 4)
    ours = collect_moments(tiny, scenes)
    with pytest.raises(ValueError, match="do not add up: two encoders"):
        ours + collect_moments(load_encoder("tiny", pretrained=False, device="cpu"), scenes)
    both = ours + collect_moments(tiny, scenes, Reading(augment="turns"))
    assert both.count == 8 and both.source["augment"] == ["published", "turns"]


def test_moments_of_earlier_versions_are_read(tmp_path):
    "They hold sums of the tokens as they are, with no shift."
    z = planted_tokens(20, (3, 4), 5)[0].double()
    source = dict(encoder="tiny", licence="MIT", image_size=96, augment="published", random_state=0)
    groups = torch.stack([z[i::16].sum(0) for i in range(16)])
    sums = dict(counts=torch.tensor([2.] * 4 + [1.] * 12).double(), cell_sums=groups,
                second=z.flatten(0, 2).T @ z.flatten(0, 2))
    write_safetensors(tmp_path / "m.safetensors", sums, "rasa_nb.moments.1", source)
    again, m = Moments.load(tmp_path / "m.safetensors"), Moments.of(z)
    assert again.count == 20 and again.source == source
    for both in (again, again + m, m + again): assert torch.allclose(both.cov, m.cov, atol=1e-12)
    m = Moments.of(z, apart=True)
    m.save(tmp_path / "new.safetensors")
    new = Moments.load(tmp_path / "new.safetensors")
    for ours, saved in ((m, new), (m.rest, new.rest), *zip(m.apart, new.apart)):
        assert torch.equal(ours.cov, saved.cov) and ours.count == saved.count
    write_safetensors(tmp_path / "head.safetensors", sums, "rasa_nb.head.1", source)
    with pytest.raises(ValueError, match="is no rasa_nb.moments.2 file"):
        Moments.load(tmp_path / "head.safetensors")


@pytest.mark.parametrize("share", [0., .2, .8])
def test_a_probe_explains_the_planted_share(share):
    "A dimension sqrt(share) * row + sqrt(1 - share) * noise, both of unit variance."
    row = position_targets((12, 12))[..., :1].float()
    row = (row - row.mean()) / row.std(correction=0)
    z = share**.5 * row + (1 - share)**.5 * torch.randn(300, 12, 12, 1)
    r2 = ridge_r2(Moments.of(z[:150]), Moments.of(z[150:]), position_targets((12, 12)))
    assert abs(r2[0] - share) < .02 and r2[1].abs() < .02


def test_what_cannot_be_summed_or_probed():
    z = planted_tokens(20, (4, 4), 6)[0]
    wrong, unbounded = (lambda grid: torch.zeros(2, 2)), (lambda grid: torch.full((*grid, 1), math.inf))
    same = Moments.of(torch.ones(20, 4, 4, 6))
    refusals = [
        (lambda: position_targets((4, 4), wrong), "expected .4, 4, T."),
        (lambda: position_targets((4, 4), unbounded), "values that are not finite"),
        (lambda: Moments((2, 8), 6).update(z), "do not fit moments of grid .2, 8. and D=6"),
        (lambda: ridge_r2(same, same, position_targets((4, 4))), "constant: nothing to probe")]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message): call()
