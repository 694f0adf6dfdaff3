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
from rasa_nb.rasa import RASA
from rasa_nb.scenes import Scenes
from rasa_nb.store import fingerprint
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
    m = next(m for m in maps_of(explorer) if m["name"] == name)
    return np.frombuffer(m["values"], "<f4").reshape(m["grid"])


def maps_of(explorer): return explorer.widget.answer["rows"][-1]["maps"]
def cells(explorer): return {m["name"]: tuple(m["cell"]) for m in maps_of(explorer)}
def labels(explorer): return [m["label"] for m in maps_of(explorer)]


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


# Directions removed

def leaky(d=24):
    "An encoder whose tokens tell row and column along two directions, loudly, and the head that takes them out."
    conv, draw = nn.Conv2d(3, d, 8, 8), torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, 2, generator=draw))[0]
    scale = 10 ** (2 * torch.rand(d, generator=draw) - 1)
    def tokens(model, x):
        z = model(x).permute(0, 2, 3, 1)
        rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in z.shape[1:3]), indexing="ij")
        place = torch.stack([20 * rows, 5 * columns], -1)
        return scale * (z / z.std() + place @ basis.T)
    encoder = PatchEncoder(conv, tokens, d, 8, 96, name="leaky")
    projector = torch.eye(d) - scale[:, None] * (basis @ basis.T) / scale
    return encoder, RASAHead(projector, basis=basis, scale=scale)


@pytest.fixture
def slider():
    "Two images of noise, by the leaky encoder and without its directions."
    encoder, head = leaky()
    noise = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    encoders = {"raw": encoder, "debiased": DebiasedEncoder(encoder, head)}
    return explore({"a": noise[0], "b": noise[1]}, encoders, point=(20, 12)).select(target="b")


def test_maps_of_every_rank_are_those_of_a_head_that_removes_as_many(slider):
    encoder, learned = slider.encoders["raw"], slider.encoders["debiased"].head._learned
    basis, scale = learned["basis"], learned["scale"]
    assert slider.max_rank == 2 and labels(slider) == ["", "2 of 2 directions removed"]
    for rank in (0, 1, 2):
        q = basis[:, :rank]
        head = RASAHead(torch.eye(24) - scale[:, None] * (q @ q.T) / scale)
        expected = explore(slider.images, DebiasedEncoder(encoder, head), point=(20, 12)).select(target="b")
        found = slider.select(rank=rank).similarity()
        assert torch.allclose(found["debiased"], *expected.similarity().values(), atol=1e-4)
        assert torch.equal(found["raw"], slider.select(rank=0).similarity()["raw"])


def test_a_hot_spot_in_an_unrelated_image_goes_with_the_directions(slider):
    def by_row(rank): return slider.select(rank=rank).similarity()["debiased"].mean(1)
    point_row, last = 1, 11
    assert by_row(0)[point_row] > .5 and by_row(0)[last] < -.5
    assert by_row(1).abs().max() < .4 and by_row(2).abs().max() < .4


def test_the_head_keeps_its_directions_in_files_and_not_in_its_fingerprint(slider, tmp_path):
    after = slider.encoders["debiased"]
    after.head.save(tmp_path / "head.safetensors")
    again = RASAHead.load(tmp_path / "head.safetensors")
    assert again.max_rank == 2
    bare = DebiasedEncoder(after.base, RASAHead(again.projector), after.name)
    assert fingerprint(bare) == fingerprint(after) and bare.head.max_rank == 0


def test_there_is_no_slider_without_directions_that_are_the_projector(tiny, scenes):
    basis = torch.eye(tiny.embed_dim)[:, :2]
    other = RASAHead(torch.eye(tiny.embed_dim), basis=basis)   # as where heads are not orthogonal to each other
    empty = RASAHead(torch.eye(tiny.embed_dim), basis=basis[:, :0])
    for encoder in (tiny, untouched(tiny), DebiasedEncoder(tiny, other), DebiasedEncoder(tiny, empty)):
        explorer = explore(scenes[0], encoder)
        assert explorer.max_rank == 0 and explorer.widget.about["rank"] == 0 and labels(explorer) == [""]


def test_the_slider_of_a_fitted_method_begins_at_the_encoder_and_ends_at_the_method(tiny):
    encoders = {"raw": tiny, "rasa": RASA(rank=3).fit(tiny, Scenes("train", 40)).attach(tiny)}
    explorer = explore(Scenes("val")[0][0], encoders, point=(30, 30))
    assert explorer.max_rank == 3
    ends = [explorer.select(rank=rank).similarity() for rank in (0, 3)]
    assert torch.allclose(ends[0]["rasa"], ends[0]["raw"], atol=1e-5)
    expected = patch_similarity(encoders["rasa"](Scenes("val")[0][0][None] / 255)[0], (3, 3))
    assert torch.allclose(ends[1]["rasa"], expected, atol=1e-4)


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
            (dict(layer="last"), "expected 'given'"), (dict(shown=["big"], query="b"), "no encoder 'big'"),
            (dict(rank=1, query="b"), "expected 'all', since no encoder has a basis")]:
        with pytest.raises(ValueError, match=message): explorer.select(**change)
        assert explorer._choice() == before


# The wire

def raw(x):
    if isinstance(x, (bytes, memoryview)): return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return [b for value in values for b in raw(value)]


def size_of(state): return sum(len(x) for x in raw(state)) + len(json.dumps(state, default=lambda b: ""))


def test_a_move_of_the_slider_is_fast():
    encoder, basis = project(8, 768, 256), torch.linalg.qr(torch.randn(768, 30))[0]
    after = DebiasedEncoder(encoder, RASAHead(torch.eye(768) - basis @ basis.T, basis=basis))
    images, times = list(torch.rand(2, 3, 256, 256)), []
    widget = explore(images, {"raw": encoder, "debiased": after}).select(target="image 2").widget
    for rank in range(30):
        start = time.process_time()
        widget.choice = dict(widget.choice, rank=rank)
        times.append(time.process_time() - start)
    assert widget.answer["rows"][1]["maps"][1]["label"] == "29 of 30 directions removed"
    assert np.median(times) < .1


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
    widget.choice = dict(at=[.1, .9], query="b", target="a", layer=2, rank=0, shown=["tiny"])
    assert [row["image"] for row in widget.answer["rows"]] == ["b", "a"]
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
    assert {p.name for p in built.iterdir()} == {"explorer.js", "explorer.css", "published.json"}


# The picture

def test_the_figure_names_images_encoders_and_blocks(tiny, scenes, tmp_path):
    explorer = explore({"a": scenes[0], "b": scenes[1]}, {"tiny": tiny, "other": project(16)})
    fig = explorer.select((50, 20), target="b", layer=3).figure()
    assert [ax.get_title() for ax in fig.axes[1:3]] == ["tiny\nblock 3", "other\nas given"]
    assert [ax.get_ylabel() for ax in fig.axes[:6:3]] == ["a", "b"]
    for row, image in enumerate("ab"):
        for column, values in enumerate(explorer.similarity(image).values(), 1):
            assert np.allclose(fig.axes[3 * row + column].images[0].get_array(), values)
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
