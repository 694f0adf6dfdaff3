"""Overclustering at own shape: on squares what it is otherwise, and on other shapes the same counts in another order."""
import numpy as np
import pytest
import torch
from conftest import color_encoder

from rasa_nb.data import ImageList, VOCSegmentation
from rasa_nb.matching import FRANCA, LEOPART
from rasa_nb.own_shape import draw_from_shapes, overcluster_own_shape, own_size, pooled
from rasa_nb.moments import Moments
from rasa_nb.rasa import PositionMean
from rasa_nb.segmentation import overcluster

FEW = LEOPART.replace(n_init=1, max_iter=8, draws=2)


def cut(scenes, n=10):
    "Scenes cut to two shapes, lying and upright."
    items = [scenes[i] for i in range(n)]
    shapes = [(x[:, :64], m[:64]) if i % 3 else (x[:, :, :72], m[:, :72]) for i, (x, m) in enumerate(items)]
    return ImageList(shapes, scenes.classes)


@pytest.mark.parametrize("protocol", [FEW, FRANCA.replace(images=None, max_iter=8, draws=2, n_init=1, mask_size=24)])
def test_squares_score_as_they_do_otherwise(protocol, scenes):
    encoder = color_encoder()
    both = {"before": encoder, "after": PositionMean().fit(encoder, scenes, 48).attach(encoder)}
    data = ImageList([scenes[i] for i in range(8)], scenes.classes)
    there, here = (score(both, data, 12, protocol, 0, 48) for score in (overcluster, overcluster_own_shape))
    for a, b in zip(there.runs + there.cells, here.runs + here.cells): assert np.array_equal(a.confusion, b.confusion)
    assert "own shape" in here.caption and "own shape" not in there.caption


def test_every_image_is_counted_in_its_place(scenes):
    data = cut(scenes)
    result = overcluster_own_shape(color_encoder(), data, 12, FEW, 0, 48)
    each = result.runs[0].counts.matrix.sum(1)
    scored = [int((data[i][1] != 255).sum()) / data[i][1].numel() for i in range(len(data))]
    whole = [np.prod(own_size(data[i][1].shape, 100)) for i in range(len(data))]
    assert np.allclose(np.asarray(each).ravel() / whole, scored, atol=.03)


def test_the_order_of_images_changes_nothing_but_the_order(scenes):
    data, tokens = cut(scenes), color_encoder()
    turned = ImageList([data.items[i] for i in range(len(data))][::-1], data.classes)
    a, b = (overcluster_own_shape(tokens, some, 12, FEW, 0, 48).cells[0].counts.matrix.toarray() for some in (data, turned))
    assert np.array_equal(a, b[::-1])


def test_moments_of_all_shapes_are_those_of_all_tokens():
    parts = [torch.randn(5, 4, 6, 3, dtype=torch.float64) + 2, 3 * torch.randn(7, 6, 2, 3, dtype=torch.float64)]
    moments = []
    for z in parts:
        moments.append(Moments(z.shape[1:3], 3))
        moments[-1].update(z.float())
    flat = torch.cat([z.reshape(-1, 3) for z in parts])
    both = pooled(moments)
    assert torch.allclose(both.mean, flat.mean(0), atol=1e-5)
    assert torch.allclose(both.cov, torch.cov(flat.T, correction=0), atol=1e-4)


def test_points_are_drawn_once_each_from_all_shapes():
    maps = [torch.arange(24.).view(2, 3, 4, 1), 100 + torch.arange(12.).view(2, 2, 3, 1)]
    some = draw_from_shapes(maps, [None, None], 20, 0).flatten().tolist()
    assert len(some) == len(set(some)) == 20 and min(some) < 100 < max(some)
    assert sorted(draw_from_shapes(maps, [None, None], 99, 0).flatten().tolist()) == [*range(24), *range(100, 112)]


def test_photographs_keep_their_shape(voc_root):
    data = VOCSegmentation(voc_root, "val").first(5)
    result = overcluster_own_shape(color_encoder(), data, 21, FEW, 0, 64)
    shapes = [own_size(data[i][1].shape, 100) for i in range(5)]
    assert min(shapes) < max(shapes) and all(min(shape) == 100 for shape in shapes)
    void = [int((data[i][1] == 255).sum()) / data[i][1].numel() for i in range(5)]
    pixels = np.asarray(result.runs[0].counts.matrix.sum(1)).ravel()
    assert np.allclose(pixels / np.prod(shapes, 1), 1 - np.array(void), atol=.02)
    assert "voc-val, 5 of 1,449 images" in result.caption and np.isnan(result.frame.nmi_cell).all()
