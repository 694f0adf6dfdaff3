"""Does it matter which program augments? torchvision with hue in HSV, against ours in batches.

    python benchmarks/augmentation.py [--shared ../shared] [--out benchmarks/results/augmentation.json]

Both draw the same distribution of crops, turns, colors and blurs; only hue is turned in another color space.
Three fits of `RASA()` with each, on 300 scenes (tiny) and 120 VOC photographs (DeiT-Tiny): rank, R² left on
images augmented by the same program, and mIoU of clusters by both ways of naming. Prints Markdown.
"""
import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from rasa_nb.augment import Transformed, augmentation
from rasa_nb.data import VOCSegmentation
from rasa_nb.encoders import load_encoder
from rasa_nb.head import moments_after
from rasa_nb.matching import LEOPART
from rasa_nb.moments import Moments, position_targets, ridge_r2
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading, batches
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
from rasa_nb.store import atomic

from torchvision.transforms import v2    # behind rasa_nb, which mends torchvision where it does not fit torch

from cases import SHARED

here = Path(__file__).resolve().parent


def by_torchvision(size):
    "The published augmentation with torchvision's own operations, one image at a time."
    def turn(image): return torch.rot90(image, int(torch.randint(4, ())), (-2, -1))
    crop = v2.RandomResizedCrop([size, size], scale=(.25, 1), antialias=True)
    jitter = v2.RandomApply([v2.ColorJitter(.4, .4, .2, .1)], p=.8)
    blur = v2.RandomApply([v2.GaussianBlur(9, sigma=(.1, 2.))], p=.5)
    flips = v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()
    to_float = v2.ToDtype(torch.float32, scale=True)
    steps = v2.Compose([turn, crop, *flips, jitter, v2.RandomGrayscale(p=.2), blur, to_float])
    return lambda image, mask: (steps(image), None)


PROGRAMS = dict(torchvision=by_torchvision, batched=augmentation)


def moments_of(encoder, data, transform, seed):
    moments = None
    for images, _ in batches(Transformed(data, transform, seed), Reading(num_workers=0)):
        tokens = encoder(images)
        if moments is None: moments = Moments(tokens.shape[1:3], tokens.shape[3])
        moments.update(tokens)
    return moments


def fitted(encoder, train, val, size, program, seed):
    "A debiased encoder; its rank, and R² before and after."
    transform = PROGRAMS[program](size)
    learned = moments_of(encoder, train, transform, seed)
    probed = moments_of(encoder, val, transform, seed + 100)
    rasa = RASA(random_state=seed).fit_moments(learned)
    debiased = rasa.attach(encoder, program)
    targets = position_targets(learned.grid_size, "coords")
    after = [moments_after(of, debiased.head, of.grid_size) for of in (learned, probed)]
    left = dict(before=float(ridge_r2(learned, probed, targets).mean()),
                after=float(ridge_r2(*after, targets).mean()))
    return debiased, dict(rank=len(rasa.basis_.T), **left)


def rows_of(case, encoder, train, val, size, k):
    "A row for each program and seed."
    rows = []
    for seed in range(3):
        both = {program: fitted(encoder, train, val, size, program, seed) for program in PROGRAMS}
        encoders = {program: debiased for program, (debiased, _) in both.items()}
        protocol = LEOPART.replace(n_init=1, image_size=size)
        scores = overcluster(encoders, val, k, protocol, (seed,)).frame.set_index("encoder")
        for program, (_, found) in both.items():
            score = scores.loc[program, ["miou", "held_out"]].to_dict()
            rows.append(dict(case=case, program=program, seed=seed, k=k, **found, **score))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    parser.add_argument("--out", type=Path, default=here / "results" / "augmentation.json")
    args = parser.parse_args()
    voc = args.shared / "data"
    weights = args.shared / "weights/deit_tiny_patch16_224_fp16.safetensors"
    train, val = VOCSegmentation(voc, "train").first(120), VOCSegmentation(voc, "val").first(100)
    rows = rows_of("tiny", load_encoder("tiny"), Scenes("train", 300), Scenes("val", 100), 96, 100)
    deit = load_encoder("deit_tiny_patch16_224", weights)
    rows += rows_of("DeiT-Tiny, VOC", deit, train, val, 224, 100)
    with atomic(args.out) as part: part.write_text(json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).groupby(["case", "program"], sort=False)
    found = table[["rank", "before", "after", "miou", "held_out"]].agg(["mean", "std"])
    found.columns = [" ".join(names) for names in found.columns]
    print(found.round(3).to_markdown())


if __name__ == "__main__": main()
