"""Linear segmentation against plain loops and scikit-learn, on tokens whose right answer is known; and its table."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import color_encoder, encoder_of
from sklearn.linear_model import Ridge

from rasa_nb.data import ImageList
from rasa_nb.dense import (CONTROLS, DenseResult, DenseRun, Split, TokenShelf, count_scores, patch_classes,
                           prepare_task, run_controls)
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.linear import (
    DINOV2_LINEAR, DINOV3_LINEAR, NECO_LINEAR, STORED_LINEAR, Learner, LinearCrops, TokenNorm, fit_ridge,
    learning_rate, linear_segmentation, slide, step_seed, train_on_crops)
from rasa_nb.matching import paired_interval
from rasa_nb.segmentation import Share

NAMES = ["red", "green", "blue"]
quick = STORED_LINEAR.replace(image_size=48, mask_size=6, steps=60, seeds=(0, 1), draws=50)


def colored(n, seed=0, bias=None, name="colors"):
    "Images of 6 x 6 patches of 8 pixels, each red, green or blue, with their masks; by chance, or by place."
    random = np.random.default_rng(seed)
    shares = np.full((6, 6, 3), 1 / 3) if bias is None else bias
    items = []
    for _ in range(n):
        ids = np.array([[random.choice(3, p=cell) for cell in row] for row in shares], np.uint8)
        pixels = (np.eye(3)[ids] * 255).astype(np.uint8)
        items.append((pixels.repeat(8, 0).repeat(8, 1), ids.repeat(8, 0).repeat(8, 1)))
    return ImageList(items, NAMES, name)


def placed(name="place", columns=36):
    "An encoder that tells where a patch is, and nothing else."
    table = torch.eye(36).view(1, 6, 6, 36)[..., :columns]
    return encoder_of(lambda images: table.expand(len(images), -1, -1, -1), columns, name=name)


@pytest.fixture(scope="module")
def by_place():
    "Each cell prefers a class."
    return np.random.default_rng(0).dirichlet([.3] * 3, (6, 6))


# what the training does

def plain_rate(protocol, step, total):
    "The published schedules, written down once more."
    lr, warm = protocol.lr, protocol.warmup
    if protocol.name.startswith("neco"): return lr if step < 4 * protocol.drop_at else lr / 10
    if protocol.name.startswith("dinov2"):
        poly = lr * (1 - step / total)
        return poly * (1 - (1 - step / warm) * (1 - 1e-6)) if step < warm else poly
    s = max(0, step - 1)    # the first two steps have the rate of the first
    if s < warm: return lr * (1 - (1 - s / warm) * (1 - 1e-6)) * (1 - s / total)
    return lr / 2 * (1 + math.cos(math.pi * (s + 1) / total))


@pytest.mark.parametrize("published", [DINOV3_LINEAR, DINOV2_LINEAR, NECO_LINEAR], ids=lambda p: p.name)
def test_the_first_fifty_steps_are_those_of_a_plain_loop(published):
    protocol = published.replace(warmup=min(published.warmup, 20), drop_at=published.drop_at and 5)
    random = torch.Generator().manual_seed(1)
    z = torch.randn(4, 5, 5, 8, generator=random) * torch.linspace(.1, 5, 8)
    masks = torch.randint(0, 4, (50, 4, 20, 20), generator=random).where(torch.rand(50, 4, 20, 20) < .9, 255)
    learner = Learner(8, 4, protocol, 60, drop_step=20, seed=3)
    layers = [torch.nn.Dropout2d(protocol.dropout), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1)]
    plain = torch.nn.Sequential(*layers if protocol.batch_norm else layers[::2])
    with torch.no_grad():
        plain[-1].weight.copy_(learner.probe.linear.weight[..., None, None])
        plain[-1].bias.copy_(learner.probe.linear.bias)
    options = dict(lr=protocol.lr, weight_decay=protocol.weight_decay)
    if protocol.optimizer == "sgd": optimizer = torch.optim.SGD(plain.parameters(), momentum=.9, **options)
    else: optimizer = torch.optim.AdamW(plain.parameters(), **options)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = plain_rate(protocol, step, 60)
        torch.manual_seed(step_seed(3, step, 0))
        maps = F.interpolate(plain(z.permute(0, 3, 1, 2)), (20, 20), mode="bilinear")
        every = F.cross_entropy(maps, masks[step].long(), ignore_index=255, reduction="none")
        loss = every.mean() if protocol.count_void else every.sum() / (masks[step] != 255).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert learner.step(z, masks[step]) == pytest.approx(loss.item(), rel=1e-5)
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(plain_rate(protocol, step, 60), rel=1e-9)
    assert torch.allclose(learner.probe.linear.weight, plain[-1].weight[..., 0, 0], atol=1e-6)


def test_the_published_numbers_of_steps_and_rates():
    assert (DINOV3_LINEAR.steps, DINOV3_LINEAR.batch_size, DINOV3_LINEAR.warmup) == (40_000, 16, 1500)
    assert learning_rate(NECO_LINEAR, 9, 25, 20) == .01 and learning_rate(NECO_LINEAR, 20, 25, 20) == .001
    assert learning_rate(DINOV2_LINEAR, 20_000, 40_000) == pytest.approx(5e-4)


def test_a_training_on_crops_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    data, encoder = colored(6), color_encoder()
    protocol = DINOV3_LINEAR.replace(image_size=48, mask_size=48, steps=5, warmup=2, batch_size=4)
    whole = train_on_crops({"color": encoder}, data, protocol, seed=0)["color"]
    path, step = tmp_path / "training.safetensors", Learner.step

    def stopping(learner, *batch):
        if learner.at == 3:
            learner.save(path)
            raise KeyboardInterrupt
        return step(learner, *batch)

    monkeypatch.setattr(Learner, "step", stopping)
    with pytest.raises(KeyboardInterrupt): train_on_crops({"color": encoder}, data, protocol, 0, paths={"color": path})
    monkeypatch.setattr(Learner, "step", step)
    resumed = train_on_crops({"color": encoder}, data, protocol, 0, paths={"color": path})["color"]
    assert torch.equal(resumed.linear.weight, whole.linear.weight)
    path.write_bytes(b"no file of ours")
    with pytest.raises(ValueError, match="delete it to begin anew"):
        train_on_crops({"color": encoder}, data, protocol, 0, paths={"color": path})


def test_the_norm_of_tokens_is_that_of_torch():
    z, norm, plain = torch.randn(3, 4, 5, 6) * 3 + 1, TokenNorm(6), torch.nn.BatchNorm2d(6)
    assert torch.allclose(norm(z).permute(0, 3, 1, 2), plain(z.permute(0, 3, 1, 2)), atol=1e-6)
    assert torch.allclose(norm.eval()(z).permute(0, 3, 1, 2), plain.eval()(z.permute(0, 3, 1, 2)), atol=1e-6)


def test_crops_show_image_and_mask_alike():
    for seed, protocol in enumerate([DINOV3_LINEAR, NECO_LINEAR]):
        crops = LinearCrops(protocol.replace(image_size=64, colors=None, most_of_one=1.))
        image, mask = colored(1)[0]
        torch.manual_seed(seed)
        image, mask = crops(image, mask)
        there = mask != 255
        told = image.argmax(0)
        edge = image.max(0).values < .9    # where two colors meet, or it is padded
        assert (told == mask)[there & ~edge].all() and (there & ~edge).float().mean() > .1


# probes on tokens whose right answer is known

def stored(z, masks, num_classes=3):
    "A split, and the encoder of its tokens."
    encoder = color_encoder()
    encoder.embed_dim = z.shape[-1]
    return Split({id(encoder): z}, masks, num_classes, 255, Share(len(z), 0, 1), torch.empty), encoder


@pytest.mark.parametrize("loud", [1., 1e3])
def test_the_ridge_probe_is_that_of_scikit_learn(loud):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(9, 4, 4, 6, generator=random) + 5
    z[..., 0] *= loud
    masks = torch.randint(0, 3, (9, 12, 12), generator=random).where(torch.rand(9, 12, 12) < .8, 255)
    masks[0] = 255
    split, encoder = stored(z, masks)
    probe = fit_ridge(split, encoder, .1)
    shares = patch_classes(masks, (4, 4), 3).flatten(0, 2).double().numpy()
    weight, x = shares.sum(1), z.flatten(0, 2).double().numpy()
    mean = np.average(x, 0, weight)
    unit = (x - mean) / np.sqrt(np.average((x - mean)**2, 0, weight))
    some = weight > 0
    target = shares[some] / weight[some, None]
    reference = Ridge(alpha=.1 * weight.sum()).fit(unit[some], target, weight[some])
    assert np.allclose(probe(z.flatten(0, 2)).numpy(), reference.predict(unit), atol=2e-4)


def test_classes_that_a_plane_separates_give_100():
    result = linear_segmentation(color_encoder(), colored(12), colored(6, 1), quick)
    assert (result.frame.miou == 100).all()
    assert result.controls.miou.max() < 45 and result.near_control("ridge") == []
    assert (result.per_class == 100).all(axis=None) and result.notes == []


def test_tokens_of_position_alone_give_the_class_prior_of_each_cell(by_place):
    train, val = colored(60, 0, by_place), colored(20, 1, by_place)
    encoders = {"place": placed(), "most of it": placed(columns=35)}
    result = linear_segmentation(encoders, train, val, quick.replace(ridge=1e-9, steps=120, seeds=(0,)))
    prior = result.controls.set_index("control").miou["class prior of each cell"]
    frame = result.frame.set_index(["encoder", "probe"]).miou
    assert frame["place", "ridge"].item() == pytest.approx(prior)
    assert frame["place", "linear"].mean() == pytest.approx(prior, abs=4)
    assert result.near_control("ridge") == list(encoders) and result.change.means_nothing.all()
    assert "class prior of each cell" in result.notes[0] and "means nothing" in result.to_markdown()


def test_the_controls_are_the_most_frequent_classes(by_place):
    train, val = colored(30, 0, by_place), colored(10, 1, by_place)
    masks = [np.stack([data[i][1].numpy()[4::8, 4::8] for i in range(len(data))]) for data in (train, val)]
    result = linear_segmentation(color_encoder(), train, val, quick.replace(steps=1, seeds=(0,)))
    counts = np.bincount(masks[0].ravel(), minlength=3)
    cells = np.apply_along_axis(lambda ids: np.bincount(ids, minlength=3).argmax(), 0, masks[0])
    for name, told in zip(CONTROLS, (np.full((6, 6), counts.argmax()), cells)):
        told = np.broadcast_to(told, masks[1].shape)
        iou = [((told == c) & (masks[1] == c)).sum() / ((told == c) | (masks[1] == c)).sum() for c in range(3)]
        assert result.controls.set_index("control").miou[name] == pytest.approx(100 * np.mean(iou))


def test_shares_of_a_patch_are_means_of_its_pixels():
    masks = torch.randint(0, 4, (3, 12, 18)).where(torch.rand(3, 12, 18) < .9, 9)
    one_hot = torch.stack([(masks == c).float() for c in range(4)], 1)
    pooled = F.adaptive_avg_pool2d(one_hot, (4, 6)).permute(0, 2, 3, 1)
    assert torch.allclose(patch_classes(masks, (4, 6), 4, ignore_index=9), pooled)


# images that are read once, and windows

def test_heads_of_one_encoder_share_its_pass_and_found_runs_need_none(tmp_path):
    seen = []

    def tokens(images):
        seen.append(len(images))
        return F.avg_pool2d(images, 8).permute(0, 2, 3, 1)

    base = encoder_of(tokens, 3)
    halves = [DebiasedEncoder(base, RASAHead(torch.eye(3) / n), f"by {n}") for n in (2, 3)]
    encoders = {"base": base} | {e.name: e for e in halves}
    train, val, reading = colored(8), colored(4, 1), dict(folder=tmp_path)
    first = linear_segmentation(encoders, train, val, quick.replace(steps=3), **reading)
    shown = sum(seen)
    again = linear_segmentation(encoders, train, val, quick.replace(steps=3, draws=20), **reading)
    probed = sum(seen) - shown    # fingerprints show a picture or two
    assert shown <= 12 + 6 and probed <= 6
    assert all((a.confusion == b.confusion).all() for a, b in zip(first.runs, again.runs))
    shelf = TokenShelf()
    linear_segmentation(encoders, train, val, quick.replace(steps=3), shelf=shelf)
    before = sum(seen)
    linear_segmentation(encoders, train, val, quick.replace(steps=3, mask_size=12), shelf=shelf)
    assert sum(seen) == before


def test_windows_average_what_they_show_and_one_window_is_the_whole():
    random = torch.Generator().manual_seed(0)
    image, weight = torch.rand(3, 16, 24, generator=random), torch.randn(3, 2, generator=random)

    def scores_of(views): return {"toy": F.avg_pool2d(views, 4).permute(0, 2, 3, 1) @ weight}

    expected, seen = torch.zeros(2, 16, 24), torch.zeros(16, 24)
    for top in (0, 6, 8):
        for left in (0, 6, 12, 16):
            some = scores_of(image[None, :, top:top + 8, left:left + 8])["toy"].permute(0, 3, 1, 2)
            expected[:, top:top + 8, left:left + 8] += F.interpolate(some, (8, 8), mode="bilinear")[0]
            seen[top:top + 8, left:left + 8] += 1
    assert torch.allclose(slide(scores_of, image, (8, 8), (6, 6))["toy"], expected / seen, atol=1e-6)


def test_windows_of_images_of_any_shape_give_a_mask_of_each_size(tmp_path):
    seen, random = [], np.random.default_rng(0)
    wide = [(np.eye(3)[ids].repeat(8, 0).repeat(8, 1).astype(np.float32), ids.repeat(8, 0).repeat(8, 1).astype(np.uint8))
            for ids in (random.integers(0, 3, shape) for shape in ((6, 9), (8, 6), (6, 6)))]
    protocol = DINOV3_LINEAR.replace(image_size=48, steps=60, warmup=5, lr=.05, batch_size=6, seeds=(0,), colors=None)

    def tokens(images):
        seen.append(len(images))
        return F.avg_pool2d(images, 8).permute(0, 2, 3, 1)

    asked = encoder_of(tokens, 3), colored(9), ImageList(wide, NAMES), protocol
    result = linear_segmentation(*asked, folder=tmp_path)
    assert [len(m) for m in result.runs[0].maps] == [48, 64, 48]
    assert result.runs[0].confusion.sum() == sum(mask.size for _, mask in wide)
    assert result.frame.miou.min() > 80 > result.controls.miou.max()
    seen.clear()
    again = linear_segmentation(*asked, folder=tmp_path)
    assert again.frame.equals(result.frame) and again.controls.equals(result.controls)
    assert sum(seen) <= 3 and not list(tmp_path.glob("*training*"))    # a picture or two that tell encoders apart


def test_several_layers_are_joined(tiny, scenes):
    result = linear_segmentation(tiny.at((1, 3)), scenes.first(6), scenes.first(3), quick.replace(
        image_size=96, mask_size=48, steps=3, seeds=(0,), unseen="score"))
    assert tiny.at((1, 3)).embed_dim == 2 * tiny.embed_dim and len(result.runs) == 2


# the table

def noisy(n=12, weights=((0, .2), (1, .1), (2, 5.)), seeds=(0, 1, 2)):
    "A result of three encoders that are right more or less often."
    masks = torch.randint(0, 3, (n, 8, 8), generator=torch.Generator().manual_seed(0))
    right, runs = F.one_hot(masks, 3).float(), []
    for e, noise in weights:
        for seed in seeds:
            random = torch.Generator().manual_seed(10 * e + seed)
            scores = right + 3 * noise * torch.randn(right.shape, generator=random)
            runs.append(DenseRun("abc"[e], "all", seed, count_scores(scores, masks)))
    controls = run_controls(patch_classes(masks, (4, 4), 3).mean(0), masks)
    about = dict(name="toys", images=n)
    return DenseResult("a task", "memory", runs, controls, STORED_LINEAR.replace(draws=40), about, about, tuple(NAMES))


def test_changes_are_paired_by_seed_and_their_images_drawn_alike():
    result = noisy()
    scores = result.frame.set_index(["encoder", "seed"]).miou.unstack()
    mean, low, high = paired_interval(scores.loc["b"] - scores.loc["a"])
    row = result.change.set_index("encoder").loc["b"]
    assert (row["mean"], row.low, row.high) == pytest.approx((mean, low, high))
    drawn = []
    for often in result.image_draws:
        each = {e: [] for e in "ab"}
        for run in result.runs[:6]:
            table = sum(int(n) * run.counts.matrix[[i]].toarray().reshape(3, 3) for i, n in enumerate(often))
            iou = np.diag(table) / (table.sum(0) + table.sum(1) - np.diag(table))
            each[run.encoder].append(100 * iou.mean())
        drawn.append(np.mean(each["b"]) - np.mean(each["a"]))
    half = 1.96 * np.std(drawn, ddof=1)
    assert (row.images_low, row.images_high) == pytest.approx((mean - half, mean + half))


def test_the_result_is_plain_values_and_text(tmp_path):
    result = noisy()
    result.save(tmp_path / "result.json")
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["knob"] == "memory" and len(kept["scores"]) == 9 and len(kept["scores"][0]["iou"]) == 3
    assert "| class prior of each cell" in result.to_markdown() and "<table" in result._repr_html_()
    assert result["b", "all", 2].seed == 2 and result.summary.encoder.tolist() == ["a", "b", "c", *CONTROLS]
    with pytest.raises(KeyError, match="encoders"): result["d", "all", 0]


# what gives no number

@pytest.mark.parametrize("change, told", [
    (dict(schedule="line"), "'cosine' or 'cycle'"), (dict(steps=None), "expected one of them"),
    (dict(dropout=1.), "below 1"), (dict(windows=True), "learned from crops"), (dict(seeds=()), "at least one"),
    (dict(batch_size=0), "at least 1"), (dict(unseen="skip"), "'refuse' or 'score'")])
def test_a_protocol_refuses_what_it_cannot_do(change, told):
    with pytest.raises(ValueError, match=told): STORED_LINEAR.replace(**change)


def test_what_cannot_be_learned_or_compared_gives_no_number():
    train, val = colored(4), colored(3, 1)
    other = ImageList(train.items, ["red", "green", "azure"], "others")
    for wrong, told in ((other, "class 2 is 'azure' in others and 'blue'"),
                        (ImageList(train.items, [*NAMES, "cyan"]), "class 3 is 'cyan'")):
        with pytest.raises(ValueError, match=told): linear_segmentation(color_encoder(), wrong, val, quick)
    red_and_green = ImageList([(image, mask % 2) for image, mask in train.items], NAMES, "two")
    with pytest.raises(ValueError, match="no pixel of two shows blue"):
        linear_segmentation(color_encoder(), red_and_green, val, quick)
    scored = linear_segmentation(color_encoder(), red_and_green, val, quick.replace(unseen="score", steps=2))
    assert (scored.per_class.blue == 0).all()
    with pytest.raises(ValueError, match="'constant class', as a control is"):
        linear_segmentation({"constant class": color_encoder()}, train, val, quick)
    with pytest.raises(ValueError, match="no encoder"): prepare_task({}, train, val, quick)
    broken = encoder_of(lambda images: torch.full((len(images), 6, 6, 2), torch.nan), 2, name="broken")
    with pytest.raises(ValueError, match="encoder broken.*not finite"): linear_segmentation(broken, train, val, quick)
    with pytest.raises(ValueError, match="nearest to 50"): linear_segmentation(color_encoder(), train, val, quick, 50)
