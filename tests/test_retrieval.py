"""Segmentation in context against a loop over single patches, on tokens whose answer is known, and its promises."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import color_encoder, encoder_of
from rasa_nb import dense
from rasa_nb.augment import Evaluation, Transformed
from rasa_nb.data import ImageList, SegmentationData, VOCSegmentation
from rasa_nb.dense import TokenShelf
from rasa_nb.encoders import load_encoder
from rasa_nb.linear import STORED_LINEAR, linear_segmentation
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.reading import Reading
from rasa_nb.rasa import PositionMean
from rasa_nb.retrieval import (HUMMINGBIRD, UPRIGHT, MemoryCrops, by_size, draw_order, image_limits, image_order,
                               in_context, memory_plan, memory_values, nearest_keys, read_patches)
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import Share

lenient = UPRIGHT.replace(unseen="score")   # so few images do not show every class


def by_hand(encoder, train, val, size, neighbors=30, temperature=.02):
    "Predicted class of each pixel [n, size, size], patch by patch, in NumPy; void says nothing."
    def read(data):
        shown = Transformed(data, Evaluation(size, size))
        pairs = [shown[i] for i in range(len(data))]
        tokens = [encoder(image[None])[0].double().numpy() for image, _ in pairs]
        return tokens, [mask.numpy() for _, mask in pairs]

    keys, values = [], []
    for tokens, mask in zip(*read(train)):
        gh, gw, _ = tokens.shape
        for row in range(gh):
            for column in range(gw):
                side = size // gh
                part = mask[row * side:(row + 1) * side, column * side:(column + 1) * side]
                known = part[part != train.ignore_index]
                if 2 * known.size < part.size: continue
                values.append(np.bincount(known, minlength=train.num_classes) / known.size)
                keys.append(tokens[row, column] / np.linalg.norm(tokens[row, column]))
    keys, values, maps = np.stack(keys), np.stack(values), []
    for tokens, mask in zip(*read(val)):
        told = np.zeros((*tokens.shape[:2], train.num_classes))
        for row, column in np.ndindex(told.shape[:2]):
            cosines = keys @ tokens[row, column] / np.linalg.norm(tokens[row, column])
            best = np.argsort(-cosines)[:neighbors]
            weights = np.exp((cosines[best] - cosines[best].max()) / temperature)
            told[row, column] = weights @ values[best] / weights.sum()
        scores = torch.from_numpy(told).permute(2, 0, 1)[None]
        maps.append(F.interpolate(scores, (size, size), mode="bilinear").argmax(1)[0].numpy())
    return np.stack(maps)


def test_a_loop_over_single_patches_gives_the_same_counts(tiny):
    train, val = Scenes("train", 8), Scenes("val", 4)
    result = in_context(tiny, train, val, lenient, room=2**16)
    maps, wrong = by_hand(tiny, train, val, 96), 0
    for predicted, i in zip(maps, range(4)):
        mask = val[i][1].numpy()
        table = np.zeros((12, 12), int)
        np.add.at(table, (predicted[mask != 255], mask[mask != 255]), 1)
        mine = result.runs[0].counts.matrix[[i]].toarray().reshape(12, 12)
        wrong += np.abs(mine - table).sum()
    assert wrong <= 4   # a pixel at which two classes tie within rounding


@pytest.mark.parametrize("room", (100, 3_000, 50_000, 2**28))
def test_the_search_in_blocks_finds_what_one_table_finds(room):
    keys, queries = (F.normalize(torch.randn(n, 6), dim=1) for n in (300, 40))
    cosines, places = nearest_keys(queries, keys, 20, room)
    expected = (queries @ keys.T).topk(20)
    assert torch.equal(places, expected.indices) and torch.allclose(cosines, expected.values, atol=1e-6)


def test_the_search_stays_within_its_room(monkeypatch):
    largest, whole = [], torch.Tensor.topk
    def watched(table, k, *rest):
        largest.append(table.nbytes)
        return whole(table, k, *rest)
    monkeypatch.setattr(torch.Tensor, "topk", watched)
    nearest_keys(torch.randn(500, 4), torch.randn(2_000, 4), 10, room=2**16)
    assert max(largest) <= 2**16 and sum(largest) > 500 * 2_000 * 4


class Blocks(SegmentationData):
    "Squares of three colors, of 8 px, each color a class; a row of void pixels on top of each image."
    name, classes, native_size = "blocks", ["red", "green", "blue"], 32
    def __init__(self, n, seed): self.n, self.seed = n, seed
    def __len__(self): return self.n

    def load(self, i):
        rng = np.random.default_rng((self.seed, i))
        ids = torch.from_numpy(rng.integers(3, size=(4, 4)).repeat(8, 0).repeat(8, 1))
        image = (torch.eye(3)[ids].permute(2, 0, 1) * rng.uniform(100, 255)).to(torch.uint8)
        mask = ids.to(torch.uint8)
        mask[0] = 255
        return image, mask


def place_encoder():
    "Tokens that tell their cell, and nothing else."
    def tokens(images):
        cells = torch.eye(16).view(1, 4, 4, 16)
        return cells.expand(len(images), 4, 4, 16)
    return encoder_of(tokens, 16, 8, 32, "place")


def test_classes_that_tokens_tell_apart_are_all_found():
    result = in_context(color_encoder(8, 32), Blocks(10, 0), Blocks(6, 1), UPRIGHT)
    counts = result.runs[0].confusion
    inner = counts.trace() / counts.sum()
    assert inner > .9   # between patches, scores are interpolated and pixels near a border may go over
    native = in_context(color_encoder(8, 32), Blocks(10, 0), Blocks(6, 1), UPRIGHT.replace(mask_size=4))
    assert native.frame.miou[0] == pytest.approx(100)


def test_tokens_of_position_alone_give_the_prior_of_each_cell():
    train, val = Blocks(9, 0), Blocks(6, 1)
    protocol = UPRIGHT.replace(neighbors=9, temperature=1.)
    result = in_context(place_encoder(), train, val, protocol)
    prior = result.controls.set_index("control").miou["class prior of each cell"]
    assert result.frame.miou[0] == pytest.approx(prior, abs=1e-9)
    assert result.near_control("all patches") == ["place"]


def test_a_patch_is_worth_less_the_more_patches_show_its_classes():
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.integers(4, size=(8, 8)).repeat(4, 0).repeat(4, 1))
    mask[:, :20] = 0
    mask[20:24, 2:30] = 1
    values = memory_values(mask[None], (8, 8), 4)[0]
    patches = [mask[8 * r // 2:8 * r // 2 + 4, 4 * c:4 * c + 4].unique().tolist() for r in range(8) for c in range(8)]
    often = [sum(c in other for other in patches) for c in range(4)]
    worth = np.array([sum(often[c] for c in some) for some in patches]) * np.random.default_rng(5).random(64)
    assert draw_order(values, 5).argsort().tolist() == worth.argsort().tolist()


def test_smaller_memories_are_parts_of_larger_ones(tiny):
    protocol = UPRIGHT.replace(memory=(None, 160, 80), share=(1, .5), image_size=96)
    patches = read_patches({"tiny": tiny}, Scenes("train", 8), protocol, (0, 1), Reading())
    plan = memory_plan(protocol, 8, 144)
    for column in (0, 1):
        chosen = {key: patches.chosen(image_order(8, column), column, *how) for key, how in plan.items()}
        assert [int(chosen[1, memory].sum()) for memory in (160, 80)] == [160, 80]
        assert (chosen[1, 80] <= chosen[1, 160]).all() and (chosen[.5, None] <= chosen[1, None]).all()
        assert len(patches.images[chosen[.5, None]].unique()) == 4
    assert not torch.equal(patches.order[:, 0], patches.order[:, 1])


def test_only_what_a_memory_takes_is_kept(tiny):
    protocol = UPRIGHT.replace(memory=60, share=.5, seeds=(0,), image_size=96)
    patches = read_patches({"tiny": tiny}, Scenes("train", 6), protocol, (0,), Reading())
    assert len(patches.tokens[id(tiny)]) == 60 and len(patches.images.unique()) == 3
    assert image_limits(protocol, 6, 144, (0,)).sum() == 60


def test_encoders_of_one_base_share_its_passes_and_score_as_they_would_alone(tiny, monkeypatch):
    train, val = Scenes("train", 12), Scenes("val", 6)
    mean = PositionMean().fit(tiny, Scenes("train", 20), 96).attach(tiny)    # its offset differs from cell to cell
    seen, forward = [], PatchEncoder.forward
    monkeypatch.setattr(PatchEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    together = in_context({"tiny": tiny, "mean": mean}, train, val, lenient, memory=240, seeds=(0, 1))
    assert sum(seen) == 12 + 6
    alone = encoder_of(lambda images: mean(images), 192, 8, 96, "mean")   # no head to be seen
    by_itself = in_context({"mean": alone}, train, val, lenient, memory=240, seeds=(0, 1))
    of_mean = together.frame[together.frame.encoder == "mean"].miou.tolist()
    assert of_mean == pytest.approx(by_itself.frame.miou.tolist(), abs=.05)
    assert of_mean[0] != of_mean[1]    # of two seeds


def test_images_shared_by_processes_give_the_counts_of_one(tiny, monkeypatch):
    request = tiny, Scenes("train", 6), Scenes("val", 5), lenient
    whole, halves = in_context(*request, examples=()), []
    monkeypatch.setattr(dense, "gather", lambda value: [value])
    for rank in range(2):
        monkeypatch.setattr(Share, "of", classmethod(lambda cls, total: Share(total, rank, 2)))
        halves.append(in_context(*request, examples=()).runs[0].counts.matrix.toarray())
    assert (np.concatenate(halves) == whole.runs[0].counts.matrix.toarray()).all()


def images_seen(monkeypatch):
    "A list to which the number of images of each pass is added."
    seen, forward = [], PatchEncoder.forward
    monkeypatch.setattr(PatchEncoder, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


def test_finished_runs_are_found_again_beside_new_ones(tiny, tmp_path, monkeypatch):
    request = tiny, Scenes("train", 6), Scenes("val", 4), lenient
    first, seen = in_context(*request, memory=60, folder=tmp_path), images_seen(monkeypatch)
    again = in_context(*request, memory=60, folder=tmp_path)
    assert not seen and again.frame.equals(first.frame) and again.controls.equals(first.controls)
    more = in_context(*request, memory=(60, 120), folder=tmp_path)
    assert sum(seen) == 10 and more.frame[more.frame.memory == "60 patches"].miou.tolist() == first.frame.miou.tolist()


def test_tasks_that_share_a_shelf_encode_each_image_once(tiny, monkeypatch):
    train, val, seen = Scenes("train", 6), Scenes("val", 4), images_seen(monkeypatch)
    shelf, learning = TokenShelf(), STORED_LINEAR.replace(steps=2, seeds=(0,), unseen="score")
    linear_segmentation(tiny, train, val, learning, shelf=shelf)
    shared, alone = (in_context(tiny, train, val, lenient, shelf=some) for some in (shelf, None))
    assert sum(seen) == 2 * 10 and shared.frame.miou.tolist() == pytest.approx(alone.frame.miou.tolist(), abs=.05)


def imagenet_encoder(blue):
    pool = torch.nn.AvgPool2d(8)
    return PatchEncoder(torch.nn.Identity(), lambda model, x: pool(x).permute(0, 2, 3, 1), 3, 8, 96,
                        mean=(.485, .456, .406), std=(.229, .224, blue), name="color")


def test_the_published_std_is_that_of_an_encoder_that_divides_blue_by_255_thousandths():
    train, val = Scenes("train", 6), Scenes("val", 3)
    flagged = in_context(imagenet_encoder(.225), train, val, lenient.replace(published_std=True))
    built, right = (in_context(imagenet_encoder(blue), train, val, lenient) for blue in (.255, .225))
    assert flagged.frame.miou[0] == pytest.approx(built.frame.miou[0], abs=.02)
    assert flagged.frame.miou[0] != pytest.approx(right.frame.miou[0], abs=.02)


def test_augmented_memories_depend_on_their_seed_alone(tiny):
    train, val = Scenes("train", 6), Scenes("val", 3)
    published = HUMMINGBIRD.replace(unseen="score")
    def score(seeds, batch):
        return in_context(tiny, train, val, published, seeds=seeds, reading=Reading(batch_size=batch)).frame
    both, other = score((0, 1), 4), score(1, 5)
    assert both.miou[1] == pytest.approx(other.miou[0], abs=.05) and both.miou[0] != pytest.approx(both.miou[1])


def test_crops_of_the_memory_move_image_and_mask_alike():
    image, mask = Transformed(Blocks(1, 0), MemoryCrops(64), 3)[0]
    known = (mask != 255) & (image.amax(0) > .9 * image.amax())   # inside of blocks
    right = image.argmax(0) == mask
    assert right[known].float().mean() > .9 and mask.shape == (64, 64)


def test_each_encoder_reads_the_largest_size_of_whole_patches(tiny):
    encoders = {f"patch {side}": color_encoder(side, 48) for side in (14, 16)}
    pairs = [(image, mask) for image, mask in (Scenes("train", 4)[i] for i in range(4))]
    data = ImageList(pairs, Scenes.classes)
    assert list(by_size(encoders, None, HUMMINGBIRD)) == [(504, 14), (512, 16)]
    result = in_context(encoders, data, data, UPRIGHT.replace(image_size=100, neighbors=3))
    assert [run.confusion.sum() > 0 for run in result.runs] == [True, True]
    assert result.controls.control.tolist()[1:] == [f"class prior of each cell, {grid}" for grid in ("7x7", "6x6")]
    with pytest.raises(ValueError, match="image size 100 x 100 is no multiple of the patch size 14"):
        in_context(encoders, data, data, UPRIGHT, image_size=100)


def test_a_class_without_a_training_pixel_is_refused_or_scores_nothing():
    train = [Blocks(4, 0).load(i) for i in range(4)]
    few = ImageList([(image, mask.clamp(max=1).where(mask != 255, mask)) for image, mask in train], Blocks.classes)
    request = color_encoder(8, 32), few, Blocks(4, 1)
    with pytest.raises(ValueError, match=r"no pixel of .* \(all patches\) shows blue, .* unseen='score'"):
        in_context(*request, UPRIGHT)
    assert in_context(*request, lenient).per_class["blue"].tolist() == [0]


def test_encoders_with_patches_of_two_sizes_are_scored_side_by_side():
    encoders = {f"patch {side}": color_encoder(side, 48) for side in (8, 16)}
    result = in_context(encoders, Scenes("train", 4), Scenes("val", 3), lenient)
    alone = [in_context(encoder, Scenes("train", 4), Scenes("val", 3), lenient) for encoder in encoders.values()]
    assert result.frame.miou.tolist() == [one.frame.miou[0] for one in alone]


REFUSED = [
    (dict(memory=50), "memory=50: less than a patch of each image"),
    (dict(memory=(None, 10_000)), "memory=10000: more patches than there are"),
    (dict(protocol=lenient.replace(neighbors=2_000)), "neighbors=2000: the memory has 1152 patches"),
    (dict(memory=16, protocol=lenient.replace(neighbors=17)), "neighbors=17: the memory has 16 patches"),
    (dict(share=0), "share=0: expected above 0"),
    (dict(protocol=UPRIGHT.replace(published_std=True)), "published_std=True: tiny divides by")]


@pytest.mark.parametrize("asked, said", REFUSED)
def test_what_no_memory_can_be_is_refused(asked, said, tiny):
    n = 60 if asked.get("memory") == 50 else 8
    with pytest.raises(ValueError, match=said):
        in_context(tiny, Scenes("train", n), Scenes("val", 4), **(dict(protocol=lenient) | asked))


def test_classes_that_differ_are_refused(tiny):
    with pytest.raises(ValueError, match="class 0 is 'clouds' in scenes-train and 'red' in blocks"):
        in_context(tiny, Scenes("train", 4), Blocks(4, 0), UPRIGHT)


def test_on_photographs_tokens_of_meaning_stand_above_the_controls(voc_root, deit_file):
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=deit_file, device="cpu")
    train, val = (VOCSegmentation(voc_root, split).first(n) for split, n in (("train", 24), ("val", 6)))
    result = in_context(encoder, train, val, lenient, image_size=224, memory=1024)
    assert result.frame.miou.mean() > result.controls.miou.max() + 3
    assert "6 of 1,449 images" in result.caption and "24 of 1,464 images" in result.caption
