"""Position, scores and tokens at larger images, before and after gram anchoring, beside plain controls.

    python benchmarks/resolution.py                                   # minutes on a GPU, hours on a CPU
    python benchmarks/resolution.py --cases "mae_cifar on VOC" --images 24 --steps 10 --folder quick \\
        --out quick.json

Fills results/resolution.json part by part and goes on where it was stopped: trainings and finished sizes are
kept in --folder. The parts of a case:

    heads    the encoder as it is, with heads fitted at the base size, at each size, and at all sizes
    anchor   the encoder and what is set against it, without a head and with the head of each size:
             "gram": gram anchoring; "gram, debiased": the same, the teacher without position;
             "match": as many steps on the plain distance of tokens, without the Gram term;
             "resampled": nothing trained, the position embedding resampled in another way, the one of four
             whose similarities are nearest to those of tiles, on images whose labels nobody looks at;
             "tiled": nothing trained, overlapping windows of the base size
    anchor, seed 1; anchor, seed 2    "gram" and "match" once more, from other adapters and crops
    cost     seconds and floating-point operations of a training step of ViT-S/16 and ViT-B/16, random weights

It runs on a GPU where there is one. Prints Markdown. Real weights and data lie beside the project, see cases.py.
"""
import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from rasa_nb.anchoring import ANCHORING, GramAnchor, Training
from rasa_nb.data import Part, SegmentationData, VOCSegmentation, read_image, read_mask
from rasa_nb.encoders import load_encoder
from rasa_nb.linear import STORED_LINEAR
from rasa_nb.matching import LEOPART
from rasa_nb.patch_encoder import ViTEncoder, timm_parts
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading, usable_cores
from rasa_nb.resolution import RESOLUTION, ResolutionCurve, Tiled, gram_loss, resolution_curve
from rasa_nb.retrieval import UPRIGHT
from rasa_nb.scenes import Scenes

from timm.layers import Format    # behind rasa_nb, which mends torchvision where it does not fit torch

from cases import SHARED, _deit, _galileo, _mae_cifar, _place
from methods import load, save

here = Path(__file__).resolve().parent
WAYS = "bicubic", "antialias", "offset", "corners"


class WaterAt(SegmentationData):
    "Crops of Sentinel-2 scenes at 10 m, of any size, evenly over each tile; `groups` has their scene."
    classes = ["land", "water"]

    def __init__(self, folder, half, n, size):
        self.name, self.native_size, self.crops, self.groups = f"water-{'ab'[half]}", size, [], []
        tiles = sorted(Path(folder, "images").glob("*.jpg"), key=_place)
        scenes = sorted({_place(tile)[0] for tile in tiles})[half::2]
        places = []
        for tile in [tile for tile in tiles if _place(tile)[0] in scenes]:
            mask = read_mask(tile.parent.parent / "masks" / f"{tile.stem}.png")
            for top in (0, (512 - size) // 2, 512 - size):
                for left in (0, (512 - size) // 2, 512 - size):
                    share = (mask[top:top + size, left:left + size] == 1).float().mean()
                    if .1 <= share <= .9: places.append((tile, mask, top, left))
        for tile, mask, top, left in places[::max(1, len(places) // n)][:n]:
            rows, columns = slice(top, top + size), slice(left, left + size)
            self.crops.append((read_image(tile)[:, rows, columns].clone(), mask[rows, columns].clone()))
            self.groups.append(_place(tile)[0])

    def __len__(self): return len(self.crops)
    def load(self, i): return self.crops[i]


class Held(SegmentationData):
    "A dataset, read once and held in memory."
    def __init__(self, data):
        self.name, self.classes, self.ignore_index = data.name, data.classes, data.ignore_index
        self.groups, self.native_size = data.groups, data.native_size
        items = DataLoader(data, batch_size=None, num_workers=usable_cores())
        self.items = [(image.clone(), mask.clone()) for image, mask in items]

    def __len__(self): return len(self.items)
    def load(self, i): return self.items[i]


@cache
def drawn_scenes(split, n, size): return Held(Scenes(split, n, size=size))


@dataclass
class Case:
    "An encoder, images for each size, and how far its training goes."
    encoder: object
    learn: object       # a dataset, or a function of the size
    score: object
    base: int           # pixels
    sizes: tuple        # beyond it
    train: object       # images of the training at all sizes beyond the base
    steps: int
    teacher: str = "own size"    # or "tiled", for images whose texture is of one scale
    lr: float = 1e-3


def any_size(encoder):
    "The encoder, whose model of timm was made for one size, open to others."
    model, embed = encoder.model, encoder.model.patch_embed
    model.dynamic_img_size, embed.strict_img_size = True, False
    embed.flatten, embed.output_fmt = False, Format.NHWC
    return encoder


def even(data, n): return Part(data, range(0, len(data), max(1, len(data) // n))[:n])


def scenes(root, n, steps):
    n, sizes = n or 150, (144, 192, 288)
    learn, score = partial(drawn_scenes, "train", n), partial(drawn_scenes, "val", n)
    train = drawn_scenes("train", 2 * n, size=288)
    return Case(load_encoder("tiny"), learn, score, 96, sizes, train, steps or 600, "tiled")


def voc(make, base, sizes, root, images, steps):
    train, val = (Held(VOCSegmentation(root / "data", split)) for split in ("train", "val"))
    large = [i for i in range(len(train)) if min(train.load_image(i).shape[1:]) >= max(sizes)]
    learn, score = (even(data, images or len(data)) for data in (train, val))
    return Case(any_size(make(root)), learn, score, base, sizes, Part(train, large), steps or 600)


def water(root, n, steps):
    folder, sizes = root / "data" / "s2_water", (144, 192, 288)
    learn, score = (partial(WaterAt, folder, half, n or 150) for half in (0, 1))
    train = WaterAt(folder, 0, 400, 288)
    return Case(any_size(_galileo(root)), learn, score, 96, sizes, train, steps or 600, "tiled")


CASES = {
    "tiny": scenes,
    "mae_cifar on VOC": partial(voc, _mae_cifar, 48, (72, 96, 144)),
    "galileo on water": water,
    "deit on VOC": partial(voc, _deit, 224, (336,)),
    "galileo on VOC": partial(voc, _galileo, 96, (144, 192, 288)),
    "deit on VOC, 448 px": partial(voc, _deit, 224, (336, 448))}
USUAL = list(CASES)[:5]    # the last by name: photographs that are enlarged


# What is compared


def protocol_of(heads):
    quick = dict(n_init=1, max_iter=30, points_per_centroid=100)
    clusters = LEOPART.replace(k=(30,), seeds=(0, 1, 2), **quick)
    context = UPRIGHT.replace(memory=10_240, seeds=(0, 1, 2), unseen="score")
    position_seeds = (1, 2) if len(heads) > 2 else (1,)
    tasks = dict(clusters=clusters, linear=STORED_LINEAR.replace(unseen="score"), context=context)
    return RESOLUTION.replace(heads=heads, position_seeds=position_seeds, **tasks)


def anchored(name, case, folder, anchoring, teacher, seed=0):
    "The encoder with what a training taught it; the training goes on where it was stopped."
    file, how = folder / f"{name.replace(', ', '-')}-{seed}.training", Reading(progress=True)
    return GramAnchor(anchoring, seed).fit(case.encoder, case.train, teacher, how, file).encoder_


def variants(case, folder, seed=0):
    "Name -> encoder, the one as it is first; of another seed than 0 only two that were trained."
    encoder = case.encoder
    def teacher(of): return Tiled(of, case.base) if case.teacher == "tiled" else of
    how = dict(sizes=case.sizes, steps=case.steps, batch_size=16)
    plain = ANCHORING.replace(lr=case.lr, enlarge=True, **how)
    def trained(name, change=plain, of=encoder):
        return anchored(name, case, folder, change, teacher(of), seed)
    made = dict(gram=trained("gram"), match=trained("match", plain.replace(gram=0, match=1.)))
    if seed: return {"as it is": encoder} | made
    base = case.learn(size=case.base) if callable(case.learn) else case.learn
    debiased = RASA().fit(encoder, base, case.base).attach(encoder)
    made["gram, debiased"] = trained("gram, debiased", of=debiased)
    controls = dict(resampled=resampled(case, base), tiled=Tiled(encoder, case.base))
    return {"as it is": encoder} | made | controls


def resampled(case, base):
    "The encoder with its position embedding resampled by the best of four ways, by similarities alone."
    size = max(case.sizes)
    data = case.learn(size=size) if callable(case.learn) else case.learn
    shown = Reading(size).apply(data.first(8))
    images = torch.stack([shown[i][0] for i in range(min(8, len(data)))]).to(case.encoder.device)
    target, found = Tiled(case.encoder, case.base)(images), {}
    how = dict(mean=case.encoder.mean.flatten().tolist(), std=case.encoder.std.flatten().tolist())
    for way in WAYS:
        how |= dict(resampling=way, name=f"resampled as {way}")
        other = ViTEncoder(case.encoder.model, timm_parts, **how)
        found[way] = float(gram_loss(other(images), target)), other
    return min(found.values(), key=lambda pair: pair[0])[1]


def curve(case, encoders, heads, folder):
    about = case.score, case.sizes, case.learn, case.base, RASA(), protocol_of(heads)
    return resolution_curve(encoders, *about, enlarge=True, folder=folder)


def run_heads(case, folder):
    return curve(case, {"as it is": case.encoder}, ("none", "base", "own", "all"), folder).to_dict()


def run_anchor(case, folder, seed=0):
    encoders = variants(case, folder, seed)
    told = curve(case, encoders, ("none", "own"), folder).to_dict()
    how = dict(trained=case.sizes, steps=case.steps, teacher=case.teacher)
    if not seed: how["resampled"] = encoders["resampled"].name
    return told | how


PARTS = dict(heads=run_heads, anchor=run_anchor)
PARTS |= {f"anchor, seed {seed}": partial(run_anchor, seed=seed) for seed in (1, 2)}


# What a real run would cost


def cost():
    "Operations, seconds and memory of a step at 512 px, the teacher at 768 px, in bfloat16."
    return [cost_of(name) for name in ("vit_small_patch16_dinov3_qkvb", "vit_base_patch16_dinov3_qkvb")]


def cost_of(name):
    encoder = load_encoder(name, pretrained=False)
    device, on_gpu = encoder.device, encoder.device.type == "cuda"
    n = 16 if on_gpu else 1
    anchoring = ANCHORING.replace(sizes=512, teacher_sizes=768, batch_size=n, steps=10, precision="bf16")
    training, images = Training(encoder, encoder, anchoring, 0), torch.rand(n, 3, 768, 768, device=device)
    with FlopCounterMode(display=False) as counter: training.step(images)
    seconds = [seconds_of(lambda: training.step(images), device) for _ in range(7 if on_gpu else 1)]
    row = dict(model=name, image=512, teacher=768, images=n, operations=counter.get_total_flops(),
               seconds=statistics.median(seconds), least=min(seconds), most=max(seconds),
               device=torch.cuda.get_device_name() if on_gpu else "CPU", threads=torch.get_num_threads())
    if on_gpu: row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(row, flush=True)
    return row


def seconds_of(do, device):
    start = time.perf_counter()
    do()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=USUAL, metavar="CASE", help=", ".join(CASES))
    add("--parts", nargs="+", choices=[*PARTS, "cost"], default=["heads", "anchor", "cost"])
    add("--images", type=int, help="of each split; each case has its own number by default")
    add("--steps", type=int, help="of each training; each case has its own number by default")
    add("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    add("--folder", type=Path, default=here.parent / "runs" / "resolution", help="of what is finished")
    add("--out", type=Path, default=here / "results" / "resolution.json")
    return parser.parse_args()


def main():
    args = arguments()
    record = load(args.out)
    command = shlex.join(["python", "benchmarks/resolution.py", *sys.argv[1:]])
    for part in [part for part in args.parts if part in PARTS]:
        for name in args.cases:
            of = record.setdefault("cases", {}).setdefault(name, {})
            if part in of: continue
            start, folder = time.perf_counter(), args.folder / name.replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            told = PARTS[part](CASES[name](args.shared, args.images, args.steps), folder)
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            about = dict(command=command, seconds=round(time.perf_counter() - start), device=device)
            of[part] = told | about
            save(args.out, json.loads(json.dumps(record, default=str)))
            print(f"{name}: {part} done, {of[part]['seconds']} s", flush=True)
    if "cost" in args.parts and "cost" not in record:
        record["cost"] = cost()
        save(args.out, json.loads(json.dumps(record, default=str)))
    for name, of in record.get("cases", {}).items():
        for part, told in of.items(): print(f"\n{name}, {part}\n\n{curve_of(told).to_markdown()}\n")


def curve_of(told):
    "The curve of a part of the record."
    known = ResolutionCurve.__dataclass_fields__
    return ResolutionCurve.from_dict({key: told[key] for key in known if key in told})


if __name__ == "__main__": main()
