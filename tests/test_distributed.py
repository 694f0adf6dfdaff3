"""Two processes that share the images learn what one learns."""
import json
import subprocess
import sys

import torch

from rasa_nb.head import RASAHead
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.rasa import RASA
from rasa_nb.scenes import Scenes

SCRIPT = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from rasa_nb.scenes import Scenes
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import collect_moments
dist.init_process_group("gloo")
m = collect_moments(load_encoder("tiny", device="cpu"), Scenes("train", 25))
if dist.get_rank() == 0: m.save(sys.argv[1])
dist.destroy_process_group()
"""


def torchrun(n, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *args]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_give_the_moments_and_the_head_of_one(tmp_path, tiny):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun(2, tmp_path / "script.py", tmp_path / "two.safetensors")
    one, two = collect_moments(tiny, Scenes("train", 25)), Moments.load(tmp_path / "two.safetensors")
    assert one.count == two.count == 25 and one.apart.count == two.apart.count == 2 and torch.equal(one.counts, two.counts)
    assert torch.allclose(one.cov, two.cov, atol=1e-6)
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
