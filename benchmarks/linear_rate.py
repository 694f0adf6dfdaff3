"""Learning rate and steps of `STORED_LINEAR`, chosen on images that no study scores.

    python benchmarks/linear_rate.py [--shared ../shared] [--out benchmarks/results/linear_rate.json]

Half of the images that studies learn from are learned from here, the other half is scored: scenes of the split
train by `tiny`, Pascal VOC's train by DeiT-Tiny; the untouched encoders, one training each. Prints Markdown.
"""
import argparse
import json
from pathlib import Path

import pandas as pd

from rasa_nb.data import Part, VOCSegmentation
from rasa_nb.encoders import load_encoder
from rasa_nb.linear import STORED_LINEAR, linear_segmentation
from rasa_nb.scenes import Scenes
from rasa_nb.dense import TokenShelf
from rasa_nb.store import atomic

from cases import SHARED

here = Path(__file__).resolve().parent
RATES, STEPS = (.001, .003, .01, .03), (300, 500, 1000)


def rows_of(case, encoder, data, size):
    "A row for each rate and number of steps."
    middle, shelf = len(data) // 2, TokenShelf()
    learn, score = Part(data, range(middle)), Part(data, range(middle, len(data)))
    for lr in RATES:
        for steps in STEPS:
            protocol = STORED_LINEAR.replace(lr=lr, steps=steps, ridge=None, unseen="score", seeds=(0,))
            found = linear_segmentation(encoder, learn, score, protocol, size, shelf=shelf, examples=())
            row = dict(case=case, images=middle, lr=lr, steps=steps, miou=float(found.frame.miou.mean()))
            print(row, flush=True)
            yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    parser.add_argument("--out", type=Path, default=here / "results" / "linear_rate.json")
    args = parser.parse_args()
    deit = load_encoder("deit_tiny_patch16_224", args.shared / "weights/deit_tiny_patch16_224_fp16.safetensors")
    voc = VOCSegmentation(args.shared / "data", "train")
    rows = [*rows_of("tiny, scenes-train", load_encoder("tiny"), Scenes("train", 400), 96),
            *rows_of("DeiT-Tiny, voc-train", deit, voc, 224)]
    with atomic(args.out) as part: part.write_text(json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).pivot_table("miou", ["case", "lr"], "steps", sort=False)
    print(table.round(1).to_markdown())


if __name__ == "__main__": main()
