"""What several test files share: real data and weights, where they lie beside the project."""
from pathlib import Path

import pytest
import torch

shared = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def voc_root():
    if not (shared / "data" / "VOCdevkit" / "VOC2012").is_dir(): pytest.skip(f"no Pascal VOC at {shared / 'data'}")
    return shared / "data"


@pytest.fixture(scope="session")
def deit_file():
    path = shared / "weights" / "deit_tiny_patch16_224_fp16.safetensors"
    if not path.exists(): pytest.skip(f"no DeiT-Tiny weights at {path}")
    return path


@pytest.fixture(scope="session")
def tiny():
    from rasa_nb.encoders import load_encoder
    return load_encoder("tiny", device="cpu")


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)
