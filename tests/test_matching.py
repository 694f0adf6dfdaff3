"""Naming and scoring clusters, against loops over pixels and classes that share no code with it."""
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from rasa_nb.matching import FRANCA, LEOPART, class_iou, confusion_matrix, match_clusters, paired_interval


def loop_pair(pixels, cluster, label, rule):
    both = either = cluster_pixels = 0
    for p, c in pixels:
        both += p == cluster and c == label
        either += p == cluster or c == label
        cluster_pixels += p == cluster
    whole = cluster_pixels if rule == "precision" else either
    return both / whole if whole else 0.0


def loop_many_to_one(pixels, k, num_classes, rule):
    matched = []
    for cluster in range(k):
        best, best_score = -1, 0.0
        for label in range(num_classes):
            score = loop_pair(pixels, cluster, label, rule)
            if score > best_score: best, best_score = label, score
        matched.append(best)
    return matched


def loop_best_one_to_one(pixels, k, num_classes):
    "All one-to-one matchings with the largest summed IoU, and that sum."
    scores = [[loop_pair(pixels, j, c, "iou") for c in range(num_classes)] for j in range(k)]
    orders = itertools.permutations(range(num_classes), k)
    total = {order: math.fsum(scores[j][c] for j, c in enumerate(order)) for order in orders}
    best = max(total.values())
    return [order for order, t in total.items() if t > best - 1e-12], best


def loop_class_iou(pixels, matched, num_classes):
    ious = []
    for label in range(num_classes):
        both = either = true = 0
        for p, c in pixels:
            both += matched[p] == label and c == label
            either += matched[p] == label or c == label
            true += c == label
        ious.append(both / either if true else math.nan)
    return ious


def pixel_lists(k, num_classes):
    "Few pixels, so that ties, void, absent classes and empty clusters are common."
    pixel = st.tuples(st.integers(0, k - 1), st.sampled_from([*range(num_classes), 255]))
    return st.tuples(st.just((k, num_classes)), st.lists(pixel, min_size=1, max_size=40))


@settings(max_examples=80, deadline=None)
@given(st.tuples(st.integers(2, 7), st.integers(2, 5)).flatmap(lambda sizes: pixel_lists(*sizes)))
@pytest.mark.parametrize("rule", ["precision", "iou"])
def test_many_to_one_equals_loops(rule, case):
    (k, num_classes), pixels = case
    confusion = confusion_matrix(*zip(*pixels), k, num_classes)
    seen = [p for p in pixels if p[1] != 255]
    matched = match_clusters(confusion, f"many_to_one_{rule}")
    expected = loop_many_to_one(seen, k, num_classes, rule)
    assert matched.tolist() == expected
    by_loops = loop_class_iou(seen, expected, num_classes)
    np.testing.assert_allclose(class_iou(confusion, matched), by_loops, rtol=0, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 5).flatmap(lambda n: pixel_lists(n, n)))
def test_hungarian_equals_all_permutations(case):
    (k, _), pixels = case
    confusion = confusion_matrix(*zip(*pixels), k, k)
    seen = [p for p in pixels if p[1] != 255]
    matched = match_clusters(confusion, "hungarian")
    best, total = loop_best_one_to_one(seen, k, k)
    assert tuple(matched) in best                # with a tie several are best
    iou, by_loops = class_iou(confusion, matched), loop_class_iou(seen, matched, k)
    np.testing.assert_allclose(iou, by_loops, rtol=0, atol=1e-12)
    assert abs(np.nansum(iou) - total) < 1e-12   # so the mean is the same whichever of them is taken


def test_counts_do_not_overflow_32_bits():
    big = np.array([[2**40, 1], [1, 2**40]])
    iou = class_iou(big, match_clusters(big, "hungarian"))
    assert iou[0] == pytest.approx(2**40 / (2**40 + 2), abs=1e-15)


def test_the_paired_interval_is_that_of_a_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    low, high = scipy.stats.ttest_rel(b, a).confidence_interval(.9)
    assert paired_interval(b - a, level=.9) == pytest.approx(((b - a).mean(), low, high))


def test_a_protocol_of_the_first_version_loads():
    old = {name: value for name, value in vars(LEOPART).items() if name not in ("folds", "fold_seed", "draws")}
    assert type(LEOPART)(**old) == LEOPART


def test_a_protocol_takes_its_own_clusters_and_seeds_where_none_are_given():
    own = FRANCA.replace(k=300, seeds=np.arange(2))
    assert (own.fill(21).k, own.fill(21).seeds) == ((300,), (0, 1))
    assert own.fill(21, k=[21, 40], seeds=7).seeds == (7,)


@pytest.mark.parametrize("knobs, error", [
    (dict(library="cuml"), "library='cuml': expected 'auto' or 'sklearn' or 'torch' or 'faiss'"),
    (dict(n_init=0), "n_init=0: expected at least 1"),
    (dict(folds=1), "folds=1: expected at least 2"),
    (dict(image_size=(224, 0)), r"image_size=\(224, 0\): expected pixels"),
    (dict(image_size=224.), "image_size=224.0: expected pixels"),
    (dict(n_clusters=3), "n_clusters"),
])
def test_a_protocol_that_cannot_be_run_is_refused(knobs, error):
    with pytest.raises((ValueError, TypeError), match=error): LEOPART.replace(**knobs)


@pytest.mark.parametrize("call, error", [
    (lambda: confusion_matrix([0, 1], [0], 2, 2), "2 cluster labels for 1 class labels"),
    (lambda: confusion_matrix([0, 2], [0, 1], 2, 2), "cluster labels from 0 to 2, expected 0 to 1"),
    (lambda: match_clusters(np.eye(2), "greedy"), "matching='greedy': expected 'hungarian'"),
])
def test_counts_that_cannot_be_are_refused(call, error):
    with pytest.raises(ValueError, match=error): call()
