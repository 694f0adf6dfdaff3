"""The explorer without a browser: its maps, what goes over the wire, the picture where no widget runs."""
import base64, io, json, shutil, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn

import rasa_nb
from rasa_nb.baselines import ShiftAverage
from rasa_nb.explorer import explore
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.scenes import Scenes
from rasa_nb.visualize import SIMILARITY_CMAP, patch_similarity, similarity_maps


def project(patch_size, embed_dim=32, size=96):
    "An encoder without position: each patch projected."
    conv = nn.Conv2d(3, embed_dim, patch_size, patch_size)
    def tokens(model, x): return model(x).permute(0, 2, 3, 1)
    return PatchEncoder(conv, tokens, embed_dim, patch_size, size, name=f"patch {patch_size}")


def untouched(encoder): return DebiasedEncoder(encoder, RASAHead(torch.eye(encoder.embed_dim), None, {}))


@pytest.fixture
def scenes(): return [Scenes("val")[i][0] for i in range(2)]


def sent(explorer, name):
    "The map of an encoder as the browser reads it."
    m = next(m for m in explorer.widget.answer["maps"] if m["name"] == name)
    return np.frombuffer(m["values"], "<f4").reshape(m["grid"])


def cells(explorer): return {m["name"]: tuple(m["cell"]) for m in explorer.widget.answer["maps"]}
def labels(explorer): return [m["label"] for m in explorer.widget.answer["maps"]]


# Maps

@pytest.mark.parametrize("center", [True, False])
def test_maps_are_those_of_patch_similarity(tiny, scenes, center):
    explorer, tokens = explore(scenes, tiny, center=center), tiny(torch.stack(scenes) / 255)
    for x, y in [(0, 0), (95, 95), (40, 71)]:
        expected = patch_similarity(tokens[0], (y // 8, x // 8), center)
        assert torch.allclose(explorer.select((x, y)).similarity()["tiny"], expected, atol=1e-5)
        assert np.allclose(sent(explorer, "tiny"), expected, atol=1e-5)


def test_across_images_the_query_token_meets_the_tokens_of_the_other(tiny, scenes):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, tiny).select((20, 60), target="b")
    a, b = (z - z.mean((0, 1)) for z in tiny(torch.stack(scenes) / 255))
    expected = torch.cosine_similarity(b, a[7, 2], dim=-1)
    assert torch.allclose(explorer.similarity()["tiny"], expected, atol=1e-5) and expected.std() > .01
    assert explorer.select(query="b").target == "b" and explorer.select(query="a", target="a").target == "a"
    assert explorer.select(query="b").target == "b"   # the same image until another is named


def test_planted_copies_of_a_patch_are_found_whatever_the_grid():
    image = torch.rand(3, 96, 192)
    image[:, 64:80, 160:176] = image[:, 16:32, 32:48]
    encoders = {"eight": project(8), "sixteen": project(16)}
    explorer = explore(image, encoders, (96, 192), point=(36, 20))
    maps = explorer.similarity()
    assert cells(explorer) == dict(eight=(2, 4), sixteen=(1, 2))
    for name, (row, column), twin in (("eight", (2, 4), (8, 20)), ("sixteen", (1, 2), (4, 10))):
        top = maps[name].flatten().topk(3).values
        assert maps[name][twin] > .999 and maps[name][row, column] > .999 and top[2] < .99


def test_layers_are_those_of_encoders_without_a_head(tiny, scenes):
    encoders = {"tiny": tiny, "average": ShiftAverage(tiny, n_shifts=2), "head": untouched(tiny)}
    explorer = explore(scenes[0], encoders, point=(50, 50))
    given = explorer.similarity()
    assert explorer.num_layers == tiny.num_layers and labels(explorer) == ["", "", ""]
    for layer in (0, 3, 5):
        maps = explorer.select(layer=layer).similarity()
        for name in ("tiny", "average"):
            expected = patch_similarity(encoders[name].at(layer)(scenes[0][None] / 255)[0], (6, 6))
            assert torch.allclose(maps[name], expected, atol=1e-5)
        assert maps["head"].equal(given["head"])   # a head is for one layer
    assert labels(explorer) == ["block 5", "block 5", "as given"]
    assert explorer.select(layer="given").similarity()["tiny"].equal(given["tiny"])


def test_an_image_is_encoded_once(scenes):
    encoder, calls = project(8), []
    tokens = encoder.tokens
    encoder.tokens = lambda model, x: calls.append(len(x)) or tokens(model, x)
    explorer = explore(scenes, {"before": encoder, "after": untouched(encoder)})   # one pass for both
    for x in range(0, 96, 8): explorer.select((x, x)).similarity()
    explorer.select(target="image 2").similarity()
    explorer.figure()
    assert len(calls) == 2


# One road for pictures

def transparent():
    a = np.random.default_rng(0).integers(0, 256, (96, 96, 4), np.uint8)
    return Image.fromarray(a)


@pytest.mark.parametrize("image", [
    torch.rand(3, 427, 640), (torch.rand(3, 30, 90) * 255).byte(), transparent(), torch.rand(48, 48)],
    ids=["photograph", "bytes", "transparent", "grey"])
@pytest.mark.parametrize("size", [None, 100, (64, 128)])
def test_the_explorer_shows_what_similarity_maps_shows(tiny, image, size):
    encoders = {"tiny": tiny, "patch 16": project(16)}
    ours = explore(image, encoders, size, point=(20, 9)).figure()
    theirs = similarity_maps(image, encoders, (20, 9), size)
    ours, theirs = ([i for ax in fig.axes for i in ax.images] for fig in (ours, theirs))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert np.allclose(a.get_array(), b.get_array(), atol=1e-5) and a.get_extent() == b.get_extent()
        assert a.get_cmap() == b.get_cmap() and a.get_clim() == b.get_clim()


def test_the_browser_has_the_colors_of_the_figures(tiny, scenes):
    colors = np.frombuffer(explore(scenes[0], tiny).widget.colors, np.uint8).reshape(256, 3)
    assert np.array_equal(colors, colormaps[SIMILARITY_CMAP](np.arange(256), bytes=True)[:, :3])


# Refusals

def test_what_cannot_be_explored_is_refused(tiny, scenes):
    with pytest.raises(ValueError, match="expected 'given'$"): explore(scenes[0], project(8)).select(layer=0)
    with pytest.raises(TypeError, match="expected an encoder or a dict"): explore(scenes[0], {})
    with pytest.raises(ValueError, match="no image given"): explore({}, tiny)
    normalized, narrow = torch.randn(3, 96, 96), torch.rand(3, 7, 96)
    with pytest.raises(ValueError, match="^image 2 ranges from"): explore([scenes[0], normalized], tiny)
    with pytest.raises(ValueError, match="smaller than one patch of"): explore([scenes[0], narrow], tiny)


def test_a_choice_that_is_refused_changes_nothing(tiny, scenes):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, tiny).select((10, 10))
    before = explorer._choice()
    for change, message in [
            (dict(point=(3, -1)), "outside"), (dict(point=(float("nan"), 1)), "outside"),
            (dict(query="c"), "no image 'c': expected one of"),
            (dict(target="c", point=(5, 5)), "no image 'c': expected one of"),
            (dict(layer=6, query="b"), "from 0 to 5"), (dict(layer=-1), "from 0 to 5"),
            (dict(layer="last"), "expected 'given'"), (dict(shown=["big"], query="b"), "no encoder 'big'")]:
        with pytest.raises(ValueError, match=message): explorer.select(**change)
        assert explorer._choice() == before


# The wire

def raw(x):
    if isinstance(x, (bytes, memoryview)): return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return [b for value in values for b in raw(value)]


def size_of(state): return sum(len(x) for x in raw(state)) + len(json.dumps(state, default=lambda b: ""))


def test_a_move_is_small_and_fast():
    encoders = {n: project(8, 384, 256) for n in ("one", "two", "three")}
    widget, sizes, times = explore(torch.rand(3, 256, 256), encoders).widget, [], []
    widget.send_state = lambda key=None, inner=widget.get_state: sizes.append(size_of(inner(key)))
    for i in range(60):
        start = time.perf_counter()
        widget.choice = dict(widget.choice, at=[i / 60, .9])
        times.append(time.perf_counter() - start)
    values, answers = 3 * 4 * 32 * 32, [size for size in sizes if size > 4096]
    assert len(answers) == 60 and all(values < size < values + 2000 for size in answers), sizes[:4]
    assert np.median(times) < .1


def test_the_widget_follows_python_and_python_the_widget(tiny, scenes):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, {"tiny": tiny, "other": project(16)})
    widget = explorer.widget
    widget.choice = dict(at=[.1, .9], query="b", target="a", layer=2, shown=["tiny"])
    assert (explorer.query, explorer.target, explorer.layer) == ("b", "a", 2)
    assert explorer.point == pytest.approx((9.6, 86.4)) and list(cells(explorer)) == ["tiny"]
    assert np.allclose(sent(explorer, "tiny"), explorer.similarity()["tiny"])
    explorer.select((80, 5), query="a", target="a", shown=["other", "tiny"])
    assert widget.choice["target"] == "" and widget.choice["shown"] == ["tiny", "other"]
    assert cells(explorer)["other"] == (0, 5)


def test_what_goes_wrong_is_sent_as_words_and_the_next_choice_is_answered(tiny, scenes):
    widget = explore(scenes[0], tiny).widget
    widget.choice = dict(widget.choice, query="gone")
    assert "gone" in widget.answer["error"]
    widget.choice = dict(widget.choice, query="image")
    assert widget.answer["error"] == ""


def test_the_export_is_the_figure(tiny, scenes):
    explorer, messages = explore(scenes[0], tiny, point=(20, 20)), []
    explorer.widget.send = lambda content, buffers: messages.append((content, buffers))
    explorer.widget.asked(explorer.widget, dict(kind="export", id="7"), [])
    (content, (png,)), = messages
    assert content == dict(kind="png", id="7", name="similarity_image.png")
    assert Image.open(io.BytesIO(png)).size == Image.open(io.BytesIO(explorer.png())).size


def test_the_widget_is_the_files_of_the_package_and_fetches_nothing(tiny, scenes):
    widget, static = explore(scenes[0], tiny).widget, Path(rasa_nb.__file__).parent / "static"
    for source, name in ((widget._esm, "explorer.js"), (widget._css, "explorer.css")):
        assert str(source) == (static / name).read_text(encoding="utf-8")
        assert not any(word in str(source) for word in ("http", "import ", "import(", "url(", "@import"))


def test_the_files_of_the_widget_are_in_a_built_package(tmp_path):
    root = Path(rasa_nb.__file__).parent.parent
    if not (root / "setup.py").exists(): pytest.skip("this is an installed package, not a checkout")
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "rasa_nb", tmp_path / "rasa_nb")
    subprocess.run([sys.executable, "setup.py", "-q", "build"], cwd=tmp_path, check=True, capture_output=True)
    built = tmp_path / "build" / "lib" / "rasa_nb" / "static"
    assert {p.name for p in built.iterdir()} == {"explorer.js", "explorer.css"}


# The picture

def test_the_figure_names_images_encoders_and_blocks(tiny, scenes, tmp_path):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, {"tiny": tiny, "other": project(16)})
    fig = explorer.select((50, 20), target="b", layer=3).figure()
    assert [ax.get_title() for ax in fig.axes[:3]] == ["a", "b", "similarity"]
    assert [ax.get_ylabel() for ax in fig.axes[:6:3]] == ["tiny, block 3", "other, as given"]
    for ending in ("pdf", "svg"):
        explorer.save(tmp_path / f"maps.{ending}")
        assert (tmp_path / f"maps.{ending}").stat().st_size > 1000


def test_without_a_kernel_there_is_the_picture(tiny, scenes):
    bundle = explore(scenes[0], tiny)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"}
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).format == "PNG"
    assert bundle["text/plain"] == "Explorer(1 image, encoders: tiny)"


@pytest.mark.parametrize("person", [True, False])
def test_where_a_person_may_answer_there_is_the_widget_too(tiny, scenes, monkeypatch, person):
    kernel = SimpleNamespace(get_parent=lambda: dict(content=dict(allow_stdin=person)))
    monkeypatch.setattr("rasa_nb.explorer.get_ipython", lambda: SimpleNamespace(kernel=kernel))
    bundle = explore(scenes[0], tiny)._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert ("application/vnd.jupyter.widget-view+json" in data) == person and "image/png" in data


def test_stored_outputs_show_the_picture_and_no_widget():
    path = Path(__file__).parent.parent / "nbs" / "02m_explorer.ipynb"
    notebook = nbformat.read(path, 4)
    stored = [o.data for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    assert not any("application/vnd.jupyter.widget-view+json" in data for data in stored)
    shown = [data for data in stored if data.get("text/plain", "").startswith("Explorer(")]
    assert "widgets" not in notebook.metadata and shown and all("image/png" in data for data in shown)
