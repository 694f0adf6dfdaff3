"""The house is in order: chapters import only from above, modules are nouns, and importing one drags in no other."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rasa_nb

nbs = Path(__file__).parent.parent / "nbs"
package = Path(rasa_nb.__file__).parent


def source(path): return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def exports(path):
    "The module a notebook exports to, or None."
    found = [m[1] for cell in source(path) if (m := re.search(r"^#\| default_exp (\w+)", cell, flags=re.M))]
    return found[0] if found else None


order = {module: i for i, path in enumerate(sorted(nbs.glob("*.ipynb"))) if (module := exports(path))}


def imported(module):
    "Modules of the package that a module imports anywhere in its code."
    tree = ast.parse((package / f"{module}.py").read_text("utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}


def test_every_module_has_its_chapter():
    assert set(order) == {p.stem for p in package.glob("*.py") if not p.stem.startswith("_")}


@pytest.mark.parametrize("module", order)
def test_a_chapter_imports_only_from_chapters_above_it(module):
    assert [below for below in imported(module) if order[below] >= order[module]] == []


@pytest.mark.parametrize("module", order)
def test_no_module_bears_the_name_of_something_in_it(module):
    tree = ast.parse((package / f"{module}.py").read_text("utf-8"))
    own = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = {node.name for node in own if "patch" not in "".join(map(ast.unparse, node.decorator_list))}
    assert module not in names   # a patched function is a method, not a name of the module


def test_prefixes_are_unique():
    prefixes = [p.stem.split("_")[0] for p in nbs.glob("*.ipynb") if p.stem != "index"]
    assert sorted(prefixes) == sorted(set(prefixes))


def test_no_method_is_hung_on_a_class_by_assignment():
    found = {p.name: re.findall(r"^[A-Z]\w+\.\w+(?:, [A-Z]\w+\.\w+)* = .*$", p.read_text("utf-8"), flags=re.M) for p in package.glob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def loaded_by(code):
    "Which of some heavy packages a fresh process has loaded after the code."
    heavy = ("matplotlib", "seaborn", "timm", "torchvision", "sklearn", "pandas", "anywidget", "ipywidgets", "papermill", "transformers")
    check = f"{code}; import sys; print([m for m in {heavy} if m in sys.modules])"
    return ast.literal_eval(subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout)


def test_the_package_by_itself_loads_nothing(): assert loaded_by("import rasa_nb") == []


def test_matching_loads_torch_and_scipy_alone(): assert loaded_by("import rasa_nb.matching") == []


def test_the_four_names_of_the_readme_load_no_plot_and_no_widget():
    loaded = loaded_by("from rasa_nb import load_encoder, RASA, Scenes, overcluster")
    assert not {"matplotlib", "seaborn", "anywidget", "ipywidgets", "papermill", "transformers"} & set(loaded)


def test_every_public_name_is_there():
    for name in rasa_nb.__all__: assert getattr(rasa_nb, name).__module__.startswith("rasa_nb") or name == "LEOPART"
