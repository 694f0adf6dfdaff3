"""Datasets: what holds for any, and files as people have them."""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import color_encoder
from PIL import Image

import rasa_nb.data
from rasa_nb.data import (
    ImageFolder, ImageList, ImageMaskFolder, Part, SegmentationData, VOCSegmentation, as_data, content,
    file_content)
from rasa_nb.reading import Evaluation, Reading, Transformed, augmentation, batches
from rasa_nb.scenes import Scenes


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


def test_items_are_counted_like_those_of_a_list(scenes):
    few = scenes.first(3)
    assert few[-1][0].equal(few[2][0])
    with pytest.raises(IndexError): few[3]
    with pytest.raises(ValueError, match="n=0: expected at least one image"): scenes.first(0)


@pytest.mark.parametrize("image, got", [
    (torch.zeros(8, 8, 3, dtype=torch.uint8), r"torch.uint8 \(8, 8, 3\)"),
    (torch.full((3, 8, 8), 200.), "torch.float32"),
    (torch.zeros(3, 8, 8, dtype=torch.int32), "torch.int32"), (Image.new("RGB", (8, 8)), "Image")])
def test_an_item_whose_image_is_none_is_refused(image, got):
    class Odd(Own):
        def load(self, i): return image, None
    said = f"item 2: the image is {got}.*expected a tensor .3, H, W. of uint8"
    with pytest.raises(TypeError, match=said): Odd()[2]


def test_groups_go_with_their_items(scenes):
    data = scenes.first(6)
    data.groups = list("aabbcc")
    assert data.first(3).groups == list("aab") and Part(data, [5, 0]).groups == ["c", "a"]
    assert Reading(16).apply(data).groups == data.images_only().groups == data.groups
    assert scenes.groups is None
    data.groups = ["a"]
    with pytest.raises(ValueError, match="1 groups for 6 items, expected one each"): data.first(2)


def test_images_are_learned_from_without_their_masks(scenes):
    class Unmasked(Own):
        def load(self, i): return super().load(i)[0], torch.full((8, 8), 99)
    for data in (scenes, scenes.first(4), Reading(16).apply(scenes)):
        assert data.images_only()[3][0].equal(data[3][0]) and data.images_only()[3][1] is None
    assert Unmasked().images_only().first(2)[1][1] is None and Unmasked().images_only().classes == ["a", "b"]

def test_what_a_subclass_loads_is_what_is_learned_from(image_folders):
    "Where a class below one that reads files loads otherwise, images and hash are not the files'."
    class Inverted(ImageFolder):
        def load(self, i): return 255 - super().load(i)[0], None
    plain, inverted = ImageFolder(image_folders / "images"), Inverted(image_folders / "images")
    assert inverted.images_only()[0][0].equal(255 - plain[0][0])
    assert content(inverted) != content(plain) and "content" not in inverted.describe()
    assert as_data(inverted, masks=False).first(2)[1][0].equal(255 - plain[1][0])


# Files

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


def test_images_and_masks_are_paired_by_name(image_folders, scenes):
    own = ImageMaskFolder(image_folders / "images", image_folders / "masks", 12)
    assert own.classes == [str(c) for c in range(12)] and own[2][1].equal(scenes[2][1])


def test_folders_that_do_not_fit_are_refused(image_folders, tmp_path):
    images, masks, empty = image_folders / "images", image_folders / "masks", tmp_path / "empty"
    empty.mkdir()
    (masks / "a/2.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 images have no mask.*2.png"):
        ImageMaskFolder(images, masks, 12)
    with pytest.raises(ValueError, match="no image in"): ImageFolder(empty)
    with pytest.raises(ValueError, match="on_error='ignore': expected 'raise'"): ImageFolder(images, "ignore")
    with pytest.raises(FileNotFoundError, match="no folder"): ImageFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"): ImageMaskFolder(images, tmp_path / "none", 12)


def test_linked_folders_are_followed_once_each(image_folders, tmp_path, scenes):
    images, elsewhere = image_folders / "images", tmp_path / "disk"
    (elsewhere / "deep").mkdir(parents=True)
    for i in (3, 4):
        Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()).save(elsewhere / f"deep/{i}.png")
        Image.fromarray(scenes[i][1].numpy()).save(elsewhere / f"mask{i}.png")
    os.symlink(elsewhere / "deep", images / "0-linked")
    os.symlink(images, elsewhere / "deep/back")   # a loop
    os.symlink(images / "a", images / "0-again")  # another name of a folder that is there
    for i in range(8): (images / f"loops{i}").mkdir()
    for i in range(8):
        for j in range(8): os.symlink(images / f"loops{j}", images / f"loops{i}/to{j}")
    names = [str(path.relative_to(images)) for path in ImageFolder(images).files]
    assert names == ["0-linked/3.png", "0-linked/4.png", "a/0.png", "a/1.png", "a/2.png"]
    (image_folders / "masks/0-linked").mkdir()
    for i in (3, 4): os.symlink(elsewhere / f"mask{i}.png", image_folders / f"masks/0-linked/{i}.png")
    assert ImageMaskFolder(images, image_folders / "masks", 12)[1][1].equal(scenes[4][1])


def test_a_link_to_nothing_is_named(image_folders):
    os.symlink("gone.png", image_folders / "images/a/3.png")
    folder, said = image_folders / "images", "3.png .a link to nothing"
    with pytest.raises(ValueError, match=f"1 of 4 files .* {said}"): ImageFolder(folder)
    with pytest.warns(UserWarning, match=said): assert len(ImageFolder(folder, "skip")) == 3


def test_two_files_of_one_name_are_no_pair(image_folders):
    images, masks = image_folders / "images", image_folders / "masks"
    (masks / "a/1.json").write_text("{}")   # what a labeling tool leaves beside a mask
    assert ImageMaskFolder(images, masks, 12).masks[1].name == "1.png"
    Image.new("L", (96, 96)).save(masks / "a/1.bmp")
    with pytest.raises(ValueError, match="a/1.bmp and .*a/1.png are two masks of one name"):
        ImageMaskFolder(images, masks, 12)
    (masks / "a/1.bmp").unlink()
    Image.new("RGB", (96, 96)).save(images / "a/2.jpg")
    with pytest.raises(ValueError, match="a/2.jpg and .*a/2.png are two images of one name"):
        ImageMaskFolder(images, masks, 12)


def test_an_umlaut_is_one_letter_however_it_is_spelled(image_folders):
    os.rename(image_folders / "images/a/1.png", image_folders / "images/a/\u00e4.png")
    os.rename(image_folders / "masks/a/1.png", image_folders / "masks/a/a\u0308.png")
    assert len(ImageMaskFolder(image_folders / "images", image_folders / "masks", 12)) == 3


# What people hold

def pictures(scenes, n=3): return [Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()) for i in range(n)]


def test_images_in_hand_are_data(scenes, image_folders):
    tensors = [scenes[i][0].as_subclass(torch.Tensor) for i in range(3)]
    batch, files = torch.stack(tensors), sorted((image_folders / "images/a").iterdir())
    arrays = batch.permute(0, 2, 3, 1).numpy()
    given = dict(
        batch=batch, floats=batch / 255, half=(batch / 255).half(), list=tensors, tuple=tuple(tensors),
        arrays=arrays, own=scenes.first(3), transformed=Reading(96).apply(scenes.first(3)),
        pictures=pictures(scenes), labeled=[(picture, 7) for picture in pictures(scenes)], files=files,
        names=list(map(str, files)), folder=image_folders / "images", name=str(image_folders / "images"),
        part=torch.utils.data.Subset(scenes, [0, 1, 2]))
    for kind, those in given.items():
        data = as_data(those)
        images = [image if image.dtype == torch.uint8 else image.mul(255).byte() for image, _ in data]
        assert len(data) == 3 and torch.stack(images).sub(batch).eq(0).all(), kind
        assert as_data(those, masks=False)[2][1] is None
    for one in (batch[0], pictures(scenes)[0], files[0], str(files[0]), arrays[0]):
        assert len(as_data(one)) == 1 and as_data(one)[0][0].equal(batch[0])
    assert as_data(scenes) is scenes


def torchvision_sets(scenes, root):
    "Two of torchvision's datasets over the same three pictures."
    from torchvision.datasets import ImageFolder as ClassFolder, VOCSegmentation as TheirVOC
    voc = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "classes/cat", "classes/dog"):
        (voc / name).mkdir(parents=True)
    for i, picture in enumerate(pictures(scenes)):
        picture.save(voc / f"JPEGImages/{i}.jpg", "PNG")
        picture.save(voc / f"classes/{'cat' if i else 'dog'}/{i}.png")
        Image.fromarray(scenes[i][1].numpy()).save(voc / f"SegmentationClass/{i}.png")
    (voc / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
    return partial(TheirVOC, root, "2012", "train"), partial(ClassFolder, voc / "classes")


def test_datasets_of_torchvision_are_data(scenes, tmp_path):
    voc, classes = torchvision_sets(scenes, tmp_path)
    from torchvision.transforms import v2
    for given in (voc(), voc(transforms=v2.Identity())):
        data = as_data(given, masks=True)
        assert len(data) == 3 and data.num_classes == 21 and data[2][1].equal(scenes[2][1])
        assert data[2][0].equal(scenes[2][0]) and as_data(given, masks=False)[2][1] is None
    for given in (classes(), classes(transform=v2.ToImage())):
        assert as_data(given)[0][0].equal(scenes[1][0]) and as_data(given).classes is None
    normalized = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, True), v2.Normalize([.5] * 3, [.2] * 3)])
    with pytest.raises(ValueError, match="item 0 ranges from .*undo its normalization"):
        as_data(classes(transform=normalized))
    assert content(as_data(voc()), masks=True) == content(VOCSegmentation(tmp_path), masks=True)


def test_deep_and_turned_files_are_not_spoiled_by_torchvision(scenes, tmp_path):
    "Its loader makes 8 bits of 16 by clipping, so files are read here."
    _, classes = torchvision_sets(scenes, tmp_path)
    path = tmp_path / "VOCdevkit/VOC2012/classes/cat/1.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 1092).save(path, exif=exif)
    image = as_data(classes())[0][0]
    assert image.shape == (3, 10, 6) and image.float().mean() == pytest.approx(125.3, abs=1)


def loader(scenes): return torch.utils.data.DataLoader(scenes)
def generator(scenes): return (image for image, _ in scenes)


@pytest.mark.parametrize("give, error, said", [
    (loader, TypeError, "DataLoader is no dataset: give its dataset, `loader.dataset`.*Reading"),
    (generator, TypeError, "a generator is no dataset.*of a generator make a list"),
    (lambda scenes: [1, 2], TypeError, "list of items that begin with a int is no dataset"),
    (lambda scenes: [dict(image=1)], TypeError, "list of items that begin with a dict"),
    (lambda scenes: dict(a=scenes[0][0]), TypeError, "a dict is no dataset of images"),
    (lambda scenes: None, TypeError, "a NoneType is no dataset of images: expected an ImageFolder"),
    (lambda scenes: [scenes[0][1]], TypeError, "item 0 is a Mask"),
    (lambda scenes: [], ValueError, "an empty list is no dataset"),
    (lambda scenes: "no/such", FileNotFoundError, "'no/such' is no folder and no file: expected"),
    (lambda scenes: torch.zeros(2, 3, 3, 8, 8), ValueError, "item 0 has shape"),
    (lambda scenes: torch.randn(2, 3, 8, 8), ValueError, "undo its normalization, or divide by 255"),
    (lambda scenes: torch.zeros(2, 3, 8, 8).long(), TypeError, "item 0 holds int64: expected uint8")])
def test_what_is_no_dataset_is_named(give, error, said, scenes):
    with pytest.raises(error, match=said): as_data(give(scenes))


def test_a_folder_with_masks_in_it_is_no_folder_of_images(image_folders, voc_root):
    with pytest.raises(ValueError, match="name the images alone, or ImageMaskFolder"): as_data(image_folders)
    for root in (voc_root, voc_root / "VOCdevkit/VOC2012"):
        with pytest.raises(ValueError, match="VOCSegmentation.root, split. reads it"): as_data(root)


def test_pairs_in_hand_are_scored(scenes):
    pairs = [tuple(scenes[i]) for i in range(3)]
    data = as_data(ImageList(pairs, scenes.classes), masks=True)
    assert data[2][1].equal(scenes[2][1]) and data.images_only()[2][1] is None
    with pytest.raises(ValueError, match="Tensor has no masks to score against.*ImageList.pairs, classes"):
        as_data(torch.zeros(1, 3, 8, 8), masks=True)
    with pytest.raises(ValueError, match="item 0 has no mask"): ImageList([pairs[0][0]], 12)[0]
    color = ImageList([(pairs[0][0], Image.new("RGB", (96, 96)))], 12)
    with pytest.raises(ValueError, match="the mask of item 0: .*got mode RGB"): color[0]


class Meant(SegmentationData):
    "A dataset whose masks are not to be looked at."
    name, classes = "meant", ["a", "b"]
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def load_image(self, i): return self.images[i]
    def load(self, i): raise AssertionError("a mask was looked at")


def test_what_learns_and_measures_takes_what_people_hold_and_no_mask(scenes):
    from rasa_nb.baselines import RemovePCA
    from rasa_nb.measures import position_r2, position_report
    from rasa_nb.moments import collect_moments
    from rasa_nb.rasa import PositionMean, fit_together
    from rasa_nb.trained import TrainedRASA
    from rasa_nb.visualize import collect_together
    encoder = color_encoder()
    images = torch.stack([scenes[i][0].as_subclass(torch.Tensor)[:, :48, :48] for i in range(20)])
    verbs = [
        collect_moments, partial(fit_together, dict(mean=PositionMean())), RemovePCA(1).fit,
        TrainedRASA(n_heads=1, epochs=1).fit, lambda *args: position_r2(*args, 48),
        lambda *args: position_report(*args, 48, k=4, mlp=False), lambda *args: collect_together(*args, 48)]
    for verb in verbs:
        for given in (Meant(images), list(images)): verb(encoder, given)
    moments = [collect_moments(encoder, given) for given in (Meant(images), images, images / 255)]
    assert all(torch.equal(moments[0].cell_sums, other.cell_sums) for other in moments)


# What a dataset holds

def settle(monkeypatch): monkeypatch.setattr(rasa_nb.data, "_settled", -10**18)


def test_content_follows_images_and_masks(image_folders):
    def read(): return ImageMaskFolder(image_folders / "images", image_folders / "masks", 12)
    images, both = content(read()), content(read(), masks=True)
    assert content(read()) == images == read().describe()["content"] and images != both
    path = image_folders / "masks/a/1.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = mask[0, 0] == 0
    Image.fromarray(mask).save(path)
    assert content(read()) == images and content(read(), masks=True) != both
    Image.new("RGB", (96, 96)).save(image_folders / "images/a/1.png")
    assert content(read()) != images


def test_folders_of_one_name_and_size_are_told_apart(tmp_path):
    "Two trees with one list, and files of one name, length and time."
    roots = [tmp_path / name / "images" for name in "ab"]
    for shade, root in enumerate(roots):
        root.mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(root / "0.bmp")
        os.utime(root / "0.bmp", ns=(10**18, 10**18))
    one, other = map(ImageFolder, roots)
    assert one.about() == other.about() and one.describe() != other.describe()


def test_pictures_that_swap_names_are_seen(tmp_path, monkeypatch):
    settle(monkeypatch)
    for shade in range(2):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / f"{shade}.bmp")
        os.utime(tmp_path / f"{shade}.bmp", ns=(10**18, 10**18))
    before = content(ImageFolder(tmp_path))
    for source, target in (("0", "x"), ("1", "0"), ("x", "1")):
        os.rename(tmp_path / f"{source}.bmp", tmp_path / f"{target}.bmp")
    assert content(ImageFolder(tmp_path)) != before


def test_a_dataset_holds_what_its_items_are_whatever_it_is_called(scenes):
    assert content(scenes.first(4)) == content(Scenes("train", 4)) == content(Part(Scenes("train"), range(4)))
    assert content(scenes.first(4)) != content(Scenes("train", 4, seed=1)) != content(Scenes("val", 4))
    assert content(Reading(16).apply(scenes.first(2))) != content(scenes.first(2))
    class Brighter(Scenes):
        def load(self, i): return super().load(i)[0] // 2, None
    assert content(Brighter("train", 2)) != content(scenes.first(2))


def test_a_dataset_of_ones_own_is_hashed_as_it_is_now():
    "Whatever it reads may have changed since, so that nothing is remembered of it."
    own = Own()
    before = content(own), content(own, masks=True)
    own.mask = torch.ones(8, 8, dtype=torch.uint8)
    assert content(own) == before[0] and content(own, masks=True) != before[1]
    own.mask[0, 0] = 0
    assert content(own, masks=True) not in before and "content" not in own.describe()


def test_a_file_is_hashed_once_and_while_it_is_decoded(image_folders, tmp_path, monkeypatch):
    settle(monkeypatch)
    monkeypatch.setenv("RASA_NB_CACHE", str(tmp_path / "memory"))
    monkeypatch.setattr(rasa_nb.data, "_known", {})
    data = ImageFolder(image_folders / "images")
    for _ in data: pass
    read = []
    monkeypatch.setattr(rasa_nb.data, "_hash", lambda data: read.append(len(data)) or "other")
    named = [json.loads(line)[2] for line in (tmp_path / "memory/contents.jsonl").read_text().splitlines()]
    assert [data.item_content(i, False) for i in range(3)] == named and not read
    monkeypatch.setattr(rasa_nb.data, "_known", {})   # as in another process
    rasa_nb.data._log.update(path=None, read=0)
    content(data)
    assert list(map(file_content, data.files)) == named and not read


def test_workers_tell_what_they_have_hashed(image_folders, tmp_path, monkeypatch):
    settle(monkeypatch)
    monkeypatch.setenv("RASA_NB_CACHE", str(tmp_path / "memory"))
    data = ImageFolder(image_folders / "images")
    list(batches(Reading(16).apply(data), Reading(num_workers=2, batch_size=1)))
    expected = [rasa_nb.data._hash(path.read_bytes()) for path in data.files]
    monkeypatch.setattr(rasa_nb.data, "_hash", lambda data: "read again")
    content(data)
    assert list(map(file_content, data.files)) == expected


def test_hashes_are_kept_where_they_can_be(image_folders, tmp_path, monkeypatch):
    settle(monkeypatch)
    expected = content(ImageFolder(image_folders / "images"))
    (tmp_path / "file").write_text("no folder")
    damaged = tmp_path / "damaged/contents.jsonl"
    damaged.parent.mkdir()
    damaged.write_bytes(b'{"\n[1]\n7\n[[], 1, 2]\n["a", 1, 2]\n\xff\n["half')
    def homeless(): raise RuntimeError("no home")
    monkeypatch.setattr(Path, "home", homeless)
    for place in (tmp_path / "file", damaged.parent, ""):
        monkeypatch.setenv("RASA_NB_CACHE", str(place))
        monkeypatch.setattr(rasa_nb.data, "_known", {})
        assert content(ImageFolder(image_folders / "images")) == expected


def test_a_file_just_written_is_not_remembered(image_folders, monkeypatch):
    monkeypatch.setattr(rasa_nb.data, "_known", {})
    data = ImageFolder(image_folders / "images")
    content(data)
    assert not set(map(str, data.files)) & set(rasa_nb.data._known)


def test_what_former_releases_stored_is_still_read(tmp_path):
    from rasa_nb.moments import Moments
    former = dict(name="images", images=3, num_classes=None, files="0123456789abcdef")
    moments = Moments.of(torch.randn(4, 2, 2, 3))
    moments.source = dict(encoder="toy", data=former)
    moments.save(tmp_path / "m.safetensors")
    assert Moments.load(tmp_path / "m.safetensors").source["data"] == former


# Pascal VOC

def test_voc_is_read(voc_root):
    for split in ("train", "val"):
        data = VOCSegmentation(voc_root, split)
        image, mask = data[0]
        assert image.shape[1:] == mask.shape and set(mask.unique().tolist()) <= {*range(21), 255}
    with pytest.raises(ValueError, match="split='test'.*found .*'train'.*'val'"):
        VOCSegmentation(voc_root, "test")


@pytest.fixture
def small_voc(tmp_path, scenes):
    "Two images in the official layout, and a list that names them by id."
    folder = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for i, picture in enumerate(pictures(scenes, 2)):
        picture.save(folder / f"JPEGImages/2007_{i}.jpg")
        Image.fromarray(scenes[i][1].numpy()).save(folder / f"SegmentationClass/2007_{i}.png")
    return folder


def test_lists_of_other_code_name_two_paths_a_line(small_voc, scenes):
    def line(i, above=""): return f"{above}JPEGImages/2007_{i}.jpg {above}SegmentationClass/2007_{i}.png"
    lines = [line(1), line(0, "/"), line(1, "VOCdevkit/VOC2012/"), "2007_0", ""]
    (small_voc / "ImageSets/Segmentation/both.txt").write_text("\ufeff" + "\r\n".join(lines), "utf-8")
    data = VOCSegmentation(small_voc.parent.parent, "both")
    assert data.ids == ["2007_1", "2007_0", "2007_1", "2007_0"]
    assert [data[i][1].equal(scenes[k][1]) for i, k in enumerate([1, 0, 1, 0])] == [True] * 4
    for line in ("2007_0 -1", "a b c", "2007_0 2007_1"):
        (small_voc / "ImageSets/Segmentation/both.txt").write_text(line)
        with pytest.raises(ValueError, match=f"a line of the list in .* is '{line}'; expected an id"):
            VOCSegmentation(small_voc.parent.parent, "both")


def test_trainaug_is_learned_from_without_its_masks(small_voc, scenes):
    (small_voc / "ImageSets/Segmentation/trainaug.txt").write_text("2007_0\n2007_1\n")
    data = VOCSegmentation(small_voc.parent.parent, "trainaug")
    learned = as_data(data, masks=False)
    assert len(data.describe()["content"]) == 16 and learned.describe() == data.describe()
    batch, masks = next(batches(Reading(32, "published").apply(learned)))
    assert batch.shape == (2, 3, 32, 32) and masks is None
    said = "VOC 2007_1 has no mask .*SegmentationClassAug.*learning needs none"
    with pytest.raises(FileNotFoundError, match=said): data[1]
    (small_voc / "SegmentationClass").rename(small_voc / "SegmentationClassAug")
    assert data[1][1].equal(scenes[1][1])


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
