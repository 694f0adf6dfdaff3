"""Weight files in the formats that are published: read without running code, loaded whole or refused."""
import bz2
import gzip
import io
import lzma
import re
import sys
import tarfile
import warnings
import zipfile
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from toy_vits import SMALL, assert_close, of_timm, of_transformers, randomize

from rasa_nb import encoders
from rasa_nb.checkpoints import choose_weights, find_encoder, load_strictly, read_checkpoint, read_file, to_timm
from rasa_nb.encoders import ALIASES, create_vit, from_timm, load_encoder
from rasa_nb.store import fingerprint, fitted_on
from rasa_nb.trained import load_released_head


def load(name, file, **options): return load_encoder(name, checkpoint=file, device="cpu", **options)


# DINOv3

def official_dinov3(dim=48, depth=3, patch=16, head_dim=16, seed=3):
    "A state dict in the key format of the official DINOv3 ViT files, biases non-zero."
    vector, layer = (dim,), {
        "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim),
        "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim)}
    layer |= {k: vector for k in ("norm1.weight", "norm1.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight",
                                  "norm2.bias", "mlp.fc2.bias", "ls2.gamma")}
    shapes = {"cls_token": (1, 1, dim), "storage_tokens": (1, 4, dim), "mask_token": (1, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": vector,
              "norm.weight": vector, "norm.bias": vector}
    shapes |= {f"blocks.{i}.{k}": s for i in range(depth) for k, s in layer.items()}
    g = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(s, generator=g) * .1 for k, s in shapes.items()}
    state = {k: v + 1 if re.search(r"norm\d?\.weight|gamma", k) else v for k, v in state.items()}
    mask = torch.ones(3 * dim)
    mask[dim:2 * dim] = 0
    state |= {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(depth)}
    periods = 100 ** (torch.arange(head_dim // 4) / (head_dim // 4))
    return state | {"rope_embed.periods": periods.bfloat16().float()}


def dinov3_by_transformers(state):
    "The same weights in a transformers model, by a table of names of our own."
    model, own = of_transformers("DINOv3ViT"), {"embeddings.mask_token": torch.zeros(1, 1, 48)}
    names = {"storage_tokens": "embeddings.register_tokens", "cls_token": "embeddings.cls_token",
             "patch_embed.proj": "embeddings.patch_embeddings", "blocks": "model.layer",
             "attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    for k, v in state.items():
        if k.startswith(("rope", "mask_token")) or k.endswith("bias_mask"): continue
        for a, b in names.items(): k = k.replace(a, b)
        for i, part in zip("qkv", v.chunk(3)) if "qkv" in k else [("", v)]:
            own[k.replace("attn.qkv", f"attention.{i}_proj")] = part
    model.load_state_dict({k: v for k, v in own.items() if not k.endswith("k_proj.bias")})
    return load_encoder(model, device="cpu", mean=(.485, .456, .406), std=(.229, .224, .225))


@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_dinov3_official_file_with_its_biases(tmp_path, size):
    pytest.importorskip("transformers")
    state = official_dinov3()
    torch.save(state, tmp_path / "dinov3.pth")
    torch.save({k: v * 0 if k.endswith("qkv.bias") else v for k, v in state.items()}, tmp_path / "zero.pth")
    encoder, images = load("vits", tmp_path / "dinov3.pth", **SMALL), torch.rand(2, 3, *size)
    assert_close(encoder(images), dinov3_by_transformers(state)(images), 1e-4)
    assert (encoder(images) - load("vits", tmp_path / "zero.pth", **SMALL)(images)).abs().max() > 1e-2


def test_dinov3_bias_is_never_dropped(tmp_path):
    torch.save(official_dinov3(), tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match=r"(?s)6 unexpected: blocks\.0\.attn\.q_bias.*ends in _qkvb"):
        load("vit_small_patch16_dinov3", tmp_path / "dinov3.pth", **SMALL)


@pytest.mark.parametrize("alias, dim, depth", [("vits", 384, 12), ("vitb", 768, 12), ("vitl", 1024, 24)])
def test_aliases_hold_every_weight_of_the_official_files(alias, dim, depth):
    with torch.device("meta"): model = create_vit(ALIASES[alias])
    small = to_timm(official_dinov3(dim=8, depth=depth, head_dim=8))
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert set(own) == set(small) - {"mask_token"}
    for k, shape in own.items():
        fixed = () if "bias" in k else (1, 3, 4, 16)   # batch, colors, registers, patch
        assert tuple(s if s in fixed else s * dim // 8 for s in small[k].shape) == shape, k


# DINOv2, DINO, Franca, Lightning

def official_dinov2(model, registers):
    state = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 48)}
    if not registers: return state
    state["register_tokens"], shift = state.pop("reg_token"), torch.randn(1, 1, 48)
    state["cls_token"] = state["cls_token"] - shift
    return state | {"pos_embed": torch.cat([shift, state["pos_embed"]], 1)}


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_official_file(tmp_path, registers):
    alias = "dinov2_vits_reg" if registers else "dinov2_vits"
    model = of_timm(ALIASES[alias])
    torch.save(official_dinov2(model, registers), tmp_path / "dinov2.pth")
    encoder, images = load(alias, tmp_path / "dinov2.pth", **SMALL), torch.rand(1, 3, 70, 112)
    assert_close(encoder(images), from_timm(model)(images), 1e-4)
    assert encoder.resampling == ("antialias" if registers else "offset")
    assert encoder.num_prefix_tokens == (5 if registers else 1)


def test_dino_full_checkpoint_gives_the_teacher(tmp_path):
    model, student = of_timm(ALIASES["dino_vits16"]), randomize(of_timm(ALIASES["dino_vits16"]), seed=9)
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    teacher["head.mlp.0.weight"] = torch.ones(2)
    student = {f"module.backbone.{k}": v for k, v in student.state_dict().items()}
    full = dict(teacher=teacher, student=student, epoch=100, args=Namespace(arch="vit_small"))
    torch.save(full, tmp_path / "dino.pth")
    with pytest.warns(UserWarning, match="averaged weights beside raw ones .* are taken, 'teacher.backbone'"):
        encoder, images = load("dino_vits16", tmp_path / "dino.pth", **SMALL), torch.rand(1, 3, 64, 128)
    assert_close(encoder(images), from_timm(model)(images), 1e-4)
    assert encoder.resampling == "offset" and encoder.origin == "dino.pth (teacher.backbone)"


def test_lightning_state_dict(tmp_path):
    model = of_timm("vit_tiny_patch16_224")
    state = {f"model.encoder.{k}": v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=state | {"criterion.weight": torch.ones(3)}, epoch=1), tmp_path / "last.ckpt")
    encoder, images = load("vit_tiny_patch16_224", tmp_path / "last.ckpt", **SMALL), torch.rand(1, 3, 64, 64)
    assert_close(encoder(images), from_timm(model)(images), 1e-5)


def test_franca_file(tmp_path, monkeypatch):
    monkeypatch.setitem(encoders.FRANCA, "franca_vitb14", (48, 4, 3, 128))
    model = randomize(create_vit("franca_vitb14", img_size=56))
    rules = [(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}."), ("mlp.fc1", "mlp.w12"),
             ("mlp.fc2", "mlp.w3"), ("^", "module.backbone.")]
    state = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 48)}
    for pattern, new in rules: state = {re.sub(pattern, new, k): v for k, v in state.items()}
    state["module.dino_head.last.weight"] = torch.ones(1)
    torch.save(dict(teacher=state), tmp_path / "franca.pth")
    encoder, images = load("franca_vitb14", tmp_path / "franca.pth"), torch.rand(1, 3, 28, 70)
    assert_close(encoder(images), from_timm(model)(images), 1e-5)
    assert encoder.resampling == "offset" and encoder.image_size == 56


def test_published_deit_weights_give_timms_tokens(deit_file):
    import timm
    encoder, images = load("deit_tiny_patch16_224", deit_file), torch.rand(1, 3, 224, 224)
    own = timm.create_model("deit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    own.load_state_dict({k: v for k, v in read_checkpoint(deit_file).items() if not k.startswith("head.")})
    with torch.no_grad(): theirs = own.forward_features(encoder.normalize(images))[:, 1:]
    assert_close(encoder(images).flatten(1, 2), theirs, 1e-5)
    assert encoder.resampling == "bicubic" and encoder(torch.rand(1, 3, 160, 320)).shape == (1, 10, 20, 192)


# The same weights through transformers and through timm

ROUTES = {   # with the exact gelu for SigLIP, as timm has it
    "Dinov2": ("dinov2_vits", dict(patch_size=14, image_size=70)),
    "Dinov2WithRegisters": ("dinov2_vits_reg", dict(patch_size=14, image_size=70)),
    "DINOv3ViT": ("dinov3_vits", {}),
    "ViT": ("vit_small_patch16_224.augreg_in21k", dict(image_size=96)),
    "ViTMAE": ("mae_vitb16", dict(image_size=96)),
    "CLIPVision": ("vit_base_patch16_clip_quickgelu_224.openai", dict(image_size=96)),
    "SiglipVision": ("vit_base_patch16_siglip_224.webli", dict(image_size=96, hidden_act="gelu"))}

@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("how", ["state_dict", "save_pretrained"])
def test_transformers_file_in_timm(tmp_path, kind, how):
    "Both generations of names: `save_pretrained` writes those of the files on the hub, `state_dict` today's."
    pytest.importorskip("transformers")
    (alias, options), file = ROUTES[kind], tmp_path / "model.safetensors"
    model = of_transformers(kind, **options)
    if how == "save_pretrained": model.save_pretrained(tmp_path)
    else: save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    stats = dict(mean=(.4, .5, .6), std=(.2, .3, .2))
    ours = load(alias, file, **SMALL, **stats)
    theirs = load_encoder(model, device="cpu", resampling=ours.resampling or "library", **stats)
    side, p = model.config.image_size, model.config.patch_size
    sizes = [(side, side), (3 * p, 7 * p)]
    if kind == "CLIPVision": sizes = sizes[:1]   # at others nothing is official: each library has its way
    for size in sizes:
        images = torch.rand(1, 3, *size)
        for layer in (1, -1): assert_close(ours.at(layer)(images), theirs.at(layer)(images), 1e-4)


# Which weights of a file

def under(prefix, state): return {f"{prefix}{k}": v for k, v in state.items()}


SETS = {   # how people save two sets of weights: the file of an average and of raw weights, and their names
    "DeiT, MAE": (lambda ema, raw: dict(model=raw, model_ema=ema, optimizer=dict(state={0: raw})), "model_ema", "model"),
    "timm": (lambda ema, raw: dict(state_dict=raw, state_dict_ema=ema, epoch=3), "state_dict_ema", "state_dict"),
    "I-JEPA": (lambda ema, raw: dict(encoder=under("module.", raw), target_encoder=under("module.", ema)),
               "target_encoder.module", "encoder.module"),
    "Lightning": (lambda ema, raw: dict(state_dict=under("net.", raw) | under("ema_model.module.", ema)),
                  "state_dict.ema_model.module", "state_dict.net"),
    "MoCo": (lambda ema, raw: dict(state_dict=under("module.base_encoder.", raw)
                                   | under("module.momentum_encoder.", ema)),
             "state_dict.module.momentum_encoder", "state_dict.module.base_encoder"),
    "one within the other": (lambda ema, raw: raw | under("ema_model.", ema), "ema_model", "")}

@pytest.mark.parametrize("what", SETS)
def test_the_average_is_taken_and_said_and_any_can_be_chosen(tmp_path, what):
    pack, average, raw = SETS[what]
    models = [of_timm("vit_tiny_patch16_224", img_size=32), randomize(of_timm("vit_tiny_patch16_224", img_size=32), 9)]
    torch.save(pack(*(m.state_dict() for m in models)), tmp_path / "w.pth")
    images = torch.rand(1, 3, 32, 32)
    def tokens(weights): return load("vit_tiny_patch16_224", tmp_path / "w.pth", weights=weights, **SMALL)
    with pytest.warns(UserWarning, match=f"averaged weights beside raw ones .* are taken, '{average}'.*weights='raw'"):
        taken = tokens(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = {w: tokens(w) for w in ("ema", average, "raw")}
    assert [e.origin for e in chosen.values()][:2] == [taken.origin, f"w.pth ({average})"]
    expected = [from_timm(m)(images) for m in models]
    for encoder in (taken, chosen["ema"], chosen[average]): assert_close(encoder(images), expected[0], 1e-6)
    assert_close(chosen["raw"](images), expected[1], 1e-6)
    assert chosen["raw"].origin == (f"w.pth ({raw})" if raw else "w.pth") and average in repr(taken)
    with pytest.raises(ValueError, match="holds no weights='swa'; its ViTs are under"): tokens("swa")


def test_two_averages_are_a_question(tmp_path):
    state = of_timm("vit_tiny_patch16_224", img_size=32).state_dict()
    torch.save(dict(model=state, model_ema=state, model_ema_best=state), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="2 ViTs in .*, under 'model_ema', 'model_ema_best': say which"):
        load("vit_tiny_patch16_224", tmp_path / "w.pth", **SMALL)
    best = load("vit_tiny_patch16_224", tmp_path / "w.pth", weights="model_ema_best", **SMALL)
    assert best.origin == "w.pth (model_ema_best)"


def test_names_that_only_look_like_an_average_are_none():
    for names in (["schema.model", "other"], ["cinema", "other"]):
        with pytest.raises(ValueError, match="2 ViTs"): choose_weights(names)


@pytest.mark.parametrize("size", [(70, 70), 112])
def test_a_file_with_a_size_of_ones_own(tmp_path, size):
    "The position embedding of the file is kept, and resampled officially."
    model = of_timm("vit_small_patch14_dinov2", img_size=98)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load("dinov2_vits", tmp_path / "w.safetensors", img_size=size, **SMALL)
    side = size if isinstance(size, int) else size[0]
    images = torch.rand(1, 3, side, side)
    assert torch.equal(encoder.model.pos_embed, model.pos_embed) and encoder.image_size == side
    assert_close(encoder(images), from_timm(model)(images), 1e-6)
    tiny = load_encoder("tiny", device="cpu", img_size=48)
    assert tiny.image_size == 48
    with pytest.raises(ValueError, match="no multiple of the patch size"):
        load("dinov2_vits", tmp_path / "w.safetensors", img_size=100, **SMALL)


def test_a_family_of_one_size_is_made_for_it(tmp_path):
    model = of_timm("beit_base_patch16_224", img_size=64)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load("beit_base_patch16_224", tmp_path / "w.safetensors", img_size=64, **SMALL)
    images = torch.rand(1, 3, 64, 64)
    assert_close(encoder(images), from_timm(model)(images), 1e-6)


# What is no checkpoint

def zipped(names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names: archive.writestr(name, b"0")
    return content.getvalue()


def tarred():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive: archive.addfile(tarfile.TarInfo("w.pth"))
    return content.getvalue()


def saved():
    content = io.BytesIO()
    torch.save({"w": torch.ones(9)}, content)
    return content.getvalue()


OTHER_FILES = {
    "nothing": (b"", "is empty, 0 bytes"),
    "HTML": (b"\n<!DOCTYPE html><html><title>Sign in</title>", r"is a web page \(HTML\), not weights"),
    "HTML behind a byte order mark": (b"\xef\xbb\xbf<HTML lang='en'>", "is a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is XML, perhaps an answer of a server"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "pointer of Git LFS .*git lfs pull"),
    "gzip": (gzip.compress(b"weights"), "is compressed by gzip, not weights: unpack it with `gunzip`"),
    "bzip2": (bz2.compress(b"weights"), "is compressed by bzip2"), "xz": (lzma.compress(b"weights"), "by xz"),
    "tar": (tarred(), "is a tar archive"), "NumPy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "npz": (zipped(["a.npy", "b.npy"]), r"is NumPy arrays \(.npz\)"), "HDF5": (b"\x89HDF\r\n", "is an HDF5 file"),
    "a zip of weights": (zipped(["w.pth", "README"]), r"is a zip archive of 2 files \(w.pth, README\)"),
    "an empty zip": (zipped([]), "no file of safetensors or `torch.save`"),
    "TorchScript": (zipped(["m/data.pkl", "m/constants.pkl", "m/code/m.py"]), "is a program of TorchScript"),
    "JSON": (b'{"metadata": {}, "weight_map": {}}', "is JSON, not weights"), "PNG": (b"\x89PNG\r\n", "a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0", "a JPEG image"), "text": (b"not weights", "is no file of safetensors or"),
    "zeros": (bytes(4096), "is no file of safetensors or"),
    "torch.save cut short": (saved()[:300], "is a zip file cut short, 300 bytes of it, not weights: .*is it whole"),
    "a pickle cut short": (b"\x80\x02}q\x00(X", "cannot be read as weights, is it whole. It has 7 bytes")}

@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_are_refused_for_what_they_are(tmp_path, what, name):
    content, match = OTHER_FILES[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error: read_file(tmp_path / name)
    assert "could run code" not in str(error.value)
    with pytest.raises(ValueError, match=match): load_released_head(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file of weights in it"): read_checkpoint(tmp_path)


def test_what_a_file_is_does_not_follow_from_its_name(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.pth")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.safetensors", "old.bin"):
        assert torch.equal(read_checkpoint(tmp_path / name)["w"], torch.ones(2))


class Code:
    def __reduce__(self): return exec, ("import sys; sys.modules['code_ran'] = 1",)


def test_code_in_a_file_never_runs(tmp_path):
    torch.save(dict(state_dict={"patch_embed.proj.weight": torch.ones(1)}, extra=Code()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="which could run code; it was not opened"):
        read_checkpoint(tmp_path / "w.pth")
    assert "code_ran" not in sys.modules


def test_a_safetensors_file_cut_short_is_refused(tmp_path):
    save_file(of_timm("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="is it whole"): read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content, match", [([torch.ones(1)], "holds no state dict but a list"),
                                            ({}, "holds no state dict but a dict"),
                                            (dict(model=dict(epoch=3)), "holds no state dict"),
                                            (dict(w=torch.ones(1), epoch=3), "no tensors: .'epoch'.")])
def test_files_without_weights_are_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=match): read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): read_checkpoint(tmp_path / "none.pth")


def test_states_that_hold_no_encoder_or_another_are_refused():
    with pytest.raises(ValueError, match="no ViT in this state dict: .* it starts with conv1.weight"):
        find_encoder({"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="another position code"):
        to_timm(official_dinov3() | {"rope_embed.periods": torch.ones(16)})


def test_another_architecture_is_refused_and_nothing_loaded(tmp_path):
    model, wrong = of_timm("vit_tiny_patch16_224"), create_vit("vit_tiny_patch16_224", depth=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = r"(?s)wrong does not fit the model: \d+ of 42 weights match \(\d+%\).*of another shape: .*Nothing"
    with pytest.raises(ValueError, match=told): load_strictly(model, wrong.state_dict(), "wrong")
    broken = before | {"norm.bias": torch.full((48,), float("nan"))}
    with pytest.raises(ValueError, match="not finite in norm.bias"): load_strictly(model, broken)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_which_weights_were_taken_is_kept_with_what_is_fitted(tmp_path):
    model = of_timm("vit_tiny_patch16_224", img_size=32)
    torch.save(dict(model=model.state_dict(), model_ema=model.state_dict()), tmp_path / "w.pth")
    def load_as(weights): return load("vit_tiny_patch16_224", tmp_path / "w.pth", weights=weights, **SMALL)
    ema, raw = load_as("ema"), load_as("raw")
    assert (fitted_on(ema)["origin"], fitted_on(raw)["origin"]) == ("w.pth (model_ema)", "w.pth (model)")
    assert "origin" not in fitted_on(from_timm(model)) and fingerprint(ema) == fingerprint(raw)
