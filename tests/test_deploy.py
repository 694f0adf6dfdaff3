"""A head where it works: folded into models of several libraries, exported, released by others, on a hub, and warned of behind a stranger."""
import argparse
import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import rasa_nb.deploy as deploy
from rasa_nb.measures import position_r2
from rasa_nb.data import Scenes
from rasa_nb.deploy import DebiasedNorm, export_onnx, fold, leak_of, load_from_hub, load_released_head, model_card, push_to_hub
from rasa_nb.encoders import PatchEncoder
from rasa_nb.store import encoder_hash, fitted_on, warn_if_foreign
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.rasa import PositionMean, RASA

import timm   # after rasa_nb, whose guard makes torchvision importable


def timm_vit(**kwargs):
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="", dynamic_img_size=True) | kwargs
    return timm.models.VisionTransformer(**options)


def normed_row(prefix):
    "Tokens of a timm ViT as its own forward gives them, prefix left out."
    return lambda model, x: model.forward_features(x)[:, prefix:].unflatten(1, (x.shape[2] // 8, x.shape[3] // 8))


def vit_encoder(**kwargs):
    model = timm_vit(**kwargs)
    return PatchEncoder(model, normed_row(model.num_prefix_tokens), 32, 8, 32, model.num_prefix_tokens, mean=(.4, .5, .6), std=(.2, .3, .2), name="vit")


def some_heads():
    q = torch.linalg.qr(torch.randn(32, 5))[0]
    return dict(projector=[RASAHead(torch.eye(32) - q @ q.T)], offset=[RASAHead(torch.eye(32), torch.randn(4, 4, 32))],
                oblique=[RASAHead(torch.randn(32, 32), torch.randn(3, 5, 32))], two=[RASAHead(torch.randn(32, 32), torch.randn(4, 4, 32)), RASAHead(torch.randn(32, 32))])


def attach(encoder, heads):
    for h in heads: encoder = DebiasedEncoder(encoder, h)
    return encoder


def normalized(encoder, images): return (images - encoder.mean) / encoder.std


@pytest.mark.parametrize("kind", ["projector", "offset", "oblique", "two"])
@pytest.mark.parametrize("options", [dict(), dict(reg_tokens=4), dict(class_token=False)], ids=["class", "registers", "patches"])
def test_folded_is_attached_and_the_rest_untouched(kind, options):
    encoder = vit_encoder(**options); before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    debiased, prefix = attach(encoder, some_heads()[kind]), encoder.num_prefix_tokens
    model = fold(debiased)
    for size in ((32, 32), (48, 48), (24, 56), (8, 40)):
        images = torch.rand(2, 3, *size); row = model.forward_features(normalized(encoder, images)); expected = debiased(images)
        assert (row[:, prefix:].unflatten(1, expected.shape[1:3]) - expected).abs().max() < 1e-5 * expected.std().clamp_min(1)
        assert torch.equal(row[:, :prefix], encoder.model.forward_features(normalized(encoder, images))[:, :prefix])
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items()) and not any(isinstance(m, DebiasedNorm) for m in encoder.model.modules())


def test_classifier_on_the_class_token_goes_on_as_before():
    encoder = vit_encoder(global_pool="token", num_classes=7)
    model, images = fold(attach(encoder, some_heads()["oblique"])), torch.rand(2, 3, 32, 40)
    assert torch.equal(model(images), encoder.model(images))
    with_prefix = fold(attach(encoder, some_heads()["projector"]), prefix=True)
    assert not torch.allclose(with_prefix(images), encoder.model(images))
    head = with_prefix.norm.debias[0].weight
    assert torch.allclose(with_prefix.forward_features(images)[:, 0], encoder.model.forward_features(images)[:, 0] @ head.T, atol=1e-5)


def test_a_projector_can_be_merged_into_the_next_layer():
    encoder = vit_encoder(class_token=False); model = fold(attach(encoder, some_heads()["projector"])); images = torch.rand(2, 3, 32, 32)
    after, merged = torch.nn.Linear(32, 10), torch.nn.Linear(32, 10)
    merged.load_state_dict(dict(weight=after.weight @ model.norm.debias[0].weight, bias=after.bias))
    assert torch.allclose(merged(encoder.model.forward_features(images)), after(model.forward_features(images)), atol=1e-5)


def test_folded_models_copy_save_and_move(tmp_path):
    encoder = vit_encoder(); debiased = attach(encoder, some_heads()["two"]); model = fold(debiased); images = torch.rand(1, 3, 24, 40)
    expected = model.forward_features(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.forward_features(images), expected) and twin.norm.grid == (3, 5)
    model.forward_features(torch.rand(1, 3, 32, 32))
    assert twin.norm.grid == (3, 5)   # the copy's hook tells the copy
    torch.save(model.state_dict(), tmp_path / "m.pth")
    other = fold(attach(vit_encoder(), some_heads()["two"])); other.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))
    assert torch.allclose(other.forward_features(images), expected, atol=1e-6)
    assert model.double().forward_features(images.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "vit", "siglip"])
def test_folded_transformers(name):
    transformers = pytest.importorskip("transformers")
    common = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    kind, config, prefix = dict(dinov2=("Dinov2Model", transformers.Dinov2Config(**common, mlp_ratio=2), 1), vit=("ViTModel", transformers.ViTConfig(**common, intermediate_size=64), 1),
                                dinov3=("DINOv3ViTModel", transformers.DINOv3ViTConfig(**common, intermediate_size=64, num_register_tokens=4), 5),
                                siglip=("SiglipVisionModel", transformers.SiglipVisionConfig(**common, intermediate_size=64), 0))[name]
    options = dict(interpolate_pos_encoding=True) if name in ("vit", "siglip") else {}
    tokens = lambda m, x: m(x, **options).last_hidden_state[:, prefix:].unflatten(1, (x.shape[2] // 8, x.shape[3] // 8))
    encoder = PatchEncoder(getattr(transformers, kind)(config), tokens, 32, 8, 32, prefix, name=name)
    for heads in some_heads().values():
        debiased = attach(encoder, heads); model = fold(debiased)
        for size in ((32, 32), (24, 48)):
            images = torch.rand(1, 3, *size); expected = debiased(images)
            out, untouched = (m(normalized(encoder, images), **options) for m in (model, encoder.model))
            assert (out.last_hidden_state[:, prefix:].unflatten(1, expected.shape[1:3]) - expected).abs().max() < 1e-5 * expected.std().clamp_min(1)
            if prefix: assert torch.equal(out.pooler_output, untouched.pooler_output)


def test_clip_norms_its_pooled_output_only_and_is_refused():
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8))
    norm = "post_layernorm" if hasattr(model, "post_layernorm") else "vision_model.post_layernorm"
    encoder = PatchEncoder(model, lambda m, x: m.get_submodule(norm)(m(x).last_hidden_state)[:, 1:].unflatten(1, (4, 4)), 32, 8, 32, 1, name="clip")
    with pytest.raises(ValueError, match="only the pooled output does"): fold(attach(encoder, some_heads()["projector"]))


class Conv(torch.nn.Module):
    "A module of the user's own: patches, a norm of another name, no prefix."
    def __init__(self): super().__init__(); self.patches, self.last = torch.nn.Conv2d(3, 32, 8, 8), torch.nn.LayerNorm(32)
    def forward(self, x): return self.last(self.patches(x).permute(0, 2, 3, 1))


def test_own_module_by_the_name_of_its_norm():
    encoder = PatchEncoder(Conv(), lambda m, x: m(x), 32, 8, 32, name="mine")
    debiased, images = attach(encoder, some_heads()["oblique"]), torch.rand(2, 3, 24, 40)
    with pytest.raises(ValueError, match="no last norm under .* its children are patches, last"): fold(debiased)
    assert torch.allclose(fold(debiased, norm="last")(normalized(encoder, images)), debiased(images), atol=1e-5)


def test_tokens_from_elsewhere_are_not_folded(tiny):
    "Of another block, of several joined, or with a prefix that nobody told of: the model's own patch tokens would be others."
    from rasa_nb.encoders import load_encoder
    for layer, match in ((3, "from another block"), ([3, 5], "joined from several blocks")):
        earlier = load_encoder("tiny", device="cpu", layer=layer)
        with pytest.raises(ValueError, match=match): fold(DebiasedEncoder(earlier, RASAHead(torch.eye(earlier.embed_dim) * 2)))
    unaware = PatchEncoder(timm_vit(), normed_row(1), 32, 8, 32, 0, name="unaware")
    with pytest.raises(ValueError, match="other prefix tokens than 0"): fold(DebiasedEncoder(unaware, RASAHead(torch.eye(32) * 2)))


def test_another_size_is_warned_of_where_models_resample_otherwise():
    from rasa_nb.encoders import from_timm
    model = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, num_classes=0, depth=2)
    for resampling, warned in (("official", True), ("library", False)):
        debiased = DebiasedEncoder(from_timm(model, "deit", resampling=resampling), RASAHead(torch.eye(192) * 2))
        with warnings.catch_warnings(record=True) as caught: warnings.simplefilter("always"); folded = fold(debiased)
        assert any("resamples its position embedding" in str(w.message) for w in caught) == warned
        for size, same in (((224, 224), True), ((224, 320), not warned)):
            images = torch.rand(1, 3, *size)
            row = folded.forward_features(normalized(debiased.encoder, images))[:, 1:].view(1, 14, -1, 192)
            assert torch.allclose(row, debiased(images), atol=1e-5) == same


def test_what_cannot_be_folded():
    encoder = vit_encoder()
    masked = fold(attach(encoder, some_heads()["offset"])); masked(torch.rand(1, 3, 32, 32))
    for call, error, match in [(lambda: fold(encoder), TypeError, "vit has no head to fold"),
                               (lambda: fold(attach(encoder, some_heads()["offset"]), norm="blocks.0.norm1"), ValueError, "takes its tokens elsewhere"),
                               (lambda: masked.norm(torch.rand(1, 5, 32)), ValueError, "4 patch tokens do not fill the grid .4, 4.")]:
        with pytest.raises(error, match=match): call()


def test_onnx_gives_the_same_tokens(tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    encoder = vit_encoder(depth=1)
    assert export_onnx(attach(encoder, some_heads()["two"]), tmp_path / "e.onnx", (24, 40)) < 1e-4
    import onnxruntime
    session, images = onnxruntime.InferenceSession(tmp_path / "e.onnx"), torch.rand(5, 3, 24, 40)
    assert session.run(None, {"images": images.numpy()})[0].shape == (5, 3, 5, 32) and [p.name for p in tmp_path.iterdir()] == ["e.onnx"]


def test_onnx_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "_write_onnx", lambda module, images, path: Path(path).write_bytes(b""))
    monkeypatch.setattr(deploy, "_onnx_difference", lambda *a: (_ for _ in ()).throw(RuntimeError("differ")))
    with pytest.raises(RuntimeError, match="differ"): export_onnx(vit_encoder(), tmp_path / "e.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no multiple"): export_onnx(vit_encoder(), tmp_path / "e.onnx", 30)


def released_forward(weights, z):
    "Independent of the library: one vector after the other, Gram-Schmidt inside each pair."
    for w in weights:
        r = w[0] / w[0].norm(); c = w[1] / w[1].norm(); c = c - (c @ r) * r; c = c / c.norm()
        z = z - (z @ r)[..., None] * r; z = z - (z @ c)[..., None] * c
    return z


def state_of(weights, prefix=""): return {f"{prefix}pre_pos_layers.{i}.weight": w for i, w in enumerate(weights[:-1])} | {f"{prefix}pos_pred.weight": weights[-1]}


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 12), d=st.integers(4, 48), prefix=st.sampled_from(["", "head.", "model.head.", "module.model.head."]), nested=st.booleans(), seed=st.integers(0, 999))
def test_released_heads_equal_their_forward(tmp_path_factory, heads, d, prefix, nested, seed):
    g = torch.Generator().manual_seed(seed); weights = [torch.randn(2, d, generator=g) for _ in range(heads)]
    path = tmp_path_factory.mktemp("h") / "head.pth"; state = state_of(weights, prefix) | {"model.encoder.norm.weight": torch.ones(3)}
    torch.save(dict(state_dict=state, hyper_parameters=argparse.Namespace(lr=1)) if nested else state, path)
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); head, clean = load_released_head(path), load_released_head(path, "global")
    z = torch.nn.functional.normalize(torch.randn(3, 4, 5, d, generator=g), dim=-1)
    assert (head(z) - released_forward(weights, z)).abs().max() < 1e-6
    m = head.metadata
    assert m["heads"] == heads and m["directions"] == min(d, 2 * heads) and m["removed"] <= m["directions"]
    assert clean.metadata["removed"] == m["directions"] and clean.metadata["leak"] < 1e-9
    if heads == 1: assert m["removed"] == 2 and m["leak"] < 1e-9


def test_leak_is_none_for_orthogonal_heads_and_known_for_a_planted_angle(tmp_path):
    q = torch.linalg.qr(torch.randn(16, 16).double())[0]
    torch.save(state_of([q[:, :2].T, q[:, 2:4].T, q[:, 4:6].T]), tmp_path / "a.pth")
    with warnings.catch_warnings(): warnings.simplefilter("error"); head = load_released_head(tmp_path / "a.pth")
    assert head.metadata["removed"] == 6 and head.metadata["leak"] < 1e-9
    second = torch.stack([(q[:, 0] + q[:, 2]) / 2**.5, q[:, 3]])      # at 45 degrees to what the first removed
    torch.save(state_of([q[:, :2].T, second]), tmp_path / "b.pth")
    with pytest.warns(UserWarning, match="2 heads removed 4 directions .* removes 3.* up to 71% comes back"): head = load_released_head(tmp_path / "b.pth")
    assert abs(head.metadata["leak"] - .5**.5) < 1e-6 and abs(leak_of(torch.eye(16), q[:, :1]) - 1) < 1e-6


def test_load_reads_own_and_released(tmp_path):
    from safetensors.torch import save_file
    weights = [torch.randn(2, 8)]
    save_file(state_of(weights, "head."), tmp_path / "a.safetensors"); torch.save(dict(head=state_of(weights)), tmp_path / "b.ckpt")
    own = RASAHead(torch.eye(8), torch.randn(2, 2, 8), dict(note="mine")); own.save(tmp_path / "c.safetensors")
    a, b, c = (RASAHead.load(tmp_path / n) for n in ("a.safetensors", "b.ckpt", "c.safetensors"))
    assert torch.equal(a.projector, b.projector) and c.metadata == own.metadata and torch.equal(c.offset, own.offset)


def test_bad_released_files(tmp_path):
    class Code:
        def __reduce__(self): return (exec, ("raise SystemExit('code ran')",))
    w = torch.randn(2, 8)
    files = dict(code=Code(), other={"weight": w}, gap=state_of([w, w + 1]) | {"pre_pos_layers.2.weight": w}, nopred={"pre_pos_layers.0.weight": w},
                 shape=state_of([torch.randn(3, 8)]), same=state_of([torch.ones(2, 8)]), mixed=state_of([w, torch.randn(2, 9)]), two=state_of([w], "student.") | state_of([w], "teacher."))
    for name, content in files.items(): torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "two.pth").read_bytes()[:300])
    for name, match in dict(code="cannot be read", other="holds no released head", gap="is not whole", nopred="is not whole", shape="expected .2, D.", same="two different directions",
                            mixed="expected .2, D.", two="holds 2 heads, behind", cut="is it whole").items():
        with pytest.raises(ValueError, match=match): load_released_head(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="basis='both'"): load_released_head(tmp_path / "two.pth", "both")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): load_released_head(tmp_path / "none.pth")
    for name, match in dict(other="holds no released head", gap="is not whole", shape="expected .2, D.").items():
        with pytest.raises(ValueError, match=match): RASAHead.load(tmp_path / f"{name}.pth")


class FolderHub:
    "Stands for huggingface_hub's client: repositories are folders."
    root = None
    def create_repo(self, repo_id, private, exist_ok): (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok); self.private = private
    def upload_folder(self, repo_id, folder_path, commit_message): shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True); return f"hub/{repo_id}/commit/1"
    def hf_hub_download(self, repo_id, filename, revision): return self.root / repo_id / filename


def test_hub_and_back(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(FolderHub, "root", tmp_path); monkeypatch.setattr(deploy, "HfApi", FolderHub)
    mean = PositionMean().fit(tiny, Scenes(n=20))
    for what in (mean, mean.head_, mean.attach(tiny)):
        assert push_to_hub(what, "me/head") == "hub/me/head/commit/1"
        back, images = load_from_hub("me/head"), torch.rand(1, 3, 48, 64)
        assert torch.equal(DebiasedEncoder(tiny, back)(images), mean.attach(tiny)(images)) and back.metadata == mean.head_.metadata
    assert sorted(p.name for p in (tmp_path / "me/head").iterdir()) == ["README.md", "head.safetensors"]
    assert "PositionMean for tiny" in model_card(mean.head_) and "grid of 12 x 12" in model_card(mean.head_)
    with pytest.raises(ValueError, match="expected 'owner/name'"): push_to_hub(mean, "head")
    with pytest.raises(TypeError, match="holds no head"): push_to_hub(PositionMean(), "me/head")


def test_a_head_of_one_size_works_at_another(tiny):
    for remover in (RASA(), PositionMean()):
        debiased = remover.fit(tiny, Scenes(n=20), 96).attach(tiny)
        for size in ((64, 64), (128, 72)): assert debiased(torch.rand(1, 3, *size)).shape == (1, size[0] // 8, size[1] // 8, 192)


def test_an_offset_learned_at_one_size_takes_position_away_at_another():
    along = torch.randn(2, 8)
    def tokens(m, x):   # content is color; position is where a patch lies in the frame, whatever its size
        z = torch.nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1) @ torch.ones(3, 8) + torch.randn(len(x), x.shape[2] // 8, x.shape[3] // 8, 8)
        where = [(torch.arange(n) + .5) / n for n in z.shape[1:3]]
        return z + 3 * torch.stack(torch.meshgrid(*where, indexing="ij"), -1) @ along
    encoder = PatchEncoder(torch.nn.Identity(), tokens, 8, 8, 64, name="where")
    debiased = PositionMean().fit(encoder, Scenes(n=200), 64).attach(encoder)
    for size in (64, 32, (96, 48)):
        left = position_r2({"raw": encoder, "after": debiased}, Scenes("val", 100), image_size=size).mean
        assert left["raw"] > .5 and left["after"] < .05, size


def test_identity_of_encoders(tiny):
    twin = copy.deepcopy(tiny)
    assert encoder_hash(twin) == encoder_hash(tiny) == encoder_hash(tiny)
    source = fitted_on(tiny)
    with warnings.catch_warnings(): warnings.simplefilter("error"); assert not warn_if_foreign(source, twin) and not warn_if_foreign({}, twin)
    with torch.no_grad(): twin.model.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.warns(UserWarning, match="fitted on 'tiny' and meets 'tiny', which is not the same encoder"): assert warn_if_foreign(source, twin)
    with pytest.warns(UserWarning, match="encoder 'vits' then, 'tiny' now"): warn_if_foreign(dict(encoder="vits"), tiny)
    twin = copy.deepcopy(tiny); twin.std = twin.std * 1.1      # images normalized otherwise: other tokens
    assert encoder_hash(twin) != encoder_hash(tiny)
