"""The published heads, with and without the leak, and the files that others released."""
import argparse
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.base import clone

from rasa_nb.reading import Reading
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import RASA
from rasa_nb.scenes import Scenes, planted_tokens
from rasa_nb.store import write_safetensors
from rasa_nb.trained import TrainedRASA, leak_of, load_released_head


def color_encoder(calls, model=None):
    "An encoder whose tokens are the colors of patches, and that writes down how many images it sees."
    def tokens(model, images):
        if len(images) > 1: calls.append(len(images))   # one alone is the probe's picture
        return model(images).permute(0, 2, 3, 1)
    return PatchEncoder(model or torch.nn.AvgPool2d(8), tokens, 3, 8, image_size=96)


def test_a_global_basis_removes_all_it_learned_and_pairs_write_back():
    z, _, _ = planted_tokens(80, (6, 6), 40)
    z = z @ torch.randn(40, 40) / 10
    for basis, back in (("global", False), ("pairwise", True)):
        rasa = TrainedRASA(basis=basis, epochs=1, batch_size=40).fit_tokens(z)
        removed = int((torch.linalg.svdvals(rasa.projector_) < 1e-3).sum())
        assert (removed < 18) == back and (leak_of(rasa.projector_, rasa.basis_[:, :2]) > .05) == back
        if not back:
            p = rasa.projector_
            assert torch.allclose(p, p.T, atol=1e-6) and torch.allclose(p @ p, p, atol=1e-6)


def test_training_is_repeatable_and_remembers_nothing():
    z, rasa = planted_tokens(60, (4, 4), 12)[0], TrainedRASA(2, epochs=1)
    first = rasa.fit_tokens(z).projector_.clone()
    rasa.fit_tokens(torch.randn(20, 4, 4, 12))
    assert torch.equal(rasa.fit_tokens(z).projector_, first) and len(rasa.history_) == 2
    assert not torch.equal(rasa.set_params(random_state=1).fit_tokens(z).projector_, first)


def test_tokens_in_a_file_teach_what_tokens_in_memory_teach(tiny, tmp_path):
    recipe, scenes = dict(n_heads=1, epochs=1, batch_size=8), Scenes("train", 16)
    memory = TrainedRASA(**recipe).fit(tiny, scenes)
    file = TrainedRASA(**recipe).fit(tiny, scenes, folder=tmp_path)
    assert torch.allclose(memory.projector_, file.projector_, atol=2e-3)   # 16 bits round


def test_images_are_encoded_once_or_anew_in_every_epoch():
    calls, recipe, scenes = [], dict(n_heads=1, epochs=2, batch_size=16), Scenes("train", 32)
    encoder = color_encoder(calls)
    TrainedRASA(**recipe).fit(encoder, scenes, Reading(batch_size=20))
    assert batches_of(calls) == [20, 12]
    calls.clear()
    rasa = TrainedRASA(reaugment=True, **recipe)
    assert (rasa.needs, TrainedRASA().needs) == ("images", "tokens")
    rasa.fit(encoder, scenes)
    assert batches_of(calls) == [16] * 4


def batches_of(calls):
    "Without the single picture that tells encoders apart."
    return [images for images in calls if images > 1]


def test_a_single_row_teaches_the_column_only():
    "The row is the same everywhere: a head for it would learn, and take away, what all tokens share."
    column = torch.linspace(-3, 3, 8).view(8, 1) * torch.eye(12)[1]
    z = torch.randn(200, 1, 8, 12) + 5 * torch.eye(12)[0] + column
    rasa = TrainedRASA(2, lr=2e-2, batch_size=8).fit_tokens(z)
    assert rasa.basis_.shape == (12, 2) and rasa.basis_[1].norm() > .9
    assert rasa.transform(z).mean((0, 1, 2))[0] > 4


def test_recipes_take_other_parameters_too():
    paper, released = TrainedRASA.paper(), TrainedRASA.released(n_heads=3)
    assert (paper.n_heads, paper.basis, paper.lr) == (9, "pairwise", 2e-3)
    assert (paper.targets, paper.epochs, paper.batch_size) == ("coords", 5, 128)
    assert (released.n_heads, released.basis, released.lr) == (3, "pairwise", 2e-4)


def test_what_cannot_be_trained_on():
    z = torch.randn(20, 4, 4, 12)
    class Log(torch.nn.Module):
        def forward(self, x): return torch.nn.functional.avg_pool2d(x, 8).log()   # below 0: not a number
    broken, scenes = color_encoder([], Log()), Scenes("train", 12)
    one, anew = TrainedRASA(1), TrainedRASA(1, reaugment=True)
    refusals = [
        (lambda: one.fit_tokens(z[:1]), "1 images are too few"),
        (lambda: one.fit_tokens(z[:0]), "0 images are too few"),
        (lambda: one.fit_tokens(torch.ones(20, 4, 4, 12)), "constant"),
        (lambda: one.fit_tokens(z[:, :1, :1]), "single patch"),
        (lambda: one.fit(broken, scenes), "tokens of image .* are not finite"),
        (lambda: anew.fit(broken, scenes, folder="."), "folder='.': reaugment=True keeps no tokens"),
        (lambda: anew.fit(broken, scenes), "tokens of image .* are not finite"),
        (lambda: TrainedRASA(2, targets="fourier").fit_tokens(z), "1 to 1, since each head takes 7"),
        (lambda: TrainedRASA(basis="both").fit_tokens(z), "basis='both': expected 'global' or 'pairwise'")]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message): call()


def test_trained_heads_of_version_0_0_1_are_read_under_todays_names(tmp_path):
    old = dict(solver="sgd", targets="auto", n_harmonics=1, rank="evidence", level=.01, ridge=None,
               n_iter=4, basis="pairwise", lr=2e-4, epochs=2, batch_size=16, tol=0., augment_every_epoch=True,
               random_state=5)
    path, tensors = tmp_path / "h.safetensors", dict(projector=torch.eye(4), basis=torch.eye(4)[:, :2])
    metadata = dict(method="RASA", params=old, fitted_on={})
    write_safetensors(path, tensors, "rasa_nb.head.1", metadata)
    rasa = TrainedRASA.load(path)
    assert rasa.get_params() == dict(n_heads=4, basis="pairwise", targets="coords", lr=2e-4, epochs=2,
                                     batch_size=16, reaugment=True, random_state=5)
    assert rasa.head_.metadata == metadata and torch.equal(rasa.basis_, tensors["basis"])
    with pytest.raises(ValueError, match="holds trained heads.*TrainedRASA.load reads it"): RASA.load(path)
    closed = dict(metadata, params=old | dict(solver="closed_form"))
    write_safetensors(path, tensors, "rasa_nb.head.1", closed)
    with pytest.raises(ValueError, match="holds RASA, not TrainedRASA"): TrainedRASA.load(path)


# Heads that others released

def forward_as_released(weights, z):
    "Independent of the library: one vector after the other, Gram-Schmidt inside each pair."
    for r, c in weights:
        r = r / r.norm()
        c = c - (c @ r) * r
        c = c / c.norm()
        z = z - (z @ r)[..., None] * r
        z = z - (z @ c)[..., None] * c
    return z


def state_of(weights, prefix=""):
    layers = {f"{prefix}pre_pos_layers.{i}.weight": w for i, w in enumerate(weights[:-1])}
    return layers | {f"{prefix}pos_pred.weight": weights[-1]}


prefixes, seeds = st.sampled_from(["", "head.", "model.head.", "module.model.head."]), st.integers(0, 999)


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 12), d=st.integers(4, 48), prefix=prefixes, nested=st.booleans(), seed=seeds)
def test_released_heads_are_their_own_forward(tmp_path_factory, heads, d, prefix, nested, seed):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(2, d, generator=g) for _ in range(heads)]
    path = tmp_path_factory.mktemp("h") / "head.pth"
    state = state_of(weights, prefix) | {"model.encoder.norm.weight": torch.ones(3)}
    torch.save(dict(state_dict=state, hyper_parameters=argparse.Namespace(lr=1)) if nested else state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head, clean = load_released_head(path), load_released_head(path, "global")
    z = torch.nn.functional.normalize(torch.randn(3, 4, 5, d, generator=g), dim=-1)
    assert (head(z) - forward_as_released(weights, z)).abs().max() < 1e-6
    about = head.metadata
    assert about["heads"] == heads and about["directions"] == min(d, 2 * heads) >= about["removed"]
    assert clean.metadata["removed"] == about["directions"] and clean.metadata["leak"] < 1e-9
    if heads == 1: assert about["removed"] == 2 and about["leak"] < 1e-9


def test_the_leak_is_none_for_orthogonal_heads_and_known_for_a_planted_angle(tmp_path, recwarn):
    q = torch.linalg.qr(torch.randn(16, 16).double())[0]
    torch.save(state_of([q[:, :2].T, q[:, 2:4].T, q[:, 4:6].T]), tmp_path / "a.pth")
    head = load_released_head(tmp_path / "a.pth")
    assert head.metadata["removed"] == 6 and head.metadata["leak"] < 1e-9 and not recwarn
    second = torch.stack([(q[:, 0] + q[:, 2]) / 2**.5, q[:, 3]])      # at 45 degrees to the first
    torch.save(state_of([q[:, :2].T, second]), tmp_path / "b.pth")
    with pytest.warns(UserWarning, match="2 heads removed 4 directions .* removes 3.* up to 71% comes back"):
        head = load_released_head(tmp_path / "b.pth")
    assert abs(head.metadata["leak"] - .5**.5) < 1e-6 and abs(leak_of(torch.eye(16), q[:, :1]) - 1) < 1e-6


def test_released_heads_in_safetensors_are_those_in_pickles(tmp_path):
    from safetensors.torch import save_file
    weights = [torch.randn(2, 8)]
    save_file(state_of(weights, "head."), tmp_path / "a.safetensors")
    torch.save(dict(head=state_of(weights)), tmp_path / "b.ckpt")
    a, b = (load_released_head(tmp_path / name) for name in ("a.safetensors", "b.ckpt"))
    assert torch.equal(a.projector, b.projector)


class Code:
    def __reduce__(self): return (exec, ("raise SystemExit('code ran')",))


def test_what_is_no_released_head(tmp_path):
    w = torch.randn(2, 8)
    files = dict(code=(Code(), "could run code"), other=({"weight": w}, "holds no released head"),
                 gap=(state_of([w, w + 1]) | {"pre_pos_layers.2.weight": w}, "is not whole"),
                 shape=(state_of([torch.randn(3, 8)]), "expected .2, D."),
                 same=(state_of([torch.ones(2, 8)]), "two different directions"),
                 mixed=(state_of([w, torch.randn(2, 9)]), "expected .2, D."),
                 two=(state_of([w], "student.") | state_of([w], "teacher."), "holds 2 heads, behind"))
    for name, (content, match) in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=match): load_released_head(tmp_path / f"{name}.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "two.pth").read_bytes()[:300])
    with pytest.raises(ValueError, match="is it whole"): load_released_head(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="basis='both'"): load_released_head(tmp_path / "two.pth", "both")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): load_released_head(tmp_path / "none.pth")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reaugment", [False, True])
def test_heads_train_where_the_caller_has_switched_gradients_off(off, reaugment):
    method, data = TrainedRASA(n_heads=1, epochs=2, reaugment=reaugment, lr=.01), Scenes("train", 30)
    expected = clone(method).fit(color_encoder([]), data).head_.projector
    with off(): found = clone(method).fit(color_encoder([]), data).head_.projector
    assert torch.equal(found, expected)
