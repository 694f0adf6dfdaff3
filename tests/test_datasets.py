"""Public datasets: real files where they are at hand, else trees of the official layout; and what is nearly right."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image

import rasa_nb.datasets
from rasa_nb.data import VOCSegmentation, as_data, content, file_content, how_many, read_mask
from rasa_nb.datasets import ADE20K_IDS, CITYSCAPES_IDS, COCO_15, COCO_27, DATASETS, list_datasets, load_dataset
from rasa_nb.matching import LEOPART, class_iou, confusion_matrix
from rasa_nb.rasa import RASA
from rasa_nb.segmentation import overcluster


def real(folder):
    root = shared / "data" / folder
    if not root.is_dir(): pytest.skip(f"no {folder} at {root}")
    return root


def write(root, **files):
    "Writes arrays as PNG (masks) or JPEG, by path; and text, as it is."
    for name, values in files.items(): put(root / name, values)
    return root


def put(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, str): path.write_text(values)
    else: Image.fromarray(np.asarray(values, np.uint8)).save(path)


def photo(number): return np.full((6, 8, 3), 40 * number, np.uint8)


def mask(values):
    "Each value in a column of its own, twice over."
    return np.tile(np.repeat(np.array(values), 2), (6, 1)).astype(np.uint8)


# Trees of the official layout, with the files that lie beside those that are read

def cityscapes(root, kind="labelIds", values=(0, 7, 11, 23)):
    for i, city in enumerate(("munster", "lindau")):
        name = f"{city}/{city}_000000_00001{i}"
        put(root / f"leftImg8bit/val/{name}_leftImg8bit.png", photo(i))
        put(root / f"gtFine/val/{name}_gtFine_{kind}.png", mask(values))
        put(root / f"gtFine/val/{name}_gtFine_color.png", photo(i))
        put(root / f"gtFine/val/{name}_gtFine_polygons.json", "{}")
    return root


def pascal_context(root, values=(0, 1, 15, 59)):
    voc = root / "VOCdevkit/VOC2010"
    for i in range(3):
        put(voc / f"JPEGImages/2008_00000{i}.jpg", photo(i))
        put(voc / f"SegmentationClassContext/2008_00000{i}.png", mask(values))
    put(voc / "ImageSets/SegmentationContext/val.txt", "2008_000002\n2008_000000\n")
    return root


def camvid(root, values=(0, 3, 10, 11)):
    for i in range(2):
        put(root / f"CamVid/test/0001TP_00{i}.png", photo(i))
        put(root / f"CamVid/testannot/0001TP_00{i}.png", mask(values))
    put(root / "CamVid/test.txt", "/SegNet/CamVid/test/0001TP_000.png /SegNet/CamVid/testannot/0001TP_000.png")
    return root


def ade20k(root, values=(0, 1, 2, 150)):
    put(root / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg", photo(1))
    put(root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", mask(values))
    return root


def coco_stuff(root, values=(0, 90, 91, 255), masks="annotations"):
    put(root / "images/val2017/000000000139.jpg", photo(1))
    put(root / f"{masks}/val2017/000000000139.png", mask(values))
    return root


TREES = dict(
    cityscapes=(cityscapes, "val"), pascal_context59=(pascal_context, "val"), camvid11=(camvid, "test"),
    ade20k=(ade20k, "validation"), coco_stuff27=(coco_stuff, "val"))
REAL = dict(
    voc=("", "val"), ade20k=("ade20k", "validation"), coco_stuff27=("coco_stuff164k", "val"),
    coco_stuff15=("coco_stuff164k", "val"), coco_thing12=("coco_stuff164k", "val"))


def tree(name, root):
    make, split = TREES[name]
    return load_dataset(name, make(root), split)


# Real files

# super-category of each value 0 to 181, of 27 in alphabetical order of these letters; written down from the
# table that PiCIE's code evaluates with, which numbers them as IIC did
PICIE = ("jlllllllliiiiiihhhhhhhhhhggggggggkkkkkkkkkkffffffffccccccccccddddddddddaaaaaabbbbbbeeeeeeeerrwuuwpzqnmmrr"
         "xpprpvpznnnnnwAoopwvvyuwprqpwyvrzqvrwqvvzvAvyurovApxuvypywzpurrwosssssssAAtty")
LETTERS = "abcdefghijklmnopqrstuvwxyzA"


def test_super_categories_of_coco_are_those_that_picie_evaluates():
    assert [COCO_27["ids"][value] for value in range(182)] == [LETTERS.index(letter) for letter in PICIE]


def test_coco_is_read():
    root = real("coco_stuff164k")
    all_, stuff, things = (load_dataset(name, root, "val") for name in ("coco_stuff27", "coco_stuff15", "coco_thing12"))
    seen = set()
    for i in range(len(all_)):
        values, labels = read_mask(all_.masks[i]), all_[i][1]
        table = torch.tensor([*map(LETTERS.index, PICIE), *[255] * 74])
        assert labels.equal(table[values.long()].byte())
        kept = [(data[i][1] != 255) for data in (stuff, things)]
        assert not (kept[0] & kept[1]).any() and (kept[0] | kept[1]).equal(labels != 255)
        assert kept[0].equal((values > 90) & (values < 255))
        seen |= set(values.unique().tolist())
    assert len(seen) > 50 and stuff.files == all_.files


def test_ade20k_is_read_and_named_as_the_dataset_names_it():
    root = real("ade20k")
    data = load_dataset("ade20k", root, "validation")
    rows = (root / "ADEChallengeData2016/objectInfo150.txt").read_text().splitlines()[1:]
    assert [row.split("\t")[4].split(",")[0].strip() for row in rows] == data.classes
    for i in range(len(data)):
        values, labels = read_mask(data.masks[i]).int(), data[i][1]
        assert labels.int().equal(torch.where(values == 0, 255, values - 1)) and (values == 0).any()


def test_voc_is_the_one_that_was_there(voc_root):
    data, before = load_dataset("voc", voc_root, "val"), VOCSegmentation(voc_root, "val")
    assert data.describe() == before.describe() and data.about()["of"] == 1449
    assert load_dataset("voc", voc_root, "trainval").full_size == 2913


# Trees

def test_label_ids_and_train_ids_of_cityscapes_say_the_same(tmp_path):
    labels = tree("cityscapes", tmp_path / "a")
    assert [Path(labels.label(i)).name[:6] for i in range(2)] == ["lindau", "munste"]
    assert labels[0][1][0].tolist() == [255, 255, 0, 0, 2, 2, 10, 10]
    train = cityscapes(tmp_path / "b", "labelTrainIds", [CITYSCAPES_IDS[v] for v in (0, 7, 11, 23)])
    assert load_dataset("cityscapes_trainids", train, "val")[0][1].equal(labels[0][1])


def test_pascal_context_follows_its_list(tmp_path):
    data = tree("pascal_context59", tmp_path)
    assert [path.stem for path in data.files] == ["2008_000002", "2008_000000"]
    assert data[1][1][0].tolist() == [255, 255, 0, 0, 14, 14, 58, 58]
    assert (data.classes[14], data.classes[58], data.name) == ("person", "wood", "pascal_context59-val")


def test_camvid_is_read(tmp_path):
    data = tree("camvid11", tmp_path)
    assert data[0][1][0].tolist() == [0, 0, 3, 3, 10, 10, 255, 255] and data.classes[10] == "bicyclist"


def test_both_layouts_of_coco_are_read(tmp_path):
    apart = coco_stuff(tmp_path / "a", masks="stuffthingmaps")
    assert load_dataset("coco_stuff15", apart, "val")[0][1].equal(
        load_dataset("coco_stuff15", coco_stuff(tmp_path / "b"), "val")[0][1])
    put(tmp_path / "c/train2017/1.jpg", photo(1))
    put(tmp_path / "c/annotations/captions_train2017.json", "{}")
    assert load_dataset("coco", tmp_path / "c", "train").about() == dict(
        name="coco-train", images=1, num_classes=None, of=118287)


def test_images_of_imagenet_come_from_each_class_in_turn(tmp_path):
    for i, name in enumerate(("n01/n01_2.JPEG", "n01/n01_1.JPEG", "n02/n02_1.JPEG")): put(tmp_path / "train" / name, photo(i))
    data = load_dataset("imagenet", tmp_path, "train")
    assert [path.stem for path in data.files] == ["n01_1", "n02_1", "n01_2"] and data[0][1] is None
    with pytest.raises(ValueError, match="has no masks to score against"): as_data(data, masks=True)


# Scores

@pytest.mark.parametrize("kind, name", [("real", n) for n in REAL] + [("tree", n) for n in TREES])
def test_masks_score_all_against_themselves_and_less_when_shifted(kind, name, tmp_path):
    data = load_dataset(name, real(REAL[name][0]), REAL[name][1]).first(8) if kind == "real" else tree(name, tmp_path)
    n = data.num_classes
    truth = torch.cat([data[i][1].flatten() for i in range(len(data))]).long()
    def miou(labels): return 100 * np.nanmean(class_iou(confusion_matrix(labels, truth, n, n), np.arange(n)))
    assert miou(truth.clip(max=n - 1)) == 100 and miou((truth + 1) % n) == 0


def test_a_head_learned_on_voc_is_scored_on_other_photographs(voc_root, tiny):
    "Few images, marked as such; the numbers mean nothing."
    learn = load_dataset("voc", voc_root, "train", masks=False).first(16)
    debiased = RASA().fit(tiny, learn, 96).attach(tiny, "after")
    assert debiased.head.metadata["fitted_on"]["data"]["of"] == 1464
    few = LEOPART.replace(n_init=1, max_iter=5, points_per_centroid=40, draws=2)
    for name, k in dict(ade20k=150, coco_stuff27=27).items():
        score = load_dataset(name, real(REAL[name][0]), REAL[name][1])
        result = overcluster({"before": tiny, "after": debiased}, score, k, few, 0, 96, examples=())
        assert f"{name}-{REAL[name][1]}, {how_many(score.about())}." in result.caption
        assert f" of {score.full_size:,} images" in result.caption and result.absent
        assert result.to_dict()["data"]["of"] == score.full_size


# What results remember

def test_a_part_of_a_split_is_marked_however_it_is_cut(tmp_path):
    data = load_dataset("camvid11", camvid(tmp_path), "test")
    for some in (data, data.first(1), data.images_only(), data.first(2).first(1)):
        assert some.about()["of"] == some.describe()["of"] == 233
    data.full_size = 2   # a whole split
    assert "of" not in data.about() and data.first(1).about()["of"] == 2
    assert how_many(data.about()) == "2 images" and how_many(data.first(1).about()) == "1 of 2 images"


def test_other_classes_of_the_same_files_are_other_content(tmp_path):
    root = coco_stuff(tmp_path)
    stuff, things = (load_dataset(name, root, "val") for name in ("coco_stuff15", "coco_thing12"))
    assert content(stuff) == content(things) and content(stuff, masks=True) != content(things, masks=True)


def test_images_are_read_without_masks(tmp_path):
    put(tmp_path / "ADEChallengeData2016/images/training/1.jpg", photo(1))
    data = load_dataset("ade20k", tmp_path, "training", masks=False)
    assert data[0][1] is None and data.about() == dict(name="ade20k-training", images=1, num_classes=None, of=20210)
    assert data.item_content(0, True) == file_content(data.files[0])


def test_trainaug_has_its_masks_beside_those_of_voc(tmp_path):
    voc = tmp_path / "VOCdevkit/VOC2012"
    put(voc / "JPEGImages/a.jpg", photo(1))
    put(voc / "ImageSets/Segmentation/trainaug.txt", "a\n")
    with pytest.raises(ValueError, match="1 of 1 images have no mask in .*SegmentationClassAug.*masks=False"):
        load_dataset("voc", tmp_path, "trainaug")
    assert load_dataset("voc", tmp_path, "trainaug", masks=False).about()["of"] == 10582
    put(voc / "SegmentationClassAug/a.png", mask((0, 1, 20, 255)))
    assert load_dataset("voc", tmp_path, "trainaug")[0][1].max() == 255


def test_the_table_holds_what_is_known():
    table = list_datasets()
    assert list(table.index) == list(DATASETS)
    assert (table.classes[["coco_stuff27", "camvid11", "coco"]] == [27, 11, 0]).all()
    assert table.images["ade20k"] == "training 20,210, validation 2,000"
    for name, known in DATASETS.items():
        assert known.learn in known.splits and known.score in (*known.splits, None), name
        if known.ids: assert {*range(len(known.classes)), 255} >= {*known.ids.values()} >= {*range(len(known.classes))}, name


# What is nearly right

def moved(root, path, to):
    (root / path).rename(root / to)
    return root


def without(root, path):
    "Removes a file, or a folder with all in it."
    for below in sorted((root / path).rglob("*"), reverse=True):
        below.unlink() if below.is_file() else below.rmdir()
    (root / path).unlink() if (root / path).is_file() else (root / path).rmdir()
    return root


CITY, ADE, COCO = "gtFine/val", "ADEChallengeData2016/annotations/validation", "annotations/val2017"
NEAR = {   # what is wrong: dataset, split, how it comes about, what is said
    "images without masks": (
        "ade20k", "validation", lambda r: without(ade20k(r), ADE),
        "no masks of ade20k-validation.*learning needs none: masks=False"),
    "some images without masks": (
        "camvid11", "test", lambda r: without(camvid(r), "CamVid/testannot/0001TP_000.png"),
        "1 of 2 images have no mask in .*testannot .masks=False reads images alone.: 0001TP_000"),
    "train ids instead": (
        "cityscapes", "val", lambda r: cityscapes(r, "labelTrainIds", (0, 1, 255, 255)),
        "there are train ids instead: load_dataset.'cityscapes_trainids'"),
    "train ids in files of label ids": (
        "cityscapes", "val", lambda r: cityscapes(r, values=(0, 1, 18, 255)),
        r"labelIds.png holds the values \[255\].*these are train ids"),
    "label ids in files of train ids": (
        "cityscapes_trainids", "val", lambda r: cityscapes(r, "labelTrainIds", (0, 7, 33, 33)),
        r"holds the values \[33\], expected 0 to 18, or 255 for void; these are label ids"),
    "label 0 taken away from ADE20K": (
        "ade20k", "validation", lambda r: ade20k(r, (0, 1, 149, 255)),
        r"holds the values \[255\], expected 0 to 150; label 0 is already removed"),
    "label 0 taken away from Pascal Context": (
        "pascal_context59", "val", lambda r: pascal_context(r, (0, 1, 58, 255)), "label 0 is already removed"),
    "a panoptic PNG": (
        "coco_stuff27", "val", lambda r: write(coco_stuff(r), **{f"{COCO}/000000000139.png": photo(3)}),
        "got mode RGB.*It may be a panoptic PNG"),
    "the panoptic folder": (
        "coco_stuff27", "val", lambda r: moved(coco_stuff(r), COCO, "annotations/panoptic_val2017"),
        "no masks of coco_stuff27-val.*this is the panoptic edition"),
    "categories, not less one": (
        "coco_stuff15", "val", lambda r: coco_stuff(r, (1, 92, 182, 0)), r"holds the values \[182\].*not less one"),
    "masks of 171 classes": (
        "coco_stuff27", "val", lambda r: moved(coco_stuff(r), f"{COCO}/000000000139.png", f"{COCO}/000000000139_labelTrainIds.png"),
        "converted to 171 classes"),
    "the full ADE20K": (
        "ade20k", "training", lambda r: write(r, **{"ADE20K_2021_17_01/index.txt": "x"}), "this is the full ADE20K"),
    "Pascal Context as .mat": (
        "pascal_context59", "val", lambda r: write(without(pascal_context(r), "VOCdevkit/VOC2010/SegmentationClassContext"),
                                                  **{"VOCdevkit/VOC2010/trainval/2008_000000.mat": "x"}), "459 categories, as .mat"),
    "an image that the list names is gone": (
        "pascal_context59", "val", lambda r: without(pascal_context(r), "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg"),
        "1 of 2 images that the list names are not in .*: 2008_000002"),
    "no list": (
        "pascal_context59", "val", lambda r: without(pascal_context(r), "VOCdevkit/VOC2010/ImageSets"),
        "no list of pascal_context59-val"),
    "CamVid in 32 colors": (
        "camvid11", "test", lambda r: write(camvid(r), **{"CamVid/testannot/0001TP_000.png": photo(3)}),
        "It may be of the edition with 32 colored classes"),
    "one folder too low": (
        "ade20k", "validation", lambda r: ade20k(r) / "ADEChallengeData2016", "give the folder that holds it"),
    "one folder too high": (
        "cityscapes", "val", lambda r: cityscapes(r / "cityscapes").parent, "it lies one folder below: give '.*cityscapes'"),
}


@pytest.mark.parametrize("wrong", NEAR)
def test_what_is_nearly_right_is_named(wrong, tmp_path):
    name, split, make, said = NEAR[wrong]
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){said}"):
        load_dataset(name, make(tmp_path), split)


def test_what_is_missing_is_drawn(tmp_path):
    root = without(ade20k(tmp_path), ADE)
    with pytest.raises(FileNotFoundError) as error: load_dataset("ade20k", root, "validation")
    lines = str(error.value).splitlines()
    assert "        images/" in lines and "            validation/    <- not there" in lines
    assert lines[-1].startswith("Get it from data.csail.mit.edu")


@pytest.mark.parametrize("request_, said", [
    (("coco_stuf27", "data", "val"), "did you mean 'coco_stuff27'"), (("ade20k", "data", "val"), "ade20k has 'training', 'validation'"),
    (("mine", "data", "val"), "expected one of voc, ade20k.*a folder of your own is read by ImageFolder")])
def test_names_that_are_none_are_refused(request_, said):
    with pytest.raises(ValueError, match=said): load_dataset(*request_)
    with pytest.raises(ValueError, match="ade20k is not fetched: get it from"): load_dataset("ade20k", "data", "training", download=True)


def test_folders_of_public_sets_are_no_folders_of_images(tmp_path):
    for make in (cityscapes, camvid, ade20k):
        with pytest.raises(ValueError, match="images and masks: load_dataset"): as_data(make(tmp_path / make.__name__))


def test_every_mask_of_ade20k_is_void_or_a_class():
    assert ADE20K_IDS[0] == 255 and sorted(ADE20K_IDS.values()) == [*range(150), 255]
    assert COCO_15["ids"][0] == 255 and rasa_nb.datasets.COCO_12["ids"][181] == 255
