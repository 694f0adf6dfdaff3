"""A head where it works: folded into models of several libraries, exported, sent to a hub."""
import copy
import shutil
import warnings

import pytest
import torch
from toy_vits import of_transformers

from rasa_nb import deploy
from rasa_nb.baselines import ShiftAverage
from rasa_nb.deploy import DebiasedNorm, export_onnx, fold, push_to_hub
from rasa_nb.encoders import from_timm, load_encoder
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.moments import Moments, position_targets, ridge_r2
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import PositionMean
from rasa_nb.scenes import Scenes

import timm   # after rasa_nb, which makes torchvision importable


def vit_encoder(**options):
    "A ViT of timm, D=32, patch 8, 32 px, behind a tokens function of our own."
    options = dict(depth=2, num_classes=0, global_pool="") | options
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, num_heads=2,
                                          dynamic_img_size=True, **options)
    prefix, stats = model.num_prefix_tokens, dict(mean=(.4, .5, .6), std=(.2, .3, .2))
    return PatchEncoder(model, normed_row(prefix), 32, 8, 32, prefix, name="vit", **stats)


def normed_row(prefix):
    "Tokens of a timm ViT as its own forward gives them, prefix left out."
    def tokens(model, x):
        grid = (x.shape[2] // 8, x.shape[3] // 8)
        return model.forward_features(x)[:, prefix:].unflatten(1, grid)
    return tokens


KINDS = ("projector", "offset", "oblique", "two")

def attach(encoder, kind, d=32):
    "The encoder behind heads of one kind."
    q, matrix = torch.linalg.qr(torch.randn(d, 5))[0], torch.randn(d, d)
    heads = dict(projector=[RASAHead(torch.eye(d) - q @ q.T)],
                 offset=[RASAHead(torch.eye(d), torch.randn(4, 4, d))],
                 oblique=[RASAHead(matrix, torch.randn(3, 5, d))],
                 two=[RASAHead(matrix, torch.randn(4, 4, d)), RASAHead(matrix.T)])
    for head in heads[kind]: encoder = DebiasedEncoder(encoder, head)
    return encoder


def double(d): return RASAHead(2 * torch.eye(d))


def assert_debiased(row, debiased, images):
    "The patches of a row of tokens are those of the attached encoder."
    expected = debiased(images)
    prefix = debiased.num_prefix_tokens
    difference = (row[:, prefix:].unflatten(1, expected.shape[1:3]) - expected).abs().max()
    assert difference < 1e-5 * expected.std().clamp_min(1)


# Fold

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [dict(), dict(reg_tokens=4), dict(class_token=False)],
                         ids=["class", "registers", "patches"])
def test_folded_is_attached_and_the_rest_untouched(kind, options):
    encoder = vit_encoder(**options)
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    debiased, prefix = attach(encoder, kind), encoder.num_prefix_tokens
    model = fold(debiased)
    for size in ((32, 32), (48, 48), (24, 56), (8, 40)):
        images = torch.rand(2, 3, *size)
        row, own = (m.forward_features(encoder.normalize(images)) for m in (model, encoder.model))
        assert_debiased(row, debiased, images)
        assert torch.equal(row[:, :prefix], own[:, :prefix])
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())
    assert not any(isinstance(m, DebiasedNorm) for m in encoder.model.modules())


def test_a_classifier_on_the_class_token_goes_on_as_before():
    encoder, images = vit_encoder(global_pool="token", num_classes=7), torch.rand(2, 3, 32, 40)
    assert torch.equal(fold(attach(encoder, "oblique"))(images), encoder.model(images))
    with_prefix = fold(attach(encoder, "projector"), prefix=True)
    projector = with_prefix.norm.debias[0].weight
    row, own = (m.forward_features(images) for m in (with_prefix, encoder.model))
    assert torch.allclose(row[:, 0], own[:, 0] @ projector.T, atol=1e-5)
    assert not torch.allclose(with_prefix(images), encoder.model(images))


def test_a_projector_can_be_merged_into_the_next_layer():
    encoder, images = vit_encoder(class_token=False), torch.rand(2, 3, 32, 32)
    model = fold(attach(encoder, "projector"))
    after, merged = torch.nn.Linear(32, 10), torch.nn.Linear(32, 10)
    merged.load_state_dict(dict(weight=after.weight @ model.norm.debias[0].weight, bias=after.bias))
    own, folded = encoder.model.forward_features(images), model.forward_features(images)
    assert torch.allclose(merged(own), after(folded), atol=1e-5)


def test_folded_models_are_copied_saved_and_moved(tmp_path):
    debiased, images = attach(vit_encoder(), "two"), torch.rand(1, 3, 24, 40)
    model = fold(debiased)
    expected, twin = model.forward_features(images), copy.deepcopy(model)
    assert torch.equal(twin.forward_features(images), expected) and twin.norm.grid == (3, 5)
    model.forward_features(torch.rand(1, 3, 32, 32))
    assert twin.norm.grid == (3, 5)   # the copy's hook tells the copy
    torch.save(model.state_dict(), tmp_path / "m.pth")
    other = fold(attach(vit_encoder(), "two"))
    other.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    assert torch.allclose(other.forward_features(images), expected, atol=1e-6)
    assert model.double().forward_features(images.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", ["Dinov2", "DINOv3ViT", "ViT", "SiglipVision"])
def test_folded_models_of_transformers(kind):
    pytest.importorskip("transformers")
    encoder = load_encoder(of_transformers(kind), resampling="library", device="cpu", mean=.5, std=.5)
    options = dict(interpolate_pos_encoding=True) if kind in ("ViT", "SiglipVision") else {}
    for heads in KINDS:
        debiased = attach(encoder, heads, encoder.embed_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("error")   # the folded model's own forward resamples as the encoder
            model = fold(debiased)
        for size in ((64, 64), (48, 96)):
            images = torch.rand(1, 3, *size)
            out, own = (m(encoder.normalize(images), **options) for m in (model, encoder.model))
            assert_debiased(out.last_hidden_state, debiased, images)
            if encoder.num_prefix_tokens: assert torch.equal(out.pooler_output, own.pooler_output)


class Conv(torch.nn.Module):
    "A module of the user's own: patches, a norm of another name, no prefix."
    def __init__(self):
        super().__init__()
        self.patches, self.last = torch.nn.Conv2d(3, 32, 8, 8), torch.nn.LayerNorm(32)
    def forward(self, x): return self.last(self.patches(x).permute(0, 2, 3, 1))


def test_a_module_of_your_own_by_the_name_of_its_norm():
    encoder = PatchEncoder(Conv(), lambda model, x: model(x), 32, 8, 32, name="mine")
    debiased, images = attach(encoder, "oblique"), torch.rand(2, 3, 24, 40)
    with pytest.raises(ValueError, match="no last norm under .* children are patches, last"): fold(debiased)
    folded = fold(debiased, norm="last")
    assert torch.allclose(folded(encoder.normalize(images)), debiased(images), atol=1e-5)


@pytest.mark.parametrize("resampling, warned", [("official", True), ("library", False)])
def test_another_size_is_warned_of_where_models_resample_otherwise(resampling, warned):
    model = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, num_classes=0, depth=2)
    debiased = DebiasedEncoder(from_timm(model, "deit", resampling=resampling), double(192))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = fold(debiased)
    assert any("resamples its position embedding" in str(w.message) for w in caught) == warned
    for size, same in (((224, 224), True), ((224, 320), not warned)):
        images = torch.rand(1, 3, *size)
        row = folded.forward_features(debiased.normalize(images))[:, 1:].view(1, 14, -1, 192)
        assert torch.allclose(row, debiased(images), atol=1e-5) == same


def test_models_that_norm_their_pooled_output_only_are_not_folded():
    pytest.importorskip("transformers")
    clip = load_encoder(of_transformers("CLIPVision"), device="cpu", mean=.5, std=.5)
    pooled = vit_encoder(global_pool="avg").model
    pooled = from_timm(pooled, "pooled", mean=(.5, .5, .5), std=(.2, .2, .2))
    for encoder in (clip, pooled):
        with pytest.raises(ValueError, match="only the pooled output does.*use attach"):
            fold(DebiasedEncoder(encoder, double(encoder.embed_dim)))


def test_tokens_from_elsewhere_are_not_folded(tiny):
    "Joined from blocks, with a prefix that nobody told of, of another norm, averaged."
    joined = tiny.at([3, 5])
    unaware = PatchEncoder(vit_encoder().model, normed_row(1), 32, 8, 32, 0, name="unaware")
    averaged = ShiftAverage(tiny, 2)
    for encoder, options, error, match in [
            (joined, {}, ValueError, "joined from several blocks"),
            (unaware, {}, ValueError, "other prefix tokens than 0"),
            (tiny, dict(norm="blocks.0.norm1"), ValueError, "takes its tokens elsewhere"),
            (averaged, {}, TypeError, r"cannot be folded: tiny\+ShiftAverage is a ShiftAverage")]:
        with pytest.raises(error, match=match):
            fold(DebiasedEncoder(encoder, double(encoder.embed_dim)), **options)
    with pytest.raises(TypeError, match="VisionTransformer cannot be folded"): fold(tiny.model)


def test_an_offset_needs_all_patches():
    model = fold(attach(vit_encoder(), "offset"))
    model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="4 patch tokens do not fill the grid .4, 4."):
        model.norm(torch.rand(1, 5, 32))


# ONNX

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A debiased encoder and its file for images of 24 x 40."
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    debiased, file = attach(vit_encoder(depth=1), "two"), tmp_path_factory.mktemp("onnx") / "e.onnx"
    assert export_onnx(debiased, file, (24, 40)) < 1e-3
    return debiased, file


def test_onnx_gives_the_same_tokens(exported):
    import onnxruntime
    debiased, file = exported
    session, images = onnxruntime.InferenceSession(file), torch.rand(5, 3, 24, 40)
    tokens, expected = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), debiased(images)
    assert (tokens - expected).abs().max() < 1e-4 * expected.std()
    assert [p.name for p in file.parent.iterdir()] == ["e.onnx"]


def test_onnx_that_differs_is_not_written(exported, tmp_path, monkeypatch, tiny):
    debiased, other = exported
    monkeypatch.setattr(deploy, "_write_onnx", lambda module, images, path: shutil.copy(other, path))
    shifted = ShiftAverage(tiny, 2)
    for encoder, size, error, match in [
            (debiased.base, (24, 40), RuntimeError, "differ from torch's .*: nothing was written"),
            (debiased, 30, ValueError, "no multiple of the patch size 8"),
            (shifted, 96, TypeError, "cannot be exported: .* is a ShiftAverage")]:
        with pytest.raises(error, match=match): export_onnx(encoder, tmp_path / "e.onnx", size)
    assert not list(tmp_path.iterdir())


# Elsewhere

def test_whatever_holds_a_head_sends_it(monkeypatch, tiny):
    sent = []
    monkeypatch.setattr(RASAHead, "push_to_hub", lambda head, *to, **how: sent.append((head, to, how)))
    mean = PositionMean().fit(tiny, Scenes("train", 20))
    for what in (mean, mean.head_, mean.attach(tiny)): push_to_hub(what, "me/head", token="t")
    assert len(sent) == 3
    for head, to, options in sent:
        assert torch.equal(head.offset, mean.head_.offset) and to == ("me/head",)
        assert options == dict(private=False, commit_message="Head: PositionMean", token="t")
    twice = DebiasedEncoder(DebiasedEncoder(tiny, double(192)), double(192), "twice")
    for what, error, match in [(PositionMean(), ValueError, "not fitted"), (3, TypeError, "int has no"),
                               (twice, TypeError, "twice has 2 heads"), (tiny, TypeError, "tiny has 0")]:
        with pytest.raises(error, match=match): push_to_hub(what, "me/head")


def test_an_offset_learned_at_one_size_takes_position_away_at_another():
    along = torch.randn(2, 8)
    def moments(grid, head=None):   # position is where a patch lies in the frame, whatever its size
        steps = [(torch.arange(side) + .5) / side for side in grid]
        where = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
        z = torch.randn(100, *grid, 8) + 3 * where @ along
        return Moments.of(head(z) if head else z)
    head = PositionMean().fit_moments(moments((8, 8))).head_
    for grid in ((8, 8), (4, 4), (12, 6)):
        targets = position_targets(grid, "coords")
        before, after = (ridge_r2(moments(grid, h), moments(grid, h), targets) for h in (None, head))
        assert before.min() > .5 and after.max() < .05, grid
