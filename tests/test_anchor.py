"""Gram anchoring: the loss by its equation, adapters that are felt, models that stay the user's own."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import start_processes

from rasa_nb import anchored, resolution
from rasa_nb.anchoring import (ANCHORING, GramAnchor, Training, anchor_batches, anchor_losses, learning_blocks, make_learn, merged_model,
                               tokens_and_prefix, with_model)
from rasa_nb.deploy import fold
from rasa_nb.encoders import from_timm, load_encoder
from rasa_nb.linear import STORED_LINEAR
from rasa_nb.matching import LEOPART
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import PositionMean
from rasa_nb.reading import Reading
from rasa_nb.resolution import Tiled, gram_loss, resize_tokens
from rasa_nb.retrieval import UPRIGHT
from rasa_nb.scenes import Scenes

from toy_vits import of_timm, of_transformers

HALF = dict(mean=(.5, .5, .5), std=(.25, .25, .25))
QUICK = ANCHORING.replace(sizes=(32, 48), steps=20, batch_size=4, rank=2, lr=5e-3)


def small_vit():
    return from_timm(of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8), "small", resampling="library", **HALF)


@pytest.fixture(scope="module")
def small(): return small_vit()


@pytest.fixture(scope="module")
def images(): return Scenes("train", 9, size=48)


# The loss


def by_loops(student, teacher, negatives):
    total, count = 0., 0
    for s, t in zip(student.flatten(1, 2), teacher.flatten(1, 2)):
        for i in range(len(s)):
            for j in range(len(s)):
                ours = s[i] @ s[j] / (s[i] @ s[i]).sqrt() / (s[j] @ s[j]).sqrt()
                theirs = t[i] @ t[j] / (t[i] @ t[i]).sqrt() / (t[j] @ t[j]).sqrt()
                if negatives == "zero both": ours, theirs = ours.clamp_min(0), theirs.clamp_min(0)
                if negatives == "zero teacher's":
                    if ours < 0 and theirs < 0: ours = ours * 0
                    theirs = theirs.clamp_min(0)
                total, count = total + (ours - theirs)**2, count + 1
    return total / count


@pytest.mark.parametrize("negatives", ["keep", "zero both", "zero teacher's"])
def test_the_gram_loss_and_its_gradient_are_those_of_a_double_loop(negatives):
    student, teacher = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 7)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, expected = gram_loss(a, teacher, negatives), by_loops(b, teacher, negatives)
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-6)


def cubic(x, a=-.75):
    "Keys' kernel, with the constant that torch has."
    x = abs(x)
    if x <= 1: return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.


def test_tokens_on_another_grid_are_bicubic_of_a_known_image():
    image = np.random.default_rng(0).normal(size=(8, 6))

    def matrix(new, old):
        m = np.zeros((new, old))
        for i in range(new):
            at = (i + .5) * old / new - .5
            for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3): m[i, min(max(j, 0), old - 1)] += cubic(at - j)
        return m

    for grid in ((4, 3), (12, 9)):
        expected = matrix(grid[0], 8) @ image @ matrix(grid[1], 6).T
        got = resize_tokens(torch.tensor(image, dtype=torch.float32)[None, ..., None], grid)[0, ..., 0]
        assert np.allclose(got, expected, atol=1e-5)
        direct = F.interpolate(torch.tensor(image, dtype=torch.float32)[None, None], grid, mode="bicubic")[0, 0]
        assert torch.equal(got, direct)


def test_a_debiased_teacher_asks_for_debiased_tokens(small, images):
    debiased = PositionMean(rank="all").fit(small, Scenes("train", 20, size=32), 32).attach(small)
    batch, protocol = torch.rand(2, 3, 32, 32), QUICK.replace(sizes=32)
    itself = anchor_losses(small, small, small, batch, 32, protocol)
    moved = anchor_losses(small, small, debiased, batch, 32, protocol)
    assert float(itself["keep"]) < 1e-9 < 1e-3 < float(moved["keep"]) and float(moved["gram"]) > 1e-5
    through = anchor_losses(small, small, Tiled(debiased), batch, 32, protocol)
    assert torch.allclose(through["keep"], moved["keep"]) and torch.allclose(through["gram"], moved["gram"], atol=1e-6)


# What learns, and what comes out of it


def encoders():
    yield "timm", lambda: small_vit()
    yield "rotary", lambda: from_timm(of_timm("vit_small_patch16_dinov3_qkvb"), "rotary", **HALF)
    yield "transformers", lambda: load_encoder(of_transformers("Dinov2WithRegisters"), device="cpu", **HALF)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in encoders()])
def test_adapters_are_felt_everywhere_and_merge_into_the_users_own_class(make):
    encoder = make()
    student = copy.deepcopy(encoder)
    p = 2 * encoder.patch_size
    parameters, batch = make_learn(student, QUICK, 0), torch.rand(2, 3, p, 2 * p)
    for value in parameters.values(): value.data.normal_(std=.05)
    tokens, prefix = tokens_and_prefix(student, batch)
    (tokens.square().sum() + prefix.square().sum()).backward()
    unfelt = [name for name, value in parameters.items() if not value.grad.abs().max() > 0]
    assert not unfelt and len(parameters) >= 2 * 4 * 3   # two matrices, four layers or more, three blocks
    merged = merged_model(encoder.model, student.model)
    assert type(merged) is type(encoder.model) and list(merged.state_dict()) == list(encoder.model.state_dict())
    again = with_model(encoder, merged)
    scale = encoder(batch).abs().mean()
    assert (again(batch) - student(batch)).abs().max() < 1e-5 * max(1, scale) < .01 * (again(batch) - encoder(batch)).abs().max()


def test_the_last_blocks_learn_and_no_other(small, images):
    anchor = GramAnchor(QUICK.replace(adapter="blocks", blocks=1, steps=2)).fit(small, images)
    before, after = small.model.state_dict(), anchor.merge().state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2"}


def test_half_precision_weights_come_back_in_half_precision(images):
    half = small_vit()
    half.model.half()
    anchor = GramAnchor(QUICK.replace(steps=1, precision="bf16")).fit(half, images)
    assert {p.dtype for p in anchor.merge().parameters()} == {torch.float16}
    assert all(np.isfinite(told["loss"]) for told in anchor.history_)


def test_a_plain_module_learns_as_well(images):
    body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2))
    model = nn.ModuleDict(dict(body=body, mix=nn.Linear(16, 16)))

    def tokens(model, images): return model["mix"](model["body"](images).mT).unflatten(1, [side // 8 for side in images.shape[-2:]])

    plain = PatchEncoder(model, tokens, 16, 8, 32, name="plain", **HALF)
    anchor = GramAnchor(QUICK.replace(steps=2)).fit(plain, images)
    assert isinstance(anchor.merge(), nn.ModuleDict) and len(anchor.training_.parameters) == 2
    with pytest.raises(ValueError, match="no blocks that are known"): GramAnchor(QUICK.replace(adapter="blocks")).fit(plain, images)


def test_a_head_on_an_anchored_encoder_folds_into_its_model(small, images):
    anchored = GramAnchor(QUICK.replace(steps=3)).fit(small, images).encoder_
    debiased = PositionMean(rank="all").fit(anchored, Scenes("train", 20, size=32), 32).attach(anchored)
    model, batch = fold(debiased), torch.rand(1, 3, 32, 32)
    assert type(model) is type(small.model)
    assert torch.allclose(model.forward_features(anchored.normalize(batch))[:, 1:].flatten(0, 1), debiased(batch).flatten(0, 2), atol=1e-5)


# Going on


def test_ten_steps_interrupted_and_ten_more_are_twenty(small, images, tmp_path, monkeypatch):
    file, taken = tmp_path / "t.safetensors", Training.step
    whole = GramAnchor(QUICK).fit(small, images)

    def ten_alone(self, batch):
        if self.at == 10: raise KeyboardInterrupt
        return taken(self, batch)

    monkeypatch.setattr(Training, "step", ten_alone)
    with pytest.raises(KeyboardInterrupt): GramAnchor(QUICK).fit(small, images, file=file)
    monkeypatch.setattr(Training, "step", taken)
    again = GramAnchor(QUICK).fit(small, images, file=file)
    a, b = whole.merge().state_dict(), again.merge().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [told["step"] for told in again.history_] == list(range(1, 21)) and again.history_ == whole.history_
    with pytest.raises(ValueError, match="another training, of another protocol"):
        GramAnchor(QUICK.replace(lr=1e-3)).fit(small, images, file=file)


def learn_a_little(small, images):
    "Gradients of a first step, and weights after two."
    training = Training(small, small, QUICK, 0)
    for p in training.parameters.values(): p.data.fill_(.01)
    training.gradients(next(anchor_batches(images, QUICK, 0, Reading(), 0, 48)))
    gradients = {name: p.grad for name, p in training.parameters.items()}
    return gradients, GramAnchor(QUICK.replace(steps=2)).fit(small, images).merge().state_dict()


def one_of_two(rank, folder, small, images):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = learn_a_little(small, images)
    try: GramAnchor(QUICK.replace(batch_size=3)).fit(small, images)
    except ValueError as e: found += (str(e),)
    if rank == 0: torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_learn_the_same(small, images, tmp_path):
    start_processes(one_of_two, (tmp_path, small, images), nprocs=2, start_method="fork")
    (theirs, two, refused), (ours, one) = torch.load(tmp_path / "found.pt"), learn_a_little(small, images)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert "3 images for 2 processes: expected a multiple" in refused


# A whole run


def test_a_run_leaves_a_model_that_loads_where_the_old_one_did(tmp_path, capsys, monkeypatch):
    few = dict(clusters=LEOPART.replace(n_init=1, max_iter=5, draws=10), position_seeds=(1,),
               linear=STORED_LINEAR.replace(draws=10), context=UPRIGHT.replace(memory=300, seeds=(0,), draws=10))
    monkeypatch.setattr(resolution, "RESOLUTION", resolution.RESOLUTION.replace(**few))
    small = "--image_size 32 --sizes 48 --n_images 30 --steps 2 --images_per_step 4 --k 12 --seeds 1".split()
    anchored.main([*small, "--out_dir", str(tmp_path), "--run_name", "r"])
    folder, record = tmp_path / "r", json.loads((tmp_path / "r" / "run.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "anchor.safetensors", "run.json", "figure.png"}
    tiny, after = load_encoder("tiny", device="cpu"), load_encoder("tiny", folder / "model.safetensors", "cpu")
    batch = torch.rand(1, 3, 48, 48)
    assert torch.allclose(GramAnchor.load(folder / "anchor.safetensors", tiny).encoder_(batch), after(batch), atol=1e-5)
    assert 0 < (after(batch) - tiny(batch)).abs().max()
    assert {row["encoder"] for row in record["curve"]["rows"]} == {"before", "after"} and len(record["history"]) == 2
    assert str(folder / "model.safetensors") in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize("change, message", [
    (dict(sizes=()), "expected at least one"), (dict(negatives="drop"), "negatives='drop': expected 'keep'"), (dict(ema=1.), "ema=1.0"),
    (dict(adapter="prompt"), "adapter='prompt': expected 'lora' or 'blocks'"), (dict(rank=0), "rank=0"), (dict(flip=2), "flip=2")])
def test_a_knob_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message): ANCHORING.replace(**change)


def test_what_cannot_be_trained_is_refused_before_the_work(small, images):
    debiased = PositionMean(rank="all").fit(small, Scenes("train", 20, size=32), 32).attach(small)
    with pytest.raises(TypeError, match="of a debiased one train the `.base`"): GramAnchor(QUICK).fit(debiased, images)
    with pytest.raises(ValueError, match="nothing would be learned"): GramAnchor(QUICK.replace(gram=0)).fit(small, images)
    with pytest.raises(ValueError, match="small has 3 blocks"): GramAnchor(QUICK.replace(adapter="blocks", blocks=4)).fit(small, images)
    with pytest.raises(ValueError, match="nearest to 36: 32 or 40"): GramAnchor(QUICK.replace(teacher_sizes=(32, 36))).fit(small, images)
    with pytest.raises(ValueError, match="48 x 48 pixels and is asked for at 96"): GramAnchor(QUICK.replace(sizes=96)).fit(small, images)
    with pytest.raises(ValueError, match="call fit"): GramAnchor().merge()
    with pytest.raises(ValueError, match="moments_file='m' has no effect"): anchored.AnchorConfig(moments_file="m")
    with pytest.raises(ValueError, match="lr='fast': expected a number"): anchored.AnchorConfig(lr="fast")
    assert len(learning_blocks(small.at(0))) == 1   # blocks behind the tokens have nothing to learn
