"""Two processes that share the images learn what one learns, and score as one scores."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from rasa_nb import segmentation
from rasa_nb.head import RASAHead
from rasa_nb.linear import (
    DINOV3_LINEAR, STORED_LINEAR, Learner, linear_segmentation, train_on_crops)
from rasa_nb.matching import FRANCA, LEOPART
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.rasa import RASA
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster

SCRIPT = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from rasa_nb.encoders import load_encoder
from rasa_nb.linear import (
    DINOV3_LINEAR, STORED_LINEAR, Learner, linear_segmentation, train_on_crops)
from rasa_nb.matching import FRANCA, LEOPART
from rasa_nb.moments import collect_moments
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
dist.init_process_group("gloo")
encoder, data = load_encoder("tiny", device="cpu"), Scenes("val", 21)
m = collect_moments(encoder, Scenes("train", 25))
if dist.get_rank() == 0: m.save(sys.argv[1] + "/moments.safetensors")
for protocol in (LEOPART, FRANCA):
    protocol = protocol.replace(library="sklearn", n_init=1)
    request = encoder, data, (12, 20, 30), protocol, 0
    result = overcluster(*request, folder=sys.argv[1], examples=(0, 20))
    again = overcluster(*request, folder=sys.argv[1], examples=(0, 20))
    assert again.frame.equals(result.frame) and len(result.runs[0].counts) == 21   # in every process
few = STORED_LINEAR.replace(steps=2, seeds=(0,), unseen="score")
result = linear_segmentation(encoder, Scenes("train", 25), data.first(9), few, examples=(0, 8))
if dist.get_rank() == 0: result.save(sys.argv[1] + "/linear.json")
torch.manual_seed(0)
z, masks = torch.randn(6, 4, 4, 8), torch.randint(0, 3, (6, 8, 8))
mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
learner = Learner(8, 3, DINOV3_LINEAR.replace(dropout=0., warmup=1), 4)
for _ in range(4): learner.step(z[mine], masks[mine])
if dist.get_rank() == 0: learner.save(sys.argv[1] + "/learner.safetensors")
crops = DINOV3_LINEAR.replace(image_size=48, mask_size=48, steps=5, warmup=1, batch_size=4, dropout=0.)
probe = train_on_crops(dict(tiny=encoder), Scenes("train", 6), crops, 0)["tiny"]
if dist.get_rank() == 0: torch.save(probe.state_dict(), sys.argv[1] + "/crops.pt")
dist.destroy_process_group()
"""


def torchrun(n, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *args]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    "The folder where two processes left moments and scores."
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    torchrun(2, folder / "script.py", folder)
    return folder


def test_two_processes_give_the_moments_and_the_head_of_one(by_two, tiny):
    one, two = collect_moments(tiny, Scenes("train", 25)), Moments.load(by_two / "moments.safetensors")
    assert one.count == two.count == 25 and [part.count for part in two.apart] == [1, 1]
    assert torch.equal(one.counts, two.counts) and torch.allclose(one.cov, two.cov, atol=1e-6)
    p, q = (RASA().fit_moments(m).basis_ for m in (one, two))
    assert (p @ p.T - q @ q.T).abs().max() < 1e-5


def test_a_run_under_torchrun(tmp_path, tiny):
    options = "--n_images", 20, "--k", 12, "--seeds", 1, "--out_dir", tmp_path, "--run_name", "r"
    said = torchrun(2, "-m", "rasa_nb.run", *options)
    alone = RASA().fit(tiny, Scenes("train", 20))   # n_images is a cut of the same dataset
    head = RASAHead.load(tmp_path / "r" / "head.safetensors")
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (head.projector - alone.projector_).abs().max() < 1e-5
    assert record["head"]["fitted_on"]["data"]["images"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and said.count("fit: ") == 1   # one process speaks


@pytest.mark.parametrize("protocol", [LEOPART, FRANCA], ids=lambda p: p.name)
def test_two_processes_score_as_one(protocol, tiny, by_two, monkeypatch):
    request = tiny, Scenes("val", 21), (12, 20, 30), protocol.replace(library="sklearn", n_init=1), 0
    with threadpool_limits(1): one = overcluster(*request, examples=(0, 20))
    monkeypatch.setattr(segmentation, "make_runs", None)   # the files are found
    two = overcluster(*request, folder=by_two, examples=(0, 20))
    for a, b in zip([*one.runs, *one.cells], [*two.runs, *two.cells]):
        moved = abs(a.counts.matrix - b.counts.matrix).sum()
        assert moved <= .02 * a.confusion.sum()   # the order of sums is another, and K-means amplifies last bits
        assert abs(a.nmi_image - b.nmi_image) < .01 and abs(a.nmi_cell - b.nmi_cell) < .01
        assert (a.labels != b.labels).sum() <= .02 * a.labels.size
    np.testing.assert_allclose(one.frame.held_out, two.frame.held_out, atol=.5)


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(segmentation, "this_process", lambda: (0, 4))
    with pytest.raises(ValueError, match="3 images for 4 processes: expected at least one"): segmentation.Share.of(3)


def test_two_processes_that_average_gradients_learn_what_one_learns(by_two):
    torch.manual_seed(0)
    z, masks = torch.randn(6, 4, 4, 8), torch.randint(0, 3, (6, 8, 8))
    protocol = DINOV3_LINEAR.replace(dropout=0., warmup=1)
    one, two = (Learner(8, 3, protocol, 4) for _ in range(2))
    for _ in range(4): one.step(z, masks)
    two.resume(by_two / "learner.safetensors")
    for name, tensor in one.probe.state_dict().items():
        assert torch.allclose(two.probe.state_dict()[name].float(), tensor.float(), atol=1e-6), name


def test_two_processes_score_a_ridge_probe_and_its_controls_as_one(by_two, tiny):
    two, few = json.loads((by_two / "linear.json").read_text()), STORED_LINEAR.replace(steps=2, seeds=(0,), unseen="score")
    one = linear_segmentation(tiny, Scenes("train", 25), Scenes("val", 21).first(9), few)
    assert two["scores"][0]["probe"] == "ridge" and two["data"]["images"] == 9
    assert two["scores"][0]["miou"] == pytest.approx(one.frame.miou[0], abs=.05)
    assert [row["miou"] for row in two["controls"]] == pytest.approx(one.controls.miou.tolist())


def test_two_processes_that_share_crops_learn_what_one_learns(by_two, tiny):
    crops = DINOV3_LINEAR.replace(image_size=48, mask_size=48, steps=5, warmup=1, batch_size=4, dropout=0.)
    one = train_on_crops(dict(tiny=tiny), Scenes("train", 6), crops, 0)["tiny"].state_dict()
    two = torch.load(by_two / "crops.pt")
    for name, tensor in one.items(): assert torch.allclose(two[name].float(), tensor.float(), atol=1e-5), name
