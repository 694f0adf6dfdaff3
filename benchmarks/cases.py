"""The cases of the study of methods: an encoder, the images that removers learn from, two splits to score.

Real weights and data lie beside the project, in ../shared, under terms of their own; numbers measured on them
are published, the files are not. Sources: ariG23498/mae-scalable-vision-learners (MIT), run 46;
nasaharvest/galileo @0f0b5b9 (MIT), its Sentinel-2 RGB path; Earth Surface Water (Luo et al., 2021).
"""
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rasa_nb.checkpoints import load_strictly, read_checkpoint
from rasa_nb.data import SegmentationData, VOCSegmentation, read_image, read_mask
from rasa_nb.encoders import load_encoder
from rasa_nb.scenes import Scenes

from timm.layers import Attention    # behind rasa_nb, which mends torchvision where it does not fit torch
from timm.models import VisionTransformer

SHARED = Path(__file__).resolve().parents[2] / "shared"
STARTS = 0, 104, 208, 312, 416    # of five crops of 96 px, evenly over a tile of 512
IMAGENET = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])


def mae_cifar(weights):
    "Returns a masked autoencoder of CIFAR-10 photographs, 48 px, patches of 6."
    model = VisionTransformer(
        img_size=48, patch_size=6, embed_dim=128, depth=3, num_heads=4, mlp_ratio=2, class_token=False,
        global_pool="avg", fc_norm=False, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    for block in model.blocks:
        block.attn = Attention(128, num_heads=4, attn_head_dim=128, qkv_bias=True)
        block.ls2 = nn.GELU()    # the original has one behind the second layer of its MLP
    return _with_weights(model, weights, mean=(0., 0., 0.), std=(1., 1., 1.))


def galileo(weights):
    "Returns Galileo-Nano on RGB, 96 px, patches of 8; its images enter as 0.5 + 0.25 (x - mean) / std."
    model = VisionTransformer(
        img_size=96, patch_size=8, embed_dim=128, depth=4, num_heads=8, mlp_ratio=4, class_token=False,
        global_pool="avg", fc_norm=False, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    mean, std = IMAGENET
    return _with_weights(model, weights, mean=(mean - 2 * std).tolist(), std=(4 * std).tolist())


def _with_weights(model, file, **stats):
    load_strictly(model, read_checkpoint(file))
    return load_encoder(model, **stats)


class Water(SegmentationData):
    "Crops of Sentinel-2 scenes, 96 px at 10 m, of which 10 to 90 % are water; `groups` has their scene."
    classes, native_size = ["land", "water"], 96

    def __init__(self, folder, scenes=None, name="water"):
        self.name = name
        tiles = sorted(Path(folder, "images").glob("*.jpg"), key=_place)
        self.crops, self.groups = [], []
        for tile in tiles:
            if scenes is None or _place(tile)[0] in scenes: self._add(tile)

    def _add(self, tile):
        image, mask = read_image(tile), read_mask(tile.parent.parent / "masks" / f"{tile.stem}.png")
        for top in STARTS:
            for left in STARTS:
                part = mask[top:top + 96, left:left + 96]
                if not .1 <= (part == 1).float().mean() <= .9: continue
                self.crops.append((image[:, top:top + 96, left:left + 96].clone(), part.clone()))
                self.groups.append(_place(tile)[0])

    def __len__(self): return len(self.crops)
    def load(self, i): return self.crops[i]
    def label(self, i): return f"crop {i} of scene {self.groups[i]}"


def _place(tile):
    "Scene, column and row of a tile's file."
    return tuple(map(int, re.fullmatch(r"esw_tif(\d+)_x(\d+)_y(\d+)", tile.stem).groups()))


@dataclass
class Case:
    "An encoder, and the images of its part of the study."
    encoder: object
    learn: object     # images that removers learn from; their masks are never looked at
    pick: object      # a split whose labels the rule may look at
    report: object    # another, on which its answer is reported
    size: int         # pixels
    k: tuple = None   # numbers of clusters; None: the protocol's
    whole: object = None    # both splits together, where each is small

    def first(self, n):
        "Returns the case with the first `n` images of each split."
        splits = {name: getattr(self, name) for name in ("learn", "pick", "report", "whole")}
        return replace(self, **{name: split and split.first(n) for name, split in splits.items()})


def open_case(name, root=SHARED, weights=None):
    "Returns the case of a name in `CASES`; `weights` is the file of `mae`."
    torch.manual_seed(0)    # of random weights
    case = CASES[name](Path(root), weights)
    case.encoder.name = name
    return case


def _scenes(encoder):
    return Case(encoder, Scenes("train", 600), Scenes("val", 300), Scenes("test", 300), 96)


def _without_position():
    encoder = load_encoder("tiny")
    encoder.model.pos_embed.data.zero_()    # it cannot tell where a patch is
    return encoder


def _voc(encoder, root, size):
    train, val = (VOCSegmentation(root / "data", split) for split in ("train", "val"))
    return Case(encoder, train, train, val, size)


def _water(encoder, root):
    "Every other scene learns and is looked at by the rule; the others report."
    folder = root / "data" / "s2_water"
    scenes = sorted({_place(tile)[0] for tile in (folder / "images").glob("*.jpg")})
    pick, report = (Water(folder, scenes[half::2], name) for half, name in enumerate(("water-a", "water-b")))
    return Case(encoder, pick, pick, report, 96, (10, 30, 100, 300), Water(folder))


def _deit(root):
    return load_encoder("deit_tiny_patch16_224", root / "weights/deit_tiny_patch16_224_fp16.safetensors")


def _mae_cifar(root): return mae_cifar(root / "weights/mae_cifar10_patch6_48.safetensors")
def _galileo(root): return galileo(root / "weights/galileo_nano_rgb_patch8_96.safetensors")


CASES = {
    "tiny": lambda root, weights: _scenes(load_encoder("tiny")),
    "mae": lambda root, weights: _scenes(load_encoder("tiny", weights)),
    "mae_cifar on VOC": lambda root, weights: _voc(_mae_cifar(root), root, 48),
    "galileo on VOC": lambda root, weights: _voc(_galileo(root), root, 96),
    "galileo on water": lambda root, weights: _water(_galileo(root), root),
    "deit on VOC": lambda root, weights: _voc(_deit(root), root, 224),
    "no-position": lambda root, weights: _scenes(_without_position()),
    "random": lambda root, weights: _scenes(load_encoder("tiny", pretrained=False))}
