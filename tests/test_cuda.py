"""On a GPU: the numbers of the CPU, from the picture to the table. Skipped where there is none."""
import warnings

import numpy as np
import pytest
import torch

from rasa_nb.anchoring import ANCHORING, GramAnchor
from rasa_nb.encoders import from_timm, load_encoder
from rasa_nb.linear import STORED_LINEAR, linear_segmentation
from rasa_nb.matching import LEOPART
from rasa_nb.measures import position_r2
from rasa_nb.moments import Moments
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading, batches
from rasa_nb.retrieval import UPRIGHT, in_context
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
from rasa_nb.trained import TrainedRASA

from toy_vits import of_timm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
learn, score = Scenes("train", 64), Scenes("val", 32)
both = pytest.mark.parametrize("augment", ["published", "turns"])


def on(device): return load_encoder("tiny", device=device)


@both
def test_pictures_are_augmented_alike(augment):
    shown = Reading(96, augment, seed=3).apply(learn)
    def pictures(device):
        return torch.cat([images.cpu() for images, _ in batches(shown, Reading(batch_size=16), "", device)])
    here, there = map(pictures, ("cpu", "cuda"))
    assert (here - there).abs().max() < 2 / 255 and (here - there).abs().mean() < 1e-4


@pytest.mark.parametrize("workers", [0, 3])
def test_pinned_workers_change_nothing(workers):
    shown = Reading(96, "published").apply(learn)
    def read(n): return list(batches(shown, Reading(num_workers=n), device="cuda"))
    for (a, _), (b, _) in zip(read(workers), read(None)): assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [0, 100, 10_000])
def test_sums_keep_their_digits_whatever_the_user_allows(mean):
    z = (torch.randn(90, 8, 8, 24) + mean) * torch.logspace(-3, 3, 24)
    torch.set_float32_matmul_precision("medium")
    try:
        moments = Moments((8, 8), 24)
        with torch.autocast("cuda", torch.bfloat16):
            for some in z.cuda().split(13): moments.update(some)
    finally: torch.set_float32_matmul_precision("highest")
    right = torch.from_numpy(np.cov(z.double().flatten(0, 2).numpy().T, bias=True))
    std = right.diagonal().sqrt()
    assert ((moments.cov.cpu() - right).abs() / std[:, None] / std).max() < 1e-6


@both
def test_a_fit_finds_the_same_head(augment):
    reading = Reading(96, augment)
    here, there = (RASA().fit(on(device), learn, reading) for device in ("cpu", "cuda"))
    ours, theirs = here.projector_.cpu(), there.projector_.cpu()
    assert here.head_.max_rank == there.head_.max_rank and (ours - theirs).abs().max() < 5e-3
    def left(head, device):
        encoder = head.attach(on(device), "debiased")
        return position_r2(encoder, score, Reading(96)).mean["debiased"]
    assert abs(left(here, "cpu") - left(there, "cuda")) < .01


def test_the_published_steps_descend_alike():
    z = torch.cat([tokens for tokens, _ in on("cpu").encode(learn, Reading(96))])
    ours, theirs = (TrainedRASA(n_heads=2, epochs=1).fit_tokens(z.to(device)).projector_.cpu()
                    for device in ("cpu", "cuda"))
    assert (ours - theirs).abs().max() < .02


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near(dtype):
    half, images = load_encoder("tiny", dtype=dtype, device="cuda"), torch.rand(4, 3, 96, 96, device="cuda")
    tokens, right = half(images), on("cuda")(images)
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - right).norm() / right.norm() < (.03 if dtype == "bf16" else .01)


def test_where_memory_runs_out_batches_are_halved():
    encoder, reading = on("cuda"), Reading(96, batch_size=64)
    right = torch.cat([z.cpu() for z, _ in encoder.encode(learn, reading)])
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    for _ in encoder.encode(learn, reading): pass
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((used + (needed - used) * .6) / total)
    try:
        with pytest.warns(UserWarning, match=r"out of memory: going on with \d+ images at a time"):
            found = torch.cat([z.cpu() for z, _ in encoder.encode(learn, reading)])
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert torch.allclose(found, right, atol=1e-3)


def test_clusters_score_within_the_spread_of_starts():
    protocol = LEOPART.replace(k=(40,), n_init=2, seeds=(0, 1, 2, 3, 4))
    assert protocol.library == "auto"
    def miou(device, library="auto"):
        return overcluster(on(device), score, protocol=protocol.replace(library=library)).frame.miou.mean()
    right = miou("cpu")
    assert abs(miou("cuda") - right) < 2 and abs(miou("cuda", "sklearn") - right) < 1


def test_both_dense_tasks_score_alike():
    protocol = STORED_LINEAR.replace(steps=60, seeds=(0,), draws=20, unseen="score")
    lenient = UPRIGHT.replace(unseen="score", draws=20)
    for task, of, most in ((linear_segmentation, protocol, 1.5), (in_context, lenient, .2)):
        here, there = (task(on(device), learn, score, of).frame.miou.mean() for device in ("cpu", "cuda"))
        assert abs(here - there) < most, task.__name__


def test_anchoring_learns_alike_and_its_short_cuts_stay_near():
    how = ANCHORING.replace(sizes=(32, 48), steps=8, batch_size=4, rank=2, lr=5e-3)
    images = Scenes("train", 9, size=48)
    def learned(device, **change):
        model = of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8)
        small = from_timm(model.to(device), "small", mean=(.5,) * 3, std=(.25,) * 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            anchor = GramAnchor(how.replace(**change)).fit(small, images)
        return torch.tensor([row["loss"] for row in anchor.history_])
    right = learned("cpu")
    assert torch.allclose(learned("cuda"), right, rtol=.02)
    assert torch.allclose(learned("cuda", checkpointing=True), right, rtol=.02)
    assert torch.allclose(learned("cuda", precision="bf16"), right, rtol=.2)
