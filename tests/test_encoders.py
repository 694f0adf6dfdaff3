"""Encoders: parity with the libraries' own forwards, official key formats and resampling, the same weights by two routes, bad input. Random weights, no downloads."""
import json, re, warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from rasa_nb.data import Evaluation, Scenes, Transformed
from rasa_nb.checkpoints import read_checkpoint, to_timm
from rasa_nb.encoders import ALIASES, FitSize, PatchEncoder, _create, from_timm, list_encoders, load_encoder
from rasa_nb.patch_encoder import resample

import timm
transformers = pytest.importorskip("transformers")

SMALL = dict(depth=3, embed_dim=48, num_heads=3)
SMALL_HF = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192)


def randomize(model, seed=0):
    "Every weight random, so that zero biases and tiny layer scales hide nothing."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * .1 + (1 if re.search(r"norm\w*\.weight$|gamma|lambda", name) else 0))
    return model.eval()


def small_timm(name, **kwargs): return randomize(_create(name, **SMALL, **kwargs))
def normalized(encoder, images): return (images - encoder.mean) / encoder.std
def close(a, b, tolerance): assert a.shape == b.shape and (a - b).abs().max() <= tolerance, f"{tuple(a.shape)}, {tuple(b.shape)}: {(a - b).abs().max():.2g} apart"
def to_rows(x): return x.permute(0, 2, 3, 1)


# Parity with timm

TIMM = ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb", "vit_small_patch16_224.dino", "vit_base_patch16_224.mae",
        "vit_base_patch16_clip_224.openai", "vit_base_patch16_siglip_224", "eva02_small_patch14_224", "eva02_base_patch16_clip_224", "deit_small_patch16_224",
        "deit_base_distilled_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224"]

@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("grid", [(5, 5), (3, 8), "trained"])
def test_tokens_are_timms_own(name, grid):
    model = small_timm(name)
    encoder, p = from_timm(model, resampling="library"), model.patch_embed.patch_size[0]
    grid = model.patch_embed.grid_size if grid == "trained" else grid
    if "beit" in name and tuple(grid) != tuple(model.patch_embed.grid_size): pytest.skip("BEiT takes its trained size only")
    if "dinov2" in name and tuple(grid) == (37, 37): pytest.skip("1,369 tokens add nothing to the smaller grids")
    images = torch.rand(2, 3, grid[0] * p, grid[1] * p)
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    with torch.no_grad():
        last = model.forward_features(normalized(encoder, images))[:, model.num_prefix_tokens:]
        if norm is not model.norm: last = norm(last)
        middle, = model.forward_intermediates(normalized(encoder, images), indices=[1], norm=False, intermediates_only=True)
        middle_normed = norm(to_rows(middle))
    close(encoder(images), last.unflatten(1, tuple(grid)), 1e-5)
    close(encoder.at(1, norm=False)(images), to_rows(middle), 1e-5)
    close(encoder.at(1)(images), middle_normed, 1e-5)
    close(encoder.at([1, -1])(images), torch.cat([middle_normed, last.unflatten(1, tuple(grid))], -1), 1e-5)


def test_a_two_to_one_image_gives_rows_first():
    "One bright patch in a black image moves the token of its own cell most."
    encoder = from_timm(small_timm("vit_small_patch14_dinov2"))
    black = torch.zeros(1, 3, 4 * 14, 8 * 14)
    for row, column in ((0, 7), (3, 0), (2, 5)):
        image = black.clone(); image[..., row * 14:(row + 1) * 14, column * 14:(column + 1) * 14] = 1
        change = (encoder.at(0)(image) - encoder.at(0)(black)).norm(dim=-1)[0]
        assert change.shape == (4, 8) and divmod(int(change.argmax()), 8) == (row, column)


# Parity with transformers

def hf(kind, **kwargs):
    model, config = getattr(transformers, kind + "Model"), getattr(transformers, kind + "Config")
    registers = dict(num_register_tokens=4) if kind == "DINOv3ViT" else {}
    return randomize(model(config(**SMALL_HF, **dict(image_size=64, patch_size=16) | registers | kwargs)))

HF = ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViT", "CLIPVision", "SiglipVision", "ViTMAE"]

def hf_reference(model, x, layer):
    "Patch tokens by the library's own forward: (normalized, bare), from its outputs and, for a middle block, its own stack of hidden states."
    kind, options = model.config.model_type, {}
    if kind in ("vit", "vit_mae", "clip_vision_model", "siglip_vision_model"): options["interpolate_pos_encoding"] = True
    if kind == "vit_mae": model.config.mask_ratio, options["noise"] = 0., torch.arange(x.shape[-1] * x.shape[-2] // 256).expand(len(x), -1).float()
    with torch.no_grad(): out = model(pixel_values=x, output_hidden_states=True, **options)
    norm = next(getattr(model, n) for n in ("layernorm", "norm", "post_layernorm") if hasattr(model, n))
    prefix = dict(dinov2_with_registers=5, dinov3_vit=5, siglip_vision_model=0).get(kind, 1)
    last = norm(out.last_hidden_state) if kind == "clip_vision_model" else out.last_hidden_state
    return (last if layer == -1 else norm(out.hidden_states[layer + 1]))[:, prefix:].detach()

@pytest.mark.parametrize("kind", HF)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_tokens_are_transformers_own(kind, grid):
    model = hf(kind)
    encoder = load_encoder(model, resampling="library", device="cpu")
    assert encoder.num_layers == 3 and encoder.embed_dim == 48 and encoder.patch_size == 16
    images = torch.rand(2, 3, grid[0] * 16, grid[1] * 16)
    for layer in (-1, 1):
        close(encoder.at(layer)(images).flatten(1, 2), hf_reference(model, normalized(encoder, images), layer), 1e-5)


def test_clip_without_norm_is_last_hidden_state():
    model = hf("CLIPVision")
    encoder = load_encoder(model, norm=False, device="cpu")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): theirs = model(normalized(encoder, images)).last_hidden_state[:, 1:]
    close(encoder(images).flatten(1, 2), theirs, 1e-5)


def test_whole_clip_and_other_classes():
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=small, vision_config=small | dict(image_size=32, patch_size=8), projection_dim=16))
    assert load_encoder(clip, device="cpu")(torch.rand(1, 3, 16, 32)).shape == (1, 2, 4, 32)
    bert = transformers.BertModel(transformers.BertConfig(**small))
    with pytest.raises(TypeError, match="give tokens="): load_encoder(bert)


# Resampling, against formulas written down anew

def cubic(t, a=-.75):
    t = np.abs(t)
    return np.where(t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1, np.where(t < 2, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a, 0))

def offset_matrix(old, new):
    "Bicubic interpolation from `old` to `new` cells whose scale is (new + 0.1) / old, edges repeated: a matrix [new, old]."
    center = (np.arange(new) + .5) / ((new + .1) / old) - .5
    matrix = np.zeros((new, old))
    for i, c in enumerate(center):
        for j in range(int(np.floor(c)) - 1, int(np.floor(c)) + 3): matrix[i, min(max(j, 0), old - 1)] += cubic(c - j)
    return matrix

def official_dinov2(position, grid):
    rows, columns = (offset_matrix(n, g) for n, g in zip(position.shape[:2], grid))
    return np.einsum("ir,jc,rcd->ijd", rows, columns, position)

@pytest.mark.parametrize("size", [(224, 224), (448, 448), (140, 280)])
def test_dinov2_resamples_as_its_official_code(size):
    model = small_timm("vit_small_patch14_dinov2")
    grid = (size[0] // 14, size[1] // 14)
    position = model.pos_embed[0, 1:].unflatten(0, (37, 37)).detach()
    expected = official_dinov2(position.double().numpy(), grid).reshape(1, -1, 48)
    fixed = _create("vit_small_patch14_dinov2", img_size=size, **SMALL)    # holds the position embedding of this very grid
    fixed.load_state_dict(model.state_dict() | {"pos_embed": torch.cat([model.pos_embed[:, :1], torch.from_numpy(expected).float()], 1)})
    encoder, images = from_timm(model), torch.rand(1, 3, *size)
    close(encoder(images), from_timm(fixed)(images), 1e-4)
    assert encoder.resampling == "offset" and (encoder(images) - from_timm(model, resampling="library")(images)).abs().max() > 1e-2
    close(load_dinov2_by_transformers(model)(images), encoder(images), 1e-4)

def load_dinov2_by_transformers(model):
    "The same weights in a transformers model, by a table of names of our own."
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL_HF, image_size=518, patch_size=14))
    own, state = model.state_dict(), {"embeddings.mask_token": torch.zeros(1, 48)}
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm.": "layernorm."}
    for k, v in own.items():
        if "attn.qkv" in k:
            for i, part in zip("qkv", v.chunk(3)): state[re.sub(r"blocks\.(\d+)\.attn\.qkv", rf"encoder.layer.\1.attention.{i}_proj", k)] = part
        elif k.startswith("blocks"): state[re.sub(r"^blocks", "encoder.layer", k).replace("attn.proj", "attention.o_proj").replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")] = v
        else: state[next(k.replace(a, b, 1) for a, b in names.items() if k.startswith(a))] = v
    theirs.load_state_dict(state)
    return load_encoder(theirs, device="cpu")


@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_resampling_ways(old, rows, columns):
    from scipy.ndimage import zoom
    position = torch.randn(old, old, 3)
    if (rows, columns) == (old, old): assert resample(position, (rows, columns), "offset") is position; return
    assert np.allclose(resample(position, (rows, columns), "offset"), official_dinov2(position.double().numpy(), (rows, columns)), atol=1e-4)
    if min(rows, columns) > 1: assert np.allclose(resample(position, (rows, columns), "corners"), zoom(position.numpy(), (rows / old, columns / old, 1), order=1), atol=1e-4)


# Files in the formats that are published

def random_state(state, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g) * .1 for k, v in state.items()}

def official_dinov3(dim=48, depth=3, patch=16, head_dim=16, seed=3):
    "A state dict in the key format of the official DINOv3 ViT files, biases non-zero."
    layers = dict(zip(["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias",
                       "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"],
                      [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (dim,), (dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,), (dim,)]))
    shapes = {"cls_token": (1, 1, dim), "storage_tokens": (1, 4, dim), "mask_token": (1, dim), "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
              **{f"blocks.{i}.{k}": s for i in range(depth) for k, s in layers.items()}, "norm.weight": (dim,), "norm.bias": (dim,)}
    g = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(s, generator=g) * .1 + (1 if re.search(r"norm\d?\.weight|gamma", k) else 0) for k, s in shapes.items()}
    mask = torch.ones(3 * dim); mask[dim:2 * dim] = 0
    periods = (100 ** (torch.arange(head_dim // 4) / (head_dim // 4))).bfloat16().float()
    return state | {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(depth)} | {"rope_embed.periods": periods}

def dinov3_by_transformers(state):
    model, own = hf("DINOv3ViT"), {}
    names = [("storage_tokens", "embeddings.register_tokens"), ("cls_token", "embeddings.cls_token"), ("patch_embed.proj", "embeddings.patch_embeddings"), ("blocks", "model.layer"),
             ("attn.proj", "attention.o_proj"), ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"), ("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj")]
    for k, v in state.items():
        if k.startswith(("rope", "mask_token")) or k.endswith("bias_mask"): continue
        for a, b in names: k = k.replace(a, b)
        for i, part in zip("qkv", v.chunk(3)) if "qkv" in k else [("", v)]: own[k.replace("attn.qkv", f"attention.{i}_proj")] = part
    own = {k: v for k, v in own.items() if not k.endswith("k_proj.bias")} | {"embeddings.mask_token": torch.zeros(1, 1, 48)}
    model.load_state_dict(own)
    return load_encoder(model, device="cpu")

@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_dinov3_official_file_with_its_biases(tmp_path, size):
    state = official_dinov3(); torch.save(state, tmp_path / "dinov3.pth")
    encoder, images = load_encoder("vits", checkpoint=tmp_path / "dinov3.pth", device="cpu", **SMALL), torch.rand(2, 3, *size)
    close(encoder(images), dinov3_by_transformers(state)(images), 1e-4)
    torch.save({k: v * 0 if k.endswith("qkv.bias") else v for k, v in state.items()}, tmp_path / "zero.pth")
    assert (encoder(images) - load_encoder("vits", checkpoint=tmp_path / "zero.pth", device="cpu", **SMALL)(images)).abs().max() > 1e-2

def test_dinov3_bias_is_never_dropped(tmp_path):
    torch.save(official_dinov3(), tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match=r"(?s)6 unexpected: blocks\.0\.attn\.q_bias.*ends in _qkvb"):
        load_encoder("vit_small_patch16_dinov3", checkpoint=tmp_path / "dinov3.pth", **SMALL)

@pytest.mark.parametrize("alias, dim, depth", [("vits", 384, 12), ("vitb", 768, 12), ("vitl", 1024, 24)])
def test_aliases_hold_every_weight_of_the_official_files(alias, dim, depth):
    with torch.device("meta"): model = _create(ALIASES[alias])
    small = to_timm(official_dinov3(dim=8, depth=depth, head_dim=8))
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert set(own) == set(small) - {"mask_token"}
    for k, shape in own.items(): assert tuple(s if s in (1, 3, 4, 16) and "bias" not in k else s * dim // 8 for s in small[k].shape) == shape, k


def official_dinov2_file(model, registers):
    state = dict(model.state_dict())
    state["mask_token"] = torch.zeros(1, 48)
    if registers:
        state["register_tokens"], shift = state.pop("reg_token"), torch.randn(1, 1, 48)
        state["cls_token"], state["pos_embed"] = state["cls_token"] - shift, torch.cat([shift, state["pos_embed"]], 1)
    return state

@pytest.mark.parametrize("alias", ["dinov2_vits", "dinov2_vits_reg"])
def test_dinov2_official_file(tmp_path, alias):
    model = small_timm(ALIASES[alias])
    torch.save(official_dinov2_file(model, "reg" in alias), tmp_path / "dinov2.pth")
    encoder, images = load_encoder(alias, checkpoint=tmp_path / "dinov2.pth", device="cpu", **SMALL), torch.rand(1, 3, 70, 112)
    close(encoder(images), from_timm(model)(images), 1e-4)
    assert encoder.resampling == ("antialias" if "reg" in alias else "offset") and encoder.num_prefix_tokens == (5 if "reg" in alias else 1)

def test_dino_official_full_checkpoint(tmp_path):
    model, other = small_timm(ALIASES["dino_vits16"]), small_timm(ALIASES["dino_vits16"], img_size=224)
    randomize(other, seed=9)
    torch.save(dict(teacher={**{f"backbone.{k}": v for k, v in model.state_dict().items()}, "head.mlp.0.weight": torch.ones(2)},
                    student={f"module.backbone.{k}": v for k, v in other.state_dict().items()}, epoch=100, args=Namespace(arch="vit_small")), tmp_path / "dino.pth")
    encoder, images = load_encoder("dino_vits16", checkpoint=tmp_path / "dino.pth", device="cpu", **SMALL), torch.rand(1, 3, 64, 128)
    close(encoder(images), from_timm(model)(images), 1e-4)
    assert encoder.resampling == "offset"

def test_lightning_state_dict(tmp_path):
    model = small_timm("vit_tiny_patch16_224")
    torch.save({"state_dict": {f"model.encoder.{k}": v for k, v in model.state_dict().items()} | {"criterion.weight": torch.ones(3)}, "epoch": 1}, tmp_path / "last.ckpt")
    encoder, images = load_encoder("vit_tiny_patch16_224", checkpoint=tmp_path / "last.ckpt", device="cpu", **SMALL), torch.rand(1, 3, 64, 64)
    close(encoder(images), from_timm(model)(images), 1e-5)

def test_franca_file(tmp_path, monkeypatch):
    from rasa_nb import encoders
    monkeypatch.setitem(encoders.FRANCA, "franca_vitb14", (48, 4, 3, 128))
    model = randomize(_create("franca_vitb14", img_size=56))
    chunked = {re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", k).replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in model.state_dict().items()}
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in chunked.items()} | {"module.backbone.mask_token": torch.zeros(1, 48), "module.dino_head.last.weight": torch.ones(1)}}, tmp_path / "franca.pth")
    encoder, images = load_encoder("franca_vitb14", checkpoint=tmp_path / "franca.pth", device="cpu"), torch.rand(1, 3, 28, 70)
    close(encoder(images), from_timm(model)(images), 1e-5)
    assert encoder.resampling == "offset" and encoder.image_size == 56


def test_published_deit_weights_give_timms_tokens(deit_file):
    encoder, own = load_encoder("deit_tiny_patch16_224", checkpoint=deit_file, device="cpu"), timm.create_model("deit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    own.load_state_dict({k: v for k, v in read_checkpoint(deit_file).items() if not k.startswith("head.")})
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad(): theirs = own.forward_features(normalized(encoder, images))[:, 1:]
    close(encoder(images).flatten(1, 2), theirs, 1e-5)
    assert encoder.resampling == "bicubic" and encoder(torch.rand(1, 3, 160, 320)).shape == (1, 10, 20, 192)


# The same weights through transformers and through timm

ROUTES = {"Dinov2": ("dinov2_vits", dict(patch_size=14, image_size=70)), "Dinov2WithRegisters": ("dinov2_vits_reg", dict(patch_size=14, image_size=70)),
          "DINOv3ViT": ("dinov3_vits", {}), "ViT": ("vit_small_patch16_224.augreg_in21k", dict(image_size=96)), "ViTMAE": ("mae_vitb16", dict(image_size=96)),
          "CLIPVision": ("vit_base_patch16_clip_quickgelu_224.openai", dict(image_size=96)), "SiglipVision": ("vit_base_patch16_siglip_224.webli", dict(image_size=96, hidden_act="gelu"))}  # timm has the exact gelu there

@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("how", ["state_dict", "save_pretrained"])
def test_transformers_file_in_timm(tmp_path, kind, how):
    "Both generations of names: `save_pretrained` writes those of the files on the hub, `state_dict` the present ones."
    alias, options = ROUTES[kind]
    model = hf(kind, **options)
    if how == "save_pretrained": model.save_pretrained(tmp_path)
    else: save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    through_timm, through_hf = load_encoder(alias, checkpoint=tmp_path / "model.safetensors", device="cpu", **SMALL), load_encoder(model, device="cpu")
    p = model.config.patch_size
    sizes = [(model.config.image_size,) * 2] + ([(3 * p, 7 * p)] if kind != "CLIPVision" else [])  # OpenAI's code has no other size, so each library has its own way
    for size in sizes:
        images = normalized(through_timm, torch.rand(1, 3, *size))
        close(through_timm.blocks(images, [1, -1])[0], through_hf.blocks(images, [1, -1])[0], 1e-4)
        close(through_timm.blocks(images, [-1])[0], through_hf.blocks(images, [-1])[0], 1e-4)

def test_transformers_folder(tmp_path):
    model = hf("Dinov2"); model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6])))
    encoder, images = load_encoder(str(tmp_path), device="cpu"), torch.rand(1, 3, 48, 64)
    assert encoder.mean.flatten().tolist() == pytest.approx([.1, .2, .3]) and encoder.resampling == "offset"
    close(encoder(images), load_encoder(model, device="cpu", mean=(.1, .2, .3), std=(.4, .5, .6))(images), 1e-5)

def test_transformers_folder_with_weights_missing(tmp_path):
    model = hf("Dinov2"); model.save_pretrained(tmp_path)
    state = read_checkpoint(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.1." not in k}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys"): load_encoder(str(tmp_path))


# torch.hub

HUBCONF = '''
import torch
from torch import nn
class ViT(nn.Module):
    embed_dim, num_register_tokens = 8, 1
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4); self.patch_embed.patch_size = self.patch_embed.img_size = (4, 4)
        self.blocks, self.norm = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.LayerNorm(8)
    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([torch.zeros(len(x), 2, 8), x], 1)
        for b in self.blocks: x = b(x)
        return self.norm(x)
def dinov2_toy(pretrained=True): return ViT()
def dinov2_pickle(pretrained=True, path=None): torch.load(path, weights_only=False); return ViT()
'''

def test_hub_clone(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    name = f"hub:{tmp_path}:dinov2_toy"
    with pytest.raises(PermissionError, match="trust=True"): load_encoder(name)
    encoder, images = load_encoder(name, trust=True, device="cpu"), torch.rand(2, 3, 8, 16)
    assert encoder(images).shape == (2, 2, 4, 8) and encoder.num_layers == 2 and encoder.num_prefix_tokens == 2
    torch.save({"teacher": {f"backbone.{k}": v for k, v in encoder.model.state_dict().items()}}, tmp_path / "w.pth")
    close(load_encoder(name, checkpoint=tmp_path / "w.pth", trust=True, device="cpu")(images), encoder(images), 1e-6)
    torch.save({k: v for k, v in encoder.model.state_dict().items() if "blocks.1" not in k}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="2 missing: blocks.1.weight"): load_encoder(name, checkpoint=tmp_path / "w.pth", trust=True)


def test_code_from_the_hub_cannot_open_pickles_with_code(tmp_path):
    import os
    (tmp_path / "hubconf.py").write_text(HUBCONF); torch.save(Code(), tmp_path / "w.pth")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(Exception, match="(?i)weights.only"): load_encoder(f"hub:{tmp_path}:dinov2_pickle", trust=True, path=tmp_path / "w.pth")
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before and "code_ran" not in __import__("sys").modules


# Datasets, sizes, precision

@pytest.fixture(scope="module")
def encoder(): return from_timm(small_timm("vit_small_patch14_dinov2", img_size=70))

@given(st.integers(1, 8))
@settings(max_examples=6, deadline=None)
def test_any_batch_size_gives_the_same_tokens(encoder, batch_size):
    tokens = lambda b: torch.cat([z for z, _ in encoder.encode(Scenes("val", 6), batch_size=b)])
    close(tokens(batch_size), tokens(6), 1e-5)

@given(st.integers(14, 80), st.integers(14, 80), st.sampled_from(["resize", "crop", "pad"]))
@settings(max_examples=30, deadline=None)
def test_fit_size_gives_whole_patches(height, width, how):
    image, mask = FitSize(how, 14)(torch.randint(256, (3, height, width), dtype=torch.uint8), torch.randint(12, (height, width), dtype=torch.uint8))
    assert image.shape[-2:] == mask.shape and image.shape[-2] % 14 == image.shape[-1] % 14 == 0 and 0 <= image.min() and image.max() <= 1
    assert set(mask.unique().tolist()) <= {*range(12), 255}
    if height % 14 == width % 14 == 0: assert image.shape[-2:] == (height, width)

def test_tokens_on_disk_go_on_and_are_checked(encoder, tmp_path):
    data = Transformed(Scenes("val", 7), Evaluation(70))
    stored = np.array(encoder.encode_to(tmp_path / "z.npy", data, batch_size=3))
    tokens = torch.cat([z for z, _ in encoder.encode(data)]).numpy()
    assert stored.shape == (7, 5, 5, 48) and np.abs(stored - tokens).max() < 1e-2
    note = json.loads((tmp_path / "z.npy.json").read_text())
    half = np.where(np.arange(7)[:, None, None, None] < 4, stored, 0)   # as if stopped after four
    np.save(tmp_path / "z.npy", half); (tmp_path / "z.npy.json").write_text(json.dumps(note | {"done": 4}))
    assert np.abs(encoder.encode_to(tmp_path / "z.npy", data, batch_size=2) - stored.astype(float)).max() < 1e-2
    with pytest.raises(ValueError, match="holds other tokens"): encoder.encode_to(tmp_path / "z.npy", Transformed(Scenes("val", 7, seed=1), Evaluation(70)))
    with pytest.raises(ValueError, match="another model or layer"): from_timm(small_timm("vit_small_patch14_dinov2", img_size=70, qkv_bias=False), encoder.name).encode_to(tmp_path / "z.npy", data)

def test_half_precision_stays_near_and_frozen(encoder):
    half, images = load_encoder(encoder.model, dtype="bf16", device="cpu"), torch.rand(2, 3, 70, 70)
    assert half(images).dtype == torch.float32 and 0 < (half(images) - encoder(images)).abs().mean() < .05
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters()) and not encoder(images).requires_grad

@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(device):
    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()): pytest.skip(f"no {device} here")
    images = torch.rand(1, 3, 64, 96)
    close(load_encoder("tiny", device=device)(images).cpu(), load_encoder("tiny", device="cpu")(images), 1e-3)

def test_list_of_encoders():
    table = list_encoders("dinov2_vits*").set_index("name")
    assert tuple(table.loc["dinov2_vits_reg", ["source", "patch", "dim", "prefix", "license"]]) == ("timm", 14, 384, 5, "apache-2.0") and 21 < table.loc["dinov2_vits", "params"] < 23


# Bad input

def test_wrong_architecture(tmp_path):
    save_file(small_timm("vit_tiny_patch16_224").state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not fit the model: \d+ of \d+ weights match \(\d+%\).*of another shape: .*Nothing was loaded"):
        load_encoder("vit_tiny_patch16_224", checkpoint=tmp_path / "tiny.safetensors")

@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_truncated_file(tmp_path, ending):
    path = tmp_path / f"w.{ending}"
    (save_file if ending == "safetensors" else torch.save)(small_timm("vit_tiny_patch16_224").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is it whole"): load_encoder("vit_tiny_patch16_224", checkpoint=path)

class Code:
    def __reduce__(self): return exec, ("import sys; sys.modules['code_ran'] = 1",)

def test_pickle_with_code_is_refused(tmp_path):
    import sys
    torch.save({"state_dict": {"patch_embed.proj.weight": torch.ones(1)}, "extra": Code()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="could run code"): load_encoder("vits", checkpoint=tmp_path / "w.pth")
    assert "code_ran" not in sys.modules

def test_images_out_of_range_are_warned_about_once():
    encoder = from_timm(small_timm("vit_small_patch14_dinov2", img_size=70))
    with pytest.warns(UserWarning, match="Normalized twice"): encoder(torch.randn(1, 3, 70, 70))
    with warnings.catch_warnings(): warnings.simplefilter("error"); encoder(torch.randn(1, 3, 70, 70))

def test_images_of_the_wrong_kind(encoder):
    with pytest.raises(TypeError, match="float"): encoder(torch.zeros(1, 3, 70, 70, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"): encoder(torch.zeros(3, 70, 70))
    with pytest.raises(ValueError, match="nearest to 75: 70 or 84"): encoder(torch.zeros(1, 3, 75, 70))

def test_grid_that_does_not_match_the_tokens(encoder):
    wrong = PatchEncoder(nn.AvgPool2d(7), lambda m, x: m(x).permute(0, 2, 3, 1), embed_dim=3, patch_size=14)
    with pytest.raises(ValueError, match=r"returned tokens \(1, 10, 10, 3\), expected \(1, 5, 5, 3\)"): wrong(torch.rand(1, 3, 70, 70))
    registers = randomize(_create("vit_small_patch14_reg4_dinov2", **SMALL)); registers.num_prefix_tokens = 1
    with pytest.raises(ValueError, match="1 prefix tokens and 5 x 5 patches"): from_timm(registers)(torch.rand(1, 3, 70, 70))

def test_names_that_are_none():
    with pytest.raises(ValueError, match="nearest: dinov2_vit"): load_encoder("dinov2_vit")
    with pytest.raises(ValueError, match="say of which model"): load_encoder("weights.pth")
    with pytest.raises(ValueError, match="branch may hold other code"): load_encoder("hub:facebookresearch/dinov2@main:dinov2_vits14", trust=True)
    with pytest.raises(TypeError, match="give tokens="): load_encoder(nn.Conv2d(3, 8, 4))
