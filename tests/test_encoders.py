"""Encoders by name: parity with the libraries' own forwards, folders, torch.hub, what is refused."""
import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import Code
from torch import nn
from toy_vits import SMALL, assert_close, of_timm, of_transformers, randomize

from rasa_nb import encoders
from rasa_nb.checkpoints import read_checkpoint
from rasa_nb.encoders import create_vit, from_hub, from_module, from_timm, hub_spec, list_encoders
from rasa_nb.encoders import load_encoder


# Parity with timm

TIMM = ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb",
        "vit_small_patch16_224.dino", "vit_base_patch16_224.mae", "vit_base_patch16_clip_224.openai",
        "vit_base_patch16_siglip_224", "eva02_small_patch14_224", "eva02_base_patch16_clip_224",
        "deit_small_patch16_224", "deit_base_distilled_patch16_224", "deit3_small_patch16_224",
        "beit_base_patch16_224"]

@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("grid", [(5, 5), (3, 8), "trained"])
def test_tokens_are_timms_own(name, grid):
    model = of_timm(name)
    trained = tuple(model.patch_embed.grid_size)
    grid = trained if grid == "trained" else grid
    if "beit" in name and grid != trained: pytest.skip("BEiT takes its trained size only")
    if grid == (37, 37): pytest.skip("1,369 tokens add nothing to the smaller grids")
    encoder, p = from_timm(model, resampling="library"), model.patch_embed.patch_size[0]
    images, prefix = torch.rand(2, 3, grid[0] * p, grid[1] * p), model.num_prefix_tokens
    last, bare, middle = timms_own(model, encoder.normalize(images))
    assert_close(encoder(images).flatten(1, 2), last[:, prefix:], 1e-5)
    assert_close(encoder.at(1, norm=False)(images), bare, 1e-5)
    assert_close(encoder.at(1)(images), middle, 1e-5)
    joined = torch.cat([middle, last[:, prefix:].unflatten(1, grid)], -1)
    assert_close(encoder.at([1, -1])(images), joined, 1e-5)


@torch.no_grad()
def timms_own(model, x):
    "The row of tokens after the last block; the grids after block 1, bare and normalized."
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    last = model.forward_features(x)
    bare, = model.forward_intermediates(x, indices=[1], norm=False, intermediates_only=True)
    bare = bare.permute(0, 2, 3, 1)
    return last if norm is model.norm else norm(last), bare, norm(bare)


# Parity with transformers

HF = ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViT", "CLIPVision", "SiglipVision", "ViTMAE"]

@torch.no_grad()
def transformers_own(model, x, layer):
    "Patch tokens, normalized, by the library's own forward and stack of hidden states."
    kind, options = model.config.model_type, {}
    sized = kind in ("vit", "vit_mae", "clip_vision_model", "siglip_vision_model")
    if sized: options["interpolate_pos_encoding"] = True
    if kind == "vit_mae":
        cells = x.shape[-1] * x.shape[-2] // 256
        model.config.mask_ratio, options["noise"] = 0., torch.arange(cells).expand(len(x), -1).float()
    out = model(pixel_values=x, output_hidden_states=True, **options)
    norm = next(getattr(model, n) for n in ("layernorm", "norm", "post_layernorm") if hasattr(model, n))
    prefix = dict(dinov2_with_registers=5, dinov3_vit=5, siglip_vision_model=0).get(kind, 1)
    if layer != -1: return norm(out.hidden_states[layer + 1])[:, prefix:]
    last = norm(out.last_hidden_state) if kind == "clip_vision_model" else out.last_hidden_state
    return last[:, prefix:]


@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_tokens_are_transformers_own(kind, grid):
    pytest.importorskip("transformers")
    model = of_transformers(kind)
    encoder = load_encoder(model, resampling="library", device="cpu")
    assert (encoder.num_layers, encoder.embed_dim, encoder.patch_size) == (3, 48, 16)
    images = torch.rand(2, 3, grid[0] * 16, grid[1] * 16)
    for layer in (-1, 1):
        own = transformers_own(model, encoder.normalize(images), layer)
        assert_close(encoder.at(layer)(images).flatten(1, 2), own, 1e-5)


def test_clip_without_norm_is_last_hidden_state():
    pytest.importorskip("transformers")
    model, images = of_transformers("CLIPVision"), torch.rand(1, 3, 64, 64)
    encoder = load_encoder(model, norm=False, device="cpu")
    with torch.no_grad(): theirs = model(encoder.normalize(images)).last_hidden_state[:, 1:]
    assert_close(encoder(images).flatten(1, 2), theirs, 1e-5)


def test_a_whole_clip_is_taken_for_its_image_half():
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = transformers.CLIPConfig(text_config=text, vision_config=text | dict(image_size=32, patch_size=8))
    encoder = load_encoder(transformers.CLIPModel(config), device="cpu")
    assert encoder(torch.rand(1, 3, 16, 32)).shape == (1, 2, 4, 32)
    assert encoder.mean.flatten().tolist() == pytest.approx([.48145466, .4578275, .40821073])


def test_a_folder_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    model, stats = of_transformers("Dinov2"), dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6])
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stats))
    encoder, images = load_encoder(str(tmp_path), device="cpu"), torch.rand(1, 3, 48, 64)
    assert encoder.mean.flatten().tolist() == pytest.approx([.1, .2, .3]) and encoder.resampling == "offset"
    given = load_encoder(model, device="cpu", mean=(.1, .2, .3), std=(.4, .5, .6))
    assert_close(encoder(images), given(images), 1e-5)


def test_a_folder_with_weights_missing_is_refused(tmp_path):
    pytest.importorskip("transformers")
    of_transformers("Dinov2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    part = {k: v for k, v in read_checkpoint(file).items() if "layer.1." not in k}
    save_file(part, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit Dinov2Model: .* missing keys"):
        load_encoder(str(tmp_path))


# torch.hub

HUBCONF = '''
import torch
from torch import nn
class ViT(nn.Module):
    embed_dim, num_register_tokens = 8, 1
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.patch_embed.patch_size = self.patch_embed.img_size = (4, 4)
        self.blocks, self.norm = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.LayerNorm(8)
    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([torch.zeros(len(x), 2, 8), x], 1)
        for b in self.blocks: x = b(x)
        return self.norm(x)
def dinov2_toy(pretrained=True): return ViT()
def other_toy(pretrained=True): return ViT()
def dinov2_needs(pretrained=True): import no_such_package
def dinov2_pickle(pretrained=True, path=None): torch.load(path, weights_only=False); return ViT()
'''

@pytest.fixture
def clone(tmp_path):
    "A clone of a repository of torch.hub, as the start of a name."
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    return f"hub:{tmp_path}"


def test_a_clone_of_a_hub(clone, tmp_path):
    name = f"{clone}:dinov2_toy"
    encoder, images = load_encoder(name, trust=True, device="cpu"), torch.rand(2, 3, 8, 16)
    assert encoder(images).shape == (2, 2, 4, 8)
    assert (encoder.num_layers, encoder.num_prefix_tokens, encoder.license) == (2, 2, "apache-2.0")
    state = encoder.model.state_dict()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    again = load_encoder(name, checkpoint=tmp_path / "w.pth", trust=True, device="cpu")
    assert_close(again(images), encoder(images), 1e-6)
    torch.save({k: v for k, v in state.items() if "blocks.1" not in k}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="2 missing: blocks.1.weight"):
        load_encoder(name, checkpoint=tmp_path / "w.pth", trust=True)


def test_code_of_a_hub_runs_on_trust_and_opens_no_pickles_with_code(clone, tmp_path):
    torch.save(Code(), tmp_path / "w.pth")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(PermissionError, match="runs code of .* read it, then pass trust=True"):
        load_encoder(f"{clone}:dinov2_toy")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_encoder(f"{clone}:dinov2_pickle", trust=True, path=tmp_path / "w.pth")
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before and "code_ran" not in sys.modules


def test_hub_code_that_is_not_known_or_not_whole_is_refused(clone):
    with pytest.raises(ImportError, match="needs the package 'no_such_package'"):
        load_encoder(f"{clone}:dinov2_needs", trust=True)
    with pytest.raises(ValueError, match="mean and std of its training images are not known"):
        load_encoder(f"{clone}:other_toy", trust=True)
    stats = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    assert load_encoder(f"{clone}:other_toy", trust=True, **stats).license == "unknown"


# Names, files, objects

def test_a_file_of_another_grid_makes_the_model_for_it(tmp_path):
    own = randomize(create_vit("vit_tiny_patch16_224", img_size=160, depth=1))
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    encoder = load_encoder("vit_tiny_patch16_224", tmp_path / "own.safetensors", device="cpu", depth=1)
    assert encoder.image_size == 160 and torch.equal(encoder.model.pos_embed, own.pos_embed)


def test_what_is_given_counts_more_than_what_a_configuration_says():
    model = of_timm("vit_tiny_patch16_224")
    encoder = load_encoder(model, device="cpu", mean=(0., 0., 0.), license="mine", name="mine")
    assert (encoder.name, encoder.license, encoder.mean.sum()) == ("mine", "mine", 0)
    assert load_encoder(encoder) is encoder


def test_notes_of_timm_are_warned_of(tmp_path):
    name = "vit_base_patch16_clip_224.openai"
    save_file(create_vit(name, **SMALL).state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=f"{name}: .*quickgelu"):
        load_encoder(name, tmp_path / "w.safetensors", **SMALL)


def test_a_bundled_file_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setattr(encoders, "TINY_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not the file that was released .* reinstall rasa_nb"):
        load_encoder("tiny")


def test_the_list_says_what_is_behind_a_name():
    table = list_encoders("dinov2_vits*").set_index("name")
    told = ["source", "patch", "dim", "prefix", "license"]
    assert tuple(table.loc["dinov2_vits_reg", told]) == ("timm", 14, 384, 5, "apache-2.0")
    assert 21 < table.loc["dinov2_vits", "params"] < 23
    assert table.loc["hub:facebookresearch/dinov2:dinov2_vits14", "source"] == "torch.hub"
    with pytest.raises(ValueError, match="no encoder fits .*; expected a pattern"): list_encoders("nothing*")


def row_of(model, images): return model(images).flatten(2).mT
def halved(model, images): return model(images).permute(0, 2, 3, 1)[:, ::2]


POOL = nn.AvgPool2d(8)
REFUSED = {
    "resnet50": (dict(pretrained=False), TypeError, "is no ViT"),
    "a/b": (dict(checkpoint="w.pth"), ValueError, "for transformers give the folder"),
    "franca_vitb14": (dict(), ValueError, "give checkpoint=FILE with a file of github.com/valeoai/Franca"),
    "vit_small_patch16_224.made_up": (dict(), ValueError, "no weights 'made_up' of .* one of augreg_in1k"),
    "vit_base_patch16_plus_240": (dict(), ValueError, "no pretrained weights for .* give checkpoint=FILE"),
    "hub:no_entry": (dict(trust=True), ValueError, "expected 'hub:owner/repo:entry'"),
    "hub:someone/else:model": (dict(trust=True), ValueError, "expected a full commit .* got none"),
    "tiny": (dict(depth=3), TypeError, "tiny is one model and takes no depth"),
    "vits": (dict(tokens=row_of), ValueError, "for a module of your own, not for a name"),
    "dinov2_vits": (dict(dtype="int8"), ValueError, "expected one of .'float32', 'bf16'"),
    3: (dict(), TypeError, "x=3: expected a name or a module"),
    POOL: (dict(tokens=row_of), ValueError, "expected .1, gh, gw, D.: leave out prefix tokens"),
}

@pytest.mark.parametrize("x", REFUSED, ids=str)
def test_refused(x):
    options, error, match = REFUSED[x]
    with pytest.raises(error, match=match): load_encoder(x, **options)


def test_requests_without_effect_are_refused(tiny):
    vit = of_timm("vit_tiny_patch16_224")
    for x, options, match in [
            (vit, dict(checkpoint="w.pth"), "has its weights already"),
            (vit, dict(pretrained=False), "has its weights already"),
            (POOL, dict(tokens=halved, layer=3), "with tokens= your function decides"),
            (tiny, dict(layer=3, norm=False), "tiny is an encoder already, so layer, norm would have no"),
            (tiny, dict(tokens=halved), "so tokens would have no effect")]:
        with pytest.raises(ValueError, match=match): load_encoder(x, **options)
    with pytest.raises(ValueError, match="the authors' code resamples by itself"):
        from_hub(vit, resampling="offset")
    with pytest.raises(ValueError, match="a grid of 6 x 12 .* expected whole square patches"):
        from_module(POOL, halved, 96)


def test_versions_of_hubs_are_fixed():
    commit = "0" * 40
    for ref in (commit, "v1.0.0", "1.2"): assert hub_spec(f"hub:me/code@{ref}:vit") == ("me/code", ref, "vit")
    for ref in (commit[:12], "v1", "dev"):
        with pytest.raises(ValueError, match="a branch may hold other code tomorrow"):
            hub_spec(f"hub:me/code@{ref}:vit")
