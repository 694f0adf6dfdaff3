"""Datasets: what holds for any, and files as people have them."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rasa_nb.data import ImageFolder, ImageMaskFolder, SegmentationData, VOCSegmentation
from rasa_nb.reading import Reading


# Datasets

def test_reading_data_loads_no_plots_and_no_methods():
    heavy = ("matplotlib", "pandas", "seaborn", "sklearn", "scipy", "timm", "IPython", "rasa_nb.encoders")
    found = f"import sys, rasa_nb.data; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


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
