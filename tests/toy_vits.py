"""Small ViTs of timm and transformers with random weights: three blocks of 48 channels."""
import re

import torch

from rasa_nb.encoders import create_vit

SMALL = dict(depth=3, embed_dim=48, num_heads=3)                                        # of timm
SMALL_HF = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192)


def randomize(model, seed=0):
    "Every weight random, so that zero biases and tiny layer scales hide nothing."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1 if re.search(r"norm\w*\.weight$|gamma|lambda", name) else 0
            p.copy_(torch.randn(p.shape, generator=g) * .1 + around)
    return model.eval()


def of_timm(name, **kwargs): return randomize(create_vit(name, **SMALL, **kwargs))


def of_transformers(kind, **kwargs):
    import transformers
    model, config = getattr(transformers, kind + "Model"), getattr(transformers, kind + "Config")
    registers = dict(num_register_tokens=4) if kind == "DINOv3ViT" else {}
    options = SMALL_HF | dict(image_size=64, patch_size=16) | registers | kwargs
    return randomize(model(config(**options)))


def assert_close(a, b, tolerance):
    assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)}"
    assert (a - b).abs().max() <= tolerance, f"{(a - b).abs().max():.2g} apart"
