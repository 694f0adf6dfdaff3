"""Correspondence against plain loops, on planted and on real pairs, and the official layouts of two datasets."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import color_encoder, encoder_of, shared
from rasa_nb.data import ImageList
from rasa_nb.keypoints import (INSID3, NEAREST, VIEWS, KeypointPairs, Pair, PFWillow, SPair71k, correspondence,
                               match_points, self_pairs)
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import PositionMean
from rasa_nb.scenes import Scenes


@pytest.fixture(scope="module")
def willow():
    if not (shared / "data/pf_willow").is_dir(): pytest.skip(f"no PF-WILLOW in {shared / 'data'}")
    return PFWillow(shared / "data/pf_willow")


def insid3_by_hand(source, target, point, temperature=.04, sigma=7):
    "Where one point (x, y) in cells is found, cell by cell: a corner's token, a damped soft-argmax."
    gh, gw, _ = source.shape
    x, y = (min(int(np.rint(value)), last) for value, last in zip(point, (gw - 1, gh - 1)))
    def cosine(a, b): return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    table = np.array([[cosine(source[y, x], target[r, c]) for c in range(gw)] for r in range(gh)])
    row, column = np.unravel_index(table.argmax(), table.shape)
    weights = np.zeros_like(table)
    for r, c in np.ndindex(table.shape):
        damped = table[r, c] * np.exp(-((r - row)**2 + (c - column)**2) / (2 * sigma**2))
        weights[r, c] = np.exp(damped / temperature)
    weights /= weights.sum()
    return (weights.sum(0) * np.arange(gw)).sum(), (weights.sum(1) * np.arange(gh)).sum()


def test_the_kernel_soft_argmax_is_that_of_a_loop_over_cells():
    source, target = torch.randn(2, 9, 7, 12)
    target[4, 5] = source[3, 2] * 2
    points = [(2.2, 3.4), (6.9, 8.7), (.2, .1)]
    found = match_points(source, target, points, INSID3)
    expected = [insid3_by_hand(source.double().numpy(), target.double().numpy(), point) for point in points]
    assert np.allclose(found, expected, atol=1e-4)


def test_the_nearest_token_is_that_of_a_loop_and_lies_in_the_middle_of_its_cell():
    source, target = torch.randn(2, 5, 8, 16)
    for x, y in [(7.99, 0), (8, 5), (3.5, 2.2)]:    # the far border is of the last cell
        token = source[min(int(y), 4), min(int(x), 7)]
        cosines = torch.cosine_similarity(token.expand(5, 8, 16), target, dim=-1)
        row, column = divmod(int(cosines.argmax()), 8)
        assert match_points(source, target, [(x, y)], NEAREST).tolist() == [[column + .5, row + .5]]


def color_places():
    "An image of 64 px in which each patch of 8 px has a color of its own."
    values = np.random.default_rng(0).permutation(64).reshape(8, 8)
    rgb = np.stack([values % 8 * 30, values // 8 * 30, np.full_like(values, 20)], -1).astype(np.uint8)
    return rgb.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("view", VIEWS)
def test_tokens_of_content_find_every_point_in_every_view(view):
    pairs = self_pairs(ImageList([color_places()]), points=12)
    result = correspondence(color_encoder(), pairs, NEAREST.replace(thresholds=.09), 64, view)
    assert result.frame.pck.min() == 100    # no point is farther than half the diagonal of a cell


def place_encoder():
    "Tokens of two directions that turn with row and column, and tell nothing else."
    def tokens(images):
        steps = torch.arange(6) / 6 * np.pi
        row, column = (torch.stack([steps.cos(), steps.sin()], -1) for _ in range(2))
        both = torch.cat([row[:, None].expand(6, 6, 2), column[None].expand(6, 6, 2)], -1)
        return both.expand(len(images), 6, 6, 4)
    return encoder_of(tokens, 4, name="place")


def test_tokens_of_position_alone_score_like_the_copied_place():
    rng, centers = np.random.default_rng(0), np.arange(6) * 8 + 4.
    points = [rng.choice(centers, (8, 2)) for _ in range(12)]
    pairs = [Pair(0, 1, a, b, (0, 0, 48, 48)) for a, b in zip(points[::2], points[1::2])]
    pairs = KeypointPairs(Scenes("val", 2), [*pairs, Pair(0, 1, points[0], points[0], (0, 0, 48, 48))])
    pairs.images.native_size = None
    scaled = [Pair(p.source, p.target, p.source_points * 2, p.target_points * 2, (0, 0, 96, 96)) for p in pairs.pairs]
    result = correspondence(place_encoder(), KeypointPairs(pairs.images, scaled), NEAREST, 48, VIEWS)
    copied = result.controls[result.controls.control == "position alone"]
    assert result.frame.pck.tolist() == copied.pck.tolist() and 0 < copied.pck.max() < 100
    assert all(result.near_control(view) == ["place"] for view in VIEWS)


def by_hand(result, pairs, encoder, view, relative, threshold):
    "PCK per image and per point, point by point."
    shares, rights, done = [], [], 0
    for pair in pairs.pairs:
        height, width = pairs.images.load_image(pair.target).shape[1:]
        side = max(height, width) if relative == "image" else pair.box_side
        own = []
        for x, y in pair.target_points:
            if view == "flipped": x = width - x
            u, v = result.places[encoder, view][done]
            own.append(((x - u)**2 + (y - v)**2)**.5 <= threshold * side)
            done += 1
        shares.append(sum(own) / len(own))
        rights += own
    return 100 * sum(shares) / len(shares), 100 * sum(rights) / len(rights)


def test_scores_on_photographs_are_those_of_a_loop_over_points(willow):
    encoders = {"color": color_encoder(16, 224), "other": color_encoder(8, 224, "other")}
    ducks = PFWillow(shared / "data/pf_willow", ["duck(S)"]).first(20)
    uneven = [Pair(p.source, p.target, p.source_points[:k], p.target_points[:k], group=p.group)
              for p, k in zip(ducks.pairs, [3, 10] * 10)]    # so that the two means differ
    pairs = KeypointPairs(ducks.images, uneven)
    result = correspondence(encoders, pairs, NEAREST, 224, ("as it is", "flipped"))
    for row in result.frame.itertuples():
        expected = by_hand(result, pairs, row.encoder, row.view, row.relative, row.threshold)
        assert (row.pck, row.pck_points) == pytest.approx(expected)
    assert (result.frame.pck - result.frame.pck_points).abs().max() > .1


def test_chance_is_what_random_places_score(willow):
    pairs = willow.first(6)
    result = correspondence(color_encoder(16, 224), pairs, NEAREST, 224)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(400):
        places = [rng.random((10, 2)) * result.sizes[p.target][::-1] for p in pairs.pairs]
        away = np.linalg.norm(np.concatenate(places) - result.targets("as it is"), axis=1)
        drawn.append(100 * (away <= result.radii("box", .1)).mean())
    assert result.by_pair("chance", "as it is").mean() == pytest.approx(np.mean(drawn), abs=.4)


def test_willow_has_all_ordered_pairs_of_each_kind_and_their_points(willow):
    assert len(willow) == 180 and len(willow.used) == 20 and {p.group for p in willow.pairs} == {"car(S)", "duck(S)"}
    assert len({(p.source, p.target) for p in willow.pairs}) == 180
    one = willow.pairs[0]
    assert one.source_points.shape == (10, 2) and np.allclose(one.source_points[0], [77.6, 145.2], atol=.1)
    with pytest.raises(ValueError, match=r"kinds=\['cat'\]: expected some of \['car\(S\)'"):
        PFWillow(shared / "data/pf_willow", ["cat"])
    with pytest.raises(FileNotFoundError, match="give the folder that holds PF-dataset"): PFWillow(shared)


@pytest.fixture
def spair(tmp_path):
    "SPair-71k's layout, of two categories with two images and one pair each."
    root, names = tmp_path / "SPair-71k", []
    for n, group in enumerate(("cat", "dog")):
        (root / "JPEGImages" / group).mkdir(parents=True)
        for i in range(2):
            image = np.random.default_rng(n + i).integers(0, 255, (60, 80, 3), np.uint8)
            Image.fromarray(image).save(root / "JPEGImages" / group / f"2008_{i}.jpg")
        names.append(f"00000{n}-2008_0-2008_1:{group}")
        said = dict(src_imname="2008_0.jpg", trg_imname="2008_1.jpg", category=group, src_kps=[[10, 20], [70, 5]],
                    trg_kps=[[12, 22], [60, 50]], trg_bndbox=[5, 10, 75, 60], src_bndbox=[0, 0, 80, 60])
        (root / "PairAnnotation/test").mkdir(parents=True, exist_ok=True)
        (root / f"PairAnnotation/test/{names[-1]}.json").write_text(json.dumps(said))
    (root / "Layout/large").mkdir(parents=True)
    (root / "Layout/large/test.txt").write_text("\n".join(names) + "\n")
    return root


def test_spair_is_read_from_its_official_layout(spair):
    for root in (spair, spair.parent):
        pairs = SPair71k(root)
        assert len(pairs) == 2 and len(pairs.used) == 4 and [p.group for p in pairs.pairs] == ["cat", "dog"]
        assert pairs.pairs[1].box_side == 70 and pairs.pairs[1].target_points.tolist() == [[12, 22], [60, 50]]
    dogs = SPair71k(spair, categories=["dog"])
    assert len(dogs) == 1 and "dog/2008_1.jpg" in str(dogs.label(0))
    result = correspondence(color_encoder(), dogs, INSID3, 48)
    assert len(result.places["color", "as it is"]) == 2
    with pytest.raises(ValueError, match=r"categories=\['cow'\]: expected some of \['cat', 'dog'\]"):
        SPair71k(spair, categories=["cow"])
    with pytest.raises(FileNotFoundError, match="expected split 'trn', 'val' or 'test'"): SPair71k(spair, "train")


def test_a_keypoint_outside_of_its_image_is_refused_by_name(spair):
    path = next((spair / "PairAnnotation/test").glob("*dog.json"))
    path.write_text(path.read_text().replace("[60, 50]", "[50, 61]"))
    with pytest.raises(ValueError, match=r"dog/2008_1.jpg\): keypoint 1 is at \(50.0, 61.0\), outside of its image"):
        correspondence(color_encoder(), SPair71k(spair), NEAREST, 48)


def test_each_image_is_encoded_once_for_each_view_however_many_pairs_and_heads(tiny, monkeypatch):
    mean = PositionMean().fit(tiny, Scenes("train", 20)).attach(tiny)
    points = np.array([[5., 5.], [60., 80.]])
    pairs = KeypointPairs(Scenes("val", 3), [Pair(a, b, points, points) for a in range(3) for b in range(3)])
    seen, forward = [], PatchEncoder.forward
    monkeypatch.setattr(PatchEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    result = correspondence({"tiny": tiny, "mean": mean}, pairs, NEAREST, views=("as it is", "turned"))
    assert sum(seen) == 3 * 3    # the sources, the targets, the targets turned
    alone = correspondence({"mean": encoder_of(lambda x: mean(x), 192, 8, 96)}, pairs, NEAREST)
    assert np.allclose(alone.places["mean", "as it is"], result.places["mean", "as it is"])


def test_intervals_over_images_are_wider_where_pairs_share_them(willow):
    encoders = {"fine": color_encoder(8, 224), "coarse": color_encoder(32, 224)}
    change = correspondence(encoders, willow, NEAREST.replace(thresholds=.1), 224).change.iloc[0]
    assert change.images_high - change.images_low > 1.2 * (change.pairs_high - change.pairs_low)


WRONG = [
    ([np.zeros((2, 2)), np.ones((3, 2))], None, "expected \\[K, 2\\] for both"),
    ([np.zeros((0, 2))] * 2, None, "expected \\[K, 2\\] for both"),
    ([np.ones((1, 2))] * 2, None, "the box of its object has no extent"),
    ([np.ones((1, 2))] * 2, (5, 5, 5, 5), "the box of its object has no extent")]


@pytest.mark.parametrize("points, box, said", WRONG)
def test_pairs_that_cannot_be_scored_are_refused(points, box, said):
    with pytest.raises(ValueError, match=f"pair 0 of mine.*{said}"):
        KeypointPairs(Scenes("val", 2), [Pair(0, 1, *points, box)], "mine")


def test_an_encoder_may_not_bear_the_name_of_a_control(tiny):
    with pytest.raises(ValueError, match="named 'chance', as a control is"):
        correspondence({"chance": tiny}, self_pairs(Scenes("val", 1)))
