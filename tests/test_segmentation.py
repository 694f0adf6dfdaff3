"""Overclustering against a plain implementation that shares no code with it, and the promises of its call."""
import html
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from rasa_nb import segmentation
from rasa_nb.data import SegmentationData, VOCSegmentation
from rasa_nb.reading import Evaluation, Reading, Transformed, batches
from rasa_nb.encoders import load_encoder
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.matching import FRANCA, LEOPART, class_iou, confusion_matrix, match_clusters
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import estimate_memory, overcluster, overcluster_tokens

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("benchmark_overcluster", root / "benchmarks" / "overcluster.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
quick = LEOPART.replace(n_init=1)


def tokens_and_masks(encoder, data, *sizes):
    parts = list(encoder.encode(Transformed(data, Evaluation(*sizes))))
    return torch.cat([z for z, _ in parts]), torch.cat([m for _, m in parts]), data.classes


@pytest.fixture(scope="module")
def scene_tokens(): return tokens_and_masks(load_encoder("tiny", device="cpu"), Scenes("val", 40), 96, 60)


@pytest.fixture(scope="module")
def voc_tokens(voc_root, deit_file):
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=deit_file, device="cpu")
    return tokens_and_masks(encoder, VOCSegmentation(voc_root, "val").first(30), 224, 100)


class Counting(torch.nn.Module):
    "Random projections of patches' mean colors; counts the images of each call."
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
        self._calls = []

    def forward(self, images):
        self._calls.append(len(images))
        return F.avg_pool2d(images, 8).permute(0, 2, 3, 1) @ self.weight


def counting_encoder(tokens=lambda model, images: model(images), name="counting"):
    return PatchEncoder(Counting(), tokens, 16, 8, name=name)


class Made(SegmentationData):
    "Random images with the masks that are given."
    classes, name = ("a", "b", "c"), "made"
    def __init__(self, masks, pixels=16): self.masks, self.pixels = masks, pixels
    def __len__(self): return len(self.masks)
    def load(self, i):
        image = torch.randint(255, (3, self.pixels, self.pixels), dtype=torch.uint8)
        return image, self.masks[i]


def filled(value, pixels=16): return list(torch.full((4, pixels, pixels), value, dtype=torch.uint8))
def random_masks(n): return list(torch.randint(3, (n, 16, 16), dtype=torch.uint8))


def close_within_seeds(ours, theirs):
    "Means over seeds no farther apart than one seed's score usually is from another's."
    ours, theirs = np.array(ours), np.array(theirs)
    return abs(ours.mean() - theirs.mean()) <= (ours.std(ddof=1) + theirs.std(ddof=1)) / 2


# Against a plain implementation
@pytest.mark.parametrize("which, k", [("scene_tokens", 12), ("scene_tokens", 40), ("voc_tokens", 21)])
def test_franca_agrees_with_really_upsampling(which, k, request):
    tokens, masks, classes = request.getfixturevalue(which)
    protocol, seeds = FRANCA.replace(n_init=1), range(3)
    matching = "hungarian" if k == len(classes) else "many_to_one_iou"
    ours = overcluster_tokens({"z": tokens}, masks, classes, k, protocol, seeds).frame.miou.to_numpy()
    points, plain = benchmark.plain_points(tokens, tuple(masks.shape[1:])), []
    for seed in seeds:
        clusters = benchmark.plain_clusters(points, k, seed, n_init=1)
        confusion = confusion_matrix(clusters, masks, k, len(classes))
        plain.append(100 * np.nanmean(class_iou(confusion, match_clusters(confusion, matching))))
    assert close_within_seeds(ours, plain)
    assert np.median(np.abs(ours - plain)) < .5   # the same seed draws the same points: most end alike


def test_the_benchmark_compares_like_with_like(scene_tokens):
    tokens, masks = (a[:8] for a in scene_tokens[:2])
    scores, labels = benchmark.plain_overcluster(tokens, masks, (12, 20), 12)
    assert set(scores[12]) == {"hungarian"} and set(scores[20]) == {"precision", "iou"}
    assert benchmark.from_counts(labels, masks, scores, 12) < 1e-9
    others = {k: np.roll(v, 999) for k, v in labels.items()}
    assert benchmark.from_counts(others, masks, scores, 12) > .1


@pytest.mark.parametrize("free, expected",
                         [(12e9, (445, 192)), (4e9, (445, 64)), (1e8, (13, 64)), (1, (2, 64))])
def test_the_benchmark_scales_down_to_the_memory_there_is(free, expected):
    assert benchmark.affordable(free) == expected


def test_faiss_agrees(scene_tokens):
    pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu to compare with it")
    tokens, masks, classes = scene_tokens
    def score(library):
        protocol = LEOPART.replace(library=library, n_init=2)
        return overcluster_tokens({"z": tokens}, masks, classes, 40, protocol, range(6)).frame.miou
    assert close_within_seeds(score("sklearn"), score("faiss"))


# The same numbers again
@pytest.mark.parametrize("protocol", [LEOPART, FRANCA], ids=lambda p: p.name)
def test_one_thread_gives_the_same_bytes(protocol, scene_tokens):
    tokens, masks, classes = scene_tokens
    protocol = protocol.replace(n_init=2)
    def once(): return overcluster_tokens({"z": tokens}, masks, classes, 12, protocol, (0, 1)).runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1): pairs = list(zip(once(), once()))
    finally: torch.set_num_threads(threads)
    assert all(a.confusion.tobytes() == b.confusion.tobytes() for a, b in pairs)


def test_more_threads_stay_within_the_documented_tolerance(scene_tokens):
    tokens, masks, classes = scene_tokens
    def scores(threads):
        with threadpool_limits(threads):
            return overcluster_tokens({"z": tokens}, masks, classes, 12, quick).frame.miou
    assert close_within_seeds(scores(1), scores(2))


# At what size
def test_scenes_are_scored_at_their_own_size_and_the_caption_says_so():
    protocol = quick.replace(image_size=448)
    result = overcluster(counting_encoder(), Scenes("val", 4), 12, protocol, 0, reading=224)
    assert result.protocol.image_size == 96 and "image_size=96 (the data's own)" in result.caption
    assert result.caption in result._repr_html_() and result.caption in result.to_markdown()


def test_a_size_that_means_something_else_is_ignored():
    data = Made(random_masks(48))
    data.size = 48   # how many there are
    protocol = quick.replace(image_size=32, mask_size=16)
    result = overcluster(counting_encoder(), data, 3, protocol, seeds=0)
    assert result.protocol.image_size == 32 and "image_size=32," in result.caption
    assert result.runs[0].confusion.sum() == 48 * 16 * 16


def test_the_size_of_the_reading_replaces_that_of_the_protocol():
    encoder = counting_encoder(lambda model, images: model(images[..., :24, :32]))
    protocol = quick.replace(mask_size=(30, 70))
    result = overcluster(encoder, Made(random_masks(6)), 3, protocol, 0, reading=(24, 32))
    assert result.protocol.image_size == (24, 32) and result.runs[0].labels.shape == (3, 30, 70)


# One call for several encoders, stored tokens, interrupted runs
def test_attached_heads_share_the_encoding_and_score_as_if_encoded():
    base, data = counting_encoder(), Scenes("val", 12)
    head = RASAHead(torch.randn(16, 16), torch.randn(12, 12, 16))
    twice = DebiasedEncoder(DebiasedEncoder(base, head), RASAHead(torch.diag(torch.arange(1., 17))))
    encoders, request = {"base": base, "twice": twice}, (12, FRANCA.replace(mask_size=(40, 50)), (0, 1))
    result = overcluster(encoders, data, *request, Reading(batch_size=12))
    assert base.model._calls == [12]
    shown = batches(Transformed(data, Evaluation(96, (40, 50))))
    tokens, masks = zip(*((twice(images).detach(), masks) for images, masks in shown))
    alone = overcluster_tokens({"twice": torch.cat(tokens)}, torch.cat(masks), data.classes, *request)
    assert abs(alone.frame.miou.mean() - result.frame.query("encoder == 'twice'").miou.mean()) < 1


def test_encoders_of_several_grids_are_scored_together():
    def pooled(model, images): return F.avg_pool2d(images, 16).permute(0, 2, 3, 1)
    coarse = PatchEncoder(torch.nn.Identity(), pooled, 3, 16, name="coarse")
    result = overcluster({"fine": counting_encoder(), "coarse": coarse}, Scenes("val", 10), 12, quick, 0)
    assert result.encoders == ["fine", "coarse"] and (result.frame.miou > 0).all()


@pytest.mark.parametrize("store", ["float16", "memmap"])
def test_smaller_stores_score_alike(store):
    encoder, data = counting_encoder(), Scenes("val", 12)
    def scores(kind): return overcluster(encoder, data, 12, quick, range(4), store=kind).frame.miou
    assert close_within_seeds(scores("float32"), scores(store))


def test_memory_is_said_where_it_matters_and_where_progress_is_shown(capsys, monkeypatch):
    def said(**reading):
        overcluster(counting_encoder(), Scenes("val", 4), 12, quick, 0, Reading(**reading))
        return capsys.readouterr().out
    assert said() == ""
    assert re.search(r"4 images, tokens 12x12x16: about 0\.\d\d GB of memory .* float32", said(progress=True))
    monkeypatch.setattr(segmentation, "estimate_memory", lambda *request: dict(tokens=2e9))
    assert "about 2.00 GB" in said()


def test_tokens_are_stored_smaller_where_memory_is_short(monkeypatch):
    request = (1000, [(14, 14, 768)], 100, LEOPART)
    def chosen(free):
        monkeypatch.setattr(segmentation.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return segmentation.choose_store("auto", *request)
    need = {kind: 2 * sum(estimate_memory(*request, kind).values()) for kind in ("float32", "float16")}
    assert chosen(need["float32"] + 1) == "float32" and chosen(need["float32"] - 1) == "float16"
    assert chosen(need["float16"] - 1) == "memmap" and chosen(1) == "memmap"


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch):
    encoder, data, made = counting_encoder(), Scenes("val", 10), []
    def call(): return overcluster(encoder, data, 12, quick, range(4), folder=tmp_path)
    real = segmentation.kmeans_centers
    def third_time_interrupted(*args):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(args)
        return real(*args)
    monkeypatch.setattr(segmentation, "kmeans_centers", third_time_interrupted)
    with pytest.raises(KeyboardInterrupt): call()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(segmentation, "kmeans_centers", lambda *args: made.append(args) or real(*args))
    resumed = call()
    assert len(made) == 4 and resumed.frame.seed.tolist() == [0, 1, 2, 3]
    encodings = len(encoder.model._calls)
    monkeypatch.setattr(segmentation, "cluster_runs", None)     # all there: nothing is computed or encoded
    again = call()
    assert again.frame.equals(resumed.frame) and again.controls.equals(resumed.controls)
    assert len(encoder.model._calls) == encodings


def test_other_weights_data_or_protocols_are_not_taken_for_finished(tmp_path):
    encoder = counting_encoder()
    def files(n=10, protocol=quick):
        overcluster(encoder, Scenes("val", n), 12, protocol, 0, folder=tmp_path)
        return len(list(tmp_path.glob("*.npz"))) - len(list(tmp_path.glob("cells*.npz")))
    assert files() == 1
    with torch.no_grad(): encoder.model.weight += 1
    assert files() == 2 and files(11) == 3 and files(protocol=quick.replace(max_iter=3)) == 4
    for read_later in dict(matching="many_to_one_iou"), dict(folds=3), dict(draws=9):
        assert files(protocol=quick.replace(**read_later)) == 4   # only how counts are read


def test_a_damaged_file_is_named(tmp_path):
    def call(): return overcluster(counting_encoder(), Scenes("val", 10), 12, quick, 0, folder=tmp_path)
    call()
    file, = set(tmp_path.glob("*.npz")) - set(tmp_path.glob("cells*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is no saved run: delete it"): call()


def test_a_run_of_the_first_version_is_refused_by_name(tmp_path):
    path = tmp_path / "old.npz"
    np.savez_compressed(path, confusion=np.eye(3, dtype=int), labels=np.zeros((0, 1, 1), np.uint16))
    with pytest.raises(ValueError, match="old.npz is no saved run: delete it .*written by version 0.1"):
        segmentation.read_run(path, "a", 3, 0)


# Results
def test_change_is_paired_by_seed_and_tables_have_mean_and_std(scene_tokens):
    tokens, masks, classes = scene_tokens
    result = overcluster_tokens({"a": tokens, "b": tokens[..., :20]}, masks, classes, 12, quick, range(4))
    a, b = (result.frame.query("encoder == @e").miou.to_numpy() for e in "ab")
    mean, low, high = segmentation.paired_interval(b - a)
    assert tuple(result.change.loc[0, ["mean", "low", "high"]]) == pytest.approx((mean, low, high))
    assert tuple(result.table.loc["a", 12][["mean", "std"]]) == pytest.approx((a.mean(), a.std()))
    c = result.change.iloc[0]
    first, second = result.summary.iloc[0], result.summary.iloc[1]
    assert first["mIoU"] == f"{a.mean():.1f} ± {a.std():.1f}" and first["change"] == ""
    over_images = f"[{c.images_low:+.1f}, {c.images_high:+.1f}]"
    assert second["change"] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {over_images}"
    held_out = result.frame.set_index("encoder").held_out
    assert c.held_out == pytest.approx((held_out["b"].mean() - held_out["a"].mean()))


def test_one_seed_has_no_interval_and_absent_classes_are_named(scene_tokens):
    tokens, masks, classes = scene_tokens
    classes = [*classes, "never seen"]
    result = overcluster_tokens({"a": tokens, "b": tokens}, masks, classes, 13, FRANCA.replace(n_init=1), 0)
    assert math.isnan(result.change.low[0]) and result.summary.iloc[1]["change"] == "+0.0 [+0.0, +0.0]"
    assert result.absent == ("never seen",) and "left out: never seen" in result.caption
    assert "never seen" not in result.per_class.columns and result.to_dict()["scores"][0]["iou"][-1] is None


def test_background_is_the_share_of_clusters():
    masks = torch.zeros(4, 8, 8, dtype=torch.uint8)
    masks[:, :2] = 1
    z = .001 * torch.randn(4, 8, 8, 2)
    z[:, :2, :, 0] += 1
    z[:, 5:, :, 1] += 1
    result = overcluster_tokens({"z": z}, masks, ["background", "thing"], k=3, seeds=0)
    assert result.frame.background[0] == pytest.approx(2 / 3) and result.frame.miou[0] == 100


# Names from other images
def planted(n=42):
    """Tokens that tell nothing, the image, or the class; and masks.
    An image shows one of three classes and a strip of the next, turned, so that cells tell nothing."""
    rng = np.random.default_rng(0)
    masks = (torch.arange(n) % 3).view(-1, 1, 1).repeat(1, 8, 8)
    masks[:, :2] = (masks[:, :2] + 1) % 3
    masks = torch.stack([torch.rot90(mask, int(turn)) for mask, turn in zip(masks, rng.integers(4, size=n))])
    noise = .01 * torch.from_numpy(rng.normal(size=(n, 8, 8, n))).float()
    image = torch.eye(n)[:, None, None].expand(n, 8, 8, n)
    return dict(nothing=noise, image=noise + image, of_class=noise + F.one_hot(masks, n)), masks


def test_clusters_of_single_images_win_the_published_column_only_and_the_result_says_so():
    tokens, masks = planted()
    result = overcluster_tokens({name: tokens[name] for name in ("nothing", "image")}, masks, "abc", 170,
                                quick, range(2))
    found, controls = result.table.loc["image", 170], result.controls.set_index("control")
    single, constant = controls.loc["a cluster per image"], controls.loc["one cluster"]
    assert found["mean"] == pytest.approx(single.miou, abs=5) and found["mean"] > 55
    assert found["held_out"] == pytest.approx(constant.held_out, abs=4) and constant.held_out < 20
    said = " ".join(result.notes)
    assert "image, K=170: the gain does not carry over to other images" in said
    assert re.search(r"follow single images more than before: NMI 0\.\d\d -> 0\.[89]\d", said)
    for shown in (repr(result), result.to_markdown(), html.unescape(result._repr_html_())):
        assert all(note in shown for note in result.notes)
    assert result.to_dict()["notes"] == result.notes


def test_clusters_of_classes_win_both_columns_and_nothing_is_said():
    tokens, masks = planted()
    encoders = {name: tokens[name] for name in ("nothing", "of_class")}
    result = overcluster_tokens(encoders, masks, "abc", (3, 12), quick.replace(n_init=5), 0)
    assert (result.frame.query("encoder == 'of_class'")[["miou", "held_out"]] == 100).all().all()
    assert result.change.held_out_images_low.min() > 40 and "of_class" not in " ".join(result.notes)


def test_images_of_a_group_do_not_name_each_other():
    tokens, masks = planted()
    z, masks = (torch.cat([a, a]) for a in (tokens["image"], masks))   # every image has a copy
    def scored(groups): return overcluster_tokens({"z": z}, masks, "abc", 170, quick, 0, groups=groups)
    together = scored([*range(42)] * 2)
    assert scored(None).frame.held_out[0] > together.frame.held_out[0] + 20
    assert "of 42 groups of images" in together.caption
    one = scored(["same"] * 84)
    assert math.isnan(one.frame.held_out[0]) and one.frame.miou[0] > 55
    assert "one group of images" in one.notes[0] and one.summary["held out"][0] == "nan ± nan"


def test_groups_of_the_data_are_taken():
    data = Made(random_masks(8))
    data.groups = list("aabbccdd")
    result = overcluster(counting_encoder(), data, 3, quick.replace(image_size=16, mask_size=16), 0)
    assert result.image_groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and result.folds.max() == 3


def test_both_columns_are_given_over_classes_that_five_images_show():
    tokens, masks = planted()
    masks[0, :4] = 3   # a class that a single image shows
    result = overcluster_tokens({"z": tokens["of_class"]}, masks, "abcd", 20, quick, 0)
    run, row = result.runs[0], result.frame.iloc[0]
    assert result.held_out(run)[3] == 0 and row.held_out_common == result.held_out(run)[:3].mean() > 85
    assert row.held_out == pytest.approx(row.held_out_common * 3 / 4)
    assert "Common: without d" in result.caption and "mIoU, common" in result.summary


# Refusals
def of_tokens(n, masks, classes="ab"):
    return overcluster_tokens({"z": torch.randn(n, 2, 2, 3)}, masks, list(classes), k=3)


@pytest.mark.parametrize("call, error", [
    (lambda e: overcluster(e, Scenes("val", 4), k=()), "expected at least one of each"),
    (lambda e: overcluster(e, Scenes("val", 4), k=12, seeds=()), "expected at least one of each"),
    (lambda e: overcluster(e, Scenes("val", 4), k=12, store="float8"), "store='float8': expected 'auto'"),
    (lambda e: overcluster(e, Made(filled(1)), k=3), r"one class only \(b\)"),
    (lambda e: overcluster(e, Made(filled(255)), k=3), "no class at all"),
    (lambda e: overcluster(e, Made(filled(0, pixels=9)), k=3), r"image is \(16, 16\) but mask is \(9, 9\)"),
    (lambda e: overcluster(e, Made(filled(7)), k=3), r"mask holds ids \[7\], expected 0 to 2, or 255"),
    (lambda e: of_tokens(4, torch.stack(filled(7)), "abc"), "hold class 7, expected 0 to 2"),
    (lambda e: of_tokens(3, torch.randint(2, (4, 8, 8))), "z: tokens of 3 images for 4 masks"),
    (lambda e: of_tokens(4, torch.rand(4, 8, 8)), "expected integers: class ids"),
])
def test_bad_input_is_refused(call, error):
    with pytest.raises((ValueError, TypeError), match=error): call(counting_encoder())


def test_images_without_masks_are_refused():
    data = Made(filled(0))
    data.classes = None
    with pytest.raises(ValueError, match="made has no masks to score against"):
        overcluster(counting_encoder(), data)


def test_tokens_that_are_no_numbers_name_the_encoder_and_image():
    def broken(model, images): return model(images).index_fill(0, torch.tensor([1]), math.nan)
    with pytest.raises(ValueError, match="encoder broken: tokens of image 1 are not finite"):
        overcluster(counting_encoder(broken, "broken"), Scenes("val", 4), k=12)
    z = torch.randn(4, 2, 2, 3)
    z[2, 0, 1] = math.inf
    with pytest.raises(ValueError, match="encoder z: tokens of image 2 are not finite"):
        overcluster_tokens({"z": z}, torch.randint(2, (4, 8, 8)), list("ab"), k=2)


def test_half_precision_that_overflows_is_refused():
    loud = counting_encoder(lambda model, images: model(images) * 1e6, "loud")
    with pytest.raises(ValueError, match="encoder loud: tokens up to .* store='float32'"):
        overcluster(loud, Scenes("val", 4), k=12, store="float16")


def test_modules_that_are_not_needed_yet_are_not_loaded():
    code = """if True:
        import sys
        def loaded(*names): return [name for name in names if name in sys.modules]
        import rasa_nb.matching
        assert not loaded("torchvision", "pandas", "sklearn", "scipy.stats", "rasa_nb.data"), "matching"
        import rasa_nb.segmentation
        assert not loaded("matplotlib", "seaborn", "sklearn.cluster", "scipy.stats"), "segmentation" """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
