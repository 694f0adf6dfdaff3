"""Which images to learn from: heads of photographs, of procedural scenes and of satellite crops, on four encoders.

    python benchmarks/learning.py
    python benchmarks/learning.py --cases tiny --images 60 --k 24 --seeds 2 --folder quick --out quick.json

Each encoder is scored on its own domain, without a head and with three: fitted on 200 photographs of VOC train,
200 Scenes, and 200 crops of Sentinel-2 scenes that are not scored. Fills results/learning.json case by case and
goes on where it was stopped: finished K-means runs are kept in --folder. Weights and images lie beside the
project, as cases.py says.
"""
import argparse
import json
from pathlib import Path

import torch

from rasa_nb.data import Part, VOCSegmentation
from rasa_nb.matching import LEOPART
from rasa_nb.measures import position_r2
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
from rasa_nb.store import atomic

from cases import SHARED, Water, _place, open_case

here = Path(__file__).resolve().parent
OWN = {"tiny": "Scenes", "deit on VOC": "photographs", "mae_cifar on VOC": "photographs",
       "galileo on water": "satellite"}    # case -> which images are of its domain


def spread(data, n):
    "The data's items, or `n` of them, evenly over its order."
    if len(data) <= n: return data
    return Part(data, [len(data) * i // n for i in range(n)])


def sources(root, n):
    "Name -> `n` images to learn from, or as many as there are."
    tiles = root / "data" / "s2_water"
    scenes = sorted({_place(tile)[0] for tile in (tiles / "images").glob("*.jpg")})
    every = {"photographs": VOCSegmentation(root / "data", "train"), "Scenes": Scenes("train", n),
             "satellite": Water(tiles, scenes[::2], "water-a")}    # the others are scored
    return {name: spread(data, n) for name, data in every.items()}


def run_case(name, args):
    "What is recorded of a case."
    case, own = open_case(name, args.shared), OWN[name]
    score, reading = spread(case.report, args.images), Reading(case.size)
    learned = sources(args.shared, args.images)
    fitted = {source: RASA().fit(case.encoder, data, reading) for source, data in learned.items()}
    encoders = {source: rasa.attach(case.encoder, source) for source, rasa in fitted.items()}

    def scored(first):
        "The result in which changes are against the encoder of this name; K-means runs are found again."
        every = {"none": case.encoder} | encoders
        ordered = {first: every[first]} | every
        protocol = LEOPART.replace(n_init=1)
        return overcluster(ordered, score, args.k, protocol, range(args.seeds), reading, args.folder, examples=())

    against = {first: scored(first) for first in ("none", own)}
    result = against["none"]
    left = position_r2({"none": case.encoder} | encoders, score, reading)
    return dict(
        own=own, size=case.size, scored=score.about(), learned={s: data.about() for s, data in learned.items()},
        rank={source: rasa.basis_.shape[1] for source, rasa in fitted.items()}, r2=left.mean,
        scores=rows(result.frame, "encoder k seed miou held_out"),
        controls=rows(result.controls, "control k miou held_out"), caption=result.caption,
        change={first: result.change.to_dict("records") for first, result in against.items()})


def rows(frame, columns): return frame[columns.split()].to_dict("records")


def rounded(value):
    "Numbers to five digits behind the point."
    if isinstance(value, dict): return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=OWN, default=list(OWN), metavar="CASE", help=", ".join(OWN))
    add("--images", type=int, default=200, help="to learn from, of each kind; and to score")
    add("--k", type=int, nargs="+", default=[100, 300], help="numbers of clusters")
    add("--seeds", type=int, default=5, help="of K-means")
    add("--shared", type=Path, default=SHARED, help="where weights and images lie")
    add("--folder", type=Path, default=here / "runs" / "learning", help="where finished K-means runs are kept")
    add("--out", type=Path, default=here / "results" / "learning.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.cases:
        if name in record: continue
        record[name] = rounded(run_case(name, args))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(args.out) as part: part.write_text(json.dumps(record))
        print(f"{name}: done", flush=True)


if __name__ == "__main__": main()
