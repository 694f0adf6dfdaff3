"""The README as a new user follows it: every block of code in it runs as written, in a copy of the repository.

A shell command that is not run here is on the list below with the reason, and is still checked for what can go stale in it.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import papermill as pm
import pytest
from packaging.requirements import Requirement
from papermill.cli import _resolve_type

from rasa_nb.run import Config, check_names

root = Path(__file__).parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")


def blocks(text): return re.findall(r"^```(python|sh)\n(.*?)^```", text, re.S | re.M)


def commands(block):
    "The commands of a shell block, word by word; comments left out, continued lines joined."
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documents():
    "README and every notebook: (name, its blocks)."
    yield "README.md", blocks((root / "README.md").read_text(encoding="utf-8"))
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        prose = [c.source + "\n" for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        if ".ipynb_checkpoints" not in path.parts: yield str(path.relative_to(root)), [b for text in prose for b in blocks(text)]


# What is not run, and what is checked of it instead


def check_make(words, folder):
    "Takes minutes, sets up an environment, or runs these tests again: the target must be there."
    subprocess.run(["make", "-n", *words[1:]], cwd=root, check=True, capture_output=True, timeout=20)


def check_papermill(words, folder):
    "Needs weights and data from a network: notebook and parameters must be there, with values that the run accepts."
    notebook, parameters = root / words[1], {}
    assert notebook.is_file() and words[2].endswith(".ipynb")
    rest = words[3:]
    assert len(rest) % 3 == 0 and set(rest[::3]) <= {"-p"}, f"expected -p NAME VALUE, got {rest}"
    for name, value in zip(rest[1::3], rest[2::3]): parameters[name] = _resolve_type(value)
    known = pm.inspect_notebook(str(notebook))
    assert set(parameters) <= set(known), f"{set(parameters) - set(known)} are no parameters of {words[1]}"
    if notebook.name == "03_train.ipynb":
        check_names(parameters)
        if "checkpoint" in parameters: parameters["checkpoint"] = str(folder / "file"); (folder / "file").touch()   # a file of the reader's own
        Config(**parameters)


def check_install(words, folder):
    "Needs a network: what is installed must be this package, with extras that it has."
    assert words[1] == "install"
    for word in words[2:]:
        if word.startswith("-"): continue
        name, extras = word, re.findall(r"\[(.*?)\]", word)
        if not word.startswith("."): name = Requirement(word).name; assert name in ("rasa_nb", "rasa-nb") or word.startswith("git+" + settings["DEFAULT"]["git_url"]) or f"{name}" in settings["DEFAULT"]["requirements"]
        for extra in ",".join(extras).split(","): assert not extra or f"{extra}_requirements" in settings["DEFAULT"], f"{word}: no such extra"


def check_clone(words, folder):
    "Needs a network: the address must be the repository's."
    assert words[1] == "clone" and words[2].removesuffix(".git") == settings["DEFAULT"]["git_url"]


def check_torchrun(words, folder):
    "Starts several processes and a whole run: module and parameters must be there."
    at = words.index("-m")
    subprocess.run([sys.executable, *words[at:at + 2], "--help"], cwd=root, check=True, capture_output=True, timeout=60)
    check_names([w[2:].split("=")[0].removeprefix("no-") for w in words[at + 2:] if w.startswith("--")])


def check_options(words, folder):
    "Takes minutes or starts many runs: the command must be there and its help must know every option."
    told = subprocess.run([words[0], "--help"], env=environment(root), check=True, capture_output=True, text=True, timeout=120).stdout
    unknown = [w for w in words[1:] if w.startswith("--") and w.split("=")[0] not in told]
    assert not unknown, f"{words[0]} --help says nothing of {unknown}"


NOT_RUN = {"make": check_make, "papermill": check_papermill, "pip": check_install, "git": check_clone, "torchrun": check_torchrun, "rasa-sweep": check_options,
           "rasa-reproduce": check_options}


# The tests


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the repository without what git ignores."
    folder = tmp_path_factory.mktemp("clone") / root.name
    ignored = shutil.ignore_patterns(".git", ".venv", "_*site*", "_proc", "runs", "data", "*.egg-info", ".ipynb_checkpoints", "__pycache__", ".cache")
    shutil.copytree(root, folder, ignore=ignored)
    return folder


def environment(folder): return dict(os.environ, PYTHONPATH=str(folder), MPLBACKEND="Agg", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def run(command, folder, **kwargs):
    "Run in a folder whose own rasa_nb is imported."
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_python_blocks_run_in_order(copy):
    code = [b for kind, b in dict(documents())["README.md"] if kind == "python"]
    assert code
    # a last line that is an expression shows its value in a notebook; here it has only to be computed
    script = "\n".join(["import rasa_nb; assert rasa_nb.__file__.startswith(" + repr(str(copy)) + ")", *code, "print('all ran')"])
    assert run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script], copy).endswith("all ran\n")


def test_shell_blocks_run_in_order(copy, tmp_path):
    shell = [b for kind, b in dict(documents())["README.md"] if kind == "sh"]
    assert shell
    to_run = []
    for words in (w for b in shell for w in commands(b)):
        if words[0] in NOT_RUN: NOT_RUN[words[0]](words, tmp_path)
        else: to_run.append(shlex.join(words))
    if to_run: run(["bash", "-euo", "pipefail", "-c", "\n".join(to_run)], copy)


@pytest.mark.parametrize("name, found", list(documents()))
def test_blocks_are_well_formed(name, found, tmp_path):
    "In notebooks, too: Python that parses, shell that parses, and commands whose names and parameters exist."
    for kind, block in found:
        if kind == "python": compile(block, name, "exec"); continue
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for words in commands(block):
            if words[0] in NOT_RUN: NOT_RUN[words[0]](words, tmp_path)


def test_stale_commands_are_found(tmp_path):
    for line in ("papermill nbs/03_train.ipynb out.ipynb -p modle vits", "papermill nbs/03_train.ipynb out.ipynb -p solver magic", "papermill nbs/none.ipynb out.ipynb",
                 "papermill nbs/03_train.ipynb out.ipynb -x", "pip install rasa_nb[nothing]", "git clone https://example.com/else"):
        words = shlex.split(line)
        with pytest.raises((AssertionError, ValueError)): NOT_RUN[words[0]](words, tmp_path)
    with pytest.raises(subprocess.CalledProcessError): check_make(["make", "no-such-target"], tmp_path)


def test_links_to_files_lead_somewhere():
    text = (root / "README.md").read_text(encoding="utf-8")
    files = [t.split("#")[0] for t in re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", text)]
    assert files
    for target in files: assert (root / target).exists(), target
    for target in re.findall(re.escape(settings["DEFAULT"]["git_url"].replace("%(user)s", "")) + r"/blob/\w+/([^)\s#]+)", text): assert (root / target).exists(), target


def test_links_to_colab_open_a_notebook_of_this_repository():
    "Where a notebook offers Colab, the address is the configured repository's, and so is what its first cells install there."
    user, repo, branch = (settings["DEFAULT"][k] for k in ("user", "repo", "branch"))
    for path in [root / "README.md", *sorted((root / "nbs").rglob("*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"colab\.research\.google\.com/github/([\w./-]+)", text):
            assert target.startswith(f"{user}/{repo}/blob/{branch}/"), f"{path.name}: {target}"
            assert (root / target.removeprefix(f"{user}/{repo}/blob/{branch}/")).is_file(), f"{path.name}: {target}"
        for target in re.findall(r"pip install [^\n\"]*git\+(https://[\w./-]+)", text):
            assert target.removesuffix(".git") == f"https://github.com/{user}/{repo}", f"{path.name}: {target}"
