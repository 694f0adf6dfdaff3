"""The run as its user starts it: by papermill, by command, in Python; with good and with bad parameters."""
import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill as pm
import pytest
import torch
from fastcore.docments import docments
from conftest import change_pixels, shared
from papermill.exceptions import PapermillExecutionError
from safetensors import SafetensorError

from rasa_nb import RASA, Reading, Scenes, load_encoder, position_r2
from rasa_nb import run as module
from rasa_nb.report import Report
from rasa_nb.run import (METHODS, Config, fit_run, identify, list_files, main, plain_name, run_folder,
                         save_run, train)

notebook = Path(__file__).parent.parent / "nbs" / "03_train.ipynb"
small = dict(n_images=30, k="12,20", seeds=2)


def papermill(folder, **parameters):
    "The executed page, made in another folder than the repository."
    parameters = small | dict(out_dir="runs") | parameters
    return pm.execute_notebook(notebook, folder / "out.ipynb", parameters, progress_bar=False, cwd=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "One run by papermill: (its folder, its record, the executed page)."
    folder = tmp_path_factory.mktemp("run")
    page = papermill(folder, run_name="one", seed=3)
    record = json.loads((folder / "runs" / "one" / "run.json").read_text())
    return folder / "runs" / "one", record, page


def outputs(page, kind):
    "All outputs of one kind, in order."
    every = [output for cell in page.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in every if kind in output.get("data", {})]


def test_a_run_leaves_three_files_and_nothing_else(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "head.safetensors", "run.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_the_record_holds_what_a_reader_needs(finished):
    _, record, _ = finished
    assert record["format"] == "rasa_nb.run.1" and record["data"]["images"] == 30
    assert record["parameters"]["seed"] == 3 and record["parameters"]["method"] == "rasa"
    assert record["protocol"]["name"] == "leopart" and record["protocol"]["image_size"] == 96
    assert set(record["miou"]) == {"before", "after"} and set(record["miou"]["after"]) == {"12", "20"}
    for scores in record["miou"].values():
        for one in scores.values():
            assert len(one["per_seed"]) == 2 and abs(sum(one["per_seed"]) / 2 - one["mean"]) < 1e-9
    assert {"row", "col", "mean"} <= set(record["position_r2"])
    assert record["stages"]["fit"]["images_per_second"] > 0 and record["peak_memory_mb"] > 50


def test_the_saved_head_gives_the_run_s_tokens_again(finished, tiny):
    folder, record, _ = finished
    rasa = RASA.load(folder / "head.safetensors")
    r2 = position_r2({"before": tiny, "after": rasa.attach(tiny)}, Scenes("val").first(30))
    for name in ("before", "after"): assert abs(r2.mean[name] - record["position_r2"]["mean"][name]) < 1e-4


def test_the_page_shows_position_first_then_scores_pictures_and_files(finished):
    _, record, page = finished
    first, whole, *_ = outputs(page, "text/html")
    before = f"{record['position_r2']['mean']['before']:.2f}"
    assert before in first and "mIoU" not in first
    assert before in whole and f"{record['miou']['after']['20']['mean']:.1f} ± " in whole
    assert len(outputs(page, "image/png")) == 2
    last = "".join(output.text for output in page.cells[-1].outputs)
    assert last == list_files(Path("runs/one")) + "\n"


def test_the_page_says_nothing_else(finished):
    "No bars, no lines of stages, no warnings: those are seen while it is made, and gone when it is done."
    _, _, page = finished
    streams = [o for cell in page.cells[:-1] for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert streams == []


def test_an_existing_run_is_left_as_it_is(finished):
    folder, _, _ = finished
    before = (folder / "run.json").read_bytes()
    with pytest.raises(FileExistsError): fit_run(Config(out_dir=str(folder.parent), run_name="one", **small))
    assert (folder / "run.json").read_bytes() == before


def test_the_page_and_the_config_agree():
    "Names, defaults and comments of the parameters cell are those of `Config`, in its order."
    cell, = (c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    lines = [line.split("#", 1) for line in cell.source.splitlines()]
    said = [(*code.split(" = "), comment.strip()) for code, comment in lines]
    told = docments(Config, full=True, returns=False)
    assert [(name, ast.literal_eval(value), comment) for name, value, comment in said] \
        == [(name, about.default, about.docment) for name, about in told.items()]


@pytest.mark.parametrize("parameters, message", [
    (dict(modle="vits"), "unknown parameter 'modle', did you mean 'model'"),
    (dict(solver="closed_form"), "'rasa' \\(was solver closed_form")])
def test_bad_names_by_papermill_are_refused_before_the_work(tmp_path, parameters, message):
    with pytest.raises(PapermillExecutionError, match=message): papermill(tmp_path, **parameters)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("parameters, message", [
    (dict(model=3), "model=3: expected text"),
    (dict(seeds=True), "seeds=True: expected a whole number"),
    (dict(download="no"), "expected True or False"),
    (dict(n_images=-1), "n_images=-1: expected at least 0"),
    (dict(batch_size=0), "batch_size=0: expected at least 1"),
    (dict(k=5), "k=5: expected at least 12"),
    (dict(k=[]), "expected a number"),
    (dict(k="many"), "k='many': expected a number"),
    (dict(data="coco"), "data='coco': expected one of 'auto', 'scenes', 'voc'"),
    (dict(data="ade20k", k=100), "k=100: expected at least 150, the number of classes of ade20k"),
    (dict(data="voc", split="test"), "split='test': voc has 'train', 'val'"),
    (dict(learn_data="no/folder"), "learn_data='no/folder' Expected a folder of images, or one of"),
    (dict(learn_data="ade20k", learn_split="val"), "learn_split='val': ade20k has 'training', 'validation'"),
    (dict(mean="red"), "mean='red': expected one number or three"),
    (dict(std="0.2,0.2,0"), "std='0.2,0.2,0': expected one number or three.*above 0"),
    (dict(method="magic"), "method='magic': expected one of 'rasa'"),
    (dict(method="closed_form"), "'closed_form' is now 'rasa'"),
    (dict(checkpoint="/no/file"), "checkpoint='/no/file': no such file"),
    *((dict(run_name=name), "run_name='.*expected a plain folder name, such as") for name in (
        "a/b", "..", ".hidden", "C:x", "x" * 201)),
    (dict(num_workers=-1), "num_workers=-1: expected at least 0"),
    (dict(num_workers="2"), "num_workers='2': expected a whole number"),
    (dict(method="paper", moments_file="sums"), "'paper' does not learn from sums .*rasa, position_mean"),
])
def test_bad_parameters(parameters, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): Config(**parameters)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_before_images_are_read(tmp_path):
    config = Config(image_size=100, data="voc", data_dir=str(tmp_path), download=False)
    with pytest.raises(ValueError, match="nearest to 100: 96 or 104"): fit_run(config, progress=False)


@pytest.mark.parametrize("name", ["targets", "n_iter", "solver"])
def test_parameters_that_are_gone_name_what_took_their_place(name, capsys):
    with pytest.raises(SystemExit): main([f"--{name}", "1"])
    said = capsys.readouterr().err
    assert f"{name} is no parameter any more" in said and "method" in said.split("any more")[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_made_with_the_run_s_seed(method):
    remover = Config(method=method, seed=2).remover
    assert remover.random_state == 2 and remover.needs in ("moments", "tokens", "images")


def test_each_default_name_is_new(tmp_path):
    config = Config(out_dir=str(tmp_path))
    names = []
    for _ in range(3):
        names.append(run_folder(config).name)
        run_folder(config).mkdir()
    assert names == ["tiny-scenes-rasa", "tiny-scenes-rasa-2", "tiny-scenes-rasa-3"]


@pytest.fixture(scope="module")
def made():
    "The least run, not saved yet."
    return train(Config(n_images=16, k=12, seeds=1, method="position_mean"), progress=False)


def saved_as(made, **parameters): return save_run(replace(made, config=Config(**parameters)))


NAMES = ["owner/name", "owner/a name with spaces", "../weights", "..", "/home/me/models/dino v2", "./große Größe",
         'a/b:c*?"<>|d', "C:\\models\\mine", "nul", "aux.pth", "-p/seed", ".hidden/model", "a/" + "x" * 300,
         "a/" + "漢" * 100, "a/b\n", "owner_name", "owner name", ""]


def test_folders_are_plain_and_safe_and_apart_whatever_a_model_is_called():
    names = [plain_name(f"{model}-voc-rasa") for model in NAMES] + [plain_name(name) for name in NAMES]
    assert len(set(names)) == len(names) and plain_name("vits-voc-rasa") == "vits-voc-rasa"
    for name in names:
        assert re.fullmatch(r"[\w=+,][\w.=+,-]*", name, re.ASCII) and len(name) <= 120 and name[-1] != "."
        assert name.partition(".")[0].lower() not in ("con", "prn", "aux", "nul", "com1", "lpt1")


def test_runs_of_models_by_path_or_owner_are_found_by_the_report_under_their_full_names(tmp_path, made, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["owner/a name with spaces", "../weights", str(tmp_path / "dino v2")]
    for model in models: saved_as(made, model=model, out_dir="runs", data="scenes")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    report = Report.read("runs")
    assert {setting.model for setting in report.settings} == set(models) and not report.left_out


def test_nothing_is_left_when_saving_fails(tmp_path, monkeypatch, made):
    monkeypatch.setattr("rasa_nb.run.run_record", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError): saved_as(made, out_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def no_space(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")


def writing_fails(monkeypatch, name):
    "Lets the writing of one file of a run fail, after a part of it."
    write = Path.write_bytes
    def fails(path, content):
        if path.name != name: return write(path, content)
        write(path, content[:7])
        no_space()
    monkeypatch.setattr(Path, "write_bytes", fails)


@pytest.mark.parametrize("which", ["head.safetensors", "run.json", "figure.png", "the move to its place"])
def test_on_a_disk_that_fills_up_no_part_of_a_run_is_left(tmp_path, monkeypatch, made, which):
    "Whichever write it is; and the error says how much the run needs, and how much is free."
    def rust_says(*args): raise SafetensorError("I/O error: No space left on device (os error 28)")
    if which == "head.safetensors": monkeypatch.setattr("rasa_nb.store.save_file", rust_says)
    elif which == "the move to its place": monkeypatch.setattr(os, "replace", no_space)
    else: writing_fails(monkeypatch, which)
    with pytest.raises(OSError, match=r"disk for .*tiny-scenes-rasa: [\d.]+ kB are needed, .* are free") as e:
        saved_as(made, out_dir=str(tmp_path))
    assert e.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def free_space(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    free_space(monkeypatch, 10**6)
    monkeypatch.setattr(module, "open_data", lambda config: pytest.fail("images were read"))
    with pytest.raises(OSError, match="2.4 MB are needed, 1.0 MB are free"):
        fit_run(Config(out_dir=str(tmp_path)), progress=False)


@pytest.mark.parametrize("place", ["out_dir", "cache_dir", "moments_file"])
def test_places_that_cannot_be_written_to_are_noticed_before_the_work(closed_place, tmp_path, monkeypatch, place):
    monkeypatch.setattr("rasa_nb.load_encoder", lambda *args: pytest.fail("it began"), raising=False)
    with pytest.raises(OSError, match=f"{place}='.*: no files can be made in .*name another folder"):
        fit_run(Config(**(dict(out_dir=str(tmp_path)) | {place: str(closed_place)})), progress=False)


def test_a_place_that_cannot_be_written_to_is_told_by_the_command(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit): main(["--out_dir", str(tmp_path / "file")])
    assert "no files can be made" in capsys.readouterr().err
    with pytest.raises(OSError, match=f"moments_file='{tmp_path}' is a folder: name a file"):
        fit_run(Config(moments_file=str(tmp_path), out_dir=str(tmp_path)), progress=False)


# What a run was made from

def test_a_run_keeps_what_it_was_made_from(made):
    identity = module.run_record(made)["identity"]
    assert identity == identify(made.config) == identify(replace(made.config, k="20", seed=3, method="rasa"))
    assert set(identity) == {"weights", "learn", "score"}


def test_other_weights_or_images_are_another_identity(tmp_path, tiny, voc_tree):
    weights = tmp_path / "w.pth"
    def of(**parameters): return identify(Config(data="voc", data_dir=str(voc_tree), checkpoint=str(weights), **parameters))
    torch.save(tiny.model.state_dict(), weights)
    before = of()
    change_pixels(voc_tree / "VOCdevkit/VOC2012/SegmentationClass/b.png")
    masked = of()
    change_pixels(voc_tree / "VOCdevkit/VOC2012/JPEGImages/a.jpg")
    pictured = of()
    moved = {name: value + 1 for name, value in tiny.model.state_dict().items()}
    torch.save(moved, weights)
    trained = of()
    changed = [[name for name in a if a[name] != b[name]] for a, b in
               zip((before, masked, pictured), (masked, pictured, trained))]
    assert changed == [["score"], ["learn"], ["weights"]]


def test_a_run_reads_with_as_many_workers_as_is_said():
    assert Config(num_workers=3).reading().num_workers == 3
    assert Config().num_workers is None and Config().reading() == Reading(96)


def test_runs_that_share_a_cache_give_the_numbers_of_runs_that_do_not(tmp_path):
    "The second finds the tokens of the first, and its scores from before."
    least = dict(n_images=16, k=12, seeds=1, method="position_mean")
    alone = train(Config(**least), progress=False)
    for _ in range(2):
        shared = train(Config(cache_dir=str(tmp_path), **least), progress=False)
        assert shared.result.frame.miou.tolist() == alone.result.frame.miou.tolist()
        assert shared.r2.mean == alone.r2.mean
    kept = list((tmp_path / "tokens").glob("*.safetensors"))
    assert len(kept) == 5   # images to learn from, to probe, to cluster, the figure's, and what encoders are asked


def test_missing_weights_are_told_within_seconds(tmp_path, monkeypatch):
    "Without network and checkpoint: what was wanted, its license, and the two ways on."
    monkeypatch.setattr("rasa_nb.encoders._hub_cached", lambda repo: False)
    monkeypatch.setattr("rasa_nb.encoders._reachable", lambda url: False)
    start = time.perf_counter()
    with pytest.raises(ConnectionError) as e: train(Config(model="vits", out_dir=str(tmp_path)))
    assert time.perf_counter() - start < 5
    wanted = "'vits'", "vit_small_patch16_dinov3_qkvb", "dinov3-license"
    for part in (*wanted, "-p checkpoint FILE", "-p model tiny"): assert part in str(e.value)


def test_missing_data_says_where_and_how(tmp_path, deit_file):
    config = Config(model="deit_tiny_patch16_224", checkpoint=str(deit_file), data_dir=str(tmp_path),
                    download=False, out_dir=str(tmp_path / "runs"))
    with pytest.raises(FileNotFoundError, match="(?s)no images of voc-train below .*download=True"): train(config)
    assert not (tmp_path / "runs").exists()


def test_real_weights_on_real_photographs(tmp_path, deit_file, voc_root):
    data = dict(data_dir=str(voc_root), n_images=60, image_size=224)
    config = Config(model="deit_tiny_patch16_224", checkpoint=str(deit_file), k=21, seeds=1, **data)
    run = train(config, progress=False)
    assert run.result.protocol.image_size == 224 and set(run.result.absent) >= {"train"}
    assert run.r2.mean["before"] > run.r2.mean["after"]


@pytest.fixture(scope="module")
def shared_data():
    if not (shared / "data" / "ade20k").is_dir(): pytest.skip(f"no ADE20K at {shared / 'data'}")
    return shared / "data"


@pytest.mark.parametrize("data, folder, k, images, whole", [
    ("ade20k", "ade20k", 150, 3, 2000), ("coco_stuff27", "coco_stuff164k", 27, 8, 5000)])
def test_learned_on_photographs_of_voc_and_scored_on_others(tmp_path, voc_root, shared_data, data, folder, k, images, whole):
    "Record and page name both datasets, how many images there were, and of how many; so does the report."
    places = dict(data_root=str(shared_data / folder), data_dir=str(voc_root), out_dir=str(tmp_path))
    config = Config(data=data, learn_data="voc", n_images=16, image_size=96, k=k, seeds=1,
                    method="position_mean", **places)
    run = train(config, progress=False)
    folder = save_run(run)
    assert folder.name == f"tiny-{data}-from-voc-position_mean"
    record = json.loads((folder / "run.json").read_text())
    assert (record["learned"]["name"], record["learned"]["images"], record["learned"]["of"]) == ("voc-train", 16, 1464)
    assert (record["data"]["images"], record["data"]["of"]) == (images, whole)
    page = repr(run)
    for said in ("learned on voc-train (16 of 1,464 images)", f"({images} of {whole:,} images)",
                 "no score here is the official number"): assert said in page
    assert ("too few for it" in page) == (images < 4)
    setting, = Report.read(tmp_path).settings
    assert setting.learned_elsewhere == "voc-train" and f"part of the split: {images} of {whole} images" in setting.marks


def test_other_tasks_stand_in_the_record_and_in_the_report(tmp_path):
    config = Config(n_images=16, k=12, seeds=1, method="position_mean", tasks="overcluster,in_context", out_dir=str(tmp_path))
    run = train(config, progress=False)
    told = json.loads((save_run(run) / "run.json").read_text())["tasks"]
    assert {row["task"] for row in told["scores"]} == {"in_context"} and told["controls"]
    report = Report.read(tmp_path)
    table = report.settings[0].tasks
    score = run.others.frame.query("encoder == 'after'").score.mean()
    assert f"{score:.1f}" in table.after[0] and "best control" in report.to_markdown() and "in context" in repr(run)


@pytest.mark.parametrize("tasks, why", [("linear", "'overcluster' is missing"), ("overcluster,depth", "'depth' is no task")])
def test_tasks_that_are_none(tasks, why):
    with pytest.raises(ValueError, match=why): Config(tasks=tasks)


def test_a_folder_of_photographs_can_be_learned_from(tmp_path, image_folders, voc_tree):
    "And another split than the official one."
    learn, score = module.open_data(Config(data="voc", learn_data=str(image_folders / "images"),
                                           data_dir=str(voc_tree), split="train"))
    assert (learn.name, len(learn), score.name) == ("images", 3, "voc-train")
    other, _ = module.open_data(Config(data="voc", data_root=str(voc_tree), learn_split="val"))
    assert (other.name, other[0][1]) == ("voc-val", None)   # no masks, and found in data_root


def test_names_keep_their_meaning():
    "The official splits of one dataset, as before there were others."
    learn, score = module.open_data(Config())
    assert (learn.name, score.name, Config().both, Config(model="vits").both) == ("scenes-train", "scenes-val", "scenes", "voc")


def test_which_weights_of_a_file_and_which_mean_reach_the_encoder(tmp_path, tiny):
    raw, average = tiny.model.state_dict(), {name: value + 1 for name, value in tiny.model.state_dict().items()}
    torch.save(dict(model=raw, model_ema=average), tmp_path / "both.pth")
    def of(**parameters): return Config(checkpoint=str(tmp_path / "both.pth"), device="cpu", **parameters).load_encoder()
    chosen = {weights: of(weights=weights, mean="0.1,0.2,0.3", std=.5) for weights in ("ema", "raw")}
    name, value = next(iter(raw.items()))
    assert torch.equal(chosen["raw"].model.state_dict()[name], value)
    assert torch.equal(chosen["ema"].model.state_dict()[name], value + 1)
    assert torch.allclose(chosen["raw"].mean.flatten().cpu(), torch.tensor([.1, .2, .3]))


def test_an_interrupted_fit_goes_on_from_its_sums(tmp_path, monkeypatch):
    "The first encodes a batch and stops in the next; the second goes on there, and learns the same."
    seen, small = [], dict(n_images=24, batch_size=8)
    fitted = RASA().fit(load_encoder("tiny"), Scenes("train").first(24))

    def stopping(*args):
        encoder = load_encoder("tiny")
        own = encoder.forward

        def forward(images):
            if len(images) == 1: return own(images)   # the picture that an encoder is told by
            seen.append(len(images))
            if len(seen) == 2: raise KeyboardInterrupt
            return own(images)
        encoder.forward = forward
        return encoder
    monkeypatch.setattr("rasa_nb.load_encoder", stopping, raising=False)
    config = Config(out_dir=str(tmp_path / "runs"), moments_file=str(tmp_path / "sums"), **small)
    with pytest.raises(KeyboardInterrupt): fit_run(config, progress=False)
    after = fit_run(config, progress=False)
    assert seen[:4] == [8, 8, 8, 8]
    assert torch.allclose(after.debiased.head.projector, fitted.projector_, atol=1e-5)


def test_the_command_makes_the_same_run(tmp_path, capsys, monkeypatch):
    "Its last lines are the table and where the three files are."
    monkeypatch.chdir(tmp_path)
    main("--n-images 16 --k 12 --seeds 1 --method position_mean --run_name one".split())
    said = capsys.readouterr().out
    run = train(Config(n_images=16, k=12, seeds=1, method="position_mean"), progress=False)
    assert said.endswith(f"{run}\n\n{list_files(Path('runs/one'))}\n")
    assert all((tmp_path / line.split("  ")[0]).is_file() for line in said.splitlines()[-3:])


def test_the_help_is_there_before_torch_is(tmp_path):
    "And explains every parameter in the words of the source."
    code = ("import sys\nfrom rasa_nb.{0} import main\n"
            "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules")
    for name in ("run", "sweep"):
        environment = os.environ | dict(COLUMNS="300", PYTHONPATH=str(notebook.parent.parent))
        done = subprocess.run([sys.executable, "-c", code.format(name)], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for parameter, text in docments(Config, returns=False).items():
            if name == "run" or parameter in ("model", "method", "k", "seed"): assert text in done.stdout
