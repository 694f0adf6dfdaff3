"""K-means over upsampled tokens, against tokens that really are upsampled and scikit-learn's own steps."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from rasa_nb import kmeans
from rasa_nb.head import RASAHead, moments_after
from rasa_nb.kmeans import (ClusterSums, UpsampledMoments, draw_points, kmeans_centers, lloyd, nearest_centers,
                            reduce_tokens, settled_library, whitened_pca)
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
    monkeypatch.setattr(kmeans, "images_per_chunk", lambda *_: 2)
    parts = [*nearest_centers(maps, centers, (8, 12), upsampled=True)]
    assert len(parts) == 4 and torch.equal(torch.cat(parts), torch.cat(whole))


def random_points(seed, n, d, offset=0.):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + offset


def scikit_learn(points, start, max_iter=100):
    "Its centers and inertia, from given centers, in float64."
    model = KMeans(len(start), init=start.double().numpy(), n_init=1, max_iter=max_iter, tol=0)
    model.fit(points.double().numpy())
    return torch.from_numpy(model.cluster_centers_), model.inertia_


def same_centers(a, b, atol=1e-4):
    "Whether every center has its like among the others, in any order."
    distances = torch.cdist(a.double(), b.double())
    return max(distances.min(0).values.max(), distances.min(1).values.max()) < atol


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 6), st.integers(0, 4))
def test_lloyd_finds_scikit_learns_centers_from_the_same_start(seed, k, d, far):
    points = random_points(seed, 200, d).double()   # float32 takes near ties otherwise
    start = points[:k].clone()
    start[:min(far, k - 1)] += 50   # nearest to no point: empty clusters
    (centers,), inertia = lloyd(points, start[None], 100)
    expected, squares = scikit_learn(points, start)
    assert same_centers(centers, expected, 1e-9) and inertia.item() == pytest.approx(squares)


def test_float32_finds_them_too():
    points = random_points(0, 2000, 10)
    start = points[:12].clone()
    start[:3] += 50
    (centers,), inertia = lloyd(points, start[None], 100)
    expected, squares = scikit_learn(points, start)
    assert same_centers(centers, expected, 1e-4) and inertia.item() == pytest.approx(squares, 1e-5)


@pytest.mark.parametrize("max_iter", [1, 2, 100])
def test_iterations_are_counted_as_scikit_learn_counts_them(max_iter):
    points = random_points(1, 500, 4)
    (centers,), _ = lloyd(points, points[None, :20], max_iter)
    assert torch.allclose(centers, scikit_learn(points, points[:20], max_iter)[0].float(), atol=1e-5)


def test_a_seed_means_the_same_in_torch_and_scikit_learn():
    points, centers = random_points(2, 600, 5, offset=10), {}
    for library in ("torch", "sklearn"):
        protocol = SimpleNamespace(library=library, n_init=4, max_iter=100)
        centers[library] = kmeans_centers(points, 8, protocol, seed=3)
    assert torch.allclose(centers["torch"], centers["sklearn"], atol=1e-4)


def test_restarts_at_once_are_restarts_in_turn_in_any_chunks(monkeypatch):
    points = random_points(3, 300, 4)
    starts = points[:45].view(3, 15, 4)
    together = lloyd(points, starts, 100)
    monkeypatch.setattr(kmeans, "images_per_chunk", lambda *_: 7)
    for i, start in enumerate(starts):
        centers, inertia = lloyd(points, start[None], 100)
        assert torch.allclose(centers[0], together[0][i], atol=1e-5)
        assert torch.allclose(inertia[0], together[1][i], rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    points, protocol = random_points(4, 400, 4), SimpleNamespace(library="torch", n_init=1, max_iter=3)
    one, again, other = (kmeans_centers(points, 9, protocol, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_fewer_places_than_clusters_leave_every_point_on_a_center():
    places = random_points(5, 4, 3)
    points = places.repeat(10, 1)
    protocol = SimpleNamespace(library="torch", n_init=2, max_iter=20)
    centers = kmeans_centers(points, 9, protocol, seed=0)
    assert centers.shape == (9, 3) and same_centers(centers, places, 1e-5)


def test_sums_of_points_that_moved_are_sums_of_all():
    points, clusters = random_points(6, 200, 3), ClusterSums(random_points(6, 200, 3), 2, 5)
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = torch.from_numpy(rng.integers(5, size=(2, 200)))
        clusters.move(labels)
    one_hot = F.one_hot(labels, 5).double()
    assert torch.allclose(clusters.sums[..., :-1], one_hot.mT @ points.double(), atol=1e-12)
    assert torch.equal(clusters.sums[..., -1], one_hot.sum(1))


def test_points_far_from_the_origin_keep_their_digits():
    points = random_points(7, 400, 4, offset=2**12)
    protocol = SimpleNamespace(library="torch", n_init=1, max_iter=30)
    centers = kmeans_centers(points, 6, protocol, seed=0)
    near = kmeans_centers(points - 2**12, 6, protocol, seed=0)
    assert same_centers(centers - 2**12, near, 2e-3)


def test_neither_autocast_nor_the_device_changes_the_centers():
    points, protocol = random_points(8, 900, 6), SimpleNamespace(library="torch", n_init=3, max_iter=10)
    expected = kmeans_centers(points, 12, protocol, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans_centers(points, 12, protocol, seed=0), expected)
    if not torch.cuda.is_available(): return
    on_gpu = [kmeans_centers(points, 12, protocol, seed=0, device="cuda") for _ in range(2)]
    assert torch.equal(*on_gpu) and same_centers(on_gpu[0], expected, 1e-3)


def test_the_fastest_library_is_taken_unless_one_is_named():
    assert [settled_library("auto", device) for device in ("cpu", "cuda:1", "mps")] == ["sklearn", "torch", "torch"]
    assert settled_library("faiss", "cuda") == "faiss"


@pytest.mark.parametrize("library", ["sklearn", "torch", "faiss", "auto"])
def test_planted_clusters_are_found(library):
    if library == "faiss": pytest.importorskip("faiss", reason="pip install faiss-cpu to compare with it")
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
