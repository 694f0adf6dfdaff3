"""Three ways on from RASA, on tiny: is there more to take, and is a projection too blunt?

    python benchmarks/beyond.py [--out benchmarks/results/beyond.json]

Even scale: each channel divided by its standard deviation in the cell, relative to that over all cells.
Second moments: the eight directions go along which the covariance within a cell differs most between cells,
found on two halves of the images. Shrinkage: with S the covariance of the position means,
(I - S Cov(z)^-1) z, the best linear guess of a token without its position.
"""
import argparse
import json
from pathlib import Path

import torch

from rasa_nb.encoders import load_encoder
from rasa_nb.matching import LEOPART
from rasa_nb.measures import position_r2
from rasa_nb.moments import collect_moments
from rasa_nb.patch_encoder import WrappedEncoder
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
from rasa_nb.store import collect_tokens

here = Path(__file__).resolve().parent


class Through(WrappedEncoder):
    "An encoder whose tokens go through a function."
    def __init__(self, base, change, name):
        super().__init__(base, name)
        self.change = change

    def forward(self, images): return self.change(self.base(images))


def second_moments(tokens):
    "How the second moment of each cell differs from their mean, [cells, D, D]."
    each = torch.einsum("nijd,nije->ijde", tokens, tokens).flatten(0, 1) / len(tokens)
    return each - each.mean(0)


def ways(tiny, scenes):
    "Name -> encoder."
    moments = collect_moments(tiny, scenes)
    debiased = RASA().fit_moments(moments).attach(tiny, "RASA")
    z = collect_tokens(debiased, Reading(96, "published", seed=0).apply(scenes))
    center = z.mean((0, 1, 2))
    even = (z.var((0, 1, 2)) / z.var(0).clamp_min(1e-8)).sqrt()
    first, second = (second_moments(half) for half in (z - z.mean(0)).split(len(z) // 2))
    differ = torch.einsum("pde,pef->df", first, second)
    varying = torch.linalg.eigh(differ + differ.T)[1][:, -8:]
    cells = (moments.cell_mean - moments.mean).flatten(0, 1)
    eye = torch.eye(tiny.embed_dim, dtype=torch.float64)
    stable = moments.cov + 1e-3 * moments.cov.diagonal().mean() * eye
    shrink = (eye - cells.T @ cells / len(cells) @ torch.linalg.inv(stable)).float()
    through = {
        "RASA, even scale": (debiased, lambda z: (z - center) * even + center),
        "RASA, second moments": (debiased, lambda z: z - z @ varying @ varying.T),
        "shrinkage": (tiny, lambda z: z @ shrink.T)}
    further = {name: Through(base, change, name) for name, (base, change) in through.items()}
    return {"none": tiny, "RASA": debiased} | further


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--out", type=Path, default=here / "results" / "beyond.json")
    args = parser.parse_args()
    tried, val = ways(load_encoder("tiny"), Scenes("train", 200)), Scenes("val", 200)
    probed = {probe: position_r2(tried, val, probe=probe).mean for probe in ("ridge", "mlp")}
    result = overcluster(tried, val, 100, LEOPART.replace(n_init=1, max_iter=30), range(3))
    rows = result.frame[["encoder", "k", "seed", "miou", "held_out"]].to_dict("records")
    args.out.write_text(json.dumps(dict(r2=probed, images=200, scores=rows)))
    print(result, probed)


if __name__ == "__main__": main()
