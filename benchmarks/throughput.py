"""Where the time of a fit and of a score goes: images/s of each stage, beside what the machine can do at best.

    python benchmarks/throughput.py --voc data                      # photographs of Pascal VOC
    python benchmarks/throughput.py                                 # photographs made for this, JPEGs of 500 x 375
    python benchmarks/throughput.py --voc data --encoders free      # an encoder that costs nothing
    python benchmarks/throughput.py --quick                         # does it run?

It runs on a GPU where there is one, else on the CPU. The stages of a fit (read, augment, encode, moments) and of
a score (read, resize, encode, moments, reduce, K-means, assign) are timed one by one in this process, after a
round that is not timed, and so are a whole fit and a whole score's input, with workers as the library starts
them and with none. All are measured in turn, several times over, because a busy machine slows all alike; ratios
are taken within a turn. "free" returns stored random tokens (D=384), so that what is left is the pipeline.
Writes benchmarks/results/throughput.json and prints Markdown.
"""
import argparse, json, os, platform, statistics, sys, tempfile, time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from rasa_nb.data import ImageMaskFolder, VOCSegmentation
from rasa_nb.reading import Evaluation, Prepared, Reading, Transformed, augmentation, batches, usable_cores
from rasa_nb.reading import _collate
from rasa_nb.scenes import Scenes
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.encoders import load_encoder
from rasa_nb.store import atomic
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.kmeans import draw_points, kmeans_centers, nearest_centers, new_moments, reduce_tokens
from rasa_nb.matching import FRANCA

results = Path(__file__).resolve().parent / "results" / "throughput.json"
ENCODERS = dict(   # name -> (what `load_encoder` takes, pixels, images as a share of --images)
    free=(None, 448, 1.), tiny=("tiny", 96, 1.), deit_tiny=("deit_tiny_patch16_224", 224, 1.),
    dinov3_s=("vits", 448, .25), dinov3_b=("vitb", 448, .1))


class Free(PatchEncoder):
    "Returns stored random tokens, whatever it is shown."
    def __init__(self, size, embed_dim, batch_size, device):
        super().__init__(torch.nn.Identity(), None, embed_dim, 16, size, name="free")
        self.to(device)
        self.stored = torch.randn(batch_size, size // 16, size // 16, embed_dim, device=device)
    def forward(self, images): return self.stored[:len(images)]


def encoder_of(name, args):
    model, size, _ = ENCODERS[name]
    if name == "free": return Free(size, 384, args.batch_size, args.device), size
    return load_encoder(model, pretrained=name == "tiny", device=args.device), size


def made_photographs(folder, n):
    "A dataset of JPEGs of 500 x 375 with masks, made of enlarged scenes."
    from PIL import Image
    scenes = Scenes("train", n)
    for name in ("images", "masks"): (folder / name).mkdir()
    for i in range(n):
        image, mask = scenes[i]
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((500, 375), Image.Resampling.BICUBIC)
        large.save(folder / f"images/{i:05}.jpg", quality=90)
        classes = Image.fromarray(mask.numpy()).resize((500, 375), Image.Resampling.NEAREST)
        classes.save(folder / f"masks/{i:05}.png")
    return ImageMaskFolder(folder / "images", folder / "masks", scenes.classes)


# Timing
def settle(device):
    "Waits until a device has done what it was told."
    if device.type == "cuda": torch.cuda.synchronize()


def seconds(do, device):
    "Seconds that a function takes, and what it returned."
    settle(device)
    start = time.perf_counter()
    made = do()
    settle(device)
    return time.perf_counter() - start, made


def finished(items, transform, device):
    "Prepared images, collated, moved and finished: what `batches` does with them."
    images, _, looks = zip(*items)
    images, looks = torch.stack(images).to(device), torch.stack(looks).to(device)
    return transform.finish(images, looks)


def fit_stages(encoder, data, reading, device):
    "Seconds of each stage of a fit over the dataset, one batch at a time, everything in this process."
    shown, spent = reading.apply(data), dict.fromkeys(("read", "augment", "encode", "moments"), 0.)
    moments = None
    for part in torch.arange(len(data)).split(reading.batch_size):
        def timed(stage, do):
            took, made = seconds(do, device)
            spent[stage] += took
            return made
        kept = Kept(data, timed("read", lambda: {int(i): (data.load_image(int(i)), None) for i in part}))
        drawn = Transformed(kept, shown.transform, shown.seed)
        images = timed("augment", lambda: finished([drawn.prepared(int(i)) for i in part], drawn, device))
        tokens = timed("encode", lambda: encoder(images))
        if moments is None: moments = Moments(tokens.shape[1:3], tokens.shape[3])
        timed("moments", lambda: moments.update(tokens))
    return spent


class Kept(Transformed):
    "Items of a dataset that were read before."
    def __init__(self, data, items):
        super().__init__(data, None)
        self.items = items
    def __getitem__(self, i): return self.items[i]


def score_stages(encoder, data, reading, k, device):
    "Seconds of each stage of a score, everything in this process; K-means with one seed and restart."
    protocol = FRANCA.replace(n_init=1, image_size=reading.size)
    shown, spent, kept = Transformed(data, Evaluation(reading.size, protocol.mask_size)), {}, []
    spent["read"], items = seconds(lambda: {i: data[i] for i in range(len(data))}, device)
    drawn, moments = Transformed(Kept(data, items), shown.transform), None
    spent.update(resize=0., encode=0., moments=0.)
    for part in torch.arange(len(data)).split(reading.batch_size):
        def resized(): return finished([drawn.prepared(int(i)) for i in part], drawn, device)
        took, images = seconds(resized, device)
        spent["resize"] += took
        took, tokens = seconds(lambda: encoder(images), device)
        spent["encode"] += took
        if moments is None: moments = new_moments(tokens.shape[1:3], tokens.shape[3], protocol)
        spent["moments"] += seconds(lambda: moments.update(tokens), device)[0]
        kept.append(tokens.cpu())
    spent["reduce"], maps = seconds(lambda: reduce_tokens(torch.cat(kept), moments, protocol, (), device), device)
    size = protocol.mask_shape
    points = draw_points(maps, k * protocol.points_per_centroid, 0, size if protocol.upsample else None)
    spent["K-means"], centers = seconds(lambda: centers_of(points, k, protocol, device), device)
    assign = lambda: sum(len(m) for m in nearest_centers(maps, centers, size, protocol.upsample, device))
    spent["assign"], _ = seconds(assign, device)
    return spent


def centers_of(points, k, protocol, device):
    return kmeans_centers(points, min(k, len(points) // 2), protocol, 0, device)


# Whole passes
def reading_alone(data): return [data[i] for i in range(len(data))]


def images_alone(data): return [data.load_image(i) for i in range(len(data))]


def whole_fit(encoder, data, reading): return collect_moments(encoder, data, reading)


def score_input(encoder, data, reading, device):
    "What a score reads: upright images and masks, resized, on the device."
    shown = Transformed(data, Evaluation(reading.size, 100))
    for images, _ in batches(shown, reading, device=device): last = images
    return last


def measure(name, data, args):
    "A turn of everything with one encoder: images/s."
    encoder, size = encoder_of(name, args)
    data = data.first(max(args.batch_size, int(len(data) * ENCODERS[name][2])))
    reading, n, device = Reading(size, "published", 0, args.batch_size), len(data), args.device
    encoder(torch.rand(args.batch_size, 3, size, size, device=device))
    turns = []
    for turn in range(args.turns + 1):   # the first is not counted
        wholes = dict(
            reading=lambda: reading_alone(data), images=lambda: images_alone(data),
            fit=lambda: whole_fit(encoder, data, reading),
            fit_alone=lambda: whole_fit(encoder, data, reading.replace(num_workers=0)),
            input=lambda: score_input(encoder, data, reading, device),
            input_alone=lambda: score_input(encoder, data, reading.replace(num_workers=0), device))
        row = dict(whole={what: n / seconds(do, device)[0] for what, do in wholes.items()})
        row["fit"] = fit_stages(encoder, data, reading.replace(num_workers=0), device)
        row["score"] = score_stages(encoder, data, reading, args.k, device)
        row["encoder"] = bare_encoder(encoder, size, args)
        if turn: turns.append(row)
        print(f"{name}: turn {turn} of {args.turns}", file=sys.stderr, flush=True)
    return summary(name, size, n, turns) | dict(turns=turns)


def bare_encoder(encoder, size, args):
    "images/s of the encoder alone, on images that lie on its device."
    images = torch.rand(args.batch_size, 3, size, size, device=args.device)
    return len(images) / seconds(lambda: encoder(images), args.device)[0]


def copy_bandwidth(device, megabytes=64):
    "GB/s of copies of bytes from memory to the device (on a CPU: within memory)."
    given = torch.zeros(megabytes * 2**20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = torch.empty_like(given, device=device)
    took = [seconds(lambda: room.copy_(given), device)[0] for _ in range(5)]
    return given.nbytes / min(took) / 1e9


def spread(values):
    values = list(values)
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def summary(name, size, images, turns):
    "Medians over turns, and ratios taken within a turn."
    row = dict(encoder=name, image_size=size, images=images)
    for part in ("fit", "score"):
        shares = [{stage: took / sum(t[part].values()) for stage, took in t[part].items()} for t in turns]
        row[part] = {stage: dict(images_per_s=images / max(spread(t[part][stage] for t in turns)["median"], 1e-9),
                                 share=spread(s[stage] for s in shares)["median"]) for stage in turns[0][part]}
    row["whole"] = {what: spread(t["whole"][what] for t in turns) for what in turns[0]["whole"]}
    row["bare_encoder"] = spread(t["encoder"] for t in turns)
    over = {f"{what} over {base}": spread(t["whole"][what] / t["whole"][base] for t in turns)
            for what in ("fit", "fit_alone", "input", "input_alone") for base in ("reading", "images")}
    return row | dict(ratios=over)


def said(v): return f"{v['median']:.2f} ({v['least']:.2f} to {v['most']:.2f})"


def markdown(record):
    lines = [f"{record['device']}, {record['cores']} cores, {record['threads']} threads, torch {record['torch']}; "
             f"copies {record['copy_gb_per_s']:.1f} GB/s; {record['data']}"]
    for run in record["runs"]:
        lines.append(f"**{run['encoder']}**, {run['images']} images of {run['image_size']} px, images/s (share)")
        for part in ("fit", "score"):
            row = {stage: f"{v['images_per_s']:.0f} ({v['share']:.0%})" for stage, v in run[part].items()}
            lines.append(pd.DataFrame(row, [part]).to_markdown())
        whole = {what: said(v) for what, v in run["whole"].items()} | dict(bare_encoder=said(run["bare_encoder"]))
        lines += [pd.DataFrame(whole, ["images/s"]).to_markdown(),
                  pd.DataFrame({k: said(v) for k, v in run["ratios"].items()}, ["ratio"]).T.to_markdown()]
    return "\n\n".join(lines)


def options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--voc", help="folder that holds VOCdevkit; none: photographs are made")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--k", type=int, default=100, help="clusters of the one K-means run that is timed")
    parser.add_argument("--device", help="None: a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="a few images, two encoders, one turn")
    parser.add_argument("--out", type=Path, default=results)
    return parser.parse_args()


def main(args):
    if args.quick: args.encoders, args.images, args.batch_size, args.turns, args.k = ["free", "tiny"], 12, 6, 1, 5
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.voc: data = VOCSegmentation(args.voc, "val")
        else: data = made_photographs(Path(folder), args.images)
        data = data.first(args.images)
        record = dict(
            command=" ".join(["python benchmarks/throughput.py", *sys.argv[1:]]), device=f"{args.device.type} {device}",
            cores=usable_cores(), threads=torch.get_num_threads(), python=platform.python_version(),
            torch=torch.__version__, load=os.getloadavg()[0], data=f"{len(data)} images of {data.name}",
            copy_gb_per_s=copy_bandwidth(args.device), runs=[measure(name, data, args) for name in args.encoders])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(args.out) as part: part.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__": main(options())
