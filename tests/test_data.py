"""Datasets: what holds for any seed, and files as people have them."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from rasa_nb.data import (Evaluation, ImageFolder, ImageMaskFolder, Scenes, Transformed, VOCSegmentation, augmentation, batches)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), i=st.integers(0, 10**6), split=st.sampled_from(["train", "val", "test"]), size=st.integers(16, 130))
def test_a_scene_is_valid_and_repeatable(seed, i, split, size):
    data = Scenes(split, n=10**6 + 1, seed=seed, size=size)
    image, mask = data[i]
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and mask.shape == (size, size)
    assert set(mask.unique().tolist()) <= {*range(data.num_classes), 255} and (mask != 255).float().mean() > .3
    assert torch.equal(image, data[i][0]) and torch.equal(mask, data[i][1])


def test_splits_do_not_overlap():
    seen = {s: {Scenes(s)[i][0].numpy().tobytes() for i in range(150)} for s in Scenes.splits}
    assert all(len(v) == 150 for v in seen.values()) and len(set.union(*seen.values())) == 450


def test_tie_is_the_share_that_follows_the_layout():
    def share_of_upper_group_above(tie):
        masks = torch.stack([Scenes("val", tie=tie)[i][1][:8] for i in range(150)])
        return ((masks < 4).sum() / (masks != 255).sum()).item()
    free, tied = share_of_upper_group_above(0), share_of_upper_group_above(1)
    assert abs(free - 1 / 3) < .1 and tied > .8


def test_scene_colors_do_not_tell_the_class():
    "Mean color of a class, over many images, is the same for all classes within sampling error."
    sums, counts = np.zeros((12, 3)), np.zeros(12)
    for image, mask in (Scenes("train")[i] for i in range(300)):
        for c in set(mask.unique().tolist()) - {255}:
            sums[c] += image[:, mask == c].float().mean(1).numpy(); counts[c] += 1
    means = sums / counts[:, None]
    assert (np.abs(means - means.mean(0)) < 30).all(), means  # of 255; a single image's color has a std of about 55


def test_augmentation_does_not_depend_on_order_or_workers():
    data = Transformed(Scenes("train", 12), augmentation(32), seed=5)
    torch.manual_seed(1); one = torch.cat([x for x, _ in batches(data, 5)])
    torch.manual_seed(2); two = torch.cat([x for x, _ in batches(data, 4, num_workers=2)])
    assert torch.equal(one, two)
    assert not torch.equal(one[0], Transformed(Scenes("train", 12), augmentation(32), seed=6)[0][0])


def test_augmentation_unties_content_and_place():
    "A picture bright above and dark below is, augmented, as often the other way round or sideways."
    class Gradient(Scenes):
        def load(self, i): return torch.linspace(255, 0, 96).to(torch.uint8).view(1, 96, 1).expand(3, 96, 96).clone(), super().load(i)[1]
    images = torch.cat([x for x, _ in batches(Transformed(Gradient("train", 200), augmentation(24)), 50)]).mean(1)
    images = images - images.mean((1, 2), keepdim=True)
    mean, spread = images.mean(0), images.std()
    assert mean.abs().max() < .25 * spread


def test_evaluation_keeps_mask_ids():
    image, mask = Scenes("val")[0]
    for size in (40, 100, (50, 130)):
        small = Evaluation(48, size)(image, mask)[1]
        assert set(small.unique().tolist()) <= set(mask.unique().tolist())


def test_voc(voc_root):
    for split in ("train", "val"):
        data = VOCSegmentation(voc_root, split)
        image, mask = data[0]
        assert len(data) > 0 and image.shape[1:] == mask.shape and set(mask.unique().tolist()) <= {*range(21), 255}
    with pytest.raises(ValueError, match="split='test'.*found .*'train'.*'val'"): VOCSegmentation(voc_root, "test")


def test_voc_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"): VOCSegmentation(tmp_path)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, capsys):
    import torchvision
    def broken(root, **_):
        (tmp_path / next(tmp_path.iterdir()) / "half.tar").write_bytes(b"x" * 100)
        raise OSError("connection lost")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", broken)
    with pytest.raises(ConnectionError, match="connection lost.*by hand"): VOCSegmentation(tmp_path, download=True)
    assert list(tmp_path.iterdir()) == [] and "2.0 GB" in capsys.readouterr().out


def test_a_download_is_moved_into_place(tmp_path, monkeypatch, voc_root):
    import shutil, torchvision
    def fake(root, **_): shutil.copytree(voc_root / "VOCdevkit/VOC2012/ImageSets", f"{root}/VOCdevkit/VOC2012/ImageSets")
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", fake)
    assert len(VOCSegmentation(tmp_path, download=True)) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["VOCdevkit"]


@pytest.fixture
def folder(tmp_path):
    for name in ("images/a", "masks/a"): (tmp_path / name).mkdir(parents=True)
    for i in range(3):
        image, mask = Scenes("train")[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"images/a/{i}.png")
        Image.fromarray(mask.numpy()).save(tmp_path / f"masks/a/{i}.png")
    return tmp_path


def test_grey_rgba_and_16_bit_images_become_rgb(folder):
    image = Scenes("train")[0][0].permute(1, 2, 0).numpy()
    Image.fromarray(image[..., 0]).save(folder / "images/grey.png")
    Image.fromarray(np.dstack([image, image[..., :1]])).save(folder / "images/rgba.png")
    data = ImageFolder(folder / "images")
    assert len(data) == 5 and all(im.shape == (3, 96, 96) and im.dtype == torch.uint8 for im, _ in (data[i] for i in range(5)))


def test_a_cut_file_is_named_or_left_out(folder):
    whole = (folder / "images/a/1.png").read_bytes()
    (folder / "images/a/1.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="1.png cannot be read"): [ImageFolder(folder / "images")[i] for i in range(3)]
    with pytest.warns(UserWarning, match="1 of 3 files left out: 1.png"): assert len(ImageFolder(folder / "images", "skip")) == 2


def test_hidden_files_are_passed_over_and_others_named(folder):
    (folder / "images/.DS_Store").write_bytes(b"x")
    assert len(ImageFolder(folder / "images")) == 3
    (folder / "images/notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="1 of 4 files.*notes.txt.*on_error='skip'"): ImageFolder(folder / "images")


def test_masks_that_do_not_fit(folder):
    own = lambda **k: ImageMaskFolder(folder / "images", folder / "masks", **{"classes": 12, **k})
    assert torch.equal(own()[2][1], Scenes("train")[2][1])
    with pytest.raises(ValueError, match="expected 0 to 2 or 255"): [own(classes=3)[i] for i in range(3)]
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(folder / "masks/a/0.png")
    with pytest.raises(ValueError, match="0.png is no mask: expected one channel"): own()[0]
    (folder / "masks/a/2.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 images have no mask.*2.png"): own()


def test_bad_arguments():
    for call, match in [(lambda: Scenes("dev"), "expected one of"), (lambda: Scenes(n=0), "at least one"), (lambda: Scenes(tie=2), "between 0 and 1"),
                        (lambda: Scenes(size=4), "at least 16"), (lambda: Scenes().first(0), "at least one"), (lambda: ImageFolder("/nowhere/at/all"), "no folder")]:
        with pytest.raises((ValueError, FileNotFoundError), match=match): call()
    with pytest.raises(IndexError): Scenes(n=3)[3]
    assert torch.equal(Scenes(n=3)[-1][0], Scenes(n=3)[2][0])
