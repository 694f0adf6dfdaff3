"""What removal of position depends on: units of channels, loud channels and tokens, rounding, images.

    python benchmarks/robustness.py                                       # tiny, about a quarter of an hour
    python benchmarks/robustness.py --cases tiny "galileo on VOC" "mae_cifar on VOC"
    python benchmarks/robustness.py --quick --out quick.json

Every encoder is run three times, on augmented images to learn from, augmented images to probe, and upright
images to cluster; all else is done to these tokens. `units` learns the directions of RASA, and the components
of the position mean, in several units of the channels. `conditions` gives the default tokens that are changed
in one way. `memory` says what a fit of ten times as many images takes more. Writes results/robustness.json
and prints Markdown.
"""
import argparse
import json
import resource
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from rasa_nb.data import SegmentationData
from rasa_nb.matching import LEOPART
from rasa_nb.measures import RidgeProbe
from rasa_nb.moments import Moments, collect_moments, inverse_scale, position_targets
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import RASA, complement, cross_covariance_basis, position_evidence
from rasa_nb.reading import Evaluation, Reading, Transformed
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster_tokens
from rasa_nb.store import atomic

from cases import CASES, SHARED, open_case

results = Path(__file__).resolve().parent / "results" / "robustness.json"


@dataclass
class Tokens:
    "Tokens of an encoder, float32 [n, gh, gw, D]."
    learn: torch.Tensor     # augmented, to fit on
    probe: torch.Tensor     # of the images that are scored, augmented
    score: torch.Tensor     # of the same, upright
    masks: torch.Tensor
    classes: list

    def changed(self, change):
        return Tokens(*map(change, (self.learn, self.probe, self.score)), self.masks, self.classes)


def read(name, args):
    case = open_case(name, args.shared)
    learn, score = case.learn.first(1000), case.pick.first(args.score)
    if name == "tiny": learn = Scenes("train", 1000)    # drawn, so there are as many as one likes
    def augmented(data, seed): return Reading(case.size, augment="published", seed=seed).apply(data)
    def encoded(data): return torch.cat([z for z, _ in case.encoder.encode(data)])
    upright = Transformed(score, Evaluation(case.size, args.protocol.mask_size))
    tokens, masks = (torch.cat(parts) for parts in zip(*case.encoder.encode(upright)))
    return Tokens(encoded(augmented(learn, 0)), encoded(augmented(score, 1)), tokens, masks, score.classes)


# Units of channels: tokens are multiplied by a matrix, position is found there, and the result is mapped back
def standardized(moments): return torch.diag(inverse_scale(moments.scale))


def within_cells(moments):
    "By the standard deviation of a channel within a cell, which position does not add to."
    between = (moments.cell_mean - moments.mean).square().mean((0, 1))
    return torch.diag(inverse_scale((moments.cov.diagonal() - between).clamp_min(0).sqrt()))


def whitened(shrinkage):
    "By the inverse root of the correlations, to whose eigenvalues `shrinkage` is added."
    def matrix(moments):
        unit = standardized(moments)
        values, vectors = torch.linalg.eigh(unit @ moments.cov @ unit)
        return vectors * (values.clamp_min(0) + shrinkage).rsqrt() @ vectors.T @ unit
    return matrix


def raw(moments): return torch.eye(moments.embed_dim, dtype=torch.float64)


UNITS = {"standard deviation": standardized, "raw": raw, "standard deviation within a cell": within_cells,
         "whitened, shrinkage 1": whitened(1.), "whitened, shrinkage 0.1": whitened(.1),
         "whitened, shrinkage 0.01": whitened(.01)}


def rasa_in(moments, matrix):
    "The projector, and the number of directions, found by evidence behind a matrix."
    sums, every_cell = moments.mapped(matrix), position_targets(moments.grid_size, "grid")
    ones = torch.ones(moments.embed_dim, dtype=torch.float64)
    rank = position_evidence(sums, every_cell, scale=ones).rank
    basis = cross_covariance_basis(sums, every_cell, ones)[:, :rank]
    projector = torch.linalg.inv(matrix) @ complement(basis) @ matrix
    return lambda z: z @ projector.T.float(), rank


def mean_in(moments, matrix):
    "The position mean, and the number of its components, found by evidence behind a matrix."
    sums, every_cell = moments.mapped(matrix), position_targets(moments.grid_size, "grid")
    rank = position_evidence(sums, every_cell, scale=torch.ones(moments.embed_dim, dtype=torch.float64)).rank
    u, s, v = torch.linalg.svd((sums.cell_mean - sums.mean).flatten(0, 1), full_matrices=False)
    offset = (u[:, :rank] * s[:rank] @ v[:rank]) @ torch.linalg.inv(matrix).T
    offset = offset.view(*moments.grid_size, -1).float()
    return lambda z: z - offset, rank


METHODS = {"RASA": rasa_in, "position mean": mean_in}


# Measuring
def row_of(tokens, apply, rank, args, **first):
    "Position left and scores behind a map of tokens."
    left = RidgeProbe(tokens.probe.shape[1:3], tokens.probe.shape[3]).update(apply(tokens.probe)).score()
    scored = {"": apply(tokens.score)}
    seeds = range(args.seeds)
    frame = overcluster_tokens(scored, tokens.masks, tokens.classes, args.k, args.protocol, seeds).frame
    row = first | {"directions": rank, "R² left": sum(left) / 2}
    for column, name in (("miou", "mIoU"), ("held_out", "held out")):
        if column in frame: row |= {name: frame[column].mean(), f"{name} std": frame[column].std(ddof=0)}
    print(row, file=sys.stderr, flush=True)
    return row


def loud(factor, channel=7):
    def change(z):
        z = z.clone()
        z[..., channel] *= factor
        return z
    return change


def units(tokens, args):
    "A row for each loudness of one channel, method and unit; the losers with one loudness only."
    rows = [row_of(tokens, lambda z: z, 0, args, loudness=1, method="none", unit="")]
    for factor in (1, 100, 300):
        changed = tokens.changed(loud(factor))
        moments = Moments.of(changed.learn[:args.learn])
        for method, learn in METHODS.items():
            for unit, matrix in UNITS.items():
                lesser = unit not in ("raw", "standard deviation")
                if lesser and (factor == 300 or method == "position mean"): continue
                fitted = learn(moments, matrix(moments))
                rows.append(row_of(changed, *fitted, args, loudness=factor, method=method, unit=unit))
    return rows


def some_louder(z):
    "One token in twenty at ten times its size."
    chosen = torch.rand(z.shape[:3], generator=torch.Generator().manual_seed(0)) < .05
    return torch.where(chosen[..., None], 10 * z, z)


CONDITIONS = {"as it is": lambda z: z, "one channel x100": loud(100), "one channel x1000": loud(1000),
              "5 % of tokens x10": some_louder, "bf16": lambda z: z.bfloat16().float()}


def conditions(tokens, args):
    "A row for the default, and one without, under each condition, and for fewer images and more."
    rows = []
    for name, change in CONDITIONS.items():
        changed = tokens.changed(change)
        rows += [row_of(changed, lambda z: z, 0, args, condition=name, method="none"),
                 default(changed, args.learn, args, name)]
    for images in (50, 200, 1000):
        if images <= len(tokens.learn): rows.append(default(tokens, images, args, f"{images} images to fit"))
    return rows


def default(tokens, images, args, condition):
    moments = Moments.of(tokens.learn[:images], apart=True)
    rasa = RASA().fit_moments(moments)
    said = dict(condition=condition, method="RASA", images=moments.count, left=rasa.left_)
    return row_of(tokens, rasa.transform, rasa.basis_.shape[1], args, **said)


PARTS = dict(units=units, conditions=conditions)


# Memory
class Noise(SegmentationData):
    "Images that cost nothing."
    name, classes, ignore_index = "noise", ["one"], 255
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def load(self, i): return torch.full((3, 32, 32), i % 256, dtype=torch.uint8), torch.zeros(32, 32)
    def describe(self): return dict(name=self.name, images=self.n)


def memory(args):
    "Peak memory of this process after a fit of a tenth of the images, and what the fit of all adds, in MB."
    stored = torch.randn(64, 4, 4, 384)
    def tokens(model, images): return stored[:len(images)]
    encoder = PatchEncoder(torch.nn.Identity(), tokens, 384, 8, 32, name="free")
    def peak(images):
        collect_moments(encoder, Noise(images), Reading(32, augment="turns"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    few = peak(args.memory_images // 10)
    return dict(images=args.memory_images, few_mb=few, more_mb=peak(args.memory_images) - few)


def markdown(record):
    parts = []
    for name, case in record["cases"].items():
        made = "{learn} images to learn from, {score} to score, K={k}, {seeds} seeds".format(**case)
        for part in [p for p in PARTS if p in case]:
            table = pd.DataFrame(case[part])
            shown = [c for c in table if not c.endswith(" std")]
            parts += [f"{name}, {part}: {made}", table[shown].round(2).to_markdown(index=False)]
    if "memory" in record: parts.append(f"memory: {record['memory']}")
    return "\n\n".join(parts)


def options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["tiny"])
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data and weights")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--learn", type=int, default=600, help="images to fit on, where no number is said")
    parser.add_argument("--score", type=int, default=300, help="images to score, at most")
    parser.add_argument("--k", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="K-means seeds, one start each")
    parser.add_argument("--memory-images", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="few images, 24 clusters, one seed")
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    if args.quick: args.learn, args.score, args.k, args.seeds, args.memory_images = 100, 40, 24, 1, 500
    args.protocol = LEOPART.replace(n_init=1, max_iter=30)
    return args


def main(args):
    record = dict(torch=torch.__version__, memory=memory(args), cases={})
    if args.out.exists(): record["cases"] = json.loads(args.out.read_text())["cases"]
    for name in args.cases:
        tokens = read(name, args)
        case = record["cases"].setdefault(name, {})
        learn = min(args.learn, len(tokens.learn))
        case |= dict(learn=learn, score=len(tokens.score), k=args.k, seeds=args.seeds)
        for part in args.parts: case[part] = PARTS[part](tokens, args)
        with atomic(args.out) as part: part.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(options())
