"""K-means over upsampled tokens, against tokens that really are upsampled and scikit-learn's own steps."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from rasa_nb import kmeans
from rasa_nb.head import RASAHead, moments_after
from rasa_nb.kmeans import (UpsampledMoments, draw_points, kmeans_centers, nearest_centers, reduce_tokens,
                            whitened_pca)
from rasa_nb.moments import Moments


def really_upsampled(z, size):
    "Every pixel's token [n * height * width, D], float64."
    pixels = F.interpolate(z.double().permute(0, 3, 1, 2), size=size, mode="bilinear")
    return pixels.permute(0, 2, 3, 1).flatten(0, 2)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2),
       st.tuples(*[st.integers(1, 30)] * 2),   # also fewer pixels than cells
       st.integers(0, 2**31))
def test_moments_of_upsampled_tokens_are_exact_for_any_grid_and_size(grid, size, seed):
    z = torch.randn(3, *grid, 5, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 6) + 10
    z = z.double()
    moments, really = UpsampledMoments(grid, 5, size).update(z[:1]).update(z[1:]), really_upsampled(z, size)
    centered = really - really.mean(0)
    assert torch.allclose(moments.mean, really.mean(0), rtol=1e-9)
    assert torch.allclose(moments.cov, centered.T @ centered / len(really), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [lambda: UpsampledMoments((4, 5), 8, (20, 30)), lambda: Moments((4, 5), 8)])
def test_moments_behind_a_head_need_no_tokens(make):
    z, head = torch.randn(6, 4, 5, 8) + 2, RASAHead(torch.randn(8, 8), torch.randn(4, 5, 8))
    derived, direct = moments_after(make().update(z), head, (4, 5)), make().update(head(z))
    assert torch.allclose(derived.mean, direct.mean, atol=1e-5)
    assert torch.allclose(derived.cov, direct.cov, atol=1e-4)


def test_reduced_tokens_are_scikit_learns_scaler_and_pca_but_for_signs():
    z = torch.randn(5, 6, 7, 12) @ torch.randn(12, 12) * torch.arange(1, 13) + 5
    ours = reduce_tokens(z, Moments((6, 7), 12).update(z), SimpleNamespace(pca=4)).flatten(0, 2)
    scaled = StandardScaler().fit_transform(z.flatten(0, 2).double())
    theirs = torch.from_numpy(PCA(4, svd_solver="full").fit_transform(scaled)).float()
    assert torch.allclose(ours * (ours * theirs).sum(0).sign(), theirs, atol=1e-3)


def test_a_dimension_that_never_changes_is_left_out_and_a_quiet_one_is_not():
    z = torch.randn(5, 6, 7, 12)
    z[..., 3] = 7
    moments = Moments((6, 7), 12).update(z)
    _, projection = whitened_pca(moments, 4)
    assert (projection[3] == 0).all() and projection.isfinite().all()
    loudness = torch.logspace(-6, 6, 12)     # one channel is a millionth of a millionth of another
    _, louder = whitened_pca(Moments((6, 7), 12).update(z * loudness), 4)
    assert torch.allclose(louder * loudness.double()[:, None], projection, atol=1e-5)


def test_points_are_drawn_without_replacement_and_anew_for_each_seed():
    maps = torch.arange(2 * 3 * 4.).view(2, 3, 4, 1)
    one, other = (draw_points(maps, 20, seed).flatten().tolist() for seed in (0, 1))
    assert len(set(one)) == 20 and one == sorted(one) and one != other


def test_pixels_go_to_the_nearest_center_whether_upsampled_or_not():
    maps, centers = torch.randn(3, 4, 6, 5), torch.randn(9, 5)
    native = torch.cdist(maps.flatten(0, 2), centers).argmin(1).view(3, 4, 6)
    labels = torch.cat([*nearest_centers(maps, centers, (8, 12), upsampled=False)])
    assert (labels == native.repeat_interleave(2, 1).repeat_interleave(2, 2)).all()
    really = torch.cdist(really_upsampled(maps, (8, 12)), centers.double()).argmin(1).view(3, 8, 12)
    assert (torch.cat([*nearest_centers(maps, centers, (8, 12), upsampled=True)]) == really).all()


def test_images_that_do_not_fit_one_chunk_are_assigned_alike(monkeypatch):
    maps, centers = torch.randn(7, 4, 6, 5), torch.randn(9, 5)
    whole = [*nearest_centers(maps, centers, (8, 12), upsampled=True)]
    monkeypatch.setattr(kmeans, "images_per_chunk", lambda numbers: 2)
    parts = [*nearest_centers(maps, centers, (8, 12), upsampled=True)]
    assert len(parts) == 4 and torch.equal(torch.cat(parts), torch.cat(whole))


@pytest.mark.parametrize("library", ["sklearn", "faiss"])
def test_planted_clusters_are_found(library):
    pytest.importorskip(library, reason="faiss is optional: pip install faiss-cpu to compare with it")
    planted = 3 * torch.eye(4, 6)
    points = planted.repeat(80, 1) + .1 * torch.randn(320, 6)
    protocol = SimpleNamespace(library=library, n_init=5, max_iter=50)
    found = kmeans_centers(points, 4, protocol, seed=0)
    order = found.argmax(1).argsort()
    assert torch.allclose(found[order], planted, atol=.1)


def test_without_faiss_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    protocol = SimpleNamespace(library="faiss", n_init=1, max_iter=5)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        kmeans_centers(torch.randn(30, 4), 3, protocol, 0)


def test_k_means_knows_no_protocols():
    source = Path(kmeans.__file__).read_text()
    imported = re.findall(r"^\s*(?:from|import) (\S+)", source, re.M)
    assert not [name for name in imported if "matching" in name or "segmentation" in name]
