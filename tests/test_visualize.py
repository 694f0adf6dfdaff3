"""Pictures that tell the truth: planted position and planted content show as what they are, the same tokens give the same picture, and what is no image is refused."""
from functools import cache

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

import rasa_nb
from rasa_nb.data import Scenes
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.head import RASAHead, DebiasedEncoder
from rasa_nb.rasa import PositionMean
from rasa_nb.visualize import (as_image, blank_images, blank_responses, blank_spread, cluster_labels, cluster_maps, cluster_places, collect_tokens, cross_similarity,
                               fitting_size, mean_tokens, patch_similarity, pca_maps, position_maps, principal_scores, shift_similarity, shift_test, similarity_maps)

SETTINGS = settings(max_examples=8, deadline=None)


# Planted encoders: tokens that are position, content, or a mixture

def planted(tokens, dim, patch=8, image_size=48, name="planted"):
    "An encoder from a function of images [B, 3, H, W] and grid that gives [B, gh, gw, dim]."
    def grid(model, images): return tokens(images, images.shape[2] // patch, images.shape[3] // patch)
    return PatchEncoder(nn.Identity(), grid, dim, patch, image_size, mean=(0., 0., 0.), std=(1., 1., 1.), name=name)


def places(gh, gw): return torch.stack(torch.meshgrid(torch.arange(gh) / gh, torch.arange(gw) / gw, indexing="ij"), -1)
def color(images, gh, gw): return nn.functional.adaptive_avg_pool2d(images, (gh, gw)).permute(0, 2, 3, 1)


def position_encoder(**how): return planted(lambda x, gh, gw: places(gh, gw).expand(len(x), -1, -1, -1), 2, name="position", **how)
def content_encoder(**how): return planted(color, 3, name="content", **how)
def mixed_encoder(strength=1., **how):
    return planted(lambda x, gh, gw: torch.cat([color(x, gh, gw), strength * places(gh, gw).expand(len(x), -1, -1, -1)], -1), 5, name="mixed", **how)
def turned(encoder, turn, name="turned"): return planted(lambda x, gh, gw: encoder(x) @ turn, encoder.embed_dim, encoder.patch_size, encoder.image_size, name)
def cosine(a, b): return nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    assert not plt.get_fignums(), "a function left a figure open, which a notebook would show twice"


@pytest.fixture(scope="module")
def photos(): return load_sample_images().images


def maps_of(fig): return [np.asarray(ax.images[0].get_array()) for ax in fig.axes if ax.images]


# Similarity

def test_pure_position_looks_the_same_across_two_images():
    z, other = (position_encoder()(torch.rand(1, 3, 48, 64))[0] for _ in range(2))
    assert torch.allclose(cross_similarity(z, (1, 2), other), patch_similarity(z, (1, 2)))
    p = places(6, 8); p = p - p.mean((0, 1))
    assert torch.allclose(cross_similarity(z, (1, 2), other), cosine(p, p[1, 2]), atol=1e-5)


def test_figure_across_two_images_shows_the_planted_map():
    image, other = torch.rand(2, 3, 48, 64)
    fig = similarity_maps(image, position_encoder(image_size=55), [(20, 10)], target=other)
    p = places(6, 8); p = p - p.mean((0, 1))
    assert np.allclose(maps_of(fig)[2], cosine(p, p[1, 2]), atol=1e-5)   # after image and target; x=20 is column 2, y=10 row 1
    ring = fig.axes[2].lines[0]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (20, 10) and ring.get_markerfacecolor() == "none"


def test_pure_content_does_not_care_where_it_is():
    image = torch.rand(3, 48, 48)
    z, flipped = (content_encoder()(x[None])[0] for x in (image, image.flip(2)))
    assert torch.allclose(cross_similarity(z, (2, 1), flipped), patch_similarity(z, (2, 1)).flip(1), atol=1e-4)


def test_target_of_another_shape_and_points_in_its_own_pixels():
    fig = similarity_maps(torch.rand(3, 48, 96), mixed_encoder(), [(90, 40), (3, 3)], target=torch.rand(3, 60, 30))
    first, ring = maps_of(fig)[2], fig.axes[2].lines[0]
    assert first.shape == (8, 4) and np.allclose((ring.get_xdata()[0], ring.get_ydata()[0]), (90 * 30 / 96, 40 * 60 / 48))


def test_alike_tokens_give_no_map_of_rounding_errors():
    flat = torch.ones(4, 5, 16) + 1e-7 * torch.randn(4, 5, 16)
    assert not patch_similarity(flat, (1, 1)).any() and patch_similarity(flat, (1, 1), center=False).min() > .999


def test_all_encoders_on_one_stated_scale():
    fig = similarity_maps(torch.rand(3, 48, 48), {"a": mixed_encoder(), "b": mixed_encoder(9.)}, [(4, 4), (30, 40)])
    drawn = [ax.images[0] for ax in fig.axes if ax.images and ax.images[0].get_array().ndim == 2]
    assert {i.get_clim() for i in drawn if i.get_array().shape == (6, 6)} == {(-1, 1)}
    assert "cosine similarity" in fig.axes[-1].get_ylabel()


# Moving content

@SETTINGS
@given(gh=st.integers(2, 6), gw=st.integers(2, 6), step=st.integers(1, 2), center=st.booleans())
def test_shift_of_pure_position_is_its_closed_form(gh, gw, step, center):
    step = min(step, max(gh, gw) - 1)
    tokens = places(gh, gw) + (0 if center else .3)
    encoder = planted(lambda x, *_: tokens.expand(len(x), -1, -1, -1), 2)
    found = shift_similarity(torch.rand(3, 8 * gh, 8 * gw), encoder, (8 * gh, 8 * gw), step, center).similarity["planted"]
    p = tokens - tokens.mean((0, 1)) * center
    for i, a in enumerate(range(0, gh, step)):
        for j, b in enumerate(range(0, gw, step)):
            expected = cosine(p, p.roll((-a, -b), (0, 1)))   # content of cell c comes to stand at c + (a, b)
            known = found[i, j].isfinite()
            assert torch.allclose(found[i, j][known & (p.roll((-a, -b), (0, 1)).norm(dim=-1) > 1e-3)], expected[known & (p.roll((-a, -b), (0, 1)).norm(dim=-1) > 1e-3)], atol=1e-4)
            assert (known == (p.norm(dim=-1) > 1e-4 * tokens.norm(dim=-1).mean())).all()


def test_shift_of_pure_content_is_one_everywhere():
    moved = shift_similarity(torch.rand(3, 48, 64), content_encoder())
    assert abs(moved.similarity["content"] - 1).max() < 1e-4 and abs(moved.mean["content"] - 1) < 1e-4
    assert abs(moved.table["content"].dropna() - 1).max() < 1e-4


def test_shift_falls_with_the_share_of_position():
    image = torch.rand(3, 48, 48)
    means = [shift_similarity(image, mixed_encoder(s)).mean["mixed"] for s in (0, .3, 1, 10)]
    assert means == sorted(means, reverse=True) and means[0] > .999 and means[-1] < .2


def test_distance_is_that_within_the_frame():
    moved = shift_similarity(torch.rand(3, 32, 32), content_encoder(image_size=32))
    distance = moved._moved("content")[0].view(4, 4, 4, 4)
    assert distance[0, 1, 2, 0] == .25 and distance[0, 1, 2, 3] == .75   # from the last column the next is the first, three away
    assert distance[0, 0].max() == 0


def test_shift_test_draws_what_shift_similarity_found():
    image, encoders = torch.rand(3, 48, 48), {"mixed": mixed_encoder(), "content": content_encoder()}
    drawn = maps_of(shift_test(image, encoders, (20, 30)))[2]
    s = shift_similarity(image, encoders).similarity["mixed"][:, :, 3, 2]   # the patch of row 3, column 2
    assert np.allclose(drawn, s.roll((3, 2), (0, 1)), atol=1e-6) and drawn[3, 2] > .999


def test_an_image_that_shows_nothing_cannot_be_followed():
    with pytest.raises(ValueError, match="all tokens of the image are alike to content"): shift_similarity(torch.full((3, 48, 48), .5), content_encoder())
    with pytest.raises(ValueError, match="step=9: expected 1 to 5"): shift_similarity(torch.rand(3, 48, 48), content_encoder(), step=9)


# Components

@SETTINGS
@given(seed=st.integers(0, 999), d=st.integers(3, 12), flip=st.booleans())
def test_components_do_not_depend_on_coordinates(seed, d, flip):
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(400, d, generator=g, dtype=torch.float64) ** 3 * 2. ** torch.arange(d, 0, -1)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q * (-1 if flip else 1)
    assert torch.allclose(principal_scores(z), principal_scores(z @ turn + 5), atol=1e-6)


def test_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA
    z = torch.rand(300, 7) ** 2 * torch.arange(7, 0, -1)
    theirs = PCA(3).fit_transform(z.numpy())
    assert np.allclose(principal_scores(z).abs(), np.abs(theirs), atol=1e-3)
    assert principal_scores(z[:, :2]).shape == (300, 3) and not principal_scores(z[:, :2])[:, 2].any()


def test_pca_maps_of_turned_tokens_are_equal():
    base = mixed_encoder(); turn = torch.linalg.qr(torch.randn(5, 5)).Q
    images = [Scenes("val")[i][0] for i in range(3)]
    a, b = (maps_of(pca_maps(images, e)) for e in (base, turned(base, turn)))
    assert len(a) == 6 and all(np.allclose(x, y, atol=1e-3) for x, y in zip(a, b))
    assert np.allclose(a[3], maps_of(pca_maps(images, turned(base, -torch.eye(5))))[3], atol=1e-3)


def test_one_base_has_one_fit_and_models_have_their_own():
    base, images = mixed_encoder(), [Scenes("val")[i][0] for i in range(2)]
    same = DebiasedEncoder(base, RASAHead(torch.eye(5)))
    maps = maps_of(pca_maps(images, {"before": base, "after": same}))
    assert np.array_equal(maps[2], maps[4]) and np.array_equal(maps[3], maps[5])
    half = DebiasedEncoder(base, RASAHead(.5 * torch.eye(5)))
    joint, alone = (maps_of(pca_maps(images, {"before": base, "after": half}, joint=j)) for j in (True, False))
    assert not np.allclose(joint[2], joint[4], atol=.05) and np.allclose(alone[2], alone[4], atol=1e-3)   # a joint fit shows that tokens shrank
    def says(fig): return fig.get_supxlabel()
    assert "colors comparable between rows" in says(pca_maps(images, {"before": base, "after": same}))
    assert "not comparable" in says(pca_maps(images, {"a": base, "b": mixed_encoder()})) and "not comparable" in says(pca_maps(images, {"before": base, "after": same}, joint=False))


# Machado, Oliveira and Fernandes 2009: how full protanopes, deuteranopes and tritanopes see linear RGB
BLIND = dict(protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
             deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
             tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]], normal=np.eye(3).tolist())


def lab(rgb, kind):
    "CIELAB of sRGB colors [..., 3] as someone of this kind sees them."
    rgb = np.asarray(rgb, float)
    linear = (np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4) @ np.array(BLIND[kind]).T).clip(0, 1)
    xyz = linear @ np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]]).T / [.95047, 1, 1.08883]
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@pytest.mark.parametrize("kind", BLIND)
def test_cluster_colors_are_told_apart_by_all_eyes(kind):
    fig = cluster_maps(torch.rand(3, 48, 48), content_encoder(), 10)
    colors = lab(np.unique(maps_of(fig)[1].reshape(-1, 3), axis=0), kind)
    apart = np.linalg.norm(colors[:, None] - colors[None], axis=-1)[~np.eye(10, dtype=bool)]
    assert apart.min() > 15   # some 2 is a difference that is just seen


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("map_name", ["RdBu_r", "cividis"])
def test_color_maps_are_told_apart_by_all_eyes(kind, map_name):
    c = lab(plt.get_cmap(map_name)(np.linspace(0, 1, 5))[:, :3], kind)
    assert min(np.linalg.norm(a - b) for n, a in enumerate(c) for b in c[:n]) > 12


@pytest.mark.parametrize("kind", ["protan", "deutan", "normal"])
def test_the_first_two_components_are_seen_by_the_red_green_blind(kind):
    from rasa_nb.visualize import _colors_of
    c = lab(_colors_of(torch.tensor([[-1., -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0], [0, 0, 0]]).double(), "opponent"), kind)
    assert min(np.linalg.norm(a - b) for n, a in enumerate(c) for b in c[:n]) > 25


# Clusters

def one_hot(k, order):
    "An encoder whose tokens say which of k stripes of grey a patch is in, numbered in this order."
    def tokens(x, gh, gw): return 5. * torch.eye(k)[torch.as_tensor(order)[(color(x, gh, gw)[..., 0] * (k - .001)).long()]]
    return planted(tokens, k)


@SETTINGS
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_clusters_of_a_permuted_encoder_have_the_same_numbers(order, seed):
    images = [torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(seed + i)).repeat_interleave(8, 1).repeat_interleave(8, 2).expand(3, -1, -1) for i in range(2)]
    encoders = {"a": one_hot(4, [0, 1, 2, 3]), "b": one_hot(4, order)}
    labels = cluster_labels(images, encoders, 4, random_state=seed)
    assert all((a == b).all() for a, b in zip(labels["a"], labels["b"]))
    sizes = np.bincount(np.concatenate([m.ravel() for m in labels["a"]]), minlength=4)
    assert (np.diff(sizes) <= 0).all()   # the largest is cluster 0


def test_cluster_colors_of_a_permuted_encoder_are_the_same():
    image = (torch.arange(36).view(1, 6, 6) / 36).repeat_interleave(8, 1).repeat_interleave(8, 2).expand(3, -1, -1)
    fig = cluster_maps(image, {"a": one_hot(4, [0, 1, 2, 3]), "b": one_hot(4, [2, 0, 3, 1])}, 4)
    maps = maps_of(fig)
    assert np.array_equal(maps[1], maps[2]) and "b 100% of the area" in fig.get_supxlabel()
  
    assert len(np.unique(maps[1].reshape(-1, 3), axis=0)) == 4


def test_clusters_match_across_patch_sizes():
    image = (torch.arange(4).view(1, 2, 2) / 3).repeat_interleave(24, 1).repeat_interleave(24, 2).expand(3, -1, -1)   # four quarters
    labels = cluster_labels(image, {"fine": content_encoder(), "coarse": content_encoder(patch=12)}, 4)
    fine, coarse = labels["fine"][0], labels["coarse"][0]
    assert fine.shape == (6, 6) and coarse.shape == (4, 4) and (fine[[0, 0, 5, 5], [0, 5, 0, 5]] == coarse[[0, 0, 3, 3], [0, 3, 0, 3]]).all()


def test_too_many_clusters_are_refused():
    with pytest.raises(ValueError, match="k=37: expected 2 to 36"): cluster_labels(torch.rand(3, 48, 48), content_encoder(), 37)
    with pytest.raises(ValueError, match="expected 2 to 10"): cluster_maps(torch.rand(3, 48, 48), content_encoder(), 11)


# Position over many images

SCENES = Scenes("val", 16, size=48)


def test_mean_tokens_finds_the_planted_shift():
    drawn = maps_of(mean_tokens(mixed_encoder(3.), SCENES))
    p = 3 * places(6, 6); p = p - p.mean((0, 1))
    z = collect_tokens(mixed_encoder(3.), SCENES)["mixed"]
    spread = float((z - z.mean((0, 1, 2))).square().sum(-1).mean().sqrt())
    assert np.abs(drawn[0] - p.norm(dim=-1).numpy() / spread).max() < .1
    assert np.ptp(drawn[1]) > .5 and abs(abs(np.corrcoef(drawn[1].ravel() ** 2 + drawn[2].ravel() ** 2, p.norm(dim=-1).square().ravel())[0, 1]) - 1) < .05


def test_mean_tokens_vanish_without_position():
    drawn = maps_of(mean_tokens({"before": mixed_encoder(3.), "without": content_encoder()}, SCENES))
    assert drawn[4].mean() < .5 * drawn[0].mean()   # 16 images: a quarter is left by chance


def test_cluster_places_of_pure_position_and_of_pure_content():
    from matplotlib.colors import LogNorm
    fig = cluster_places({"place": position_encoder(), "content": content_encoder()}, SCENES, 4)
    panels = [ax.images[0] for ax in fig.axes if ax.images and ax.images[0].get_array().shape == (6, 6)]
    place, content = [i.get_array() for i in panels[:4]], [i.get_array() for i in panels[4:]]
    for m in place: assert set(np.round(np.unique(np.asarray(m)), 6)) == {0., round(36 / (np.asarray(m) > .1).sum(), 6)}   # all of a cell or nothing of it
    assert np.allclose(sum(np.asarray(m) > .1 for m in place), 1)
    assert np.mean([np.abs(np.log2(np.asarray(m).clip(.25, 4))).mean() for m in content]) < 1
    assert {i.get_clim() for i in panels} == {(.25, 4)} and all(isinstance(i.norm, LogNorm) for i in panels)


def test_blank_images_are_the_same_in_every_patch():
    for kind, x in blank_images((32, 48), 8).items():
        z = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).permute(0, 2, 3, 1, 4).flatten(3)
        assert x.min() >= 0 and x.max() <= 1 and (kind == "noise" or (z - z[:, :1, :1]).abs().max() < 1e-4)


def test_blank_spread_is_the_planted_position():
    mixed = mixed_encoder(2.)
    table = blank_spread({"mixed": mixed, "content": content_encoder()}, SCENES)
    z = collect_tokens(mixed, SCENES)["mixed"]
    p = 2 * places(6, 6); p = p - p.mean((0, 1))
    planted_share = float(p.square().sum(-1).mean().sqrt() / (z - z.mean((0, 1, 2))).square().sum(-1).mean().sqrt())
    assert abs(table.loc["mixed", ["grey", "texture"]] - planted_share).max() < .01 and abs(table.loc["mixed", "noise"] - planted_share) < .05
    assert table.loc["content", ["grey", "texture"]].max() < 1e-3 and table.loc["content", "noise"] < .1


def test_blank_responses_of_content_are_grey():
    fig = blank_responses({"mixed": mixed_encoder(2.), "content": content_encoder()}, SCENES)
    maps = maps_of(fig)
    assert len(maps) == 9 and np.abs(maps[6] - .5).max() < .01 < .2 < np.abs(maps[3] - .5).max()


def test_collected_tokens_give_the_same_pictures():
    encoders = {"mixed": mixed_encoder(), "content": content_encoder()}
    tokens = collect_tokens(encoders, SCENES)
    for draw in (mean_tokens, cluster_places, blank_responses):
        assert all(np.array_equal(a, b) for a, b in zip(maps_of(draw(encoders, tokens)), maps_of(draw(encoders, SCENES)), strict=True))
    with pytest.raises(ValueError, match="collect them for these"): mean_tokens(mixed_encoder(), tokens)
    with pytest.raises(TypeError, match="augmented: the tokens are collected already"): mean_tokens(encoders, tokens, augmented=False)


def test_upright_images_show_their_layout_and_augmented_ones_do_not():
    lengths = {a: maps_of(mean_tokens(content_encoder(), Layout(), augmented=a))[0].mean() for a in (True, False)}
    assert lengths[False] > 3 * lengths[True]


class Layout(rasa_nb.data.SegmentationData):
    "Images that are light above and dark below, with some noise."
    def __len__(self): return 60
    def load(self, i):
        x = torch.linspace(220, 30, 48)[:, None] + 20 * torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(i))
        return x.clamp(0, 255).byte(), None


def test_position_maps_hold_the_three_parts():
    encoders = {"mixed": mixed_encoder(2.), "after": PositionMean().fit(mixed_encoder(2.), SCENES).attach(mixed_encoder(2.))}
    tokens = collect_tokens(encoders, SCENES)
    sheet, parts = position_maps(encoders, tokens, 3), [mean_tokens(encoders, tokens), cluster_places(encoders, tokens, 3), blank_responses(encoders, tokens)]
    for a, b in zip(maps_of(sheet), (m for p in parts for m in maps_of(p)), strict=True): assert np.array_equal(a, b)


def test_too_few_images_and_dead_encoders_are_refused():
    with pytest.raises(ValueError, match="1 image is too few"): mean_tokens(content_encoder(), Scenes("val", 1, size=48))
    dead = planted(lambda x, gh, gw: torch.ones(len(x), gh, gw, 4), 4)
    with pytest.raises(ValueError, match="are alike"): mean_tokens(dead, SCENES)
    with pytest.raises(ValueError, match="are alike"): blank_spread(dead, SCENES)


# Images of all kinds

def test_all_kinds_of_one_image_are_one_image():
    a = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    expected = torch.from_numpy(a).permute(2, 0, 1) / 255
    kinds = [a, torch.from_numpy(a).permute(2, 0, 1), expected, expected.numpy(), Image.fromarray(a), a.astype(np.float32) / 255, a.astype(np.uint16) * 257, expected.half(), torch.from_numpy(a)]
    for kind in kinds: assert torch.allclose(as_image(kind), expected, atol=1e-3) and as_image(kind).dtype == torch.float32
    opaque = np.dstack([a, np.full((10, 12), 255, np.uint8)])
    assert torch.allclose(as_image(opaque), expected, atol=1e-6) and torch.allclose(as_image(Image.fromarray(opaque)), expected, atol=1e-6)
    assert not as_image(expected).data_ptr() == expected.data_ptr()   # the caller's image stays as it is


def test_files_and_palettes(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    assert torch.allclose(as_image(tmp_path / "a.png"), torch.from_numpy(a).permute(2, 0, 1) / 255) and torch.equal(as_image(str(tmp_path / "a.png")), as_image(tmp_path / "a.png"))
    palette = Image.fromarray(a).quantize(8)
    assert torch.allclose(as_image(palette), as_image(palette.convert("RGB")))
    deep = Image.fromarray((np.arange(120).reshape(10, 12) * 500).astype(np.uint16))
    assert torch.allclose(as_image(deep)[1], torch.arange(120).view(10, 12) * 500 / 65535)


@pytest.mark.parametrize("grey", [np.arange(2304).reshape(48, 48).astype(np.uint8), torch.rand(48, 48), torch.rand(1, 48, 48), Image.fromarray(np.arange(2304).reshape(48, 48).astype(np.uint8)),
                                  np.arange(2304).reshape(48, 48, 1) % 2 == 0], ids=["array", "tensor", "one channel", "PIL", "bool"])
def test_grey_images_are_repeated(grey):
    x = as_image(grey)
    assert x.shape == (3, 48, 48) and torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) and 0 <= x.min() < x.max() <= 1
    for fig in (similarity_maps(grey, mixed_encoder(), [(3, 4)]), pca_maps(grey, mixed_encoder()), cluster_maps(grey, mixed_encoder(), 3), shift_test(grey, mixed_encoder())): fig.canvas.draw()


def test_transparent_images_lie_over_white():
    a = np.zeros((4, 6, 4), np.uint8); a[..., 0] = 200; a[:, :3, 3] = 255; a[:, 3, 3] = 51
    x = as_image(a)
    assert torch.allclose(x[:, 0, 0], torch.tensor([200 / 255, 0, 0])) and (x[:, :, 4] == 1).all()
    assert torch.allclose(x[:, 0, 3], torch.tensor([.2 * 200 / 255 + .8, .8, .8])) and torch.allclose(as_image(Image.fromarray(a)), x) and torch.allclose(as_image(torch.from_numpy(a).permute(2, 0, 1)), x)
    similarity_maps(np.tile(a, (10, 8, 1)), mixed_encoder(), [(3, 4)]).canvas.draw()
    assert torch.equal(as_image(Image.fromarray(a).convert("LA"))[0], as_image(Image.fromarray(a).convert("LA"))[1])


@pytest.mark.parametrize("image, says", [
    (torch.full((3, 48, 48), float("nan")), "6912 values that are not finite"), (torch.rand(3, 48, 48) * 255, "divide by 255"), (torch.rand(3, 48, 48) - .5, "undo its normalization"),
    (torch.rand(2, 3, 48, 48), "of a batch give one"), (torch.rand(5, 48, 48), "expected \\[3, H, W\\]"), (torch.rand(3, 0, 48), "expected \\[3, H, W\\]"), (np.zeros((0, 4)), "expected \\[3, H, W\\]")])
@pytest.mark.parametrize("draw", [lambda i: similarity_maps(i, mixed_encoder(), [(1, 1)]), lambda i: shift_test(i, mixed_encoder()), lambda i: pca_maps([i], mixed_encoder()),
                                  lambda i: cluster_maps([i], mixed_encoder()), lambda i: similarity_maps(torch.rand(3, 48, 48), mixed_encoder(), [(1, 1)], target=i)],
                         ids=["similarity", "shift", "pca", "clusters", "target"])
def test_what_is_no_image_is_refused(draw, image, says):
    with pytest.raises(ValueError, match=says): draw(image)


def test_one_bad_pixel_is_enough():
    image = torch.rand(3, 48, 48); image[1, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="1 values that are not finite"): similarity_maps(image, mixed_encoder(), [(1, 1)])
    with pytest.raises(TypeError, match="image holds int64"): as_image(torch.zeros(3, 8, 8, dtype=torch.long))


@pytest.mark.parametrize("point", [(48, 3), (3, 40), (-1, 3), (3, -.1), (float("nan"), 3)])
def test_a_point_outside_the_image_is_refused(point):
    says = r"is outside the image of width 48 and height 40: expected x from 0 to 47, y from 0 to 39"
    for draw in (lambda: similarity_maps(torch.rand(3, 40, 48), mixed_encoder(), [(3, 3), point]), lambda: shift_test(torch.rand(3, 40, 48), mixed_encoder(), point)):
        with pytest.raises(ValueError, match=says): draw()


def test_cells_outside_the_grid_are_refused():
    for cell in ((4, 0), (0, 5), (-1, 0)):
        with pytest.raises(IndexError, match="expected rows 0 to 3, columns 0 to 4"): patch_similarity(torch.rand(4, 5, 3), cell)


def test_points_in_the_last_pixel_and_numbers_of_points():
    similarity_maps(torch.rand(3, 40, 48), mixed_encoder(), [(47.9, 39.9)])
    assert len(maps_of(similarity_maps(torch.rand(3, 40, 48), mixed_encoder(), (3, 5)))) == 2   # one point may come alone
    for n in (0, 10):
        with pytest.raises(ValueError, match=f"{n} points: expected 1 to 9"): similarity_maps(torch.rand(3, 40, 48), mixed_encoder(), [(1, 1)] * n)


def test_an_image_smaller_than_a_patch_is_refused():
    for image in (torch.rand(3, 7, 30), torch.rand(3, 30, 7)):
        for draw in (lambda i: similarity_maps(i, mixed_encoder(), [(1, 1)]), lambda i: pca_maps(i, mixed_encoder()), lambda i: cluster_maps(i, mixed_encoder()), lambda i: shift_test(i, mixed_encoder())):
            with pytest.raises(ValueError, match=r"smaller than one patch of mixed \(8 x 8\)"): draw(image)
    assert fitting_size(torch.rand(3, 8, 8), mixed_encoder()) == (48, 48)


@SETTINGS
@given(height=st.integers(8, 300), width=st.integers(8, 300), patch=st.sampled_from([4, 7, 8]))
def test_sizes_are_whole_patches_of_about_the_trained_area(height, width, patch):
    size = fitting_size(torch.empty(3, height, width), mixed_encoder(patch=patch, image_size=96))
    assert all(s % patch == 0 and s >= patch for s in size)
    if max(height, width) < 4 * min(height, width): assert .6 < size[0] * size[1] / 96**2 < 1.5 and .6 < (size[0] / size[1]) / (height / width) < 1.6


def test_encoders_of_different_patch_sizes_side_by_side(photos):
    encoders = {"p8": mixed_encoder(), "p12": content_encoder(patch=12), "p7": mixed_encoder(patch=7, image_size=56)}
    grids = {"p8": (5, 7), "p12": (3, 5), "p7": (7, 10)}
    for fig in (similarity_maps(photos[0], encoders, [(300, 200)]), similarity_maps(photos[0], encoders, [(300, 200)], target=photos[1]), pca_maps(photos, encoders), cluster_maps(photos, encoders, 4)):
        fig.canvas.draw()
        assert {m.shape[:2] for m in maps_of(fig)} >= set(grids.values())
    shift_test(photos[1], encoders).canvas.draw()
    for draw in (mean_tokens, cluster_places, blank_responses): draw({k: encoders[k] for k in ("p8", "p12")}, SCENES).canvas.draw()


def test_no_encoder_and_tokens_that_are_not_finite():
    for bad in ({}, None, "tiny", [mixed_encoder()]):
        with pytest.raises(TypeError, match="expected an encoder, or a dict"): similarity_maps(torch.rand(3, 48, 48), bad, [(1, 1)])
    broken = planted(lambda x, gh, gw: torch.full((len(x), gh, gw, 2), torch.nan), 2)
    for draw in (lambda: similarity_maps(torch.rand(3, 48, 48), broken, [(1, 1)]), lambda: pca_maps(torch.rand(3, 48, 48), broken), lambda: mean_tokens(broken, SCENES), lambda: cluster_places(broken, SCENES)):
        with pytest.raises(ValueError, match="not finite"): draw()
    with pytest.raises(ValueError, match="no images"): pca_maps([], mixed_encoder())
    with pytest.raises(ValueError, match="colors='hsv'"): pca_maps(torch.rand(3, 48, 48), mixed_encoder(), colors="hsv")


# Figures

AB = {"a": mixed_encoder(), "b": content_encoder()}
@cache
def seen(): return collect_tokens(AB, SCENES)


FIGURES = dict(similarity=(lambda e, **k: similarity_maps(torch.rand(3, 48, 48), e, [(3, 3), (9, 9)], **k), (2, 3)),
               across=(lambda e, **k: similarity_maps(torch.rand(3, 48, 48), e, [(3, 3)], target=torch.rand(3, 48, 60), **k), (2, 3)),
               shift=(lambda e, **k: shift_test(torch.rand(3, 48, 48), e, **k), (1, 5)), pca=(lambda e, **k: pca_maps([torch.rand(3, 48, 48)] * 2, e, **k), (3, 2)),
               clusters=(lambda e, **k: cluster_maps([torch.rand(3, 48, 48)] * 2, e, 3, **k), (3, 2)), means=(lambda e, **k: mean_tokens(e, seen(), **k), (2, 4)),
               places=(lambda e, **k: cluster_places(e, seen(), 3, **k), (2, 3)), blank=(lambda e, **k: blank_responses(e, seen(), **k), (3, 3)))


@pytest.mark.parametrize("what", FIGURES)
def test_figures_fit_a_notebook_and_go_where_they_are_asked_to(what):
    (draw, shape), encoders = FIGURES[what], AB
    fig = draw(encoders)
    assert isinstance(fig, plt.Figure) and fig.get_figwidth() <= 9.5 and draw(encoders, figsize=(4, 3)).get_size_inches().tolist() == [4, 3]
    mine, axes = plt.subplots(*shape, squeeze=False, layout="constrained")
    assert draw(encoders, axes=axes) is mine and all(ax.images or ax.lines for ax in axes.flat)
    plt.close(mine)
    part = plt.figure(layout="constrained"); sub = part.subfigures(1, 2)[0]
    assert draw(encoders, axes=sub.subplots(*shape, squeeze=False)) is part
    plt.close(part)
    wrong = plt.figure()
    with pytest.raises(ValueError, match=f"1 axes, expected {shape[0]} x {shape[1]}"): draw(encoders, axes=wrong.subplots())
    plt.close(wrong)


def test_many_columns_still_fit():
    assert similarity_maps(torch.rand(3, 48, 96), mixed_encoder(), [(n, n) for n in range(9)]).get_figwidth() <= 9.5
    assert pca_maps([torch.rand(3, 48, 96)] * 7, mixed_encoder()).get_figwidth() <= 9.5


def test_calls_that_stood_before_still_work(tiny):
    image = Scenes("val")[0][0]
    fig = similarity_maps(image, {"before": tiny}, [(80, 30), (50, 50)], 96)   # a run gives the size by place
    assert maps_of(fig)[1].shape == (12, 12) and len(maps_of(similarity_maps(image, tiny, [(80, 30)], center=False))) == 2
    assert patch_similarity(tiny(image[None] / 255)[0], (3, 4)).shape == (12, 12)
    for name in ("similarity_maps", "pca_maps", "cluster_maps", "position_maps", "shift_test"): assert callable(getattr(rasa_nb, name))


def test_before_and_after_share_one_pass():
    calls = []
    base = planted(lambda x, gh, gw: calls.append(len(x)) or color(x, gh, gw), 3)
    after = DebiasedEncoder(base, RASAHead(torch.eye(3)))
    similarity_maps(torch.rand(3, 48, 48), {"before": base, "after": after}, [(1, 1)])
    assert calls == [1]
