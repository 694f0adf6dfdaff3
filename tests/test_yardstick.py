"""Names from other images, against plain loops; planted cases; what the intervals promise."""
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import normalized_mutual_info_score

from rasa_nb.matching import class_iou, match_clusters
from rasa_nb.yardstick import (Counts, bootstrap_interval, class_pixels, cluster_cells, cluster_per_image, deal_folds,
                               draw_images, held_out_iou, name_held_out, number_groups, one_cluster,
                               resampled_iou, what_clusters_follow)

RULES = "hungarian", "many_to_one_precision", "many_to_one_iou"


def loop_name(naming, cluster, matching):
    "The class that naming images [images][k][C] give a cluster; ties go to the lower class."
    k, num_classes = len(naming[0]), len(naming[0][0])
    total = [[sum(int(image[j][c]) for image in naming) for c in range(num_classes)] for j in range(k)]
    of_class = [sum(total[j][c] for j in range(k)) for c in range(num_classes)]
    if sum(total[cluster]) == 0: return of_class.index(max(of_class))
    if matching == "hungarian": return int(match_clusters(np.array(total), matching)[cluster])
    best, best_score = -1, 0.
    for c in range(num_classes):
        whole = sum(total[cluster])
        if matching == "many_to_one_iou": whole = whole + of_class[c] - total[cluster][c]
        score = total[cluster][c] / whole
        if score > best_score: best, best_score = c, score
    return best


def loop_held_out(images, folds, matching):
    "IoU of each class by plain loops over folds, images, clusters and classes."
    k, num_classes = len(images[0]), len(images[0][0])
    right, predicted, true = ([0] * num_classes for _ in range(3))
    for fold in sorted(set(folds)):
        naming = [image for image, f in zip(images, folds) if f != fold]
        for image in [image for image, f in zip(images, folds) if f == fold]:
            for cluster in range(k):
                name = loop_name(naming, cluster, matching)
                for c in range(num_classes):
                    pixels = int(image[cluster][c])
                    true[c] += pixels
                    predicted[name] += pixels
                    if name == c: right[c] += pixels
    union = [p + t - r for p, t, r in zip(predicted, true, right)]
    return [right[c] / union[c] if true[c] else math.nan for c in range(num_classes)]


def sparse_tables():
    "Counts [n, k, C] with many zeros, so that ties, lone clusters and absent classes are common; often k = C."
    sizes = st.tuples(st.integers(2, 9), st.integers(2, 5), st.integers(2, 4))
    number = st.sampled_from([0, 0, 0, 1, 2, 7])
    return sizes.flatmap(lambda s: st.lists(number, min_size=math.prod(s), max_size=math.prod(s)).map(
        lambda values: np.array(values).reshape(s)))


@settings(max_examples=60, deadline=None)
@given(sparse_tables(), st.integers(0, 3))
@pytest.mark.parametrize("matching", RULES)
def test_held_out_equals_loops_over_folds_images_and_classes(matching, table, seed):
    if matching == "hungarian": table = table[:, :min(table.shape[1:]), :min(table.shape[1:])]
    table[0, 0, 0] += 1   # at least one pixel
    folds = deal_folds(np.arange(len(table)), 5, seed)
    ours = held_out_iou(Counts.of(table).tables(folds), matching)
    np.testing.assert_allclose(ours, loop_held_out(table, folds.tolist(), matching), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(sparse_tables(), st.integers(0, 3))
@pytest.mark.parametrize("matching", RULES)
def test_a_draw_of_images_scores_as_the_images_written_out(matching, table, seed):
    counts, folds = Counts.of(table), deal_folds(np.arange(len(table)), 3, seed)
    weights = draw_images(np.arange(len(table)), 4, seed)
    same, other = resampled_iou(counts, folds, weights, matching)
    for draw, often in enumerate(weights):
        copies, their_folds = np.repeat(table, often, 0), np.repeat(folds, often)
        if copies.sum() == 0: continue
        total = copies.sum(0)
        expected = np.nan_to_num(class_iou(total, match_clusters(total, matching)))
        np.testing.assert_allclose(same[draw], expected, rtol=0, atol=1e-12)
        tables = np.stack([copies[their_folds == fold].sum(0) for fold in range(folds.max() + 1)])
        expected = np.nan_to_num(held_out_iou(tables, matching))
        np.testing.assert_allclose(other[draw], expected, rtol=0, atol=1e-12)


def test_counts_beyond_32_bits_are_summed_in_64():
    counts = Counts.of(np.full((4, 2, 2), 2**30))
    assert counts.confusion[0, 0] == 2**32
    assert counts.tables(np.arange(4) % 2)[0, 0, 0] == 2**31


def test_groups_stay_together_and_folds_are_even():
    groups = number_groups(np.repeat(list("abcdefg"), 3), 21)
    folds = deal_folds(groups, 5, seed=0)
    assert all(len(set(folds[groups == g])) == 1 for g in range(7))
    assert sorted(np.bincount(folds)) == [3, 3, 3, 6, 6]
    assert (np.bincount(deal_folds(np.arange(100), 5, seed=1)) == 20).all()
    weights = draw_images(groups, 50, seed=0)
    assert (weights.reshape(50, 7, 3) == weights.reshape(50, 7, 3)[..., :1]).all() and (weights.sum(1) == 21).all()


def test_mutual_information_is_that_of_scikit_learn():
    patches = np.random.default_rng(0).integers(-1, 6, (20, 9))
    image, cell = np.indices(patches.shape)
    seen = patches >= 0
    expected = [normalized_mutual_info_score(of[seen], patches[seen]) for of in (image, cell)]
    assert what_clusters_follow(patches) == pytest.approx(expected, abs=1e-12)


def test_controls_score_what_they_should():
    pixels = np.random.default_rng(0).multinomial(100, [.6, .3, .1], 10)
    counts, folds = Counts.of(pixels[:, None]), deal_folds(np.arange(10), 5, 0)
    share = pixels[:, 0].sum() / 1000
    for control in one_cluster(counts), cluster_per_image(counts):
        np.testing.assert_array_equal(class_pixels(control), pixels)
        held_out = held_out_iou(control.tables(folds), "many_to_one_precision")
        assert held_out == pytest.approx([share, 0, 0])   # nobody else knows the cluster of an image
    assert cluster_per_image(counts).shape == (10, 10, 3)


def population(rng, n, purity):
    "Counts of images whose pixels fall into the cluster of their class with a purity that varies by image."
    table = np.zeros((n, 6, 3), int)
    for image in table:
        shares = rng.dirichlet([.5] * 3)
        right = np.clip(purity + .15 * rng.normal(), .4, 1)
        for c, pixels in enumerate(rng.multinomial(100, shares)):
            place = np.full(6, (1 - right) / 4)
            place[[c, c + 3]] = right / 2
            image[:, c] = rng.multinomial(pixels, place)
    return table


def scores(table, folds, weights=None):
    "Mean IoU by names from the same and from other images."
    counts, matching = Counts.of(table), "many_to_one_precision"
    if weights is not None: return [iou.mean(1) for iou in resampled_iou(counts, folds, weights, matching)]
    same = class_iou(counts.confusion, match_clusters(counts.confusion, matching)).mean()
    return [same, held_out_iou(counts.tables(folds), matching).mean()]


def test_the_interval_over_images_covers_the_mean_over_fresh_sets_of_images():
    rng, n = np.random.default_rng(0), 40
    folds = deal_folds(np.arange(n), 5, 0)
    def fresh(): return [population(rng, n, purity) for purity in (.75, .65)]
    def difference(*tables, **options):
        after, before = (scores(table, folds, **options) for table in tables)
        return np.subtract(after, before)
    truth = np.mean([difference(*fresh()) for _ in range(300)], axis=0)
    covered = np.zeros(2, int)
    for trial in range(100):
        tables = fresh()
        measured = difference(*tables)
        drawn = difference(*tables, weights=draw_images(np.arange(n), 100, trial))
        for i in range(2):
            low, high = bootstrap_interval(measured[i], drawn[i])
            covered[i] += low <= truth[i] <= high
    assert (covered >= 90).all(), covered


def test_a_cluster_of_cells_exists_for_every_cell_where_clusters_abound():
    from rasa_nb.matching import LEOPART
    sklearn = LEOPART.replace(library="sklearn")
    assert cluster_cells((3, 5), 20, sklearn, 0).flatten().tolist() == list(range(15))
    assert cluster_cells((8, 8), 4, sklearn, 0).unique().tolist() == list(range(4))


def test_left_over_classes_of_one_to_one_matching_give_way_to_the_most_frequent():
    table = np.zeros((2, 3, 3), int)
    table[0, 0, 0], table[0, 1, 1] = 9, 4   # in the other image's eyes cluster 2 does not exist
    table[1, 2, 0] = 5
    named = name_held_out(Counts.of(table).tables(np.arange(2)), "hungarian")
    assert named[1].tolist() == [0, 1, 0]
