"""Committed notebooks: small, whole, and silent about the machine that ran them."""
import json
import re
from pathlib import Path

import pytest

nbs = Path(__file__).parent.parent / "nbs"
notebooks = [p for p in sorted(nbs.rglob("*.ipynb")) if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts)]


def outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for o in cell.get("outputs", []): yield cell, o


def texts(o):
    "What an output says in words: streams, errors, HTML, Markdown and plain text, but no picture."
    join = lambda v: "".join(v) if isinstance(v, list) else json.dumps(v) if isinstance(v, dict) else v
    yield join(o.get("text", ""))
    for kind, value in o.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml": yield join(value)


def faults(path):
    found = []
    for cell, o in outputs(path):
        line = ("".join(cell["source"]).strip().splitlines() or [""])[0][:60]
        if o["output_type"] == "error": found.append(f"an error is stored below {line!r}")
        if o.get("name") == "stderr": found.append(f"a message on stderr is stored below {line!r}")
        for text in texts(o):
            if m := re.search(r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|private|mnt|opt|usr|var)/|[A-Z]:\\\\?Users)\S*", text): found.append(f"a path of the machine, {m[0]!r}, is stored below {line!r}")
            if m := re.search(r"\b\w*Warning\b:?.*", text): found.append(f"a warning, {m[0][:80]!r}, is stored below {line!r}")
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {}) and "image/png" not in o["data"] and "text/html" not in o["data"]: found.append(f"a widget without a picture is stored below {line!r}")
    return found


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebook_is_small_and_clean(path):
    assert path.stat().st_size < 1.5e6, f"{path.stat().st_size / 1e6:.2f} MB: are the figures too large?"
    assert faults(path) == []


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebook_was_saved_with_its_outputs(path):
    "The docs show what is committed; a notebook that computes something shows something."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# \S", "".join(cells[0]["source"]))
    code = {i: "".join(c["source"]).rstrip() for i, c in enumerate(cells) if c["cell_type"] == "code"}
    shown = [i for i, source in code.items() if re.search(r"imshow|\.table|similarity_maps\(|\bprint\(", source)]
    shows = [cells[i] for i in shown if "#| export" not in code[i] and not code[i].splitlines()[-1].startswith("assert ")]
    assert not shows or any(c.get("outputs") for c in shows), "no output is stored: run it top to bottom and save it"


def test_there_are_notebooks(): assert len(notebooks) > 10 and any(p.parent.name == "tutorials" for p in notebooks)


@pytest.mark.parametrize("output, fault", [
    (dict(output_type="stream", name="stdout", text=["saved to /home/me/runs/x"]), "a path of the machine"),
    (dict(output_type="execute_result", data={"text/html": ["<td>/tmp/abc/file</td>"]}), "a path of the machine"),
    (dict(output_type="stream", name="stderr", text="anything"), "stderr"),
    (dict(output_type="stream", name="stdout", text="x.py:3: UserWarning: careful"), "a warning"),
    (dict(output_type="error", ename="ValueError", evalue="no", traceback=[]), "an error"),
    (dict(output_type="display_data", data={"image/png": "/tmp/AAAA/root/"}), None),
    (dict(output_type="stream", name="stdout", text="dinov2: https://github.com/tmp/x and data/root/x"), None),
])
def test_faults_are_found(tmp_path, output, fault):
    (tmp_path / "n.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", source=["x"], outputs=[output])])))
    found = faults(tmp_path / "n.ipynb")
    assert not found if fault is None else fault in found[0]
