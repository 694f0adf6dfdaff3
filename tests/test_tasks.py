"""Every task in one call: the scores of each by itself, from one encoding, with paired changes and controls."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import encoder_of
from test_linear import colored, placed

from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.keypoints import NEAREST, self_pairs
from rasa_nb.linear import STORED_LINEAR, linear_segmentation
from rasa_nb.matching import LEOPART
from rasa_nb.retrieval import UPRIGHT, in_context
from rasa_nb.segmentation import overcluster
from rasa_nb.tasks import beyond_chance, evaluate

small = dict(image_size=48, mask_size=6, draws=30)
PROTOCOLS = dict(
    overcluster=LEOPART.replace(k=(3, 6), n_init=1, pca=3, library="sklearn", **small),
    linear=STORED_LINEAR.replace(steps=30, **small),
    in_context=UPRIGHT.replace(neighbors=3, **small),
    correspondence=NEAREST.replace(image_size=48, thresholds=(.1,), draws=30))


@pytest.fixture(scope="module")
def counted():
    "A table of all tasks, what was asked, and how many images the base encoder saw."
    seen = []

    def tokens(images):
        seen.append(len(images))
        noise = torch.randn(6, 6, 5, generator=torch.Generator().manual_seed(0))
        colors = F.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return torch.cat([colors, 3 * noise.expand(len(images), -1, -1, -1)], -1)

    base = encoder_of(tokens, 8)
    keep = torch.eye(8)
    keep[4:] = 0
    encoders = {"before": base, "after": DebiasedEncoder(base, RASAHead(keep), "after"),
                "half": DebiasedEncoder(base, RASAHead(torch.eye(8) / 2), "half")}
    train, val = colored(12), colored(8, 1)
    pairs = self_pairs(val.first(4))
    table = evaluate(encoders, train, val, tuple(PROTOCOLS), seeds=(0, 1), protocols=PROTOCOLS, pairs=pairs)
    return table, encoders, train, val, sum(seen)


def test_each_task_scores_as_it_does_by_itself(counted):
    table, encoders, train, val, _ = counted
    scores = table.frame.set_index(["task", "setting", "encoder", "seed"]).score
    alone = linear_segmentation(encoders, train, val, PROTOCOLS["linear"], seeds=(0, 1)).frame
    for row in alone.itertuples(): assert scores["linear", row.probe, row.encoder, row.seed] == row.miou
    alone = in_context(encoders, train, val, PROTOCOLS["in_context"], seeds=(0, 1)).frame
    for row in alone.itertuples(): assert scores["in_context", row.memory, row.encoder, row.seed] == row.miou
    alone = overcluster(encoders, val, None, PROTOCOLS["overcluster"], seeds=(0, 1), reading=48).frame
    for row in alone.itertuples():
        assert scores["overcluster", f"K={row.k}", row.encoder, row.seed] == pytest.approx(row.miou)
        assert scores["overcluster", f"K={row.k}, other images", row.encoder, row.seed] == pytest.approx(row.held_out)


def test_all_tasks_and_heads_take_one_encoding(counted):
    seen = counted[-1]
    assert 20 <= seen <= 20 + 4 + 20    # and pictures that tell encoders apart; images of pairs may be read anew


def test_changes_are_those_of_the_tasks_and_every_column_has_its_control(counted):
    table = counted[0]
    rows = table.change.set_index(["task", "setting", "encoder"])
    own = table["linear"].change.set_index(["probe", "encoder"]).loc["ridge", "after"]
    assert rows.loc["linear", "ridge", "after"]["mean"] == own["mean"]
    own = table["overcluster"].change.set_index(["k", "encoder"]).loc[6, "after"]
    told = rows.loc["overcluster", "K=6, other images", "after"]
    assert (told["mean"], told.low, told.images_high) == (own.held_out, own.held_out_low, own.held_out_images_high)
    assert set(table.change.task) == set(table.controls.task) == set(PROTOCOLS)
    best = table.summary.set_index("encoder").loc["best control"]
    assert best.notna().all() and len(table.summary.columns) == 1 + 4 + 2 + 1 + 1
    markdown = table.to_markdown()
    for task in PROTOCOLS: assert f"## {task}" in markdown
    kept = json.loads(json.dumps(table.to_dict()))
    assert set(kept["tasks"]) == set(PROTOCOLS) and len(kept["scores"]) == len(table.frame)


def test_two_encoders_of_position_alone_differ_by_nothing():
    bias = np.random.default_rng(0).dirichlet([.3] * 3, (6, 6))
    encoders = {"place": placed(), "less": placed(columns=30)}
    tasks = "linear", "in_context"
    table = evaluate(encoders, colored(30, 0, bias), colored(10, 1, bias), tasks, seeds=0, protocols=PROTOCOLS)
    assert table.change.means_nothing.all()
    assert "[" in table.summary.iloc[1, 1] and len(table.notes) == 3
    assert table.show().axes


def test_a_change_is_beyond_chance_where_all_its_intervals_are():
    class Row: low, high, images_low, images_high = 1, 3, .5, 2
    assert beyond_chance(Row)
    Row.images_low = -.1
    assert not beyond_chance(Row)
    Row.low = Row.high = float("nan")
    assert not beyond_chance(Row)
    Row.images_high = -.05
    assert beyond_chance(Row)
