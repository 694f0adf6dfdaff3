"""The checks that the docs site is built behind, on small sites with planted faults; and how text becomes a page."""
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / "scripts"))
from check_links import check


def site(folder, **pages):
    for name, body in {"index": '<h1 id="top">x</h1>', "other": '<h2 id="here">y</h2>', **pages}.items():
        path = folder / f"{name.replace('__', '/')}.html"; path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<html><body>{body}</body></html>")
    (folder / "a.png").write_bytes(b"")
    return check(folder)


def test_a_whole_site_has_no_fault(tmp_path):
    good = '<a href="other.html#here">a</a> <a href="#me">b</a><p id="me"></p> <img src="a.png"> <a href="https://arxiv.org/abs/2507.14137">c</a> <a href="deep/page.html">d</a> <a href="mailto:a@b.org">e</a>'
    assert site(tmp_path, good=good, deep__page='<a href="../other.html">x</a> <a href="..">up</a>') == []


@pytest.mark.parametrize("body, fault", [
    ('<a href="missing.html">x</a>', "missing.html leads nowhere"), ('<a href="other.html#gone">x</a>', "names no place on other.html"), ('<a href="#gone">x</a>', "names no place on page.html"),
    ('<a href="00_data.ipynb">x</a>', "leads nowhere"), ('<a href="data.md">x</a>', "leads nowhere"), ('<img src="b.png">', "b.png leads nowhere"), ('<a href="../../etc">x</a>', "leads nowhere"),
    ('<script src="https://unpkg.com/x"></script>', "is loaded from outside"), ('<link rel="stylesheet" href="https://fonts.googleapis.com/css">', "is loaded from outside"),
    ('<img src="//example.org/x.png">', "is loaded from outside"), ('<link rel="preconnect" href="https://fonts.gstatic.com">', "is loaded from outside"),
    ('<a href="https://nowhere">x</a>', "is no address"), ('<a href="htps://a.org">x</a>', "a scheme that a browser does not open"), ('<a href="https://a b.org">x</a>', "is no address"),
    ('<p id="one"></p><p id="one"></p>', "the id 'one' is there 2 times"),
])
def test_faults_are_found(tmp_path, body, fault):
    found = site(tmp_path, page=body)
    assert len(found) == 1 and fault in found[0]


def test_style_sheets_are_read_too(tmp_path):
    (tmp_path / "x.css").write_text("@import 'https://a.org/b.css'; p { background: url(//b.org/c.png) } q { background: url(data:image/png;base64,AA) }")
    assert len(site(tmp_path)) == 2


def test_an_empty_folder_is_no_site(tmp_path): assert "holds no page" in check(tmp_path)[0]


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("mkdocs", reason="the docs are built with the extra dev: pip install -e .[dev]")
    import build_docs
    return build_docs


def page(build, folder): nb = build.Notebook.__new__(build.Notebook); nb.folder, nb.page = folder, f"{folder}/x.md" if folder else "x.md"; return nb


def test_links_between_notebooks(build):
    rasa, tutorial = page(build, ""), page(build, "tutorials")
    rasa.page = "rasa.md"
    pages = {"02_rasa.ipynb": rasa, "tutorials/x.ipynb": tutorial}
    assert build.local("[a](../02_rasa.ipynb#part)", tutorial, pages) == "[a](../rasa.md#part)"
    assert build.local("[a](x.ipynb)", tutorial, pages) == "[a](x.md)"
    assert build.local("[a](tutorials/x.ipynb)", rasa, pages) == "[a](tutorials/x.md)"
    assert build.local(f"[`RASA`]({build.url}rasa.html#rasa)", tutorial, pages) == "[`RASA`](../rasa.md#rasa)"
    for same in ("[a](https://a.org/02_rasa.ipynb)", "[a](gone.ipynb)"): assert build.local(same, rasa, pages) == same   # the link check speaks up


def test_mathematics_needs_no_script(build):
    assert "<math" in build.math("where $a_1 = b$ holds") and build.math("`$x$` costs 5$ or 6$") == "`$x$` costs 5$ or 6$"
    assert 'display="block"' in build.math("$$\\sum_i x_i$$")


def explained(build, obj):
    "What a page of the folder tutorials says of a name."
    from nbdev.showdoc import show_doc
    here = page(build, "tutorials")
    here.module, here.api = sys.modules[obj.__module__], []
    said = build.names.linkify(show_doc(obj)._repr_markdown_())   # as nbdev's processors hand it on
    return build.explained(said, here, {})


def test_a_signature_shows_every_parameter_and_links_names(build):
    from rasa_nb.moments import collect_moments
    shown = explained(build, collect_moments)
    for part in ("### collect_moments { #collect_moments .api }", "moments_file", "# sums are saved here every half minute"):
        assert part in shown
    assert '<a href="../moments.html#moments">Moments</a>' in shown
    assert '<a href="../patch_encoder.html#patchencoder">PatchEncoder</a>' in shown
    assert "moments.py#L" in shown and "LNone" not in shown and "](" not in shown.split("<pre>")[1].split("</pre>")[0]


def test_a_method_told_in_pieces_has_a_place_of_its_own(build):
    from rasa_nb.rasa import PositionRemover
    assert "### PositionRemover.attach { #positionremover.attach .api }" in explained(build, PositionRemover.attach)


def test_a_default_with_a_name_is_shown_by_it(build):
    from rasa_nb.segmentation import overcluster
    shown = explained(build, overcluster)
    assert "LEOPART" in shown and "points_per_centroid" not in shown


def test_navigation_has_a_section_for_every_notebook_or_stops(build):
    def one(source):
        nb = build.Notebook.__new__(build.Notebook)
        nb.source, nb.folder, nb.title = source, str(Path(source).parent).replace(".", ""), source
        nb.page = source.replace(".ipynb", ".md")
        return nb
    names = sorted(["index.ipynb", "00_a.ipynb", "02b_b.ipynb", "02d_c.ipynb", "tutorials/b.ipynb", "tutorials/a.ipynb"])
    nav = build.navigation([one(s) for s in names])
    assert [next(iter(n)) for n in nav] == ["Home", "Images", "Removing position", "Measuring and scoring", "Tutorials", "All names"]
    assert [next(iter(e.values())) for e in nav[4]["Tutorials"]] == ["tutorials/a.md", "tutorials/b.md"]
    with pytest.raises(SystemExit, match="no section for more/c.ipynb"): build.navigation([one("more/c.ipynb")])
