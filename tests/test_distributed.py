"""Two processes that share the images learn what one learns."""
import json
import subprocess
import sys

import torch

from rasa_nb.data import Scenes
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import Moments
from rasa_nb.head import RASAHead
from rasa_nb.rasa import RASA

SCRIPT = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from rasa_nb.data import Scenes
from rasa_nb.encoders import load_encoder
from rasa_nb.moments import collect_moments
dist.init_process_group("gloo")
m = collect_moments(load_encoder("tiny", device="cpu"), Scenes("train", 45), batch_size=8)
if dist.get_rank() == 0: m.save(sys.argv[1])
dist.destroy_process_group()
"""


def torchrun(n, *args): return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, args)], capture_output=True, text=True)


def test_two_processes_give_the_moments_and_the_head_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for n in (1, 2):
        done = torchrun(n, tmp_path / "script.py", tmp_path / f"{n}.safetensors")
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (Moments.load(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert one.count == two.count == 45 and torch.equal(one.counts, two.counts)
    heads = [RASA().fit_moments(m).basis_ for m in (one, two)]
    assert (heads[0] @ heads[0].T - heads[1] @ heads[1].T).abs().max() < 1e-8


def test_a_run_under_torchrun(tmp_path):
    done = torchrun(2, "-m", "rasa_nb.run", "--n_images", 20, "--k", 12, "--seeds", 1, "--out_dir", tmp_path, "--run_name", "r")
    assert done.returncode == 0, done.stderr[-2000:]
    alone = RASA().fit(load_encoder("tiny", device="cpu"), Scenes("train", 20))   # n_images is a cut of the same dataset
    assert (RASAHead.load(tmp_path / "r" / "head.safetensors").projector - alone.projector_).abs().max() < 1e-5
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["head"]["fitted_on"]["data"]["images"] == 20 and RASAHead.load(tmp_path / "r" / "head.safetensors").embed_dim == 192
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and done.stdout.count("saved to") == 1
