"""What several test files share: real data and weights, images, and the smallest encoders."""
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# real data and weights lie beside the project, or where RASA_NB_SHARED says
shared = Path(os.environ.get("RASA_NB_SHARED") or Path(__file__).parent.parent.parent / "shared")


@pytest.fixture(scope="session")
def voc_root():
    root = shared / "data"
    if not (root / "VOCdevkit" / "VOC2012").is_dir(): pytest.skip(f"no Pascal VOC at {root}")
    return root


@pytest.fixture(scope="session")
def deit_file():
    path = shared / "weights" / "deit_tiny_patch16_224_fp16.safetensors"
    if not path.exists(): pytest.skip(f"no DeiT-Tiny weights at {path}")
    return path


@pytest.fixture(scope="session")
def tiny():
    "The bundled encoder; it is shared, so a test that changes weights takes a copy."
    from rasa_nb.encoders import load_encoder
    return load_encoder("tiny", device="cpu")


@pytest.fixture(scope="session")
def scenes():
    "Forty images to learn from."
    from rasa_nb.scenes import Scenes
    return Scenes("train", 40)


@pytest.fixture
def image_folders(tmp_path, scenes):
    "A folder with three scenes as files: `images/a/0.png`, `masks/a/0.png`, ..."
    from PIL import Image
    for name in ("images/a", "masks/a"): (tmp_path / name).mkdir(parents=True)
    for i in range(3):
        image, mask = scenes[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"images/a/{i}.png")
        Image.fromarray(mask.numpy()).save(tmp_path / f"masks/a/{i}.png")
    return tmp_path


@pytest.fixture
def voc_tree(tmp_path, scenes):
    "A folder with the layout of Pascal VOC, of three scenes: image `a` to learn from, `b` and `c` to score."
    return make_voc(tmp_path / "data", scenes)


def make_voc(root, scenes):
    from PIL import Image
    voc = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (voc / name).mkdir(parents=True)
    for name, (image, mask) in zip("abc", (scenes[i] for i in range(3))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(voc / f"JPEGImages/{name}.jpg")
        Image.fromarray(mask.numpy()).save(voc / f"SegmentationClass/{name}.png")
    for split, names in dict(train="a", val="b\nc").items():
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text(names)
    return root


def change_pixels(path):
    "Moves the rows of an image or a mask, and changes nothing else about its file."
    import numpy as np
    from PIL import Image
    with Image.open(path) as file: pixels = np.array(file)
    Image.fromarray(np.roll(pixels, 9, 0)).save(path)


@pytest.fixture(params=["a file", "a read-only folder", "a folder of the system's own"])
def closed_place(request, tmp_path):
    "A path below which no file can be made."
    if request.param == "a file":
        (tmp_path / "taken").write_text("a file")
        return tmp_path / "taken" / "runs"
    if request.param == "a read-only folder":
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK): pytest.skip("no mode stops root, as whom these tests run")
        return folder / "runs"
    if not Path("/proc/self").is_dir(): pytest.skip("there is no /proc on this system")
    return Path("/proc/runs")


@contextmanager
def no_file_beyond(size):
    "Lets the system refuse what is written beyond `size` bytes of a file, as it does on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True, scope="session")
def hashes_of_their_own(tmp_path_factory):
    "Hashes of files are remembered for these tests alone."
    os.environ["RASA_NB_CACHE"] = str(tmp_path_factory.mktemp("contents"))


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)


def encoder_of(tokens, embed_dim, patch_size=8, image_size=48, name="toy"):
    "An encoder from a function of images [B, 3, H, W] in [0, 1] that gives tokens [B, gh, gw, embed_dim]."
    from rasa_nb.patch_encoder import PatchEncoder
    plain = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    def grid(model, images): return tokens(images)
    return PatchEncoder(torch.nn.Identity(), grid, embed_dim, patch_size, image_size, name=name, **plain)


def color_encoder(patch_size=8, image_size=48, name="color"):
    "The smallest encoder there is: the mean color of each patch."
    pool = torch.nn.AvgPool2d(patch_size)
    return encoder_of(lambda images: pool(images).permute(0, 2, 3, 1), 3, patch_size, image_size, name)
