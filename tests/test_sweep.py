"""Sweeps: what is finished, killed, broken, or taken by another process; with a page that only pretends."""
import json
import multiprocessing
import os
import signal
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from rasa_nb.report import read_runs
from rasa_nb.sweep import finished, main, make_run, one_gpu, plan, run_sweep

pretended = """
import json, os, pathlib, time
folder = pathlib.Path(out_dir, run_name)
with open(f"{out_dir}/made", "a") as f: f.write(f"{run_name} {os.environ.get('OMP_NUM_THREADS')}\\n")
if n_images == 7: os.kill(os.getpid(), 9)
if n_images == 8: raise ValueError("8 does not work")
time.sleep(n_images / 10)
folder.with_name(f".{run_name}").mkdir()
text = json.dumps(dict(parameters=dict(seed=seed, method=method, n_images=n_images)))
folder.with_name(f".{run_name}").joinpath("run.json").write_text(text)
folder.with_name(f".{run_name}").rename(folder)
"""
six = dict(method=["rasa", "position_mean"], seed=[0, 1, 2])


def silent(line): pass


def made(folder): return [line.split()[0] for line in (folder / "made").read_text().splitlines()]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
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
    (folder / "run.json").write_text(json.dumps(dict(parameters=dict(model="tiny", k="13"))))
    table = run_sweep(dict(k=["12"]), tmp_path, say=silent)
    assert "k='13' there, '12' asked" in table.why.iloc[0]
    assert finished(folder, dict(k="13", data_dir="elsewhere"))


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
