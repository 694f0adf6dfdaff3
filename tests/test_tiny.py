"""The bundled encoder: its file is checked, it loads fast, and its recipe runs, resumes and refuses nonsense."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import papermill as pm
import pytest
import torch
from papermill.exceptions import PapermillExecutionError

from rasa_nb import encoders

notebook = Path(__file__).parent.parent / "nbs" / "01a_tiny.ipynb"


def recipe(tmp_path, folder, **parameters):
    out = tmp_path / f"{folder}.ipynb"
    return pm.execute_notebook(notebook, out, {"out_dir": str(tmp_path / folder), **parameters}, progress_bar=False)


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["truncated", "altered", "absent"])
def test_weights_that_are_not_the_released_file_are_refused(tmp_path, monkeypatch, damage):
    whole = bytearray(encoders._tiny_file.read_bytes())
    if damage == "altered": whole[len(whole) // 2] ^= 1
    copy = tmp_path / "tiny.safetensors"
    if damage != "absent": copy.write_bytes(whole[:-1000] if damage == "truncated" else whole)
    monkeypatch.setattr(encoders, "_tiny_file", copy)
    with pytest.raises(ValueError, match=r"tiny\.safetensors is not the file that was released .*reinstall rasa_nb"): encoders.load_encoder("tiny", device="cpu")


def test_the_file_is_small_and_the_one_that_is_expected():
    assert encoders._tiny_file.stat().st_size < 5.6e6
    assert digest(encoders._tiny_file) == encoders.TINY_SHA256


def test_it_loads_in_under_a_second_after_imports():
    code = ("import time, torch; from rasa_nb.encoders import load_encoder, tiny_vit; t = time.process_time(); "
            "e = load_encoder('tiny', device='cpu'); print(time.process_time() - t)")
    seconds = float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout)
    assert seconds < 1, seconds


def test_it_is_no_random_network(tiny):
    torch.manual_seed(0)
    from rasa_nb.data import Scenes
    from rasa_nb.measures import position_r2
    assert position_r2(tiny, Scenes("train", 120, seed=6)).mean["tiny"] > .6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "One run of twenty steps without interruption: (the folder above its own, the executed notebook)."
    tmp = tmp_path_factory.mktemp("tiny")
    return tmp, recipe(tmp, "whole", steps=20, eval_every=20)


def test_twenty_steps_of_the_recipe(whole):
    tmp, nb = whole
    record = json.loads((tmp / "whole" / "run.json").read_text())
    assert record["steps"] == 20 and record["params"]["objective"] == "gradients" and record["curve"][-1]["step"] == 20
    assert {p.name for p in (tmp / "whole").iterdir()} == {"checkpoint.pt", "run.json", "tiny.safetensors"}
    model = encoders.tiny_vit()
    encoders.load_strictly(model, encoders.read_checkpoint(tmp / "whole" / "tiny.safetensors"))
    assert any("image/png" in o.get("data", {}) for c in nb.cells if c.cell_type == "code" for o in c.outputs)


def test_an_interrupted_run_ends_with_the_same_weights(whole):
    tmp, _ = whole
    recipe(tmp, "parts", steps=20, eval_every=20, stop_after=7, kmeans_seeds=0)
    assert not (tmp / "parts" / "tiny.safetensors").exists()
    recipe(tmp, "parts", steps=20, eval_every=20, kmeans_seeds=0)
    assert digest(tmp / "whole" / "tiny.safetensors") == digest(tmp / "parts" / "tiny.safetensors")


def test_a_misspelt_parameter_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(PapermillExecutionError, match="no parameter 'stepz'; nearest: steps"): recipe(tmp_path, "run", stepz=5)
    assert not (tmp_path / "run").exists()
