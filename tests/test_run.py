"""The run as its user starts it: by papermill, with good and with bad parameters."""
import json
import time
from pathlib import Path

import papermill as pm
import pytest
import torch
from papermill.exceptions import PapermillExecutionError

from rasa_nb.data import Scenes
from rasa_nb.encoders import load_encoder
from rasa_nb.rasa import RASA
from rasa_nb.run import Config, run_folder, save_run, train

notebook = Path(__file__).parent.parent / "nbs" / "03_train.ipynb"
small = dict(n_images=30, k="12,20", seeds=2)


def papermill(tmp_path, **parameters):
    return pm.execute_notebook(notebook, tmp_path / "out.ipynb", {"out_dir": str(tmp_path / "runs"), **small, **parameters}, progress_bar=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "One run by papermill: (its folder, its record, the executed notebook)."
    tmp = tmp_path_factory.mktemp("run")
    nb = papermill(tmp, run_name="one", seed=3)
    return tmp / "runs" / "one", json.loads((tmp / "runs" / "one" / "run.json").read_text()), nb


def test_a_run_leaves_three_files(finished):
    folder, _, _ = finished
    assert sorted(p.name for p in folder.iterdir()) == ["figure.png", "head.safetensors", "run.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["one"]


def test_the_record_holds_what_a_reader_needs(finished):
    _, record, _ = finished
    assert record["parameters"]["seed"] == 3 and record["protocol"]["name"] == "leopart" and record["protocol"]["image_size"] == 96
    assert set(record["miou"]) == {"before", "after"} and set(record["miou"]["after"]) == {"12", "20"}
    for scores in record["miou"].values():
        for s in scores.values(): assert len(s["per_seed"]) == 2 and abs(sum(s["per_seed"]) / 2 - s["mean"]) < 1e-9 and s["std"] >= 0
    assert {"row", "col", "mean"} <= set(record["position_r2"]) and set(record["position_r2"]["mean"]) == {"before", "after"}
    assert all(v["seconds"] >= 0 for v in record["stages"].values()) and record["stages"]["fit"]["images_per_second"] > 0
    assert record["peak_memory_mb"] > 50 and record["versions"]["torch"] and record["data"]["images"] == 30


def test_the_saved_head_gives_the_run_s_tokens_again(finished, tiny):
    folder, record, _ = finished
    from rasa_nb.measures import position_r2
    from rasa_nb.data import Scenes
    rasa = RASA.load(folder / "head.safetensors")
    r2 = position_r2({"before": tiny, "after": rasa.attach(tiny)}, Scenes("val").first(30))
    for name in ("before", "after"): assert abs(r2.mean[name] - record["position_r2"]["mean"][name]) < 1e-4


def test_the_notebook_shows_table_and_figure(finished):
    _, _, nb = finished
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    html = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any("K=20" in h and "±" in h and "Position R²" in h for h in html)
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_an_existing_run_is_left_as_it_is(finished, tmp_path):
    folder, _, _ = finished
    before = (folder / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is left as it is"): train(Config(out_dir=str(folder.parent), run_name="one", **small))
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("parameters, message", [
    (dict(modle="vits"), "unknown parameter 'modle', did you mean 'model'"),
    (dict(model="vit_smal"), "unknown model 'vit_smal'; nearest: "),
    (dict(image_size=100), "nearest to 100: 96 or 104"),
])
def test_bad_parameters_by_papermill(tmp_path, parameters, message):
    with pytest.raises(PapermillExecutionError, match=message): papermill(tmp_path, **parameters)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("parameters, message", [
    (dict(model=3), "model=3: expected text"), (dict(seeds=True), "seeds=True: expected a whole number"), (dict(download="no"), "expected True or False"),
    (dict(n_images=-1), "n_images=-1: expected at least 0"), (dict(k=5), "k=5: expected at least 12"), (dict(k=[]), "expected a number"),
    (dict(data="coco"), "data='coco': expected one of 'auto', 'scenes', 'voc'"), (dict(solver="magic"), "solver='magic'"),
    (dict(checkpoint="/no/file"), "checkpoint='/no/file': no such file"), (dict(run_name="a/b"), "expected a plain folder name"),
])
def test_bad_parameters(parameters, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): Config(**parameters)


def test_each_default_name_is_new(tmp_path):
    config = Config(out_dir=str(tmp_path))
    names = []
    for _ in range(3): names.append(run_folder(config).name); run_folder(config).mkdir()
    assert names == ["tiny-scenes-closed_form", "tiny-scenes-closed_form-2", "tiny-scenes-closed_form-3"]


def test_nothing_is_left_when_saving_fails(tmp_path, monkeypatch):
    config = Config(n_images=16, k=12, seeds=1, out_dir=str(tmp_path), run_name="broken")
    run = train(config, progress=False)
    monkeypatch.setattr("rasa_nb.run.run_record", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError): save_run(run)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_are_told_within_seconds(tmp_path, monkeypatch):
    "Without network and checkpoint: what was wanted, its license, and the two ways on."
    monkeypatch.setattr("rasa_nb.encoders._hub_cached", lambda repo: False)
    monkeypatch.setattr("rasa_nb.encoders._reachable", lambda url: False)
    start = time.perf_counter()
    with pytest.raises(ConnectionError) as e: train(Config(model="vits", out_dir=str(tmp_path)))
    assert time.perf_counter() - start < 5
    for part in ("'vits'", "vit_small_patch16_dinov3_qkvb", "dinov3-license", "-p checkpoint FILE", "-p model tiny"): assert part in str(e.value)


def test_missing_data_says_where_and_how(tmp_path, deit_file):
    config = Config(model="deit_tiny_patch16_224", checkpoint=str(deit_file), data_dir=str(tmp_path), download=False, out_dir=str(tmp_path / "runs"))
    with pytest.raises(FileNotFoundError, match="no Pascal VOC at .*download=True"): train(config)
    assert not (tmp_path / "runs").exists()


def test_real_weights_on_real_photographs(tmp_path, deit_file, voc_root):
    config = Config(model="deit_tiny_patch16_224", checkpoint=str(deit_file), data_dir=str(voc_root), n_images=60, image_size=224, k=21, seeds=1, out_dir=str(tmp_path))
    run = train(config, progress=False)
    assert run.result.protocol.image_size == 224 and set(run.result.absent) >= {"train"}
    assert run.r2.mean["before"] > run.r2.mean["after"]


def test_an_interrupted_fit_goes_on_from_its_sums(tmp_path, monkeypatch):
    "The second run encodes only the images that the first had not come to, and learns what an uninterrupted one does."
    config, seen = Config(out_dir=str(tmp_path / "runs"), moments_file=str(tmp_path / "sums"), n_images=80, k=12, seeds=1), []
    def stopping(*args):
        encoder = load_encoder("tiny"); own = encoder.forward
        def forward(images):
            seen.append(len(images))
            if len(seen) == 2: raise KeyboardInterrupt
            return own(images)
        encoder.forward = forward
        return encoder
    monkeypatch.setattr("rasa_nb.run.load_encoder", stopping)
    with pytest.raises(KeyboardInterrupt): train(config, progress=False)
    run = train(config, progress=False)
    assert seen[:4] == [32, 32, 32, 16]
    assert torch.allclose(run.debiased.head.projector, RASA().fit(load_encoder("tiny"), Scenes("train", size=96).first(80)).projector_, atol=1e-5)
    with pytest.raises(ValueError, match="solver='sgd' learns from no sums"): Config(solver="sgd", moments_file="sums")


def test_every_parameter_of_a_solver_reaches_it():
    assert Config(solver="sgd", n_iter=3, seed=2).remover.get_params()["n_iter"] == 3 and Config(solver="sgd", seed=2).remover.random_state == 2
    assert Config(targets="grid").remover.targets == "grid" and Config(solver="auto", seed=1).remover.random_state == 1
