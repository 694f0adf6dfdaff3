"""The explorer without a browser: maps against `patch_similarity`, what goes over the wire, time of a move, images of all kinds, bad input, the picture where no widget can run."""
import base64, io, json, time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn

from rasa_nb.data import Scenes
from rasa_nb.encoders import PatchEncoder
from rasa_nb.explorer import explore
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.visualize import patch_similarity


def project(patch_size, embed_dim=32, size=96):
    "An encoder without position: each patch projected."
    conv = nn.Conv2d(3, embed_dim, patch_size, patch_size)
    return PatchEncoder(conv, lambda m, x: m(x).permute(0, 2, 3, 1), embed_dim, patch_size, size, name=f"patch {patch_size}")


@pytest.fixture
def scenes(): return [Scenes("val")[i][0] for i in range(2)]


def sent(explorer, name):
    "The map of an encoder as the browser reads it."
    m = next(m for m in explorer.widget.answer["maps"] if m["name"] == name)
    return np.frombuffer(m["values"], "<f4").reshape(m["grid"])


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
    explorer = explore(image, {"eight": project(8), "sixteen": project(16)}, point=(36, 20))
    maps = explorer.similarity()
    assert maps["eight"].shape == (12, 24) and maps["sixteen"].shape == (6, 12)
    for name, cell in dict(eight=(2, 4), sixteen=(1, 2)).items():
        rows, columns = maps[name].shape
        twin = cell[0] + rows // 2, cell[1] + columns * 2 // 3
        top = maps[name].flatten().topk(3).values
        assert maps[name][twin] > .999 and maps[name][cell] > .999 and top[2] < .99
        assert next(m for m in explorer._answer()["maps"] if m["name"] == name)["cell"] == list(cell)


def test_layers_are_the_encoders_own(tiny, scenes):
    head = RASAHead(torch.eye(tiny.embed_dim), None, {})
    explorer = explore(scenes[0], {"tiny": tiny, "same": DebiasedEncoder(tiny, head)}, point=(50, 50))
    given = explorer.similarity()
    assert torch.allclose(given["tiny"], given["same"], atol=1e-5) and explorer.num_layers == tiny.num_layers
    for layer in (0, 3, 5):
        maps = explorer.select(layer=layer).similarity()
        assert torch.allclose(maps["tiny"], patch_similarity(tiny.at(layer)(scenes[0][None] / 255)[0], (6, 6)), atol=1e-5)
        assert maps["same"].equal(given["same"])   # a head is for one layer
    assert [m["label"] for m in explorer._answer()["maps"]] == ["block 5", "as given"]
    assert explorer.select(layer="given").similarity()["tiny"].equal(given["tiny"])


def test_an_image_is_encoded_once(scenes):
    encoder, calls = project(8), []
    tokens = encoder.tokens
    encoder.tokens = lambda m, x: calls.append(len(x)) or tokens(m, x)
    head = RASAHead(torch.eye(encoder.embed_dim), None, {})
    explorer = explore(scenes, {"before": encoder, "after": DebiasedEncoder(encoder, head)})   # one pass for both
    for x in range(0, 96, 8): explorer.select((x, x)).similarity()
    explorer.select(target="image 2").similarity(); explorer.figure()
    assert len(calls) == 2


# Images

@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
@pytest.mark.parametrize("height, width", [(16, 40), (24, 8)])
def test_images_of_all_kinds_give_the_maps_of_their_rgb_bytes(height, width, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)
    rgb, encoder = np.array(picture.convert("RGB")), project(8)
    same = [picture, rgb, torch.from_numpy(rgb).permute(2, 0, 1), torch.from_numpy(rgb).permute(2, 0, 1) / 255, rgb / 255]
    if mode == "L": same += [np.array(picture), torch.from_numpy(np.array(picture))[None]]
    if mode == "RGBA": same.append(np.array(picture))
    maps = [explore(x, encoder, image_size=(height, width)).similarity()["patch 8"] for x in same]
    assert all(torch.allclose(m, maps[0], atol=1e-4) for m in maps) and maps[0].shape == (height // 8, width // 8)


@pytest.mark.parametrize("size, grid", [(None, (12, 18)), (64, (8, 12)), ((64, 64), (8, 8)), (60, (8, 11))])
def test_the_whole_image_is_seen_at_the_size_asked_for(size, grid):
    image = torch.zeros(3, 427, 640); image[:, :, 320:] = 1   # dark on the left, light on the right
    values = explore(image, project(8), image_size=size, point=(639, 426)).similarity()["patch 8"]
    assert values.shape == grid and (values[:, grid[1] // 2 + 1:] > .9).all() and (values[:, :grid[1] // 2] < 0).all()


@pytest.mark.parametrize("image, error, message", [
    (torch.randn(3, 96, 96), ValueError, "expected floats in"),
    (torch.full((3, 96, 96), float("nan")), ValueError, "ranges from nan"),
    (torch.zeros(3, 96, 96, dtype=torch.int64), TypeError, "is int64: expected uint8"),
    (torch.zeros(2, 96, 96), ValueError, r"has shape \(2, 96, 96\)"),
    (np.zeros((3, 96, 96), np.uint8), ValueError, r"\[H, W, 3\] of an array"),
    (torch.zeros(1, 3, 96, 96), ValueError, "has shape"),
    (torch.zeros(3, 0, 96), ValueError, "has shape"),
    ("picture.png", TypeError, "is a str"),
    (torch.zeros(3, 7, 96), ValueError, "image, 7 x 96 pixels, is smaller than one patch of patch 8, 8 pixels"),
])
def test_images_that_are_refused(image, error, message):
    with pytest.raises(error, match=message): explore(image, project(8))


def test_a_choice_that_is_refused_changes_nothing(tiny, scenes):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, tiny).select((10, 10))
    before = explorer._choice()
    for change, message in [(dict(point=(96, 3)), r"point \(x=96, y=3\) is outside a, 96 wide and 96 high: expected 0 <= x < 96 and 0 <= y < 96"),
                            (dict(point=(3, -1)), "outside"), (dict(point=(float("nan"), 1)), "outside"), (dict(query="c"), "expected one of"),
                            (dict(target="c", point=(5, 5)), "expected one of"), (dict(layer=6, query="b"), "from 0 to 5"), (dict(layer=-1), "from 0 to 5"),
                            (dict(layer="last"), "expected 'given'"), (dict(shown=["big"], query="b"), "no encoder 'big'")]:
        with pytest.raises(ValueError, match=message): explorer.select(**change)
        assert explorer._choice() == before
    with pytest.raises(ValueError, match="expected 'given'$"): explore(scenes[0], project(8)).select(layer=0)
    with pytest.raises(ValueError, match="image_size=6 is smaller than one patch"): explore(scenes[0], tiny, image_size=6)
    with pytest.raises(ValueError, match="no encoder given"): explore(scenes[0], {})
    with pytest.raises(ValueError, match="no image given"): explore({}, tiny)


def test_tokens_that_are_not_finite_are_refused(scenes):
    encoder = project(8); encoder.model.weight[:] = float("inf")
    with pytest.raises(ValueError, match="tokens of patch 8 for image are not finite"): explore(scenes[0], encoder)


# The wire

def test_a_move_is_small_and_fast():
    explorer = explore(torch.rand(3, 256, 256), {n: project(8, 384, 256) for n in ("one", "two", "three")})
    widget, sizes, times = explorer.widget, [], []
    widget.send_state = lambda key=None, inner=widget.get_state: sizes.append(measure(inner(key)))
    for i in range(60):
        start = time.perf_counter()
        widget.choice = dict(widget.choice, at=[i / 60, .9])
        times.append(time.perf_counter() - start)
    values = 3 * 4 * 32 * 32
    answers = [size for size in sizes if size > 4096]
    assert len(answers) == 60 and all(values < size < values + 2000 for size in answers), sizes[:4]
    assert widget.answer["maps"][2]["cell"] == [28, 31] and np.median(times) < .1


def measure(state): return sum(len(x) for x in raw(state)) + len(json.dumps(state, default=lambda b: ""))
def raw(x): return [x] if isinstance(x, (bytes, memoryview)) else [b for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()) for b in raw(y)]


def test_the_widget_follows_python_and_python_the_widget(tiny, scenes):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, {"tiny": tiny, "other": project(16)})
    widget = explorer.widget
    widget.choice = dict(at=[.1, .9], query="b", target="a", layer=2, shown=["tiny"])
    assert explorer.query == "b" and explorer.target == "a" and explorer.layer == 2 and explorer.point == pytest.approx((9.6, 86.4))
    assert [m["name"] for m in widget.answer["maps"]] == ["tiny"] and np.allclose(sent(explorer, "tiny"), explorer.similarity()["tiny"])
    explorer.select((80, 5), query="a", target="a", shown=["other", "tiny"])
    assert widget.choice["target"] == "" and widget.choice["shown"] == ["tiny", "other"] and widget.answer["maps"][1]["cell"] == [0, 5]


def test_what_goes_wrong_in_the_browser_is_sent_as_words(tiny, scenes):
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
    assert content == dict(kind="png", id="7", name="similarity_image.png") and Image.open(io.BytesIO(png)).size == Image.open(io.BytesIO(explorer.png())).size


def test_nothing_is_fetched_from_elsewhere(tiny, scenes):
    widget = explore(scenes[0], tiny).widget
    for source in (widget._esm, widget._css): assert "http" not in str(source) and "import " not in str(source) and "url(" not in str(source)


# The picture

def test_the_figure_states_one_scale_for_all(tiny, scenes, tmp_path):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, {"tiny": tiny, "other": project(16)}).select((50, 20), target="b")
    fig = explorer.figure()
    drawn = [ax.images[0] for ax in fig.axes if ax.get_title() in ("tiny", "other")]
    assert [ax.get_title() for ax in fig.axes[:4]] == ["a", "b", "tiny", "other"] and fig.axes[-1].get_ylabel() == "cosine similarity\nmean removed"
    assert all(d.get_clim() == (-1, 1) and d.get_cmap().name == "viridis" for d in drawn)
    assert np.allclose(drawn[0].get_array(), explorer.similarity()["tiny"])
    for ending in ("png", "pdf", "svg"):
        explorer.save(tmp_path / f"maps.{ending}")
        assert (tmp_path / f"maps.{ending}").stat().st_size > 1000


def test_without_a_kernel_there_is_the_picture(tiny, scenes):
    bundle = explore(scenes[0], tiny)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"} and Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).format == "PNG"
    assert bundle["text/plain"] == "Explorer(1 image, encoders: tiny)"


def test_a_notebook_run_by_a_program_holds_the_picture_and_one_with_a_person_the_widget_too():
    code = """import torch
from torch import nn
from rasa_nb.encoders import PatchEncoder
from rasa_nb.explorer import explore
mean = PatchEncoder(nn.AvgPool2d(8), lambda m, x: m(x).permute(0, 2, 3, 1), 3, 8, 96)
explore(torch.rand(3, 96, 96), mean)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(notebook, timeout=120)
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
        data = notebook.cells[0].outputs[-1].data
        assert set(data) == {"text/plain", "image/png"} and not client.widget_state
        client.kc.allow_stdin = True   # as a front end with a person at it says
        client.execute_cell(notebook.cells[0], 0)
        data = notebook.cells[0].outputs[-1].data
        assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data) and client.widget_state


def test_stored_outputs_show_the_picture_and_no_widget():
    folder = Path(__file__).parent.parent / "nbs"
    for path in folder.rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        notebook = nbformat.read(path, 4)
        kept = [o for c in notebook.cells for o in c.get("outputs", []) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
        assert not kept, f"{path.name} stores a widget, which a reader cannot use: run it by `jupyter nbconvert --to notebook --execute --inplace`, then `nbdev_clean`"
        if path.stem == "02f_explorer":
            shown = [o.data for c in notebook.cells for o in c.get("outputs", []) if o.get("data", {}).get("text/plain", "").startswith("Explorer(")]
            assert "widgets" not in notebook.metadata and shown and all("image/png" in data for data in shown)
