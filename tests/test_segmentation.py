"""Overclustering against plain implementations that share no code with it: loops over pixels, really upsampled tokens, faiss."""
import importlib, importlib.util, itertools, math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from threadpoolctl import threadpool_limits

from rasa_nb.data import Evaluation, Scenes, SegmentationData, Transformed, VOCSegmentation, batches
from rasa_nb.encoders import PatchEncoder, load_encoder
from rasa_nb.segmentation import (FRANCA, LEOPART, UpsampledMoments, class_iou, confusion_matrix, draw_points, kmeans_centers, match_clusters,
                                 moments_after, nearest_centers, overcluster, overcluster_tokens, reduce_tokens, upsample, whitened_pca)
from rasa_nb.moments import Moments
from rasa_nb.head import DebiasedEncoder, RASAHead

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("benchmark_overcluster", root / "benchmarks" / "overcluster.py")
benchmark = importlib.util.module_from_spec(spec); spec.loader.exec_module(benchmark)


# Scoring, by loops over pixels and classes
def loop_pair(pixels, cluster, label, rule):
    both = either = cluster_pixels = 0
    for p, c in pixels:
        both += p == cluster and c == label
        either += p == cluster or c == label
        cluster_pixels += p == cluster
    whole = cluster_pixels if rule == "precision" else either
    return both / whole if whole else 0.0


def loop_many_to_one(pixels, k, num_classes, rule):
    matched = []
    for cluster in range(k):
        best, best_score = -1, 0.0
        for label in range(num_classes):
            score = loop_pair(pixels, cluster, label, rule)
            if score > best_score: best, best_score = label, score
        matched.append(best)
    return matched


def loop_best_one_to_one(pixels, k, num_classes):
    "All one-to-one matchings with the largest summed IoU, and that sum."
    scores = [[loop_pair(pixels, j, c, "iou") for c in range(num_classes)] for j in range(k)]
    total = {p: math.fsum(scores[j][c] for j, c in enumerate(p)) for p in itertools.permutations(range(num_classes), k)}
    best = max(total.values())
    return [p for p, t in total.items() if t > best - 1e-12], best


def loop_class_iou(pixels, matched, num_classes):
    ious = []
    for label in range(num_classes):
        both = either = true = 0
        for p, c in pixels:
            both += matched[p] == label and c == label
            either += matched[p] == label or c == label
            true += c == label
        ious.append(both / either if true else math.nan)
    return ious


def pixel_lists(k, num_classes, max_size=40):
    return st.lists(st.tuples(st.integers(0, k - 1), st.sampled_from([*range(num_classes), 255])), min_size=1, max_size=max_size)


def counted(pixels, k, num_classes): return confusion_matrix(*zip(*pixels), k, num_classes)
def not_void(pixels): return [p for p in pixels if p[1] != 255]


@settings(max_examples=150, deadline=None)
@given(st.tuples(st.integers(2, 7), st.integers(2, 5)).flatmap(lambda kc: st.tuples(st.just(kc), pixel_lists(*kc))))
@pytest.mark.parametrize("rule", ["precision", "iou"])
def test_many_to_one_equals_loops(rule, case):   # few pixels: ties, void, absent classes and empty clusters are common
    (k, num_classes), pixels = case
    confusion = counted(pixels, k, num_classes)
    matched = match_clusters(confusion, f"many_to_one_{rule}")
    expected = loop_many_to_one(not_void(pixels), k, num_classes, rule)
    assert matched.tolist() == expected
    np.testing.assert_allclose(class_iou(confusion, matched), loop_class_iou(not_void(pixels), expected, num_classes), rtol=0, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 5).flatmap(lambda c: st.tuples(st.just(c), pixel_lists(c, c))))
def test_hungarian_equals_all_permutations(case):
    k, pixels = case
    confusion = counted(pixels, k, k)
    matched = match_clusters(confusion, "hungarian")
    best, total = loop_best_one_to_one(not_void(pixels), k, k)
    assert tuple(matched) in best        # with a tie several are best
    iou, loops = class_iou(confusion, matched), loop_class_iou(not_void(pixels), matched, k)
    np.testing.assert_allclose(iou, loops, rtol=0, atol=1e-12)
    assert abs(np.nansum(iou) - total) < 1e-12   # so the mean is the same whichever of them is taken


@pytest.mark.parametrize("k", [4, 12])
def test_scores_of_a_result_equal_loops(k):
    g = torch.Generator().manual_seed(k)
    masks = torch.randint(0, 5, (3, 9, 8), generator=g); masks[masks == 2] = 0; masks[0, :2] = 255; masks[masks == 4] = 3   # 2 is absent
    z = torch.randn(3, 4, 4, 6, generator=g)
    result = overcluster_tokens({"z": z}, masks, list("abcd"), k=k, protocol=LEOPART.replace(n_init=1), seeds=0)
    run = result["z", k, 0]
    assert run.confusion.sum() == (masks != 255).sum() and result.absent == ("c",)
    pixels = [(j, c) for j in range(k) for c in range(4) for _ in range(run.confusion[j, c])]
    for rule, column in (("precision", "miou_precision"), ("iou", "miou_iou")):
        iou = loop_class_iou(pixels, loop_many_to_one(pixels, k, 4, rule), 4)
        assert abs(result.frame[column][0] - 100 * np.nanmean(iou)) < 1e-10
    headline = {4: "hungarian", 12: "many_to_one_precision"}[k]
    assert result.frame.matching[0] == headline
    if k == 4: assert abs(result.frame.miou[0] - 100 * loop_best_one_to_one(pixels, 4, 4)[1] / 3) < 1e-10


def test_counts_do_not_overflow_32_bits():
    big = np.array([[2**40, 1], [1, 2**40]])
    assert class_iou(big, match_clusters(big, "hungarian"))[0] == pytest.approx(2**40 / (2**40 + 2), abs=1e-15)


# Statistics of upsampled tokens
@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 30)] * 2), st.integers(0, 2**31))
def test_moments_of_upsampled_tokens_are_exact(grid, size, seed):   # any grid and size, also fewer pixels than cells
    z = torch.randn(3, *grid, 5, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 6) + 10
    m = UpsampledMoments(grid, 5, size).update(z[:1]).update(z[1:])
    really = F.interpolate(z.double().permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 5)
    assert torch.allclose(m.mean, really.mean(0), rtol=1e-9)
    assert torch.allclose(m.cov, (really - really.mean(0)).T @ (really - really.mean(0)) / len(really), rtol=1e-6, atol=1e-9)


def test_moments_behind_a_head_need_no_tokens():
    g = torch.Generator().manual_seed(0)
    z, head = torch.randn(6, 4, 5, 8, generator=g) + 2, RASAHead(torch.randn(8, 8, generator=g), torch.randn(4, 5, 8, generator=g))
    for make in (lambda: UpsampledMoments((4, 5), 8, (20, 30)), lambda: Moments((4, 5), 8)):
        derived, direct = moments_after(make().update(z), head, (4, 5)), make().update(head(z))
        assert torch.allclose(derived.mean, direct.mean, atol=1e-5) and torch.allclose(derived.cov, direct.cov, atol=1e-4)


# End to end
@pytest.fixture(scope="module")
def scene_tokens():
    encoder, data = load_encoder("tiny", device="cpu"), Scenes("val", 40)
    parts = list(encoder.encode(Transformed(data, Evaluation(96, 60))))
    return torch.cat([z for z, _ in parts]), torch.cat([m for _, m in parts]), data.classes


@pytest.fixture(scope="module")
def voc_tokens(voc_root, deit_file):
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=deit_file, device="cpu")
    data = VOCSegmentation(voc_root, "val")
    parts = list(encoder.encode(Transformed(data.first(60), Evaluation(224, 100))))
    return torch.cat([z for z, _ in parts]), torch.cat([m for _, m in parts]), data.classes


def close_within_seeds(ours, theirs):
    "Means over seeds no farther apart than one seed's score usually is from another's."
    ours, theirs = np.array(ours), np.array(theirs)
    return abs(ours.mean() - theirs.mean()) <= (ours.std(ddof=1) + theirs.std(ddof=1)) / 2


@pytest.mark.parametrize("which, k", [("scene_tokens", 12), ("scene_tokens", 40), ("voc_tokens", 21), ("voc_tokens", 50)])
def test_franca_agrees_with_really_upsampling(which, k, request):
    tokens, masks, classes = request.getfixturevalue(which)
    seeds = range(5)
    ours = overcluster_tokens({"z": tokens}, masks, classes, k=k, protocol=FRANCA.replace(n_init=1), seeds=seeds).frame.miou.to_numpy()
    points, truth = benchmark.plain_points(tokens, tuple(masks.shape[1:])), masks.numpy().astype(int).reshape(-1)
    plain = []
    for seed in seeds:
        clusters = benchmark.plain_clusters(points, k, seed, n_init=1)[truth != 255]
        confusion = confusion_matrix(clusters, truth[truth != 255], k, len(classes))
        plain.append(100 * np.nanmean(class_iou(confusion, match_clusters(confusion, "hungarian" if k == len(classes) else "many_to_one_iou"))))
    assert abs(ours.mean() - np.mean(plain)) <= np.std(plain)
    assert np.median(np.abs(ours - plain)) < .5   # the same seed draws the same points, so most seeds end in the same clusters


def test_franca_on_the_same_drawn_points_gives_the_same_counts(scene_tokens):
    tokens, masks, classes = scene_tokens
    size, k = tuple(masks.shape[1:]), 40
    moments = UpsampledMoments(tokens.shape[1:3], tokens.shape[3], size).update(tokens)
    maps = reduce_tokens(tokens, moments, FRANCA)
    centers = kmeans_centers(draw_points(maps, 4000, 0, size), k, FRANCA.replace(n_init=1), 0)
    mean, projection = (a.float() for a in whitened_pca(moments, 50))
    pixels = (upsample(tokens, size) - mean) @ projection
    plain = torch.cdist(pixels.flatten(1, 2).double(), centers.double()).argmin(-1).view(masks.shape)
    ours = torch.cat(list(nearest_centers(maps, centers, size, True)))
    assert (ours == plain).double().mean() > .999
    differ = np.abs(confusion_matrix(ours, masks, k, 12) - confusion_matrix(plain, masks, k, 12)).sum()
    assert differ <= 2 * (ours != plain).sum()


def test_the_plain_reference_of_the_benchmark_scores_alike(scene_tokens):
    tokens, masks, classes = scene_tokens
    clusters = torch.randint(0, 15, masks.shape, generator=torch.Generator().manual_seed(0))
    clusters, truth = clusters[masks != 255].numpy(), masks[masks != 255].numpy().astype(int)
    confusion = confusion_matrix(clusters, truth, 15, 12)
    for rule in ("precision", "iou"):
        assert benchmark.plain_miou(clusters, truth, 15, 12, rule) == pytest.approx(100 * np.nanmean(class_iou(confusion, match_clusters(confusion, f"many_to_one_{rule}"))), abs=1e-9)


def test_the_benchmark_compares_like_with_like(scene_tokens):
    tokens, masks = (a[:8] for a in scene_tokens[:2])
    scores, labels = benchmark.plain_overcluster(tokens, masks, (12, 20), 12)
    assert set(scores[12]) == {"hungarian"} and set(scores[20]) == {"precision", "iou"} and labels[20].shape == (masks.numel(),)
    assert benchmark.from_counts(labels, masks, scores, 12) < 1e-9
    assert benchmark.from_counts({k: np.roll(v, 999) for k, v in labels.items()}, masks, scores, 12) > .1   # other clusters are noticed


@pytest.mark.parametrize("free, expected", [(12e9, (445, 192)), (4e9, (445, 64)), (1e8, (13, 64)), (1, (2, 64))])
def test_the_benchmark_scales_down_to_the_memory_there_is(free, expected): assert benchmark.affordable(free) == expected


@pytest.mark.parametrize("which, k", [("scene_tokens", 12), ("scene_tokens", 40), ("voc_tokens", 50)])
def test_faiss_agrees(which, k, request):
    pytest.importorskip("faiss", reason="faiss is optional: pip install faiss-cpu to compare with it")
    tokens, masks, classes = request.getfixturevalue(which)
    ours, theirs = (overcluster_tokens({"z": tokens}, masks, classes, k=k, protocol=LEOPART.replace(library=library, n_init=2), seeds=range(6 if which == "voc_tokens" else 10)).frame.miou
                    for library in ("sklearn", "faiss"))
    assert close_within_seeds(ours, theirs)


# The same numbers again
@pytest.mark.parametrize("protocol", [LEOPART, FRANCA], ids=lambda p: p.name)
def test_one_thread_gives_the_same_bytes(protocol, scene_tokens):
    tokens, masks, classes = scene_tokens
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            once, twice = (overcluster_tokens({"z": tokens}, masks, classes, k=(12, 40), protocol=protocol.replace(n_init=2), seeds=(0, 1)) for _ in range(2))
    finally: torch.set_num_threads(threads)
    assert all(a.confusion.tobytes() == b.confusion.tobytes() for a, b in zip(once.runs, twice.runs))


def test_more_threads_stay_within_the_documented_tolerance(scene_tokens):
    tokens, masks, classes = scene_tokens
    def run(n):
        with threadpool_limits(n): return overcluster_tokens({"z": tokens}, masks, classes, k=40, protocol=LEOPART.replace(n_init=2), seeds=range(5)).frame.miou
    one, two = run(1), run(2)
    assert close_within_seeds(one, two)


# One call for several encoders, stored tokens, interrupted runs
class Counting(torch.nn.Module):
    def __init__(self): super().__init__(); self.weight, self.calls = torch.nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0))), []
    def forward(self, images): self.calls.append(len(images)); return F.avg_pool2d(images, 8).permute(0, 2, 3, 1) @ self.weight


def counting_encoder(name="counting"): return PatchEncoder(Counting(), lambda m, images: m(images), 16, 8, name=name)


def test_attached_heads_share_the_encoding_and_score_as_if_encoded():
    base, data = counting_encoder(), Scenes("val", 12)
    g = torch.Generator().manual_seed(0)
    head = RASAHead(torch.randn(16, 16, generator=g), torch.randn(12, 12, 16, generator=g))
    twice = DebiasedEncoder(DebiasedEncoder(base, head), RASAHead(torch.diag(torch.arange(1., 17))))
    result = overcluster({"base": base, "twice": twice}, data, k=12, seeds=(0, 1), batch_size=12, protocol=FRANCA.replace(mask_size=(40, 50)))
    assert len(base.model.calls) == 1
    tokens = torch.cat([twice(x) for x, _ in batches(Transformed(data, Evaluation(96)))]).detach()
    masks = torch.cat([m for _, m in batches(Transformed(data, Evaluation(96, (40, 50))))])
    alone = overcluster_tokens({"twice": tokens}, masks, data.classes, k=12, seeds=(0, 1), protocol=FRANCA)
    assert abs(alone.frame.miou.mean() - result.frame.query("encoder == 'twice'").miou.mean()) < 1
    assert result.protocol.image_size == 96 and result.data["images"] == 12


@pytest.mark.parametrize("store", ["float16", "memmap"])
def test_smaller_stores_score_alike(store):
    encoder, data = counting_encoder(), Scenes("val", 12)
    a, b = (overcluster(encoder, data, k=12, seeds=range(4), store=s).frame.miou for s in ("float32", store))
    assert close_within_seeds(a, b)


def test_encoders_of_several_grids_and_sizes():
    coarse = PatchEncoder(torch.nn.Identity(), lambda m, x: F.avg_pool2d(x, 16).permute(0, 2, 3, 1), 3, 16, name="coarse")
    result = overcluster({"fine": counting_encoder(), "coarse": coarse}, Scenes("val", 10), k=12, seeds=0)
    assert result.encoders == ["fine", "coarse"] and (result.frame.miou > 0).all()


def test_non_square_input():
    result = overcluster(counting_encoder(), Scenes("val", 6).first(6), k=12, seeds=0, protocol=FRANCA.replace(mask_size=(30, 70)))
    assert result.runs[0].labels.shape == (3, 30, 70)


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch):
    module = importlib.import_module("rasa_nb.segmentation")   # the name `rasa_nb.segmentation` is the function
    encoder, data, done = counting_encoder(), Scenes("val", 10), []
    real = module.cluster_run
    def stops(*args, **kwargs):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(args); return real(*args, **kwargs)
    monkeypatch.setattr(module, "cluster_run", stops)
    with pytest.raises(KeyboardInterrupt): overcluster(encoder, data, k=12, seeds=range(4), folder=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2 and not list(tmp_path.glob("*.part"))
    made = []
    monkeypatch.setattr(module, "cluster_run", lambda *a, **k: made.append(a) or real(*a, **k))
    resumed = overcluster(encoder, data, k=12, seeds=range(4), folder=tmp_path)
    assert len(made) == 2 and resumed.frame.seed.tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(module, "cluster_run", None)     # all there: nothing is computed, and the encoder does not run
    calls = len(encoder.model.calls)
    again = overcluster(encoder, data, k=12, seeds=range(4), folder=tmp_path)
    assert len(encoder.model.calls) == calls and (again.frame.miou == resumed.frame.miou).all()


def test_other_weights_data_or_protocol_are_not_taken_for_finished(tmp_path):
    run = lambda e, d, p=LEOPART: overcluster(e, d, k=12, seeds=0, folder=tmp_path, protocol=p)
    encoder = counting_encoder(); run(encoder, Scenes("val", 10))
    with torch.no_grad(): encoder.model.weight += 1
    run(encoder, Scenes("val", 10)); run(encoder, Scenes("val", 11)); run(encoder, Scenes("val", 10), LEOPART.replace(n_init=1))
    assert len(list(tmp_path.glob("*.npz"))) == 4
    run(encoder, Scenes("val", 10), LEOPART.replace(matching="many_to_one_iou"))   # only how counts are read
    assert len(list(tmp_path.glob("*.npz"))) == 4


def test_a_damaged_file_is_named(tmp_path):
    overcluster(counting_encoder(), Scenes("val", 10), k=12, seeds=0, folder=tmp_path)
    file, = tmp_path.glob("*.npz"); file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name} is no saved run: delete it"): overcluster(counting_encoder(), Scenes("val", 10), k=12, seeds=0, folder=tmp_path)


# Results
def test_change_is_the_paired_interval(scene_tokens):
    tokens, masks, classes = scene_tokens
    result = overcluster_tokens({"a": tokens, "b": tokens[..., :20]}, masks, classes, k=12, seeds=range(4), protocol=LEOPART.replace(n_init=1))
    a, b = (result.frame.query("encoder == @e").miou.to_numpy() for e in "ab")
    low, high = scipy.stats.ttest_rel(b, a).confidence_interval(.95)
    change = result.change.iloc[0]
    assert change["mean"] == pytest.approx((b - a).mean()) and (change.low, change.high) == (pytest.approx(low), pytest.approx(high))
    assert result.table.loc["a", (12, "mean")] == pytest.approx(a.mean()) and result.table.loc["a", (12, "std")] == pytest.approx(a.std())


def test_one_seed_has_no_interval_and_absent_classes_are_named(scene_tokens):
    tokens, masks, classes = scene_tokens
    result = overcluster_tokens({"a": tokens, "b": tokens}, masks, [*classes, "never seen"], k=13, seeds=0, protocol=FRANCA.replace(n_init=1))
    assert math.isnan(result.change.low[0]) and result.absent == ("never seen",) and "never seen" in result._repr_html_()
    assert "never seen" not in result.per_class.columns and result.to_dict()["scores"][0]["iou"][-1] is None


def test_background_share_counts_clusters():
    masks = torch.zeros(4, 8, 8, dtype=torch.uint8); masks[:, :2] = 1
    z = torch.zeros(4, 8, 8, 2); z[:, :2, :, 0] = 1; z[:, 5:, :, 1] = 1
    result = overcluster_tokens({"z": z + .001 * torch.randn(z.shape)}, masks, ["background", "thing"], k=3, seeds=0)
    assert result.frame.background[0] == pytest.approx(2 / 3) and result.frame.miou[0] == 100


# Bad input
class Masked(SegmentationData):
    classes, name = ("a", "b", "c"), "masked"
    def __init__(self, masks, size=16): self.masks, self.size = masks, size
    def __len__(self): return len(self.masks)
    def load(self, i): return torch.randint(0, 255, (3, self.size, self.size), dtype=torch.uint8), self.masks[i]


def small(fill, n=4, size=16): return [torch.full((size, size), fill, dtype=torch.uint8) for _ in range(n)]


@pytest.mark.parametrize("call, error", [
    (lambda e: overcluster(e, Scenes("val", 4), k=1), "k=1: expected at least 12"),
    (lambda e: overcluster(e, Scenes("val", 2), k=300), r"k=300: more clusters than there are points to cluster \(288\)"),
    (lambda e: overcluster(e, Scenes("val", 4), k=()), "expected at least one of each"),
    (lambda e: overcluster(e, Scenes("val", 4), k=12, seeds=()), "expected at least one of each"),
    (lambda e: overcluster(e, Scenes("val", 4), k=12, store="float8"), "store='float8': expected 'auto', 'float32'"),
    (lambda e: overcluster(e, Masked(small(1)), k=3), r"one class only \(b\)"),
    (lambda e: overcluster(e, Masked(small(255)), k=3), "no class at all"),
    (lambda e: overcluster(e, Masked(small(0, size=9) * 2), k=3), r"image is \(16, 16\) but mask is \(9, 9\)"),
    (lambda e: overcluster(e, Masked(small(7)), k=3), r"mask holds ids \[7\], expected 0 to 2 or 255"),
    (lambda e: overcluster_tokens({"z": torch.randn(4, 2, 2, 3)}, torch.stack(small(7)), list("abc"), k=3), "hold class 7, expected 0 to 2"),
    (lambda e: overcluster_tokens({"z": torch.randn(3, 2, 2, 3)}, torch.randint(0, 2, (4, 8, 8)), list("ab"), k=2), "z: tokens of 3 images for 4 masks"),
    (lambda e: overcluster_tokens({"z": torch.randn(4, 2, 2, 3)}, torch.rand(4, 8, 8), list("ab"), k=2), "expected integers: class ids"),
    (lambda e: LEOPART.replace(library="cuml"), "library='cuml': expected 'sklearn' or 'faiss'"),
])
def test_bad_input(call, error):
    with pytest.raises((ValueError, TypeError), match=error): call(counting_encoder())


def test_tokens_that_are_no_numbers_name_the_encoder_and_image():
    def tokens(model, images): z = model(images); z[1, 0, 0] = float("nan"); return z
    broken = PatchEncoder(Counting(), tokens, 16, 8, name="broken")
    with pytest.raises(ValueError, match="encoder broken: tokens of image 1 are not finite"): overcluster(broken, Scenes("val", 4), k=12)


def test_handed_over_tokens_that_are_no_numbers_are_refused():
    z = torch.randn(4, 2, 2, 3); z[2, 0, 1] = float("inf")
    with pytest.raises(ValueError, match="encoder z: tokens of image 2 are not finite"): overcluster_tokens({"z": z}, torch.randint(0, 2, (4, 8, 8)), list("ab"), k=2)


def test_half_precision_that_overflows_is_refused():
    loud = PatchEncoder(Counting(), lambda m, x: m(x) * 1e6, 16, 8, name="loud")
    with pytest.raises(ValueError, match="encoder loud: tokens up to .* store='float32'"): overcluster(loud, Scenes("val", 4), k=12, store="float16")


def test_without_faiss_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"): kmeans_centers(torch.randn(30, 4), 3, LEOPART.replace(library="faiss"), 0)


def test_layers_have_fingerprints_of_their_own_and_caches_have_none(tiny):
    from rasa_nb.store import encoder_hash
    from rasa_nb.segmentation import fingerprint
    before = fingerprint(tiny)
    encoder_hash(tiny)
    assert fingerprint(tiny) == before and len({fingerprint(tiny.at(i)) for i in (2, 4, 5)}) == 3
