"""The bundled encoder: its file is checked, it loads fast, its recipe runs, resumes and refuses nonsense."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import papermill as pm
import pytest
from papermill.exceptions import PapermillExecutionError

from rasa_nb import checkpoints, encoders
from rasa_nb.measures import position_r2
from rasa_nb.scenes import Scenes

root = Path(__file__).parent.parent
notebook = root / "nbs" / "studies" / "tiny.ipynb"
weights = root / "rasa_nb" / "weights" / "tiny.safetensors"
small = dict(steps=4, eval_every=4, batch_size=4, n_train=40, n_eval=16, kmeans_seeds=0)


def recipe(tmp_path, folder, **parameters):
    "The executed notebook, whose files are in a folder of this name."
    given = {**small, "out_dir": str(tmp_path / folder), **parameters}
    return pm.execute_notebook(notebook, tmp_path / f"{folder}.ipynb", given, progress_bar=False)


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["truncated", "altered", "absent"])
def test_weights_that_are_not_the_released_file_are_refused(tmp_path, monkeypatch, damage):
    copy = tmp_path / "weights" / "tiny.safetensors"
    copy.parent.mkdir()
    content = bytearray(weights.read_bytes())
    if damage == "altered": content[len(content) // 2] ^= 1
    if damage == "truncated": content = content[:-1000]
    if damage != "absent": copy.write_bytes(content)
    monkeypatch.setattr(encoders, "resources", SimpleNamespace(files=lambda package: tmp_path))
    with pytest.raises(ValueError, match=r"is not the file that was released .*reinstall rasa_nb"):
        encoders.load_encoder("tiny", device="cpu")


def test_the_file_is_small_and_its_model_card_names_it():
    assert weights.stat().st_size < 5.6e6
    assert digest(weights) == encoders.TINY_SHA256
    assert encoders.TINY_SHA256 in weights.with_name("README.md").read_text()


LOADING = """
import time
from rasa_nb.encoders import load_encoder, tiny_vit
start = time.process_time()
load_encoder("tiny", device="cpu")
print(time.process_time() - start)
"""


def test_it_loads_in_under_a_second_after_imports():
    call = [sys.executable, "-W", "ignore", "-c", LOADING]
    assert float(subprocess.run(call, capture_output=True, text=True, check=True).stdout) < 1


def test_it_is_no_random_network(tiny):
    assert position_r2(tiny, Scenes("train", 120, seed=6)).mean["tiny"] > .6


def test_the_recipe_goes_on_where_it_stopped_and_leaves_a_record_and_weights_that_load(tmp_path):
    folder = tmp_path / "run"
    recipe(tmp_path, "run", stop_after=2)
    assert not (folder / "tiny.safetensors").exists()
    executed = recipe(tmp_path, "run")
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("going on from step 2" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "run.json", "tiny.safetensors"}
    record = json.loads((folder / "run.json").read_text())
    assert [point["step"] for point in record["curve"]] == [0, 4]
    state = checkpoints.read_checkpoint(folder / "tiny.safetensors")
    checkpoints.load_strictly(encoders.tiny_vit(), state)


def test_a_misspelt_parameter_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(PapermillExecutionError, match="no parameter 'stepz'; nearest: steps"):
        recipe(tmp_path, "run", stepz=5)
    assert not (tmp_path / "run").exists()
