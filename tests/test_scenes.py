"""Scenes and planted tokens: valid for any seed, the same for ever, content and place as promised."""
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rasa_nb.scenes import Scenes, planted_tokens


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**6), st.sampled_from([*Scenes.splits]), st.integers(16, 130))
def test_a_scene_is_valid_and_repeatable(seed, i, split, size):
    data = Scenes(split, n=10**6 + 1, seed=seed, size=size)
    image, mask = data[i]
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and mask.shape == (size, size)
    assert set(mask.unique().tolist()) <= {*range(12), 255} and (mask != 255).float().mean() > .3
    assert image.equal(data[i][0]) and mask.equal(data[i][1])


@pytest.mark.parametrize("split, masks, brightness", [
    ("train", "c2e521862f9ef42d", 119.785),
    ("val", "816bf2e2bebcc72d", 118.304),
    ("test", "3cd6691e733e032d", 125.207)])
def test_scenes_are_those_that_stored_results_were_made_on(split, masks, brightness):
    items = [Scenes(split)[i] for i in range(10)]
    bits = b"".join(mask.numpy().tobytes() for _, mask in items)
    assert hashlib.sha256(bits).hexdigest()[:16] == masks
    images = torch.stack([image for image, _ in items])
    assert abs(images.float().mean() - brightness) < .01   # of 255; sines may differ in their last digits


def test_splits_do_not_overlap():
    seen = {image.numpy().tobytes() for split in Scenes.splits for image, _ in Scenes(split, 100)}
    assert len(seen) == 300


def test_tie_is_the_share_that_follows_the_layout():
    def share_of_upper_group_above(tie):
        above = torch.stack([Scenes("val", tie=tie)[i][1][:8] for i in range(100)])
        return ((above < 4).sum() / (above != 255).sum()).item()
    free, tied = share_of_upper_group_above(0), share_of_upper_group_above(1)
    assert abs(free - 1 / 3) < .1 and tied > .8


def test_colors_do_not_tell_the_class():
    "Mean color of a class, over many images, is the same for all classes within sampling error."
    sums, counts = np.zeros((12, 3)), np.zeros(12)
    for image, mask in Scenes("train", 200):
        for c in set(mask.unique().tolist()) - {255}:
            sums[c] += image[:, mask == c].float().mean(1).numpy()
            counts[c] += 1
    means = sums / counts[:, None]
    assert (np.abs(means - means.mean(0)) < 30).all(), means  # of 255; one image's color has a std of about 55


@pytest.mark.parametrize("options, message", [
    (dict(n=0), "n=0: expected at least one image"), (dict(tie=2), "tie=2: expected a share between 0 and 1"),
    (dict(size=4), "size=4: expected at least 16 pixels")])
def test_scenes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message): Scenes(**options)


@pytest.mark.parametrize("grid", [(6, 8), (1, 5), (4, 1)])
def test_planted_tokens_hold_what_was_planted(grid):
    tokens, content, directions = planted_tokens(200, grid, d=12, strength=3., spread=2.)
    assert tokens.shape == (200, *grid, 12) and tokens.dtype == torch.float32
    torch.testing.assert_close(directions.T @ directions, torch.eye(2))
    across = torch.eye(12) - directions @ directions.T
    torch.testing.assert_close(content.flatten(0, 2).T.cov(), 4 * across, atol=.5, rtol=0)
    place = (tokens @ directions / 3)[0]
    rows, columns = (torch.linspace(0, 1, side) if side > 1 else torch.tensor([.5]) for side in grid)
    torch.testing.assert_close(place[..., 0], rows[:, None].expand(grid), atol=1e-5, rtol=0)
    torch.testing.assert_close(place[..., 1], columns.expand(grid), atol=1e-5, rtol=0)


def test_planted_tokens_of_another_seed_are_new_images_of_the_same_world():
    (_, one, directions), (_, two, same) = planted_tokens(seed=0), planted_tokens(seed=1)
    assert directions.equal(same) and not one.equal(two)
