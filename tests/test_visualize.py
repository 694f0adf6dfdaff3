"""Pictures that tell the truth: planted position and planted content show as what they are."""
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.colors import LogNorm
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

from rasa_nb.baselines import ShiftAverage
from rasa_nb.data import SegmentationData
from rasa_nb.reading import Reading
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import PositionMean
from rasa_nb.scenes import Scenes
from rasa_nb.visualize import (
    SIMILARITY_CMAP, _colors_of, as_image, blank_images, blank_responses, blank_spread, cluster_labels,
    cluster_maps, cluster_places, collect_together, cross_similarity, fitting_size, mean_tokens,
    patch_similarity, pca_maps, position_maps, principal_scores, shift_similarity, shift_test,
    similarity_maps, tokens_of)

SETTINGS = settings(max_examples=8, deadline=None)
SCENES = Scenes("val", 16, size=48)


# Planted encoders: tokens that are position, content, or both

def planted(tokens, dim, patch=8, image_size=48, name="planted"):
    "An encoder from a function of images [B, 3, H, W] and the grid that gives [B, gh, gw, dim]."
    def grid(model, images): return tokens(images, images.shape[2] // patch, images.shape[3] // patch)
    as_they_are = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    return PatchEncoder(nn.Identity(), grid, dim, patch, image_size, name=name, **as_they_are)


def places(gh, gw):
    rows, columns = torch.arange(gh) / gh, torch.arange(gw) / gw
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)


def centered_places(gh, gw): return places(gh, gw) - places(gh, gw).mean((0, 1))
def color(images, gh, gw): return nn.functional.adaptive_avg_pool2d(images, (gh, gw)).permute(0, 2, 3, 1)
def place(images, gh, gw): return places(gh, gw).expand(len(images), -1, -1, -1)
def position_encoder(**how): return planted(place, 2, name="position", **how)
def content_encoder(**how): return planted(color, 3, name="content", **how)


def mixed_encoder(strength=1., **how):
    def both(*args): return torch.cat([color(*args), strength * place(*args)], -1)
    return planted(both, 5, name="mixed", **how)


def turned(encoder, turn):
    return planted(lambda x, *_: encoder(x) @ turn, encoder.embed_dim, encoder.patch_size, encoder.image_size)


def cosine(a, b): return nn.functional.cosine_similarity(a, b, dim=-1)
def maps_of(fig): return [np.asarray(ax.images[0].get_array()) for ax in fig.axes if ax.images]
def blocks(values): return values.repeat_interleave(8, -2).repeat_interleave(8, -1)


@pytest.fixture(autouse=True)
def no_open_figures():
    plt.close("all")    # those of other tests
    yield
    assert not plt.get_fignums(), "a function left a figure open, which a notebook would show twice"


# Similarity

def test_pure_position_looks_the_same_across_two_images():
    z, other = (position_encoder()(torch.rand(1, 3, 48, 64))[0] for _ in range(2))
    assert torch.allclose(cross_similarity(z, (1, 2), other), patch_similarity(z, (1, 2)))
    p = centered_places(6, 8)
    assert torch.allclose(cross_similarity(z, (1, 2), other), cosine(p, p[1, 2]), atol=1e-5)


def test_pure_content_does_not_care_where_it_is():
    image = torch.rand(3, 48, 48)
    z, flipped = (content_encoder()(x[None])[0] for x in (image, image.flip(2)))
    expected = patch_similarity(z, (2, 1)).flip(1)
    assert torch.allclose(cross_similarity(z, (2, 1), flipped), expected, atol=1e-4)


def test_figure_across_two_images_shows_the_planted_map():
    image, other = torch.rand(2, 3, 48, 64)
    fig = similarity_maps(image, position_encoder(image_size=55), [(20, 10)], target=other)
    p = centered_places(6, 8)
    assert np.allclose(maps_of(fig)[2], cosine(p, p[1, 2]), atol=1e-5)   # x=20 is column 2, y=10 row 1
    ring = fig.axes[2].lines[0]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (20, 10) and ring.get_markerfacecolor() == "none"


def test_target_has_a_shape_and_pixels_of_its_own():
    image, target = torch.rand(3, 48, 96), torch.rand(3, 60, 30)
    fig = similarity_maps(image, mixed_encoder(), [(90, 40), (3, 3)], target=target)
    ring = fig.axes[2].lines[0]
    assert maps_of(fig)[2].shape == (8, 4)
    assert np.allclose((ring.get_xdata()[0], ring.get_ydata()[0]), (90 * 30 / 96, 40 * 60 / 48))


def test_alike_tokens_give_no_map_of_rounding_errors():
    flat = torch.ones(4, 5, 16) + 1e-7 * torch.randn(4, 5, 16)
    assert not patch_similarity(flat, (1, 1)).any()
    assert patch_similarity(flat, (1, 1), center=False).min() > .999


def test_all_similarities_have_one_scale_and_one_color_map():
    image, encoders = torch.rand(3, 48, 48), {"a": mixed_encoder(), "b": mixed_encoder(9.)}
    for fig in (similarity_maps(image, encoders, [(4, 4), (30, 40)]), shift_test(image, encoders)):
        drawn = [i for ax in fig.axes for i in ax.images if i.get_array().shape == (6, 6)]
        assert len(drawn) in (2, 4)
        assert {(i.get_clim(), i.get_cmap().name) for i in drawn} == {((-1, 1), SIMILARITY_CMAP)}
        assert any("cosine" in ax.get_ylabel() for ax in fig.axes)


def test_a_cell_outside_the_grid_is_refused():
    for cell in ((4, 0), (0, 5), (-1, 0)):
        with pytest.raises(IndexError, match="expected rows 0 to 3, columns 0 to 4"):
            patch_similarity(torch.rand(4, 5, 3), cell)


@pytest.mark.parametrize("point", [(48, 3), (3, 40), (-1, 3), (3, -.1), (float("nan"), 3)])
def test_a_point_outside_the_image_is_refused(point):
    image = torch.rand(3, 40, 48)
    says = r"is outside the image of width 48 and height 40: expected x from 0 to 47, y from 0 to 39"
    with pytest.raises(ValueError, match=says): similarity_maps(image, mixed_encoder(), [(3, 3), point])
    with pytest.raises(ValueError, match=says): shift_test(image, mixed_encoder(), point)


def test_axes_of_another_number_are_refused():
    with pytest.raises(ValueError, match="expected 1 x 2"):
        similarity_maps(torch.rand(3, 48, 48), mixed_encoder(), [(3, 3)], axes=[None] * 3)


# Moving content

@SETTINGS
@given(gh=st.integers(2, 6), gw=st.integers(2, 6), step=st.integers(1, 2), center=st.booleans())
def test_shift_of_pure_position_is_its_closed_form(gh, gw, step, center):
    step = min(step, max(gh, gw) - 1)
    tokens = places(gh, gw) + (0 if center else .3)
    encoder = planted(lambda x, *_: tokens.expand(len(x), -1, -1, -1), 2)
    moved = shift_similarity(torch.rand(3, 8 * gh, 8 * gw), encoder, (8 * gh, 8 * gw), step, center)
    p = tokens - tokens.mean((0, 1)) * center
    some_direction = p.norm(dim=-1) > 1e-4 * tokens.norm(dim=-1).mean()
    for i, a in enumerate(range(0, gh, step)):
        for j, b in enumerate(range(0, gw, step)):
            there = p.roll((-a, -b), (0, 1))   # content of cell c comes to stand at c + (a, b)
            found = moved.similarity["planted"][i, j]
            assert (found.isfinite() == some_direction).all()
            compared = some_direction & (there.norm(dim=-1) > 1e-3)
            assert torch.allclose(found[compared], cosine(p, there)[compared], atol=1e-4)


def test_shift_of_pure_content_is_one_everywhere():
    moved = shift_similarity(torch.rand(3, 48, 64), content_encoder())
    assert abs(moved.similarity["content"] - 1).max() < 1e-4 and abs(moved.mean["content"] - 1) < 1e-4
    assert abs(moved.table["content"].dropna() - 1).max() < 1e-4


def test_shift_falls_with_the_share_of_position():
    image = torch.rand(3, 48, 48)
    means = [shift_similarity(image, mixed_encoder(s)).mean["mixed"] for s in (0, .3, 1, 10)]
    assert means == sorted(means, reverse=True) and means[0] > .999 and means[-1] < .2


def test_an_average_over_all_shifts_has_no_position_to_see():
    encoders = {"before": mixed_encoder(3.), "averaged": ShiftAverage(mixed_encoder(3.), n_shifts=36)}
    moved = shift_similarity(torch.rand(3, 48, 48), encoders)
    assert moved.mean["before"] < .5 and abs(moved.similarity["averaged"] - 1).max() < 1e-3


def test_distance_is_that_within_the_frame():
    distance = shift_similarity(torch.rand(3, 32, 32), content_encoder(image_size=32)).moved("content")
    assert distance[0, 0].max() == 0
    assert distance[0, 1, 2, 0] == .25
    assert distance[0, 1, 2, 3] == .75   # after the last column comes the first


def test_shift_test_draws_what_shift_similarity_found():
    image, encoders = torch.rand(3, 48, 48), {"mixed": mixed_encoder(), "content": content_encoder()}
    drawn = maps_of(shift_test(image, encoders, (20, 30)))[2]
    s = shift_similarity(image, encoders).similarity["mixed"][:, :, 3, 2]   # the patch of row 3, column 2
    assert np.allclose(drawn, s.roll((3, 2), (0, 1)), atol=1e-6) and drawn[3, 2] > .999


def test_shifts_that_show_nothing_are_refused():
    with pytest.raises(ValueError, match="all tokens of the image are alike to content"):
        shift_similarity(torch.full((3, 48, 48), .5), content_encoder())
    with pytest.raises(ValueError, match="step=9: expected 1 to 5"):
        shift_similarity(torch.rand(3, 48, 48), content_encoder(), step=9)


# Components

@SETTINGS
@given(seed=st.integers(0, 999), d=st.integers(3, 12), flip=st.booleans())
def test_components_do_not_depend_on_coordinates(seed, d, flip):
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(400, d, generator=g, dtype=torch.float64) ** 3 * 2. ** torch.arange(d, 0, -1)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q * (-1 if flip else 1)
    assert torch.allclose(principal_scores(z), principal_scores(z @ turn + 5), atol=1e-6)


def test_components_are_those_of_scikit_learn():
    z = torch.rand(300, 7) ** 2 * torch.arange(7, 0, -1)
    theirs = PCA(3).fit_transform(z.numpy())
    assert np.allclose(principal_scores(z).abs(), np.abs(theirs), atol=1e-3)
    assert principal_scores(z[:, :2]).shape == (300, 3) and not principal_scores(z[:, :2])[:, 2].any()


def test_pca_maps_of_turned_tokens_are_equal():
    images, turn = [SCENES[i][0] for i in range(3)], torch.linalg.qr(torch.randn(5, 5)).Q
    a, b = (maps_of(pca_maps(images, e)) for e in (mixed_encoder(), turned(mixed_encoder(), turn)))
    assert len(a) == 6 and all(np.allclose(x, y, atol=1e-3) for x, y in zip(a, b))


def test_encoders_on_one_base_have_one_fit():
    base, images = mixed_encoder(), [SCENES[i][0] for i in range(2)]
    half = DebiasedEncoder(base, RASAHead(.5 * torch.eye(5)))
    joint, alone = (pca_maps(images, {"before": base, "after": half}, joint=j) for j in (True, False))
    before, _, after, _ = maps_of(joint)[2:]
    assert not np.allclose(before, after, atol=.05)   # a joint fit shows that tokens shrank
    before, _, after, _ = maps_of(alone)[2:]
    assert np.allclose(before, after, atol=1e-3)
    assert "colors comparable between rows" in joint.get_supxlabel()
    models = pca_maps(images, {"a": base, "b": mixed_encoder()})
    assert all("not comparable" in fig.get_supxlabel() for fig in (alone, models))


def test_an_average_over_shifts_shares_the_space_of_its_base():
    base = mixed_encoder()
    fig = pca_maps(SCENES[0][0], {"before": base, "averaged": ShiftAverage(base, n_shifts=4)})
    assert "colors comparable between rows" in fig.get_supxlabel()


def test_unknown_colors_are_refused():
    with pytest.raises(ValueError, match="expected 'opponent' or 'rgb'"):
        pca_maps(SCENES[0][0], mixed_encoder(), colors="hsv")


# Colors, as full protanopes, deuteranopes and tritanopes see linear RGB (Machado and others 2009)

BLIND = dict(
    protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]],
    normal=np.eye(3).tolist())
XYZ = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .072175], [.0193339, .119192, .9503041]])


def lab(rgb, kind):
    "CIELAB of sRGB colors [..., 3] as someone of this kind sees them."
    rgb = np.asarray(rgb, float)
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    seen = (linear @ np.array(BLIND[kind]).T).clip(0, 1)
    xyz = seen @ XYZ.T / [.95047, 1, 1.08883]
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def nearest(colors, kind):
    "The smallest distance between two of the colors; some 2 is a difference that is just seen."
    seen = lab(colors, kind).reshape(-1, 3)
    return min(np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n])


@pytest.mark.parametrize("kind", BLIND)
def test_colors_are_told_apart_by_all_eyes(kind):
    fig = cluster_maps(torch.rand(3, 48, 48), content_encoder(), 10)
    colors = np.unique(maps_of(fig)[1].reshape(-1, 3), axis=0)
    assert len(colors) == 10 and nearest(colors, kind) > 15
    for name in (SIMILARITY_CMAP, "cividis"):
        assert nearest(plt.get_cmap(name)(np.linspace(0, 1, 5))[:, :3], kind) > 12


@pytest.mark.parametrize("kind", ["protan", "deutan", "normal"])
def test_the_first_two_components_are_seen_by_the_red_green_blind(kind):
    corners = torch.tensor([[-1., -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0], [0, 0, 0]]).double()
    assert nearest(_colors_of(corners, "opponent"), kind) > 25


# Clusters

def one_hot(k, order):
    "An encoder whose tokens say which of k levels of grey a patch has, numbered in this order."
    order = torch.as_tensor(order)
    def tokens(x, gh, gw): return 5. * torch.eye(k)[order[(color(x, gh, gw)[..., 0] * (k - .001)).long()]]
    return planted(tokens, k)


@SETTINGS
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_clusters_of_a_permuted_encoder_have_the_same_numbers(order, seed):
    g = torch.Generator().manual_seed(seed)
    images = [blocks(torch.rand(1, 6, 6, generator=g)).expand(3, -1, -1) for _ in range(2)]
    labels = cluster_labels(images, {"a": one_hot(4, range(4)), "b": one_hot(4, order)}, 4, random_state=seed)
    assert all((a == b).all() for a, b in zip(labels["a"], labels["b"]))
    sizes = np.bincount(np.concatenate([m.ravel() for m in labels["a"]]), minlength=4)
    assert (np.diff(sizes) <= 0).all()   # the largest is cluster 0


def test_cluster_colors_of_a_permuted_encoder_are_the_same():
    image = blocks(torch.arange(36).view(1, 6, 6) / 36).expand(3, -1, -1)
    fig = cluster_maps(image, {"a": one_hot(4, range(4)), "b": one_hot(4, [2, 0, 3, 1])}, 4)
    assert np.array_equal(*maps_of(fig)[1:3]) and "b 100% of the area" in fig.get_supxlabel()


def test_clusters_match_across_patch_sizes():
    quarters = (torch.arange(4).view(1, 2, 2) / 3).repeat_interleave(24, 1).repeat_interleave(24, 2)
    encoders = {"fine": content_encoder(), "coarse": content_encoder(patch=12)}
    labels = cluster_labels(quarters.expand(3, -1, -1), encoders, 4)
    fine, coarse = labels["fine"][0], labels["coarse"][0]
    assert fine.shape == (6, 6) and coarse.shape == (4, 4)
    assert (fine[::5, ::5] == coarse[::3, ::3]).all()


def test_too_many_clusters_are_refused():
    image, encoder = torch.rand(3, 48, 48), content_encoder()
    with pytest.raises(ValueError, match="k=37: expected 2 to 36"): cluster_labels(image, encoder, 37)
    with pytest.raises(ValueError, match="expected 2 to 10"): cluster_maps(image, encoder, 11)


# Position over many images

def planted_shift(encoder, strength):
    "Length of the planted position, in spreads of the tokens."
    z = collect_together(encoder, SCENES)[encoder.name]
    spread = float((z - z.mean((0, 1, 2))).square().sum(-1).mean().sqrt())
    return strength * centered_places(6, 6).norm(dim=-1).numpy() / spread


def test_mean_tokens_finds_the_planted_shift():
    length, first, second, _ = maps_of(mean_tokens(mixed_encoder(3.), SCENES))
    assert np.abs(length - planted_shift(mixed_encoder(3.), 3)).max() < .1
    squares = 9 * centered_places(6, 6).norm(dim=-1).square()
    assert np.corrcoef((first**2 + second**2).ravel(), squares.ravel())[0, 1] > .95


def test_mean_tokens_vanish_without_position():
    drawn = maps_of(mean_tokens({"before": mixed_encoder(3.), "without": content_encoder()}, SCENES))
    assert drawn[4].mean() < .5 * drawn[0].mean()   # of 16 images a quarter is left by chance


def test_cluster_places_of_pure_position_and_of_pure_content():
    fig = cluster_places({"place": position_encoder(), "content": content_encoder()}, SCENES, k=4)
    drawn = [i for ax in fig.axes for i in ax.images if i.get_array().shape == (6, 6)]
    assert {i.get_clim() for i in drawn} == {(.25, 4)} and all(isinstance(i.norm, LogNorm) for i in drawn)
    place, content = (np.array([i.get_array() for i in some]) for some in (drawn[:4], drawn[4:]))
    assert ((place > .1).sum(0) == 1).all()   # each cell has one cluster, in all images
    assert np.abs(np.log2(content.clip(.25, 4))).mean() < 1


def test_blank_images_are_the_same_in_every_patch():
    for kind, x in blank_images((32, 48), 8).items():
        z = x.unfold(2, 8, 8).unfold(3, 8, 8)
        assert x.min() >= 0 and x.max() <= 1
        assert kind == "noise" or (z - z[:, :, :1, :1]).abs().max() < 1e-4


def test_blank_spread_is_the_planted_position():
    table = blank_spread({"mixed": mixed_encoder(2.), "content": content_encoder()}, SCENES)
    expected = np.sqrt((planted_shift(mixed_encoder(2.), 2)**2).mean())
    assert abs(table.loc["mixed", ["grey", "texture"]] - expected).max() < .01
    assert abs(table.loc["mixed", "noise"] - expected) < .05
    assert table.loc["content", ["grey", "texture"]].max() < 1e-3 and table.loc["content", "noise"] < .1


def test_blank_responses_of_content_are_grey():
    maps = maps_of(blank_responses({"mixed": mixed_encoder(2.), "content": content_encoder()}, SCENES))
    assert len(maps) == 9 and np.abs(maps[6] - .5).max() < .01 < .2 < np.abs(maps[3] - .5).max()


def test_collected_tokens_give_the_same_pictures_and_the_sheet_holds_them():
    base = mixed_encoder(2.)
    encoders = {"mixed": base, "after": PositionMean().fit(base, SCENES).attach(base)}
    tokens, parts = collect_together(encoders, SCENES), []
    for draw, how in ((mean_tokens, {}), (cluster_places, dict(k=3)), (blank_responses, {})):
        maps = maps_of(draw(encoders, tokens, **how))
        again = maps_of(draw(encoders, SCENES, **how))
        assert all(np.array_equal(a, b) for a, b in zip(maps, again, strict=True))
        parts += maps
    sheet = maps_of(position_maps(encoders, tokens, k=3))
    assert all(np.array_equal(a, b) for a, b in zip(sheet, parts, strict=True))
    with pytest.raises(ValueError, match="collect them for these"): mean_tokens(mixed_encoder(), tokens)
    with pytest.raises(TypeError, match="the tokens are collected already"):
        mean_tokens(encoders, tokens, Reading(augment="none"))


class Layout(SegmentationData):
    "Images that are light above and dark below, with some noise."
    def __len__(self): return 60
    def load(self, i):
        noise = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(i))
        return (torch.linspace(220, 30, 48)[:, None] + 20 * noise).clamp(0, 255).byte(), None


def test_upright_images_show_their_layout_and_augmented_ones_do_not():
    upright = maps_of(mean_tokens(content_encoder(), Layout(), Reading(augment="none")))[0]
    augmented = maps_of(mean_tokens(content_encoder(), Layout()))[0]
    assert upright.mean() > 3 * augmented.mean()


def test_too_few_images_and_dead_encoders_are_refused():
    with pytest.raises(ValueError, match="1 image is too few"):
        mean_tokens(content_encoder(), SCENES.first(1))
    dead = planted(lambda x, gh, gw: torch.ones(len(x), gh, gw, 4), 4)
    for draw in (mean_tokens, blank_spread):
        with pytest.raises(ValueError, match="are alike"): draw(dead, SCENES)
    sick = planted(lambda x, gh, gw: torch.full((len(x), gh, gw, 4), torch.inf), 4)
    with pytest.raises(ValueError, match="not finite"): collect_together(sick, SCENES)
    with pytest.raises(ValueError, match="not finite"): tokens_of([torch.rand(3, 48, 48)], {"sick": sick})


# Images of all kinds

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
OPAQUE = np.dstack([PIXELS, np.full((10, 12), 255, np.uint8)])


@pytest.mark.parametrize("image", [
    PIXELS, torch.from_numpy(PIXELS), torch.from_numpy(PIXELS).permute(2, 0, 1), EXPECTED, EXPECTED.half(),
    EXPECTED.bfloat16(), EXPECTED.numpy(), PIXELS.astype(np.float32) / 255, PIXELS.astype(np.uint16) * 257,
    Image.fromarray(PIXELS), OPAQUE, Image.fromarray(OPAQUE)], ids=lambda x: f"{type(x).__name__}")
def test_all_kinds_of_one_image_are_one_image(image):
    found = as_image(image)
    assert found.dtype == torch.float32 and torch.allclose(found, EXPECTED, atol=4e-3)


def test_files_and_palettes_and_deep_images(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert torch.allclose(as_image(tmp_path / "a.png"), EXPECTED)
    assert torch.equal(as_image(str(tmp_path / "a.png")), as_image(tmp_path / "a.png"))
    palette = Image.fromarray(PIXELS).quantize(8)
    assert torch.allclose(as_image(palette), as_image(palette.convert("RGB")))
    deep = np.arange(120).reshape(10, 12) * 500
    assert torch.allclose(as_image(Image.fromarray(deep.astype(np.uint16)))[1], torch.tensor(deep) / 65535)


def test_the_image_of_the_caller_stays_as_it_is():
    assert as_image(EXPECTED).data_ptr() != EXPECTED.data_ptr()


GREY = np.arange(2304).reshape(48, 48).astype(np.uint8)
GREYS = dict(array=GREY, tensor=torch.rand(48, 48), channel=torch.rand(1, 48, 48), PIL=Image.fromarray(GREY),
             bool=GREY[:, :, None] % 2 == 0)


@pytest.mark.parametrize("grey", GREYS.values(), ids=GREYS)
def test_grey_images_are_repeated_in_every_picture(grey):
    x, encoder = as_image(grey), mixed_encoder()
    assert x.shape == (3, 48, 48) and torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    figures = [similarity_maps(grey, encoder, [(3, 4)], target=grey), shift_test(grey, encoder)]
    figures += [pca_maps(grey, encoder), cluster_maps([grey], encoder, 3)]
    for fig in figures:
        assert np.array_equal(maps_of(fig)[0], x.permute(1, 2, 0))
        fig.canvas.draw()


def test_transparent_images_lie_over_white():
    a = np.zeros((4, 6, 4), np.uint8)
    a[..., 0] = 200
    a[:, :3, 3], a[:, 3, 3] = 255, 51   # opaque, a fifth, transparent
    x = as_image(a)
    assert torch.allclose(x[:, 0, 0], torch.tensor([200 / 255, 0, 0])) and (x[:, :, 4] == 1).all()
    assert torch.allclose(x[:, 0, 3], torch.tensor([.2 * 200 / 255 + .8, .8, .8]))
    for same in (Image.fromarray(a), torch.from_numpy(a).permute(2, 0, 1)):
        assert torch.allclose(as_image(same), x)
    grey = as_image(Image.fromarray(a).convert("LA"))
    assert torch.equal(grey[0], grey[1]) and (grey[:, :, 4] == 1).all()


ONE_BAD = torch.rand(3, 48, 48)
ONE_BAD[1, 2, 3] = torch.inf


@pytest.mark.parametrize("image, error, says", [
    (torch.full((3, 48, 48), torch.nan), ValueError, "6912 values that are not finite"),
    (ONE_BAD, ValueError, "1 values that are not finite"),
    (torch.rand(3, 48, 48) - .5, ValueError, "undo its normalization"),
    (torch.rand(2, 3, 48, 48), ValueError, "of a batch give one"),
    (torch.rand(5, 48, 48), ValueError, r"expected \[3, H, W\]"),
    (torch.rand(3, 0, 48), ValueError, r"expected \[3, H, W\]"),
    (np.zeros((0, 4)), ValueError, r"expected \[3, H, W\]"),
    (torch.zeros(3, 8, 8, dtype=torch.long), TypeError, "holds int64"),
    ([[0, 1]], TypeError, "is a list: expected a file"),
])
def test_what_is_no_image_is_refused(image, error, says):
    with pytest.raises(error, match=f"target .*{says}"): as_image(image, "target")


def test_sizes_are_whole_patches_for_every_encoder():
    image = torch.rand(3, 427, 640)
    for patch in (8, 14, 16):
        encoder = content_encoder(patch=patch, image_size=224)
        for asked in (None, 100, (50, 333)):
            height, width = fitting_size(image, encoder, asked)
            assert height % patch == 0 and width % patch == 0
            if asked is None: assert abs(height * width / 224**2 - 1) < .15
    with pytest.raises(ValueError, match="image_size=6 is smaller than one patch"):
        fitting_size(image, content_encoder(), 6)
