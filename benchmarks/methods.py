"""Every way of removing position on several encoders, in one table each: position left and mIoU.

    papermill nbs/studies/tiny.ipynb out.ipynb -p objective pixels -p own_weight 0.0 -p place_weight 0.0 \\
        -p steps 1000 -p batch_size 32 -p n_train 3000 -p eval_every 1000 -p n_eval 250 -p kmeans_seeds 0 \\
        -p out_dir runs/mae
    python benchmarks/methods.py tiny mae=runs/mae/tiny.safetensors no-position random
    python benchmarks/methods.py deit --skip "shift averaging, 10"
    python benchmarks/methods.py tiny --learn 100 --score 50 --seeds 2 --k 24 --out quick.json

The first command makes the masked autoencoder; NAME=FILE is weights of tiny's architecture; the last one is a
quick look. Scenes are scored on the split "test": "val" was looked at while the rule of
nbs/studies/methods.ipynb took its form (so were images of VOC, of which there are no others here). Writes
benchmarks/results/methods.json after each encoder and goes on where it was stopped; prints Markdown, and the
default method by that rule.
"""
import argparse
import json
from pathlib import Path

import torch

from rasa_nb.baselines import ShiftAverage, roster
from rasa_nb.comparison import Comparison, choose_default, compare_methods
from rasa_nb.data import VOCSegmentation
from rasa_nb.reading import Reading
from rasa_nb.encoders import load_encoder
from rasa_nb.matching import LEOPART
from rasa_nb.scenes import Scenes
from rasa_nb.store import atomic

here = Path(__file__).resolve().parent
shared = here.parent.parent / "shared"    # real weights and data lie beside the project
NAMES = [*roster(), "shift averaging, 10"]


def open_encoder(spec, args):
    "Returns the encoder of a name, what it learns from, what it is scored on, and the image size."
    name, _, file = spec.partition("=")
    if name == "deit":
        weights = file or shared / "weights" / "deit_tiny_patch16_224_fp16.safetensors"
        encoder = load_encoder("deit_tiny_patch16_224", weights)
        learn, score, size = VOCSegmentation(args.voc, "train"), VOCSegmentation(args.voc, "val"), 448
    else:
        torch.manual_seed(0)    # of random weights
        encoder = load_encoder("tiny", file or None, pretrained=name != "random")
        if name == "no-position": encoder.model.pos_embed.data.zero_()    # cannot tell where a patch is
        learn, score, size = Scenes("train"), Scenes("test"), 96
    encoder.name = name
    if args.learn: learn = learn.first(args.learn)
    if args.score: score = score.first(args.score)
    return encoder, learn, score, size


def compare(spec, args):
    "Returns the comparison of all methods that were asked for."
    encoder, learn, score, size = open_encoder(spec, args)
    every = roster() | {"shift averaging, 10": ShiftAverage(encoder, 10)}
    methods = {name: every[name] for name in args.methods or NAMES if name not in args.skip}
    reading = Reading(size, batch_size=args.batch_size, num_workers=args.num_workers, progress=True)
    protocol = LEOPART.replace(n_init=args.n_init, max_iter=args.max_iter)
    seeds = range(args.seeds)
    return compare_methods(encoder, learn, score, methods, args.k, seeds, reading, args.probes, protocol)


def save(path, done):
    text = json.dumps({name: c.to_dict() for name, c in done.items()}, indent=1)
    with atomic(path) as part: part.write_text(text)


def load(path):
    if not path.exists(): return {}
    return {name: Comparison.from_dict(c) for name, c in json.loads(path.read_text()).items()}


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("encoders", nargs="+", help="tiny, random, no-position (no position embedding), deit, NAME=FILE")
    add("--learn", type=int, help="the first so many images to learn from; all by default")
    add("--score", type=int, help="the first so many images to score; all by default")
    add("--seeds", type=int, default=5, help="of K-means")
    add("--n_init", type=int, default=1, help="K-means starts of each seed; the protocol has 5")
    add("--max_iter", type=int, default=30, help="K-means rounds; the protocol has 100")
    add("--k", type=int, nargs="+", help="numbers of clusters; the protocol's by default")
    add("--methods", nargs="+", default=[], help=f"all by default: {', '.join(NAMES)}")
    add("--skip", nargs="+", default=[], help="methods to leave out")
    add("--probes", nargs="+", default=["ridge", "mlp"])
    add("--voc", default=shared / "data", help="folder that holds VOCdevkit")
    add("--batch_size", type=int, default=32)
    add("--num_workers", type=int, default=0)
    add("--out", type=Path, default=here / "results" / "methods.json")
    args = parser.parse_args()
    unknown = {*args.methods, *args.skip} - set(NAMES)
    if unknown: parser.error(f"unknown methods {sorted(unknown)}; known: {NAMES}")
    return args


def main():
    args = arguments()
    done = load(args.out)
    for spec in args.encoders:
        name = spec.partition("=")[0]
        if name not in done:
            done[name] = compare(spec, args)
            save(args.out, done)
        print(f"\n{done[name].to_markdown()}\n", flush=True)
    choice = choose_default(list(done.values()))
    print(f"Default by the rule: {choice.method or 'none'}. {choice.reason}.\n\n{choice.table.to_string()}")


if __name__ == "__main__": main()
