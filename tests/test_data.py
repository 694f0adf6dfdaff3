"""Datasets and how they are read: what holds for any seed, and files as people have them."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from rasa_nb.data import ImageFolder, ImageMaskFolder, SegmentationData, VOCSegmentation
from rasa_nb.reading import Evaluation, Reading, Transformed, augmentation, batches
from rasa_nb.scenes import Scenes


# How images are read

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


def test_workers_and_order_do_not_change_what_is_read(scenes):
    data = Reading(32, "published", seed=5).apply(scenes.first(12))
    torch.manual_seed(1)
    alone = torch.cat([images for images, _ in batches(data, Reading(batch_size=5))])
    torch.manual_seed(2)
    helped = torch.cat([images for images, _ in batches(data, Reading(batch_size=4, num_workers=2))])
    assert alone.equal(helped) and data[7][0].equal(alone[7])
    assert not alone[0].equal(Reading(32, "published", seed=6).apply(scenes)[0][0])


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


def test_reading_data_loads_no_plots_and_no_methods():
    heavy = ("matplotlib", "pandas", "seaborn", "sklearn", "scipy", "timm", "IPython", "rasa_nb.encoders")
    found = f"import sys, rasa_nb.data; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# Datasets

class Own(SegmentationData):
    "A dataset of one's own, with attributes that mean something else than the library's."
    name, classes, size = "own", ["a", "b"], 3
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    def __len__(self): return self.size
    def load(self, i): return torch.zeros(3, 8, 8, dtype=torch.uint8), self.mask


def test_a_size_of_another_meaning_is_no_native_size():
    own = Own()
    assert own.native_size is own.first(2).native_size is Reading(16).apply(own).native_size is None
    assert len(own) == 3 and Reading(16).apply(own)[2][0].shape == (3, 16, 16)


def test_a_mask_without_classes_is_refused():
    own = Own()
    own.classes = None
    with pytest.raises(ValueError, match="item 1 has a mask, but 'own' names no classes"): own[1]


def test_what_is_no_dataset_is_refused():
    with pytest.raises(TypeError, match="list is no dataset of images: expected an ImageFolder"):
        Reading(16).apply([1, 2])


def test_a_batch_of_several_sizes_is_refused(image_folders):
    Image.new("RGB", (50, 40)).save(image_folders / "images/small.png")
    data = ImageFolder(image_folders / "images")
    with pytest.raises(ValueError, match="40 x 50 and 96 x 96: resize to one first"): list(batches(data))


def test_items_are_counted_like_those_of_a_list(scenes):
    few = scenes.first(3)
    assert few[-1][0].equal(few[2][0])
    with pytest.raises(IndexError): few[3]
    with pytest.raises(ValueError, match="n=0: expected at least one image"): scenes.first(0)


# Files

def test_grey_rgba_and_palette_images_become_rgb(image_folders, scenes):
    image = scenes[0][0].permute(1, 2, 0).numpy()
    folder = image_folders / "images"
    Image.fromarray(image[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.dstack([image, image[..., :1]])).save(folder / "rgba.png")
    Image.fromarray(image).convert("P").save(folder / "palette.png")
    read = [image for image, _ in ImageFolder(folder)]
    assert len(read) == 6 and all(image.shape == (3, 96, 96) and image.dtype == torch.uint8 for image in read)


def test_a_cut_file_is_named_or_left_out(image_folders):
    path = image_folders / "images/a/1.png"
    path.write_bytes(path.read_bytes()[:2000])
    data = ImageFolder(image_folders / "images")
    with pytest.raises(ValueError, match="1.png cannot be read as an image"): data[1]
    with pytest.warns(UserWarning, match="1 of 3 files left out: 1.png"):
        assert len(ImageFolder(image_folders / "images", "skip")) == 2


def test_hidden_files_are_passed_over(image_folders):
    (image_folders / "images/.DS_Store").write_bytes(b"x")
    assert len(ImageFolder(image_folders / "images")) == 3


def test_folders_are_told_apart_by_their_files(image_folders):
    before = ImageFolder(image_folders / "images").describe()
    assert before == ImageFolder(image_folders / "images").describe()
    Image.new("RGB", (8, 8)).save(image_folders / "images/a/2.png")
    assert ImageFolder(image_folders / "images").describe() != before


def test_images_and_masks_are_paired_by_name(image_folders, scenes):
    own = ImageMaskFolder(image_folders / "images", image_folders / "masks", 12)
    assert own.classes == [str(c) for c in range(12)] and own[2][1].equal(scenes[2][1])


def test_folders_that_do_not_fit_are_refused(image_folders, tmp_path):
    images, masks, empty = image_folders / "images", image_folders / "masks", tmp_path / "empty"
    empty.mkdir()
    (masks / "a/2.png").unlink()
    Image.new("RGB", (96, 96)).save(masks / "a/0.png")
    with pytest.raises(ValueError, match="1 of 3 images have no mask.*2.png"):
        ImageMaskFolder(images, masks, 12)
    (images / "a/2.png").unlink()
    with pytest.raises(ValueError, match="0.png is no mask: expected one channel"):
        ImageMaskFolder(images, masks, 12)[0]
    with pytest.raises(ValueError, match="no image in"): ImageFolder(empty)
    with pytest.raises(ValueError, match="on_error='ignore': expected 'raise'"): ImageFolder(images, "ignore")
    with pytest.raises(FileNotFoundError, match="no folder"): ImageFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"): ImageMaskFolder(images, tmp_path / "none", 12)


# Pascal VOC

def test_voc_is_read(voc_root):
    for split in ("train", "val"):
        data = VOCSegmentation(voc_root, split)
        image, mask = data[0]
        assert image.shape[1:] == mask.shape and set(mask.unique().tolist()) <= {*range(21), 255}
    with pytest.raises(ValueError, match="split='test'.*found .*'train'.*'val'"):
        VOCSegmentation(voc_root, "test")


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, capsys):
    import torchvision
    def broken(root, **_):
        (tmp_path / next(tmp_path.iterdir()) / "half.tar").write_bytes(b"x" * 100)
        raise OSError("connection lost")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", broken)
    with pytest.raises(ConnectionError, match="connection lost.*by hand"):
        VOCSegmentation(tmp_path, download=True)
    assert list(tmp_path.iterdir()) == [] and "2.0 GB" in capsys.readouterr().out


def test_a_download_is_moved_into_place(tmp_path, monkeypatch):
    import torchvision
    def fake(root, **_):
        lists = Path(root, "VOCdevkit/VOC2012/ImageSets/Segmentation")
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", fake)
    assert VOCSegmentation(tmp_path, download=True).ids == ["2007_000032", "2007_000039"]
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]
