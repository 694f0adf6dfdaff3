"""Sums of tokens: they add up in any order, come back from files, and give the R² of a probe."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rasa_nb.reading import Reading
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import Moments, collect_moments, position_targets, ridge_r2
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.scenes import Scenes, planted_tokens
from rasa_nb.store import write_safetensors

grids = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda g: g[0] * g[1] > 1)
seeds = st.integers(0, 99)


@settings(max_examples=30, deadline=None)
@given(grid=grids, d=st.integers(3, 9), cuts=st.lists(st.integers(0, 60), max_size=4), seed=seeds)
def test_moments_agree_in_any_order_and_in_any_number_of_parts(grid, d, cuts, seed):
    z, _, _ = planted_tokens(60, grid, d, seed=seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    pieces = order.tensor_split(sorted(cuts))
    parts = [Moments(grid, d).update(z[some], some) for some in pieces]
    merged, whole = sum(parts[1:], parts[0]), Moments.of(z)
    assert merged.count == 60 and torch.equal(merged.counts, whole.counts)
    for name in ("cov", "mean", "cell_mean"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), atol=1e-9)
    targets = position_targets(grid, "grid")
    assert torch.allclose(merged.group_cross(targets), whole.group_cross(targets), atol=1e-9)


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


def test_moments_of_version_0_0_1_are_read(tmp_path):
    m = Moments.of(planted_tokens(20, (3, 4), 5)[0])
    source = dict(encoder="tiny", licence="MIT", image_size=96, augment="published", random_state=0)
    sums = dict(counts=m.counts, cell_sums=m.cell_sums, second=m.second)
    write_safetensors(tmp_path / "m.safetensors", sums, "rasa_nb.moments.1", source)
    again = Moments.load(tmp_path / "m.safetensors")
    assert torch.equal(again.cov, m.cov) and again.count == 20 and again.source == source


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
