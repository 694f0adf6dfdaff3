"""Every way of removing position on several encoders, in one table each: position left and mIoU.

    papermill nbs/01a_tiny.ipynb out.ipynb -p objective pixels -p own_weight 0.0 -p place_weight 0.0 -p steps 1000 \
        -p batch_size 32 -p n_train 3000 -p eval_every 1000 -p n_eval 250 -p kmeans_seeds 0 -p out_dir runs/mae    # the masked autoencoder
    python benchmarks/methods.py tiny mae=runs/mae/tiny.safetensors no-position random   # NAME=FILE: weights of tiny's architecture
    python benchmarks/methods.py deit --skip "shift averaging, 10"                       # DeiT-Tiny on VOC
    python benchmarks/methods.py tiny --learn 100 --score 50 --seeds 2 --k 24 --out quick.json   # a quick look

Scenes are scored on the split "test": "val" was looked at while the rule of the chapter on baselines took its form (so were images
of VOC, of which there are no others here). Writes
benchmarks/results/methods.json after each encoder and goes on where it was stopped; prints Markdown, and the default method by
that rule.
"""
import argparse, json, os
from pathlib import Path

import torch

from rasa_nb.baselines import Comparison, choose_default, compare_methods, roster
from rasa_nb.data import Scenes, VOCSegmentation
from rasa_nb.encoders import load_encoder
from rasa_nb.segmentation import LEOPART

here = Path(__file__).resolve().parent
shared = here.parent.parent / "shared"   # real weights and data lie beside the project


def open_encoder(spec, args):
    "The encoder of a name, what it learns from and what it is scored on, and the image size."
    name, _, file = spec.partition("=")
    if name == "deit":
        encoder = load_encoder("deit_tiny_patch16_224", file or shared / "weights" / "deit_tiny_patch16_224_fp16.safetensors")
        data, size = [VOCSegmentation(args.voc, split) for split in ("train", "val")], 448
    else:
        torch.manual_seed(0)   # of random weights
        encoder = load_encoder("tiny", file or None, pretrained=name != "random")
        if name == "no-position": encoder.model.pos_embed.data.zero_()   # a ViT without position embedding cannot tell where a patch is
        data, size = [Scenes("train"), Scenes("test")], 96
    encoder.name = name
    learn, score = (d.first(n) if n else d for d, n in zip(data, (args.learn, args.score)))
    return encoder, learn, score, size


def run(spec, args):
    encoder, learn, score, size = open_encoder(spec, args)
    removers = {n: r for n, r in roster().items() if (not args.methods or n in args.methods) and n not in args.skip}
    return compare_methods(encoder, learn, score, removers, args.k, range(args.seeds), size, args.probes, LEOPART.replace(n_init=args.n_init, max_iter=args.max_iter), args.batch_size, args.num_workers, progress=True)


def save(path, done):
    part = path.with_suffix(".part")
    part.write_text(json.dumps({name: c.to_dict() for name, c in done.items()}, indent=1))
    os.replace(part, path)


def load(path):
    if not path.exists(): return {}
    return {name: Comparison.from_dict(c) for name, c in json.loads(path.read_text()).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="tiny, random, no-position (tiny without its position embedding), deit, or NAME=FILE")
    parser.add_argument("--learn", type=int, help="the first so many images to learn from; all by default")
    parser.add_argument("--score", type=int, help="the first so many images to score; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n_init", type=int, default=1, help="K-means starts of each seed; the protocol has five, one is a fifth of the time")
    parser.add_argument("--max_iter", type=int, default=30, help="K-means rounds; the protocol has 100, of which the last 70 move little")
    parser.add_argument("--k", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", help="names of the roster; all by default")
    parser.add_argument("--skip", nargs="+", default=[], help="names of the roster to leave out, e.g. 'shift averaging, 10', which takes ten passes at every use")
    parser.add_argument("--probes", nargs="+", default=["ridge", "mlp"])
    parser.add_argument("--voc", default=shared / "data", help="folder that holds VOCdevkit")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=here / "results" / "methods.json")
    args = parser.parse_args()
    unknown = {*(args.methods or ()), *args.skip} - set(roster())
    if unknown: parser.error(f"unknown methods {sorted(unknown)}; known: {list(roster())}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = load(args.out)
    for spec in args.encoders:
        name = spec.partition("=")[0]
        if name not in done: done[name] = run(spec, args); save(args.out, done)
        print(f"\n{done[name].to_markdown()}\n", flush=True)
    choice = choose_default(list(done.values()))
    print(f"Default by the rule: {choice.method or 'none'}. {choice.reason}.\n\n{choice.table.to_string()}")
