"""Sweeps on `tiny`, with the least a run can do: what is finished, killed, broken or claimed by another process."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rasa_nb import sweep as module
from rasa_nb.report import Report
from rasa_nb.store import Claim
from rasa_nb.sweep import BUSY, find_notebook, main, plan, run_one, sweep

quick = dict(n_images=[16], k=["12"], seeds=[2], n_iter=[1])
six = dict(model=["tiny"], solver=["closed_form", "sgd"], seed=[0, 1, 2], **quick)


def silent(line): pass


def worker_of(folder):
    "The run, and the process that makes it, that has fitted and not finished while two others are there."
    while True:
        done = [p.parent.name for p in folder.glob("*/run.json")]
        for claim in (folder / ".sweep").glob("*.claim.*"):
            name = claim.name.split(".claim")[0]
            try:
                if len(done) >= 2 and name not in done and "fit:" in (folder / ".sweep" / f"{name}.log").read_text(): return name, json.loads(claim.read_text())["pid"]
            except (OSError, ValueError): pass
        time.sleep(.01)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    "Two solvers x three seeds; the third run is killed, and the sweep started again: (folder, lines of the first, first result, second result, times of the first)."
    import threading
    folder, lines, killed = tmp_path_factory.mktemp("sweep") / "runs", [], []

    def kill():
        name, pid = worker_of(folder)
        os.kill(pid, signal.SIGKILL); killed.append(name)

    killer = threading.Thread(target=kill); killer.start()
    first = sweep(six, folder, jobs=1, notebook="none", say=lines.append)
    killer.join()
    times = {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/run.json")}
    leftovers = sorted(p.name for p in folder.iterdir())
    second = sweep(six, folder, jobs=1, notebook="none", say=silent)
    return folder, lines, first, second, times, leftovers, killed[0]


def test_a_killed_run_fails_alone_and_looks_unfinished(resumed):
    _, lines, first, _, times, leftovers, killed = resumed
    assert list(first.failed) == [killed] and "killed by signal 9" in first.failed[killed]
    assert len(times) == 5 and killed not in leftovers
    assert set(leftovers) == {".shared", ".sweep", *times}
    assert len([line for line in lines if line.startswith("[")]) == 6   # one line a run


def test_the_second_start_makes_the_rest_only(resumed):
    folder, _, _, second, times, _, killed = resumed
    assert second.ok and second.table.outcome.to_dict() == {n: "finished before" for n in times} | {killed: "finished"}
    assert {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/run.json") if p.parent.name != killed} == times
    assert not list(folder.glob(".sweep/*.claim.*"))


def test_runs_of_one_encoder_share_what_they_can(resumed):
    "Clusters from before are the same in all; a run that shares nothing gives the same numbers."
    folder, _, _, _, _, _, _ = resumed
    records = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/run.json")}
    assert len({r["miou"]["before"]["12"]["mean"] for r in records.values()}) == 1
    assert not (folder / ".shared" / "tokens").exists()
    name = plan({k: v[:1] for k, v in six.items()})[0].name
    alone = folder.parent / "alone"
    assert sweep({k: v[:1] for k, v in six.items()}, alone, jobs=1, notebook="none", share=False, say=silent).ok
    again = json.loads((alone / name / "run.json").read_text())
    assert again["miou"] == records[name]["miou"] and again["position_r2"] == records[name]["position_r2"]


def test_the_report_of_the_sweep(resumed):
    report = Report.read(resumed[0])
    assert [(s.model, s.solver, len(s.records)) for s in report.settings] == [("tiny", "closed_form", 3), ("tiny", "sgd", 3)]
    assert report.frame.fits.tolist() == [3, 3] and report.frame.seeds.tolist() == [2, 2]
    assert all("part of the split: 16 of 500 images" in s.marks for s in report.settings)
    d = [r["miou"]["after"]["12"]["mean"] - r["miou"]["before"]["12"]["mean"] for r in report.settings[0].records]
    assert abs(report.frame.difference[0] - sum(d) / 3) < 1e-9


def test_by_papermill_with_a_bad_value_that_fails_alone(tmp_path, capfd):
    "The command itself, with the notebook: exit code, executed notebook in the run's folder, the reason of the failure."
    command = f"--model tiny --solver position_mean -p n_images 16 -p k 12 -p seeds 1 -p image_size 0 100 --jobs 2 --out-dir {tmp_path}"
    assert main(command.split()) == 1
    said = capfd.readouterr().out
    assert "2 of 2 runs to make" in said and "without a notebook" not in said
    good, bad = (p.name for p in plan(dict(model=["tiny"], solver=["position_mean"], seed=[0], n_images=[16], k=["12"], seeds=[1], image_size=[0, 100])))
    assert sorted(p.name for p in (tmp_path / good).iterdir()) == ["03_train.ipynb", "figure.png", "head.safetensors", "run.json"]
    assert f"{bad}: ValueError: image size 100 x 100 is no multiple" in said.replace("failed in", "").split("1 failed")[1]
    assert not (tmp_path / bad).exists() and (tmp_path / ".sweep" / f"{bad}.ipynb").exists()


def test_two_sweeps_at_once_never_take_the_same_run(tmp_path, monkeypatch):
    "Twenty runs that only note who made them, six processes that want all of them."
    context = multiprocessing.get_context("fork")
    names = [f"run{i}" for i in range(20)]
    processes = [context.Process(target=take_all, args=(tmp_path, names)) for _ in range(6)]
    [p.start() for p in processes]; [p.join(60) for p in processes]
    made = (tmp_path / "made").read_text().split()
    assert sorted(made) == sorted(names)
    assert all(p.exitcode == 0 for p in processes) and not list((tmp_path / ".sweep").glob("*.claim.*"))


def take_all(folder, names):
    def pretend(spec, parameters):
        with open(folder / "made", "a") as f: f.write(spec["name"] + "\n")
        time.sleep(.01)
        part = folder / f".part-{spec['name']}"; part.mkdir()
        (part / "run.json").write_text('{"parameters": {}}'); part.rename(folder / spec["name"])
    module._by_module = pretend
    for name in names:
        run_one(dict(name=name, parameters={}, out_dir=str(folder), notebook="", stale=120, begun=time.time(), threads=1, devices="", share=False))


def test_a_run_that_another_sweep_has_is_waited_for(tmp_path):
    "Claimed by a living process, then by a dead one: waited for, and taken over."
    request = {k: v[:1] for k, v in six.items()}
    name = plan(request)[0].name
    (tmp_path / ".sweep").mkdir()
    held = Claim(tmp_path / ".sweep" / f"{name}.claim"); assert held.acquire()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    p = psutil.Process(sleeper.pid)
    held.file.write_text(json.dumps(json.loads(held.file.read_text()) | dict(pid=p.pid, started=p.create_time())))
    assert run_one(module._specs(plan(request), tmp_path, "", 120, True, 1, True)[0]) == BUSY
    held.released.set()
    import threading
    threading.Timer(2, sleeper.kill).start()
    result = sweep(request, tmp_path, jobs=1, notebook="none", say=silent)
    sleeper.wait()
    assert result.ok and result.table.outcome.tolist() == ["finished"]


def test_other_parameters_under_the_same_name_are_not_taken(tmp_path):
    request = {k: v[:1] for k, v in six.items()}
    folder = tmp_path / plan(request)[0].name; folder.mkdir()
    (folder / "run.json").write_text(json.dumps(dict(parameters=dict(model="tiny", k="13"))))
    result = sweep(request, tmp_path, notebook="none", say=silent)
    assert "k='13' there, '12' asked" in list(result.failed.values())[0] and (folder / "run.json").read_text().count("13") == 1


def test_a_checkpoint_counts_by_content(tmp_path):
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    a.write_bytes(b"one"); b.write_bytes(b"two")
    name = lambda path: plan(dict(model=["vits"], checkpoint=[str(path)]))[0].name
    one = name(a); (tmp_path / "moved").mkdir(); moved = shutil.copy(a, tmp_path / "moved")
    assert name(moved) == one != name(b)
    a.write_bytes(b"three"); assert name(a) != one


@pytest.mark.parametrize("arguments, message", [
    ("-p modle x", "did you mean 'model'"), ("-p k", "-p k: no value"), ("-p download maybe", "expected True or False"), ("--seeds 0", "expected at least 1"),
    ("--notebook nowhere.ipynb", "no such file"), ("-p out_dir x", "not for the runs of a sweep"), ("--slurm 7", "expected KEY=VALUE")])
def test_requests_that_make_no_sense(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(["--out-dir", str(tmp_path), *arguments.split()])
    assert e.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.glob("*/run.json"))


def test_values_that_make_no_sense_fail_without_a_process(tmp_path):
    result = sweep(dict(solver=["magic"], seed=[0]), tmp_path / "runs", say=silent)
    assert "solver='magic': expected one of" in list(result.failed.values())[0] and not (tmp_path / "runs").exists()


def test_through_a_launcher(tmp_path):
    "The command line that the launcher is given, run by `env`, as srun would."
    request = dict(model=["tiny"], solver=["position_mean"], seed=[0], n_images=[16], k=["12"], seeds=[1])
    result = sweep(request, tmp_path, notebook="none", launcher="env RASA_TEST=1", say=silent)
    assert result.ok and len(list(tmp_path.glob("*/run.json"))) == 1


def test_by_submitit(tmp_path):
    pytest.importorskip("submitit")
    request = dict(model=["tiny"], solver=["position_mean"], seed=[0], n_images=[16], k=["12"], seeds=[1], image_size=[0, 100])
    result = sweep(request, tmp_path, notebook="none", slurm=dict(cluster="debug"), say=silent)
    assert sorted(result.table.outcome) == ["failed", "finished"] and "nearest to 100" in list(result.failed.values())[0]


def test_submitit_is_asked_for_only_when_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match="pip install 'rasa_nb\\[slurm\\]'"): sweep(dict(seed=[0]), tmp_path, slurm={}, say=silent)


def test_the_console_script_is_declared():
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, "setup.py", "--name", "--version"], cwd=root, capture_output=True, text=True)
    assert said.returncode == 0 and "console_scripts = rasa-sweep=rasa_nb.sweep:console" in (root / "settings.ini").read_text()
    assert callable(module.console) and find_notebook().endswith("03_train.ipynb")
