"""Encoders by name: parity with the libraries' own forwards, folders, torch.hub, what is refused."""
import copy
import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import Code
from torch import nn
from toy_vits import SMALL, SMALL_HF, assert_close, of_timm, of_transformers, randomize

from rasa_nb import encoders
from rasa_nb.checkpoints import read_checkpoint
from rasa_nb.encoders import create_vit, from_hub, from_module, from_timm, hub_spec, list_encoders
from rasa_nb.encoders import load_encoder, timm
from rasa_nb.scenes import Scenes


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
PLAIN = dict(mean=.5, std=.25)

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
    encoder = load_encoder(model, resampling="library", device="cpu", **PLAIN)
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
    with pytest.warns(UserWarning, match="no preprocessor_config.json says .* published clip_vision_model"):
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
    how = dict(trust=True, device="cpu", **PLAIN)
    encoder, images = load_encoder(name, **how), torch.rand(2, 3, 8, 16)
    assert encoder(images).shape == (2, 2, 4, 8)
    assert (encoder.num_layers, encoder.num_prefix_tokens, encoder.license) == (2, 2, "unknown")
    state = encoder.model.state_dict()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    again = load_encoder(name, checkpoint=tmp_path / "w.pth", **how)
    assert_close(again(images), encoder(images), 1e-6)
    assert again.origin == "w.pth (teacher.backbone)" and encoder.origin is None
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
        load_encoder(f"{clone}:dinov2_toy", trust=True)   # a name proves nothing
    assert load_encoder(f"{clone}:other_toy", trust=True, **PLAIN).license == "unknown"


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
    "crossvit_tiny_240": (dict(pretrained=False), TypeError, r"CrossVit ends in 2 grids .* expected one: give"),
    "levit_128s": (dict(pretrained=False), TypeError, "LevitDistilled has no whole patches for 192 x"),
    "coat_tiny": (dict(pretrained=False), TypeError, "CoaT ends in 3 grids"),
    "xcit_nano_12_p16_224": (dict(pretrained=False, layer=3), ValueError, "no plain ViT, and layer, norm and"),
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
            ("tiny", dict(weights="ema"), "chooses among those of a file: give checkpoint="),
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


# Facts are known, asked for or warned of

@pytest.mark.parametrize("kind", ["ViT", "DINOv3ViT"])
@pytest.mark.parametrize("folder", ["vits16", "dino/deit", "facebook/dinov2"])
def test_mean_and_std_are_not_read_from_a_path(tmp_path, kind, folder):
    pytest.importorskip("transformers")
    of_transformers(kind).save_pretrained(tmp_path / folder)
    with pytest.raises(ValueError, match="mean and std of its training images are not known: pass mean=, std="):
        load_encoder(tmp_path / folder, device="cpu")
    encoder = load_encoder(tmp_path / folder, device="cpu", **PLAIN)
    assert (encoder.license, encoder.resampling) == ("unknown", None)


@pytest.mark.parametrize("kind", ["Dinov2", "SiglipVision", "DeiT"])
def test_what_a_class_has_in_common_is_taken_with_a_warning(kind):
    pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="no preprocessor_config.json says which mean and std"):
        encoder = load_encoder(of_transformers(kind), device="cpu")
    assert encoder.mean.flatten()[0] == pytest.approx(.5 if kind == "SiglipVision" else .485)


HALF, BYTES = dict(image_mean=.5, image_std=[.5]), dict(image_mean=[127.5] * 3, image_std=[127.5] * 3)
PROCESSORS = {   # what a preprocessor_config.json says, and what the model should see of a black and a white pixel
    "scalars": (HALF, -1, 1),
    "not normalized": (HALF | dict(do_normalize=False), 0, 1),
    "not scaled": (BYTES | dict(do_rescale=False), -1, 1),
    "neither": (BYTES | dict(do_rescale=False, do_normalize=False), 0, 255),
    "scaled by another factor": (HALF | dict(rescale_factor=2 / 255), -1, 3)}

@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("what", PROCESSORS)
def test_what_a_processor_says_is_honored(tmp_path, what, file):
    "transformers' own processor, where it is at hand, gives the model the same pixels."
    transformers = pytest.importorskip("transformers")
    config, black, white = PROCESSORS[what]
    of_transformers("ViT", num_hidden_layers=1).save_pretrained(tmp_path)
    nested = config if file.startswith("pre") else dict(image_processor=config)
    (tmp_path / file).write_text(json.dumps(nested))
    encoder, shade = load_encoder(tmp_path, device="cpu"), torch.tensor([0., 1]).view(2, 1, 1, 1)
    images = shade.expand(2, 3, 64, 64)
    seen = encoder.normalize(images)
    assert_close(seen, torch.tensor([black, white]).view(2, 1, 1, 1).expand(2, 3, 64, 64).float(), 1e-4)
    full = {k: tuple(np.broadcast_to(v, 3)) if k.startswith("image_") else v for k, v in config.items()}
    processor = transformers.ViTImageProcessor(do_resize=False, **full)
    bytes_ = [np.full((64, 64, 3), value, np.uint8) for value in (0, 255)]
    theirs = torch.stack([torch.as_tensor(x) for x in processor(bytes_)["pixel_values"]])
    assert_close(seen, theirs.float(), 1e-4)


def test_a_license_is_the_model_cards(tmp_path):
    pytest.importorskip("transformers")
    of_transformers("Dinov2").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model")
    assert load_encoder(tmp_path, device="cpu", **PLAIN).license == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("# A model")
    assert load_encoder(tmp_path, device="cpu", **PLAIN).license == "unknown"


def test_a_file_under_a_name_of_several_trainings_is_warned_of(tmp_path):
    save_file(create_vit("vit_small_patch16_224", **SMALL).state_dict(), tmp_path / "w.safetensors")
    def load(name, **how): return load_encoder(name, tmp_path / "w.safetensors", device="cpu", **SMALL, **how)
    with pytest.warns(UserWarning, match="trainings of vit_small_patch16_224, with different mean and std"):
        encoder = load("vit_small_patch16_224")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dino = load("vit_small_patch16_224.dino")
        given = load("vit_small_patch16_224", **PLAIN)
        load("deit_small_patch16_224")   # one training
    assert encoder.license == "apache-2.0" and dino.mean[0] != encoder.mean[0] and given.mean[0] == .5


@pytest.mark.parametrize("make", [lambda: of_transformers("ViT"), lambda: of_transformers("IJepa"),
                                  lambda: of_timm("eva02_small_patch14_224")], ids=["ViT", "IJepa", "eva02"])
def test_an_unknown_way_of_resampling_is_warned_of_where_it_matters(make):
    encoder = load_encoder(make(), device="cpu", **PLAIN)
    side, patch = encoder.image_size, encoder.patch_size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(torch.rand(1, 3, side, side))
    with pytest.warns(UserWarning, match="How its authors resample it is not known"):
        encoder(torch.rand(1, 3, 2 * patch, 3 * patch))


def test_a_module_of_unknown_mean_and_std_is_warned_of():
    def grid(model, images): return model(images).permute(0, 2, 3, 1)
    conv = nn.Conv2d(3, 4, 8, 8)
    with pytest.warns(UserWarning, match="Conv2d: mean and std of its training images are not known"):
        load_encoder(conv, tokens=grid, device="cpu")
    conv.pretrained_cfg = dict(mean=(.1, .2, .3), std=(.4, .5, .6), license="mit")   # as timm's models have
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = load_encoder(conv, tokens=grid, device="cpu")
        load_encoder(POOL, tokens=grid, device="cpu")   # nothing was trained
    assert (encoder.mean.flatten()[2], encoder.license) == (pytest.approx(.3), "mit")


# A size of one's own

@pytest.mark.parametrize("name, way", [("vit_small_patch14_dinov2", "offset"), ("vit_base_patch16_224.mae", "bicubic")])
def test_what_timm_resampled_is_not_said_to_be_official(tmp_path, name, way):
    "timm loads the file of a larger grid into an object of its own size, as it does with weights of the hub."
    small = dict(SMALL, num_classes=0)
    file = save_timm(timm.create_model(name, **small), tmp_path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file), hf_hub_id=None))
    side = 10 * int(name.split("patch")[1][:2])
    made = timm.create_model(name, img_size=side, dynamic_img_size=True, **overlay, **small).eval()
    with pytest.warns(UserWarning, match=f"resampled .* by its own way .* not by the official one .'{way}'"):
        mine = load_encoder(made, device="cpu")
    assert mine.resampling is None and "resampled" not in repr(mine)
    official = load_encoder(name, file, device="cpu", img_size=side, **SMALL)
    assert (official.image_size, official.resampling) == (side, way)
    images = torch.rand(1, 3, side, side)
    native = load_encoder(name, file, device="cpu", **SMALL)
    assert_close(official(images), native(images), 1e-6)
    assert (official(images) - mine(images)).abs().max() > 1e-3


def save_timm(model, folder):
    file = folder / "w.safetensors"
    save_file(randomize(model).state_dict(), file)
    return file


def test_where_nothing_else_is_official_a_size_of_ones_own_is_no_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
            model = timm.create_model(name, img_size=int(name.split("patch")[1][:2]) * 4, **SMALL)
            load_encoder(model, device="cpu")
        mine = of_timm("vit_small_patch14_dinov2", img_size=70)   # random weights of this size, by our own name
        assert from_timm(mine).resampling == "offset"


# Objects that people hold

HOLDERS = ["Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification", "Dinov2Backbone",
           "ViTForImageClassification", "ViTForMaskedImageModeling", "ViTMAEForPreTraining", "ViTMSNModel",
           "DeiTForImageClassificationWithTeacher", "BeitForImageClassification", "IJepaForImageClassification",
           "CLIPVisionModelWithProjection", "DINOv3ViTBackbone"]

@pytest.mark.parametrize("kind", HOLDERS)
def test_a_vit_is_found_below_its_heads(kind):
    "The tokens are the hidden states that the model itself returns, behind as many as it puts in front."
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, kind)
    config = cls.config_class(**SMALL_HF, image_size=64, patch_size=16)
    model, images = randomize(cls(config)), torch.rand(2, 3, 64, 64)
    encoder = load_encoder(model, device="cpu", norm=False, resampling="library", **PLAIN)
    noise = dict(noise=torch.arange(16).expand(2, 16).float()) if kind.startswith("ViTMAE") else {}
    if noise: model.config.mask_ratio = 0.
    with torch.no_grad():
        theirs = model(encoder.normalize(images), output_hidden_states=True, **noise)
    tokens = encoder.at(1, norm=False)(images).flatten(1, 2)
    states = theirs.hidden_states if hasattr(theirs, "hidden_states") else ()
    if kind.endswith("Backbone"): states = ()
    if states: assert_close(tokens, states[2][:, states[2].shape[1] - 16:], 1e-5)
    assert encoder(images).shape == (2, 4, 4, 48) and encoder(torch.rand(1, 3, 32, 96)).shape == (1, 2, 6, 48)


def test_what_holds_no_vit_or_several_says_what_is_expected():
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8] * 4, embedding_size=8, depths=[1] * 4))
    with pytest.raises(TypeError, match=r"ResNetModel \(resnet\) holds none of beit, .*: give tokens="):
        load_encoder(resnet)
    vit = of_transformers("ViT")
    vit.second = of_transformers("Dinov2")
    with pytest.raises(TypeError, match="holds 2 ViTs: pass the one you mean"): load_encoder(vit, **PLAIN)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "IJepa"])
def test_a_transformers_vit_of_a_size_that_is_no_square(kind):
    pytest.importorskip("transformers")
    model, images = of_transformers(kind, image_size=(32, 64)), torch.rand(1, 3, 32, 64)
    encoder = load_encoder(model, device="cpu", **PLAIN)
    assert encoder.image_size == (32, 64) and "32 x 64 px" in repr(encoder)
    if kind != "Dinov2":   # transformers itself takes Dinov2's embedding for a square one
        with torch.no_grad(): theirs = model(encoder.normalize(images)).last_hidden_state
        assert_close(encoder(images).flatten(1, 2), theirs[:, encoder.num_prefix_tokens:], 1e-5)
    position = encoder.parts(encoder.model).position
    assert position.shape == (2, 4, 48)
    wide = load_encoder(of_transformers(kind, image_size=(32, 96)), device="cpu", resampling="bicubic", **PLAIN)
    assert wide(images).shape == (1, 2, 4, 48) and encoder.at(0)(images).shape == (1, 2, 4, 48)


def test_a_timm_vit_of_a_size_that_is_no_square():
    model, images = of_timm("vit_small_patch16_224", img_size=(32, 64)), torch.rand(1, 3, 32, 64)
    encoder = load_encoder(model, device="cpu")
    with torch.no_grad(): theirs = model.forward_features(encoder.normalize(images))[:, 1:]
    assert encoder.image_size == (32, 64)
    assert_close(encoder(images).flatten(1, 2), theirs, 1e-5)
    (tokens, _), = encoder.encode(Scenes("val", 1))
    assert tokens.shape == (1, 2, 4, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["timm", "transformers", "module"])
def test_weights_of_another_precision_work(dtype, kind):
    def grid(model, images): return model(images).permute(0, 2, 3, 1)
    make = dict(timm=lambda: (of_timm("vit_small_patch14_dinov2", img_size=56), {}),
                transformers=lambda: (of_transformers("Dinov2"), PLAIN),
                module=lambda: (randomize(nn.Conv2d(3, 8, 8, 8)), PLAIN | dict(tokens=grid, image_size=64)))[kind]
    (model, how), images = make(), torch.rand(2, 3, 56, 56) if kind == "timm" else torch.rand(2, 3, 64, 64)
    whole = load_encoder(model, device="cpu", **how)
    expected = whole(images)
    other = load_encoder(copy.deepcopy(model).to(dtype), device="cpu", **how)
    assert other(images).dtype == torch.float32 and str(dtype).removeprefix("torch.") in repr(other)
    assert (other(images) - expected).norm() / expected.norm() < .03
    whole.model.to(dtype)   # afterwards, too
    assert_close(whole(images), other(images), 0)


def test_weights_of_mixed_precision_work():
    model, images = of_timm("vit_small_patch14_dinov2", img_size=56), torch.rand(2, 3, 56, 56)
    expected = from_timm(copy.deepcopy(model))(images)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d): module.bfloat16()   # norms stay as they are
    tokens = from_timm(model)(images)
    assert tokens.dtype == torch.float32 and (tokens - expected).norm() / expected.norm() < .03


class Compiled(nn.Module):
    "As torch.compile puts around a module."
    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled, lambda model: nn.DataParallel(Compiled(model))])
def test_what_training_puts_around_a_model_is_looked_through(wrap):
    model, images = of_timm("vit_tiny_patch16_224", img_size=64), torch.rand(1, 3, 64, 64)
    assert_close(load_encoder(wrap(model), device="cpu")(images), from_timm(model)(images), 1e-6)


class Mine(timm.models.VisionTransformer): pass


def test_a_class_derived_from_timms_is_a_vit_of_timm():
    model = Mine(img_size=32, patch_size=16, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    with pytest.raises(ValueError, match="mean and std .* not known"): load_encoder(model)
    assert load_encoder(model, device="cpu", **PLAIN)(torch.rand(1, 3, 32, 32)).shape == (1, 2, 2, 48)


OTHERS = {   # name: arguments that make it small, and where the model's own forward has its patch tokens
    "xcit_nano_12_p16_224": (dict(depth=1, cls_attn_layers=0), lambda x: x[:, 1:]),
    "cait_xxs24_224": (dict(depth=1), lambda x: x[:, 1:]),
    "swin_tiny_patch4_window7_224": (dict(depths=(1, 1, 1, 1), embed_dim=24), lambda x: x.flatten(1, 2)),
    "hiera_tiny_224": (dict(stages=(1, 1, 1, 1), embed_dim=24), lambda x: x),
    "vit_tiny_r_s16_p8_224": (dict(depth=1), lambda x: x[:, 1:]),
    "test_convnext": (dict(), lambda x: x.flatten(2).mT)}

@pytest.mark.parametrize("name", OTHERS)
def test_models_of_timm_that_end_in_one_grid_work(name):
    small, patch_tokens = OTHERS[name]
    encoder = load_encoder(name, pretrained=False, device="cpu", **small)
    randomize(encoder.model)
    images = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad(): theirs = patch_tokens(encoder.model.forward_features(encoder.normalize(images)))
    assert_close(encoder(images).flatten(1, 2), theirs, 1e-4)
    assert encoder.mean.flatten()[0] == pytest.approx(encoder.model.pretrained_cfg["mean"][0])


def test_another_size_than_such_a_model_takes_is_refused():
    encoder = load_encoder("hiera_tiny_224", pretrained=False, device="cpu", stages=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(ValueError, match="Hiera cannot take images of 64 x 64 .*: give the size that it was made"):
        encoder(torch.rand(1, 3, 64, 64))


def test_files_of_such_models(tmp_path):
    model = randomize(create_vit("test_convnext"))
    state = {f"model.backbone.{k}": v for k, v in model.state_dict().items()}
    save_file(state | {"model.backbone.head.fc.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    encoder = load_encoder("test_convnext", tmp_path / "w.safetensors", device="cpu")
    images = torch.rand(1, 3, 64, 96)
    assert_close(encoder(images), from_timm(model)(images), 1e-6)
    assert encoder.origin == "w.safetensors (model.backbone)"
