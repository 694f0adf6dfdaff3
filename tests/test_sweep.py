"""Sweeps: what is finished, killed, broken, or taken by another process; with a page that only pretends."""
import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import joblib
import nbformat
import pytest
from conftest import change_pixels, make_voc
from nbformat.v4 import new_code_cell, new_notebook

from rasa_nb import sweep
from rasa_nb.report import read_runs
from rasa_nb.run import Config, identify
from rasa_nb.sweep import (OtherContent, finished, main, make_run, one_gpu, plan, run_here, run_on_slurm,
                           run_sweep, visible_gpus)

IDENTITY = dict(weights="w", learn="l", score="s")
pretended = f"""
import json, os, pathlib, time
identity = {IDENTITY}""" + """
folder = pathlib.Path(out_dir, run_name)
with open(f"{out_dir}/made", "a") as f: f.write(f"{run_name} {os.environ.get('OMP_NUM_THREADS')}\\n")
if n_images == 7: os.kill(os.getpid(), 9)
if n_images == 8: raise ValueError("8 does not work")
time.sleep(n_images / 10)
folder.with_name(f".{run_name}").mkdir()
text = json.dumps(dict(parameters=dict(seed=seed, method=method, n_images=n_images), identity=identity))
folder.with_name(f".{run_name}").joinpath("run.json").write_text(text)
folder.with_name(f".{run_name}").rename(folder)
"""
six = dict(method=["rasa", "position_mean"], seed=[0, 1, 2])


def silent(line): pass


def made(folder): return [line.split()[0] for line in (folder / "made").read_text().splitlines()]


@pytest.fixture
def page(written_page, monkeypatch):
    "A page that pretends to make runs; what they read is always the same."
    monkeypatch.setattr(sweep, "identify", lambda config: IDENTITY)
    return written_page


@pytest.fixture(scope="module")
def written_page(tmp_path_factory):
    "A page that takes the parameters of a run and writes its record, after `n_images` tenths of a second."
    path = tmp_path_factory.mktemp("page") / "page.ipynb"
    kernel = dict(name="python3", display_name="python3", language="python")
    first = new_code_cell("seed = n_images = 0; method = 'rasa'", metadata=dict(tags=["parameters"]))
    notebook = new_notebook(cells=[first, new_code_cell(pretended)], metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, path)
    return str(path)


def in_a_process(asked, folder, page):
    "A sweep in a process of its own, as another command would start it."
    request = dict(notebook=page, say=silent)
    process = multiprocessing.get_context("fork").Process(target=run_sweep, args=(asked, folder), kwargs=request)
    process.start()
    return process


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end: time.sleep(.02)
    assert condition()


def test_a_sweep_that_was_killed_goes_on_where_it_was(page, tmp_path):
    "Two methods x three seeds, killed in the third run: the second start makes the rest only."
    process = in_a_process(six, tmp_path, page)
    wait_for(lambda: len(list(tmp_path.glob("*/run.json"))) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    times = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")}
    assert 2 <= len(times) < 6
    table = run_sweep(six, tmp_path, notebook=page, say=silent)
    assert len(table) == 6 and set(table.outcome) == {"finished before", "finished"}
    for name, then in times.items():
        assert table.outcome[name] == "finished before"
        assert (tmp_path / name / "run.json").stat().st_mtime_ns == then
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["03_train.ipynb", "run.json"]


def test_two_sweeps_at_once_make_each_run_once(page, tmp_path):
    asked = dict(seed=[0, 1, 2])
    other = in_a_process(asked, tmp_path, page)
    table = run_sweep(asked, tmp_path, notebook=page, say=silent)
    other.join()
    assert other.exitcode == 0 and sorted(made(tmp_path)) == sorted(table.index)
    assert all(outcome.startswith("finished") for outcome in table.outcome)


def test_a_run_that_another_sweep_has_is_waited_for(page, tmp_path):
    "Taken by a process that makes it, it is found finished; by one that is killed, it is made here."
    first, second = plan(dict(seed=[0, 1], n_images=[10]))
    other = in_a_process(dict(seed=[0], n_images=[10]), tmp_path, page)
    wait_for(lambda: (tmp_path / "made").exists())
    assert make_run(first, tmp_path, page)["outcome"] == "taken"
    assert make_run(first, tmp_path, page, wait=True)["outcome"] == "finished elsewhere"
    other.join()
    other = in_a_process(dict(seed=[1], n_images=[10]), tmp_path, page)
    wait_for(lambda: len(made(tmp_path)) == 2)
    os.kill(other.pid, signal.SIGKILL)
    assert make_run(second, tmp_path, page, wait=True)["outcome"] == "finished"


def test_bad_runs_fail_alone_and_say_why(page, tmp_path, capsys):
    "One that raises, one whose process is killed, one whose value is refused; and a good one. Two at once."
    command = f"-p n_images 0 7 8 some --jobs 2 --notebook {page} --out_dir {tmp_path}"
    assert main(command.split()) == 1
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith("[")]) == 4   # one line a run
    for part in ("3 failed, 1 finished", "n_images=8-seed0: ValueError: 8 does not work",
                 "n_images=7-seed0: its process died: killed, or out of memory",
                 "n_images='some': expected a whole number"): assert part in said
    notes = {path.name for path in (tmp_path / ".sweep").glob("*.failed.json")}
    assert notes == {f"tiny-scenes-rasa-n_images={n}-seed0.failed.json" for n in (7, 8)}
    threads = {line.split()[1] for line in (tmp_path / "made").read_text().splitlines()}
    assert threads == {str(max(1, os.cpu_count() // 2))} or "OMP_NUM_THREADS" in os.environ


def test_a_run_that_failed_in_another_sweep_meanwhile_is_not_tried_again(page, tmp_path):
    (tmp_path / ".sweep").mkdir()
    planned, begun = plan(dict(n_images=[8]))[0], time.time() - 1
    assert make_run(planned, tmp_path, page)["why"] == "ValueError: 8 does not work"
    assert make_run(planned, tmp_path, page, begun=begun)["outcome"] == "failed" and len(made(tmp_path)) == 1
    make_run(planned, tmp_path, page, begun=time.time() + 1)
    assert len(made(tmp_path)) == 2


def test_by_submitit(page, tmp_path):
    "Its local executor, in processes of their own: a good run, one that raises, one that is there already."
    pytest.importorskip("submitit")
    run_sweep(dict(n_images=[0]), tmp_path, notebook=page, say=silent)
    table = run_sweep(dict(n_images=[0, 1, 8]), tmp_path, notebook=page, slurm=dict(cluster="local"), say=silent)
    assert table.outcome.sort_index().tolist() == ["finished", "failed", "finished before"]
    assert table.why["tiny-scenes-rasa-n_images=8-seed0"] == "ValueError: 8 does not work"
    assert len(made(tmp_path)) == 3


def test_submitit_is_asked_for_only_when_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match="pip install 'rasa_nb\\[slurm\\]'"):
        run_sweep(dict(seed=[0]), tmp_path, slurm={}, say=silent)


def test_a_real_run_by_the_module_alone(tmp_path):
    "The least that a run on `tiny` can do, where there is no page."
    asked = dict(method=["position_mean"], n_images=[16], k=["12"], seeds=[2])
    table = run_sweep(asked, tmp_path, notebook="none", say=silent)
    assert table.outcome.tolist() == ["finished"]
    files = sorted(path.name for path in (tmp_path / table.index[0]).iterdir())
    assert files == ["figure.png", "head.safetensors", "run.json"]
    record, = read_runs(tmp_path).records
    assert finished(tmp_path / table.index[0], dict(method="position_mean", n_images=16, k="12", seeds=2))
    assert record["identity"] == identify(Config(n_images=16))
    assert record["parameters"]["cache_dir"] == str(tmp_path / ".shared")
    assert [path.name for path in (tmp_path / ".shared").iterdir()] == ["scores"]   # tokens are removed


def hold_a_gpu(folder):
    with one_gpu(["4", "6"], folder): (folder / "said").write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def test_a_run_waits_for_a_gpu_of_its_own(tmp_path):
    with one_gpu(["4", "6"], tmp_path):
        with one_gpu(["4", "6"], tmp_path):
            process = multiprocessing.get_context("fork").Process(target=hold_a_gpu, args=(tmp_path,))
            process.start()
            process.join(.3)
            assert not (tmp_path / "said").exists()
        process.join()
    assert (tmp_path / "said").read_text() == "6" and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("4", "6")


def test_a_checkpoint_counts_by_content(tmp_path):
    def name(path): return plan(dict(model=["vits"], checkpoint=[str(path)]))[0].name
    file, moved = tmp_path / "a.pth", tmp_path / "moved" / "a.pth"
    moved.parent.mkdir()
    file.write_bytes(b"one")
    moved.write_bytes(b"one")
    one = name(file)
    assert name(moved) == one
    file.write_bytes(b"two")
    assert name(file) != one


def test_other_parameters_under_the_same_name_are_not_taken(tmp_path):
    folder = tmp_path / plan(dict(k=["12"]))[0].name
    folder.mkdir()
    record = dict(parameters=dict(model="tiny", k="13"), identity=identify(Config()))
    (folder / "run.json").write_text(json.dumps(record))
    table = run_sweep(dict(k=["12"]), tmp_path, say=silent)
    assert "k='13' there, '12' asked" in table.why.iloc[0]
    assert finished(folder, dict(k="13", data_dir="elsewhere"))


# What a finished run is valid for

@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    "Makes a sweep whose runs only note what they would have read, and returns its rows as (name, outcome)."
    def note(planned, out, *_):
        (out / planned.name).mkdir()
        record = dict(parameters=planned.parameters, identity=identify(Config(**planned.parameters)))
        (out / planned.name / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(sweep, "_execute", note)

    def rows(**parameters):
        asked = dict(data=["voc"], download=[False]) | {name: [value] for name, value in parameters.items()}
        table = run_sweep(asked, tmp_path / "runs", notebook="none", say=silent)
        return [*table.outcome.items()], table.why.iloc[0]
    return rows


def test_a_run_on_other_data_is_made_beside_the_one_that_is_there(sweep_of, tmp_path, scenes):
    "Two trees with the same lists; then a corrected mask, and a picture that was replaced."
    a, b = (str(make_voc(tmp_path / name, scenes)) for name in "AB")
    change_pixels(tmp_path / "B/VOCdevkit/VOC2012/JPEGImages/c.jpg")
    first, _ = sweep_of(data_dir=a)
    assert first == [("tiny-voc-rasa-seed0", "finished")]
    (other, outcome), = sweep_of(data_dir=b)[0]
    assert outcome == "finished" and other.startswith("tiny-voc-rasa-seed0-")
    names = {other}
    for folder in ("JPEGImages/a.jpg", "SegmentationClass/b.png"):
        change_pixels(tmp_path / "B/VOCdevkit/VOC2012" / folder)
        [(name, outcome)], why = sweep_of(data_dir=b)
        assert outcome == "finished" and "tiny-voc-rasa-seed0 was made from other images" in why
        names.add(name)
    assert len(names) == 3
    assert sweep_of(data_dir=b)[0] == [(name, "finished before")]
    assert sweep_of(data_dir=a)[0] == [("tiny-voc-rasa-seed0", "finished before")]


def test_a_run_with_other_weights_under_the_old_name_is_made_beside(sweep_of, tmp_path, voc_tree, monkeypatch, tiny):
    weights = ["one"]
    monkeypatch.setattr("rasa_nb.run._hash_of_weights", lambda asked, stamps: weights[-1])
    def made(): return sweep_of(model="owner/name", data_dir=str(voc_tree))
    [(first, _)], _ = made()
    weights.append("another")
    [(second, outcome)], why = made()
    assert second.startswith(first) and outcome == "finished" and f"{first} was made from other weights" in why
    assert made()[0] == [(second, "finished before")]


def test_a_run_of_an_earlier_version_is_not_trusted_without_a_word(sweep_of, tmp_path, voc_tree):
    old = tmp_path / "runs" / "tiny-voc-rasa-seed0"
    old.mkdir(parents=True)
    (old / "run.json").write_text(json.dumps(dict(parameters=dict(data="voc"))))
    [(name, outcome)], why = sweep_of(data_dir=str(voc_tree))
    assert outcome == "finished" and "does not say which weights and images it was made from" in why
    assert name.startswith(f"{old.name}-") and old.joinpath("run.json").exists()
    with pytest.raises(OtherContent): finished(old, dict(data="voc", data_dir=str(voc_tree)))


def test_a_run_that_another_sweep_made_of_other_data_meanwhile_is_not_taken(sweep_of, tmp_path, scenes):
    a, b = (str(make_voc(tmp_path / name, scenes)) for name in "AB")
    change_pixels(tmp_path / "B/VOCdevkit/VOC2012/JPEGImages/c.jpg")
    planned, = plan(dict(data=["voc"], data_dir=[b]))
    sweep_of(data_dir=a)                       # after B was found absent, and before it is begun
    row = make_run(planned, tmp_path / "runs")
    assert row["outcome"] == "finished" and row["run"] != planned.name


def test_data_that_are_not_there_are_no_finished_run(sweep_of, tmp_path, voc_tree):
    sweep_of(data_dir=str(voc_tree))
    [(_, outcome)], why = sweep_of(data_dir=str(tmp_path / "mistyped"))
    assert outcome == "failed" and "no images of voc-train below" in why


def test_models_of_any_name_have_folders_of_their_own(tmp_path):
    models = ["owner/name", "owner/name ", "../name", str(tmp_path / "name"), "owner/" + "x" * 300, "a/ü", "a/ö"]
    names = [planned.name for planned in plan(dict(model=models, data=["scenes"]))]
    assert len(set(names)) == len(names)
    for name in names: assert re.fullmatch(r"[\w=+,][\w.=+,-]*", name, re.ASCII) and len(name) <= 120


# Places

def test_a_place_that_cannot_be_written_to_is_noticed_before_the_work(closed_place, capsys):
    with pytest.raises(OSError, match="out_dir='.*no files can be made in"):
        run_sweep(dict(seed=[0]), closed_place, say=silent)
    with pytest.raises(SystemExit): main(["--out_dir", str(closed_place)])
    assert "no files can be made in" in capsys.readouterr().err


def test_on_a_full_disk_a_run_fails_alone_and_says_how_much_is_needed(page, tmp_path, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sweep, "_execute", full)
    monkeypatch.setattr(Path, "write_text", full)   # of the note, too
    table = run_sweep(dict(seed=[0, 1]), tmp_path, notebook=page, say=silent)
    assert table.outcome.tolist() == ["failed"] * 2
    assert re.search("4.2 MB are needed, .* are free", table.why.iloc[0])


# GPUs, of which a count is pretended

@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def seen_gpu(planned):
    begun = time.time()
    time.sleep(.5)
    from joblib import cpu_count
    gpu, cores = os.environ.get("CUDA_VISIBLE_DEVICES"), cpu_count()   # that it may use, by joblib's count
    return dict(run=planned.name, gpu=gpu, cores=cores, begun=begun, ended=time.time())


def test_runs_at_once_have_a_gpu_each_and_never_the_same(two_gpus, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])   # so that workers need not import what tests do
    rows = list(run_here(seen_gpu, plan(dict(seed=[0, 1, 2, 3])), 0, tmp_path))
    assert {row["gpu"] for row in rows} == {"0", "1"} and len(rows) == 4
    for gpu in "01":
        times = sorted((row["begun"], row["ended"]) for row in rows if row["gpu"] == gpu)
        assert all(ended <= begun for (_, ended), (begun, _) in zip(times, times[1:]))
    starts = sorted(row["begun"] for row in rows)
    assert starts[1] < min(row["ended"] for row in rows)   # two were at work at once
    assert {row["cores"] for row in rows} == {max(1, joblib.cpu_count() // 2)}


def test_runs_on_the_cpu_wait_for_no_gpu(two_gpus, tmp_path):
    rows = list(run_here(seen_gpu, plan(dict(device=["cpu"])), 0, tmp_path))
    assert rows[0]["gpu"] is None


def test_jobs_of_submitit_that_see_several_gpus_share_them_out(two_gpus, tmp_path):
    pytest.importorskip("submitit")
    gpu, lock = sweep._first_free(["0", "1"], tmp_path)   # it is another run's
    with lock:
        rows = list(run_on_slurm(seen_gpu, plan(dict(seed=[0])), 0, tmp_path, dict(cluster="debug")))
    assert gpu == "0" and rows[0]["gpu"] == "1"


@pytest.mark.parametrize("named, count, gpus", [
    (None, 2, ["0", "1"]), ("2,5", 2, ["2", "5"]), ("3,-1,4", 1, ["3"]),
    ("MIG-a/1/0,MIG-a/2/0", 2, ["MIG-a/1/0", "MIG-a/2/0"])])
def test_gpus_go_by_the_names_they_were_given(named, count, gpus, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if named: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus
    if len(gpus) > 1:
        with one_gpu(gpus, tmp_path): assert os.environ["CUDA_VISIBLE_DEVICES"] == gpus[0]


@pytest.mark.parametrize("arguments, message", [
    ("--solver sgd", "`method` takes its place"),
    ("-p k", "expected a list with at least one value"),
    ("--seeds 0", "expected a list with at least one value"),
    ("--notebook nowhere.ipynb", "no such file"),
    ("--slurm 7", "expected KEY=VALUE"),
    ("--n_images 5", "given as -p NAME VALUE")])
def test_requests_that_make_no_sense(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(["--out_dir", str(tmp_path), *arguments.split()])
    assert e.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_values_that_cannot_work_fail_without_a_process(tmp_path):
    table = run_sweep(dict(method=["magic"], download=["maybe"]), tmp_path / "runs", say=silent)
    assert table.outcome.tolist() == ["failed"] and not (tmp_path / "runs").exists()
