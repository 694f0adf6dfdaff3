"""Resolution: position that changes with the size is found and removed by the head that has seen it."""
from functools import partial

import numpy as np
import pytest
import torch

from rasa_nb import resolution
from rasa_nb.data import ImageList
from rasa_nb.encoders import from_timm
from rasa_nb.matching import LEOPART
from rasa_nb.rasa import RASA, PositionMean
from rasa_nb.reading import Reading
from rasa_nb.resolution import RESOLUTION, OnGrid, Tiled, fit_heads, moments_of_sizes, resolution_curve, token_moves
from rasa_nb.retrieval import UPRIGHT
from rasa_nb.scenes import Scenes

from conftest import color_encoder, encoder_of
from toy_vits import of_timm

FEW = RESOLUTION.replace(position_seeds=(1,), clusters=LEOPART.replace(k=(12,), seeds=(0, 1), n_init=1, max_iter=10, draws=20),
                         context=UPRIGHT.replace(memory=400, seeds=(0, 1)))
SCORE, LEARN = partial(Scenes, "val", 16), partial(Scenes, "train", 24)


def planted(images):
    "Colors of patches in four channels' company: at 48 px position lies in channels 3 and 4, at any other in 5 and 6."
    colors = torch.nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1)
    n, gh, gw, _ = colors.shape
    place = torch.stack(torch.meshgrid(torch.linspace(0, 2, gh), torch.linspace(0, 2, gw), indexing="ij"), -1).expand(n, -1, -1, -1)
    g = torch.Generator().manual_seed(0)
    blank = .05 * torch.randn(n, gh, gw, 2, generator=g)
    return torch.cat([colors, place, blank] if gh == 6 else [colors, blank, place], -1)


@pytest.fixture(scope="module")
def curve(): return resolution_curve(encoder_of(planted, 7), SCORE, (48, 72), LEARN, protocol=FEW)


def mean(curve, measure, head, size):
    f = curve.frame
    return f[(f.measure == measure) & (f["head"] == head) & (f["size"] == size)].value.mean()


def test_a_head_of_the_base_size_misses_position_that_moved(curve):
    assert min(mean(curve, "position_r2", "none", size) for size in (48, 72)) > .9
    assert mean(curve, "position_r2", "base", 48) < .3 < .9 < mean(curve, "position_r2", "base", 72)
    for head in ("own", "all"):
        assert max(mean(curve, "position_r2", head, size) for size in (48, 72)) < .3


def test_every_measure_has_its_controls_its_spread_and_its_changes(curve):
    assert set(curve.measures) == set(resolution.MEASURES)
    assert curve.frame[curve.frame.measure != "position_r2"].images_std.notna().all()
    assert {row["measure"] for row in curve.controls} == set(resolution.MEASURES)
    assert mean(curve, "cosine", "none", 48) == pytest.approx(1, abs=1e-5)
    moved = curve.change.set_index(["measure", "head", "size"]).loc[("in_context", "own", 72)]
    assert moved["mean"] == pytest.approx(mean(curve, "in_context", "own", 72) - mean(curve, "in_context", "none", 72))
    assert moved.images_low < moved["mean"] < moved.images_high
    assert len(curve.show().axes) == 7


def test_a_finished_size_is_not_measured_again(tmp_path, monkeypatch):
    request = dict(data=SCORE, sizes=(40, 48), learn=LEARN, protocol=FEW.replace(heads=("none",)), folder=tmp_path)
    one, measured = resolution_curve(color_encoder(), **request), []
    list(tmp_path.glob("*-40.json"))[0].unlink()
    measure = resolution.measure_size
    monkeypatch.setattr(resolution, "measure_size", lambda *args: measured.append(args[4]) or measure(*args))
    assert resolution_curve(color_encoder(), **request).table.equals(one.table) and measured == [40]
    resolution_curve(color_encoder(), **request)
    assert measured == [40]


def kinds():
    yield "learned", lambda: of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8)
    yield "rotary", lambda: of_timm("vit_small_patch16_dinov3_qkvb", patch_size=8, img_size=32)

    def sin_cos():
        model = of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8)
        steps = torch.outer(torch.arange(4.), 1 / 100**torch.linspace(0, 1, 12))
        one = torch.cat([steps.sin(), steps.cos()], 1)
        rows, columns = one[:, None].expand(4, 4, 24), one[None].expand(4, 4, 24)
        model.pos_embed.data[:, 1:] = torch.cat([rows, columns], -1).flatten(0, 1)
        return model
    yield "sin-cos", sin_cos


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in kinds()])
def test_position_of_every_kind_is_read_at_other_sizes(make):
    encoder = from_timm(make(), mean=(.5, .5, .5), std=(.25, .25, .25), resampling="library")
    learn = {size: Scenes("train", 20, size=size) for size in (32, 48)}
    heads = fit_heads(encoder, learn, 32, ("none", "base", "own", "all"), RASA(rank=2), Reading())
    images = torch.rand(2, 3, 48, 48)
    assert {tuple(e(images).shape) for (_, size), e in heads.items() if size == 48} == {(2, 6, 6, 48)}
    assert moments_of_sizes(encoder, learn, Reading(augment="none", seed=0)).grid_size == (4, 8)   # side by side
    moves = token_moves(heads["none", 48](images), heads["none", 32](torch.nn.functional.interpolate(images, 32)))
    assert (moves["cosine"] < 1).all() and (moves["gram"] > 0).all()


def test_windows_of_an_encoder_that_looks_at_patches_alone_change_nothing():
    color = color_encoder()
    for size in ((48, 48), (72, 120), (40, 64)):
        images = torch.rand(2, 3, *size)
        assert torch.allclose(Tiled(color)(images), color(images), atol=1e-6)
    picked = OnGrid(color, (3, 3))(images := torch.rand(1, 3, 72, 72))
    assert torch.equal(picked, color(images)[:, [1, 4, 7]][:, :, [1, 4, 7]])


def test_images_are_enlarged_only_when_asked_and_the_result_says_it():
    pairs = [Scenes("val", 16, size=48)[i] for i in range(16)]
    small = ImageList(pairs, Scenes.classes)
    request = dict(data=small, sizes=(48, 56), learn=small, remover=RASA(rank=1), protocol=FEW.replace(heads=("none", "base")))
    with pytest.raises(ValueError, match="size=56: 16 of 16 images of .* are smaller, item 0 has 48 x 48"): resolution_curve(color_encoder(), **request)
    allowed = resolution_curve(color_encoder(), enlarge=True, **request)
    assert allowed.notes == ["At 56 px, 16 of 16 images are enlarged: they have fewer pixels."] and allowed.notes[0] in allowed.to_markdown()


def test_what_cannot_be_a_curve_is_refused():
    with pytest.raises(ValueError, match="'each' is none of none, base"): RESOLUTION.replace(heads=("none", "each"))
    with pytest.raises(ValueError, match="expected 'none' first"): RESOLUTION.replace(heads=("base",))
    sizes = {size: Scenes("train", 20, size=size) for size in (40, 48)}
    with pytest.raises(ValueError, match="there is none for 'all' sizes"):
        fit_heads(color_encoder(), sizes, 48, ("none", "all"), PositionMean(rank="all"), Reading())
    with pytest.raises(ValueError, match="no encoder"): resolution_curve({}, SCORE, 48, LEARN)
    assert np.isnan(resolution._change({("a", "none", "x"): resolution.Scores({0: 1.}), ("b", "none", "x"): resolution.Scores({0: 2.})},
                                       ("b", "none", "x"), ("a", "none", "x"), 48)["low"])
