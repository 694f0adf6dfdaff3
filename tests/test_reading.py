"""How images are read: sizes, augmentation beside torchvision's, the same numbers for any batch or worker."""
import json
import multiprocessing
import os
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from rasa_nb import reading as reading_module
from rasa_nb.augment import blur_, blur_weights, color_map
from rasa_nb.data import ImageFolder, ImageMaskFolder, SegmentationData, VOCSegmentation
from rasa_nb.reading import (
    Evaluation, Prepared, Reading, Transformed, augmentation, batches, kept_threads, lent_threads,
    possible_workers, usable_cores, worth_workers)
from rasa_nb.moments import Moments
from rasa_nb.scenes import Scenes

from torchvision.transforms import v2   # after rasa_nb, which makes it importable


# What a reading is

@pytest.mark.parametrize("fields, message", [
    (dict(size=0), "size=0: expected a whole number of pixels"),
    (dict(size=(96, 96, 3)), r"size=\(96, 96, 3\)"),
    (dict(size=(96, -1)), r"size=\(96, -1\)"),
    (dict(size=True), "size=True"),
    (dict(size="448"), "size='448'"),
    (dict(augment="crops"), "augment='crops': expected 'published', 'turns' or 'none'"),
    (dict(seed=-1), "seed=-1: expected a whole number, 0 or more"),
    (dict(seed=1.5), "seed=1.5"),
    (dict(batch_size=0), "batch_size=0: expected a whole number, 1 or more"),
    (dict(num_workers=-2), "num_workers=-2: expected a whole number, 0 or more")])
def test_a_reading_refuses_what_it_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message): Reading(**fields)


def test_what_is_no_reading_is_refused():
    expected = r"expected None, a size in pixels, \(height, width\), or a Reading"
    for given in ({"size": 96}, 96., Scenes("val", 2)):
        with pytest.raises(TypeError, match=expected): Reading.of(given)


def test_numbers_of_numpy_become_plain_ones():
    "What a head remembers of a fit is written as JSON."
    reading = Reading((np.int64(96), np.int32(48)), seed=np.int64(3), batch_size=np.uint8(4))
    assert json.loads(json.dumps(asdict(reading)))["size"] == [96, 48]
    assert reading == Reading((96, 48), seed=3, batch_size=4) and Reading.of(np.int64(96)) == Reading(96)


def test_defaults_fill_what_is_open_and_nothing_else():
    given = Reading(augment="none", seed=0, batch_size=4)
    filled = Reading.of(given, size=96, augment="published", seed=7)
    assert filled == Reading(96, "none", 0, 4) and given.size is None


def test_images_are_not_read_at_no_size(scenes):
    with pytest.raises(ValueError, match="say at what size"): Reading(augment="published").apply(scenes)


def test_augmentation_unties_content_and_place():
    "A picture bright above and dark below is, augmented, as often the other way round or sideways."
    class Gradient(Scenes):
        def load(self, i):
            gradient = torch.linspace(255, 0, 96).to(torch.uint8)
            return gradient.view(1, 96, 1).expand(3, 96, 96).clone(), super().load(i)[1]
    data = Transformed(Gradient("train", 120), augmentation(24))
    images = torch.cat([images for images, _ in batches(data)]).mean(1)
    images = images - images.mean((1, 2), keepdim=True)
    assert images.mean(0).abs().max() < .25 * images.std()


@pytest.mark.parametrize("size", [40, 100, (50, 130)])
def test_evaluation_makes_up_no_ids(scenes, size):
    image, mask = scenes[0]
    small = Evaluation(48, size)(image, mask)[1]
    assert set(small.unique().tolist()) <= set(mask.unique().tolist())


def test_bars_show_only_where_asked_for(scenes, capsys, monkeypatch):
    monkeypatch.setattr("rasa_nb.reading.tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    for progress in (False, True):
        list(batches(Reading(16).apply(scenes.first(2)), Reading(progress=progress), "draw"))
        assert ("draw" in capsys.readouterr().out) is progress


def test_a_batch_of_several_sizes_is_refused(image_folders):
    Image.new("RGB", (50, 40)).save(image_folders / "images/small.png")
    data = ImageFolder(image_folders / "images")
    with pytest.raises(ValueError, match="40 x 50 and 96 x 96: resize to one first"): list(batches(data))


# Augmentation

def torchvisions(size, *, turns_only=False):
    "The published augmentation with every operation torchvision's, as it was in version 0.1."
    def turn(image): return torch.rot90(image, int(torch.randint(4, ())), (-2, -1))
    place = [v2.RandomResizedCrop(size, scale=(.25, 1), antialias=True), v2.RandomHorizontalFlip(),
             v2.RandomVerticalFlip()]
    colors = [v2.RandomApply([v2.ColorJitter(.4, .4, .2, .1)], p=.8), v2.RandomGrayscale(p=.2),
              v2.RandomApply([v2.GaussianBlur(9, sigma=(.1, 2.))], p=.5)]
    if turns_only: place, colors = [*place[1:], v2.Resize(size, antialias=True)], []
    steps = v2.Compose([turn, *place, *colors, v2.ToDtype(torch.float32, scale=True)])
    return lambda image, mask: (steps(image), None)


def both(data, ours, theirs, n):
    seeded = Transformed(data, ours, 5), Transformed(data, theirs, 5)
    return [torch.stack([shown[i][0] for i in range(n)]) for shown in seeded]


def test_the_published_draws_are_torchvisions(voc_root):
    "The same crop, turn, factors and blur for one seed: pixels differ by what one color map cannot do."
    ours, theirs = both(VOCSegmentation(voc_root, "val"), augmentation(112), torchvisions([112, 112]), 60)
    off = (ours - theirs).abs().mean((1, 2, 3))
    assert off.mean() < .015 and off.max() < .06
    def chroma(images): return (images.amax(1) - images.amin(1)).mean()
    assert abs(ours.mean() - theirs.mean()) < .01                    # torchvision rounds down six times
    assert abs(ours.std((2, 3)) - theirs.std((2, 3))).mean() < .006
    assert abs(chroma(ours) - chroma(theirs)) < .004


def test_turns_are_torchvisions_to_a_grey_level(voc_root):
    data = VOCSegmentation(voc_root, "val")
    ours, theirs = both(data, augmentation((96, 64), "turns"), torchvisions([96, 64], turns_only=True), 20)
    assert (ours - theirs).abs().max() < 2.5 / 255


f = v2.functional
@pytest.mark.parametrize("what, theirs, amounts, most", [
    ("brightness", f.adjust_brightness, (.6, 1.4), .001), ("contrast", f.adjust_contrast, (.6, 1.4), .001),
    ("saturation", f.adjust_saturation, (.8, 1.2), .001), ("hue", f.adjust_hue, (-.1, .1), .025),
    ("grey", lambda x, _: f.rgb_to_grayscale(x, 3), (None,), .001)])
def test_each_operation_is_torchvisions(voc_root, what, theirs, amounts, most):
    data = VOCSegmentation(voc_root, "val")
    images = [data.load_image(i).as_subclass(torch.Tensor)[:, ::4, ::4] / 255 for i in range(20)]
    for amount in amounts:
        M, K = torch.from_numpy(color_map([(what, amount)])).float().split(3, 1)
        ours = [torch.einsum("ij,jhw->ihw", M, x) + (K @ x.mean((1, 2)))[:, None, None] for x in images]
        off = [(a.clamp(0, 1) - theirs(x, amount)).abs().mean() for a, x in zip(ours, images)]
        assert sum(off) / len(off) < most


def test_blur_is_torchvisions_for_every_width():
    images, sigmas = torch.rand(5, 3, 20, 31), (.15, .3, .7, 1.3, 2.)
    for image, sigma in zip(images, sigmas):
        blurred = blur_(image[None].clone(), blur_weights(sigma)[None])[0]
        assert (blurred - f.gaussian_blur(image, 9, sigma)).abs().max() < 2 / 255
    assert blur_weights(0.).tolist() == blur_weights(.15).tolist() == [1.]


class Coded(SegmentationData):
    "Images whose red is the class of each pixel, and the mask says the same."
    name, classes = "coded", [str(i) for i in range(6)]
    def __len__(self): return 8
    def load(self, i):
        mask = torch.arange(60 * 48).view(60, 48).div(480, rounding_mode="floor").byte()
        return torch.stack([mask, mask, mask]) * 40, mask


@pytest.mark.parametrize("kind", ["turns", "published"])
def test_masks_go_along_with_every_crop_turn_and_flip(kind):
    for i in range(8):
        image, mask, _ = Transformed(Coded(), augmentation((64, 32), kind), 1).prepared(i)
        seen = (image[0].float() / 40).round()
        assert mask.shape == (64, 32) and (seen == mask).float().mean() > .9    # but where two classes meet


def test_an_item_is_the_same_in_any_batch_order_worker_and_number_of_threads(scenes):
    data = Reading(32, "published", seed=5).apply(scenes.first(12))
    def read(reading, **options):
        return torch.cat([images for images, _ in batches(data, reading, **options)])
    alone = read(Reading(batch_size=5, num_workers=0))
    torch.manual_seed(2)
    assert alone.equal(read(Reading(batch_size=4, num_workers=2)))
    assert alone[[7, 3]].equal(read(Reading(), indices=[7, 3])) and data[7][0].equal(alone[7])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try: assert alone.equal(read(Reading()))
    finally: torch.set_num_threads(threads)
    assert not alone[0].equal(Reading(32, "published", seed=6).apply(scenes)[0][0])


def test_a_transform_of_ones_own_is_seeded_and_batched(scenes):
    def noisy(image, mask): return image / 255 + torch.rand(3, 96, 96), mask
    data = Transformed(scenes.first(4), noisy, seed=1)
    images, masks = next(batches(data, Reading(num_workers=0)))
    assert images[2].equal(data[2][0]) and masks.shape == (4, 96, 96)


# What fits do not read

@pytest.fixture
def photos(tmp_path, scenes):
    "Two large JPEGs, and masks that cannot be read."
    for name in ("images", "masks"): (tmp_path / name).mkdir()
    for i, size in enumerate([(640, 480), (400, 800)]):
        image = Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
        image.save(tmp_path / f"images/{i}.jpg", quality=95)
        (tmp_path / f"masks/{i}.png").write_text("none")
    return ImageMaskFolder(tmp_path / "images", tmp_path / "masks", 12)


def test_who_learns_reads_no_masks_and_no_more_of_a_jpeg_than_it_needs(photos):
    assert photos.first(1).load_image(0, (200, 100)).shape == (3, 240, 320)   # half, no side below 200
    assert photos.images_only()[0][0].shape == photos.load_image(0).shape == (3, 480, 640)
    assert augmentation((48, 32)).at_least == (96, 64)    # of a crop of a quarter, the size is left
    shown = Reading(160, "turns").apply(photos.first(2).images_only())
    half = shown.prepared(0)[0]
    whole = Transformed(ImageFolder(photos.root), shown.transform).prepared(0)[0]
    assert 0 < (half.float() - whole.float()).abs().mean() < 3
    images, masks = next(batches(shown))
    assert masks is None and images.shape == (2, 3, 160, 160)
    upright = Transformed(photos.images_only(), Evaluation(160))              # as a score reads, at full size
    assert upright[0][0].equal(Transformed(ImageFolder(photos.root), Evaluation(160))[0][0])


def test_an_image_stored_on_its_side_is_read_smaller_upright(tmp_path):
    picture, exif = Image.new("RGB", (640, 320), "red"), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "0.jpg", exif=exif)
    assert ImageFolder(tmp_path).load_image(0, (200, 90)).shape == (3, 640, 320)   # a half is 160 wide
    assert ImageFolder(tmp_path).load_image(0, (150, 90)).shape == (3, 320, 160)


def test_floats_and_bytes_are_one_image(scenes):
    "A dataset may give floats in [0, 1], or now one and now the other."
    class Floats(Scenes):
        kinds = (True,)
        def load(self, i):
            image, mask = super().load(i)
            return image / 255 if self.kinds[i % len(self.kinds)] else image, mask
    class Both(Floats): kinds = True, False
    for augment in ("none", "published", "turns"):
        shown = [Reading(96, augment).apply(kind("val", 4)) for kind in (Scenes, Floats, Both)]
        read = [next(batches(data))[0] for data in shown]
        assert (read[0] - read[1]).abs().max() < 3 / 255 and (read[0] - read[2]).abs().max() < 3 / 255


# Workers

def worth(reading, using, using_half=0., n_batches=100, on_gpu=False):
    return worth_workers(reading, using, using_half, n_batches, on_gpu)


def test_workers_start_where_reading_takes_a_good_part_of_a_long_time(monkeypatch):
    monkeypatch.setattr(reading_module, "usable_cores", lambda: 6)
    for on_gpu, n in (True, 6), (False, 1):
        assert worth(.1, .1, .1, on_gpu=on_gpu) == n
        assert worth(.1, .1, .1, n_batches=10, on_gpu=on_gpu) == 0    # one second
        assert worth(.1, 2., 2., on_gpu=on_gpu) == 0
    monkeypatch.setattr(reading_module, "usable_cores", lambda: 1)
    assert worth(.1, .1, .1) == worth(.1, .1, .1, on_gpu=True) == 0


@pytest.mark.parametrize("using, using_half, workers", [
    (.1, .1, 1),      # all that torch does goes on as fast with a thread less
    (.1, .2, 0),      # it takes twice as long: what a worker saves, torch loses
    (.01, .02, 2),    # next to nothing is done but read
    (1., 1.9, 0)])
def test_on_two_cores_torch_lends_a_thread_if_it_loses_less_than_a_worker_brings(
        monkeypatch, using, using_half, workers):
    monkeypatch.setattr(reading_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert worth(.1, using, using_half) == workers


def test_many_cores_are_dealt_between_workers_and_torch(monkeypatch):
    monkeypatch.setattr(reading_module, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    few, many = worth(.2, .1, .2), worth(.8, .1, .2)    # torch takes twice as long with half of its threads
    assert 1 < few < many < 16
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert worth(.8, .1, .1) == 8 and kept_threads(8) == 1    # what torch leaves is free
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [kept_threads(n) for n in (0, 8, 10, 15, 16)] == [8, 8, 6, 1, 1]


def threads_while(read):
    "How many threads torch has at each batch, and afterwards."
    return [torch.get_num_threads() for _ in read], torch.get_num_threads()


def test_torch_lends_its_threads_to_automatic_workers_alone(scenes, monkeypatch):
    monkeypatch.setattr(reading_module, "worth_workers", lambda *_: 2)
    monkeypatch.setattr(reading_module, "usable_cores", lambda: 4)
    data, before = Reading(16).apply(scenes.first(10)), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        during, after = threads_while(batches(data, Reading(batch_size=2)))
        assert during[:2] == [4, 4] and during[3:] == [2, 2] and after == 4
        assert threads_while(batches(data, Reading(batch_size=5, num_workers=1))) == ([4, 4], 4)
        read = batches(data, Reading(batch_size=2))
        for _ in range(4): next(read)
        assert torch.get_num_threads() == 2
        read.close()    # a pass that is left early gives them back, too
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(reading_module, "worth_workers", lambda *_: 0)
        monkeypatch.setattr(reading_module, "usable_cores", lambda: 2)
        assert threads_while(batches(data, Reading(batch_size=2))) == ([4] * 5, 4)    # no worker, nothing lent
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("reads, uses, images, is_open", [
    (.3, .2, 11, True),      # 2.4 seconds are left to read
    (.3, .2, 9, False),      # 1.8 are
    (.3, 4., 11, False)])    # a slow encoder keeps its threads
def test_the_third_batch_shows_what_torch_does_with_half_its_threads(monkeypatch, reads, uses, images, is_open):
    clock, told, before = [0.], [], torch.get_num_threads()
    class Slow(Scenes):
        def load_image(self, i, at_least=None):
            clock[0] += reads
            return super().load_image(i)
    monkeypatch.setattr(reading_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(reading_module, "worth_workers", lambda *seconds: told.append(seconds) or 0)
    torch.set_num_threads(4)
    try:
        for _ in batches(Reading(16).apply(Slow("val", images).images_only()), Reading(batch_size=1)):
            clock[0] += uses if torch.get_num_threads() == 4 else 3 * uses
    finally: torch.set_num_threads(before)
    *seconds, left, on_gpu = told[0]
    assert np.allclose(seconds, [reads, uses, 3 * uses if is_open else uses])
    assert left == images - 3 and not on_gpu


def test_tokens_and_sums_do_not_hang_on_the_number_of_threads(tiny, scenes):
    "But for rounding, so that a run gives the same numbers whether workers paid this time or not."
    images, before = torch.stack([scenes[i][0] for i in range(8)]) / 255, torch.get_num_threads()
    def made(threads):
        torch.set_num_threads(threads)
        tokens = tiny(images)
        return tokens, Moments.of(tokens)
    try: (one, sums), *others = map(made, (1, 2, 3))
    finally: torch.set_num_threads(before)
    for tokens, moments in others:
        assert (tokens - one).abs().max() < 1e-5
        assert ((moments.cov - sums.cov).abs() < 1e-6 * sums.scale.outer(sums.scale)).all()


def test_readers_that_overlap_give_back_all_threads_in_any_order():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = lent_threads(1), lent_threads(2)
        first.__enter__(), second.__enter__()
        assert torch.get_num_threads() == 1
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 4
        with lent_threads(9): assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    finally: torch.set_num_threads(before)


def test_only_cores_that_may_be_used_are_counted(monkeypatch):
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try: assert usable_cores() == 1
    finally: os.sched_setaffinity(0, everywhere)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_cores() == max(1, len(everywhere) // 2)


def test_automatic_workers_read_what_is_left(scenes, monkeypatch):
    monkeypatch.setattr(reading_module, "worth_workers", lambda *_: 2)
    data = Reading(16, "published").apply(scenes.first(11))
    def read(n):
        return torch.cat([images for images, _ in batches(data, Reading(batch_size=3, num_workers=n))])
    assert read(None).equal(read(0))


def fewer(message, data, reading=Reading(16, num_workers=4)):
    prepared = Prepared(reading.apply(data))
    with pytest.warns(UserWarning, match=message): return possible_workers(4, prepared, reading)


def test_a_small_shared_memory_takes_fewer_workers_or_none(scenes, monkeypatch):
    for free, n in (10**5, 1), (10**4, 0):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert fewer(f"by {n} workers, not 4: /dev/shm has 0 MB free", scenes) == n


def test_what_cannot_be_sent_to_a_new_process_is_read_in_this_one(scenes, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    assert possible_workers(4, Prepared(Reading(16).apply(scenes)), Reading(16, num_workers=4)) == 4
    class Local(Scenes): pass
    assert fewer("0 workers, not 4: the dataset cannot be sent", Local("val", 4)) == 0
    import __main__
    monkeypatch.setattr(__main__, "__file__", "script.py", raising=False)
    assert fewer("a script asks for them itself", scenes, Reading(16)) == 0
    own = type("Own", (Scenes,), dict(__module__="__main__"))
    monkeypatch.setattr(__main__, "Own", own, raising=False)
    monkeypatch.delattr(__main__, "__file__")
    assert fewer("the dataset is defined in a notebook", own("val", 4)) == 0
