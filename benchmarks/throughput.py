"""Where the time of a fit and of a score goes: images/s of each stage, beside what a machine can do at best.

    python benchmarks/throughput.py --voc data                      # photographs of Pascal VOC
    python benchmarks/throughput.py                                 # JPEGs of 500 x 375, made for this
    python benchmarks/throughput.py --voc data --encoders free      # an encoder that costs nothing
    python benchmarks/throughput.py --quick                         # does it run?

It runs on a GPU where there is one, else on the CPU. The stages of a fit (read, augment, encode, moments) and
of a score (read, resize, encode, moments, reduce, K-means, assign) are timed one by one in this process, and
so are whole passes: a fit, a fit by this process alone, the encoder alone, and with --compile the encoder
with its blocks compiled by torch. "free" returns stored tokens at no cost (random, D=384), so that what is
left is the pipeline; beside it stand reading alone (in one process, images alone or with their masks) and
what a score reads. All are measured in turn, several times over, as a busy machine slows all alike; ratios
are taken within a turn. Images are repeated where there are too few. Writes
benchmarks/results/throughput.json and prints Markdown.
"""
import argparse, copy, json, os, platform, statistics, sys, tempfile, time
from pathlib import Path

import pandas as pd
import torch

from rasa_nb.data import ImageMaskFolder, Part, VOCSegmentation
from rasa_nb.reading import Evaluation, Reading, Transformed, batches, usable_cores
from rasa_nb.scenes import Scenes
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.encoders import load_encoder
from rasa_nb.store import atomic
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.kmeans import draw_points, kmeans_centers, nearest_centers, new_moments, reduce_tokens
from rasa_nb.matching import FRANCA

results = Path(__file__).resolve().parent / "results" / "throughput.json"
ENCODERS = dict(   # name -> (what `load_encoder` takes, pixels, images on a CPU as a share of --images)
    free=(None, 448, 1.), tiny=("tiny", 96, .25), deit_tiny=("deit_tiny_patch16_224", 224, .125),
    dinov3_s=("vits", 448, .0166), dinov3_b=("vitb", 448, .0083))


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
    tokens = torch.cat(kept)
    spent["reduce"], maps = seconds(lambda: reduce_tokens(tokens, moments, protocol, (), device), device)
    size = protocol.mask_shape
    points = draw_points(maps, k * protocol.points_per_centroid, 0, size if protocol.upsample else None)
    spent["K-means"], centers = seconds(lambda: centers_of(points, k, protocol, device), device)
    def assign(): return sum(len(m) for m in nearest_centers(maps, centers, size, protocol.upsample, device))
    spent["assign"], _ = seconds(assign, device)
    return spent


def centers_of(points, k, protocol, device):
    return kmeans_centers(points, min(k, len(points) // 2), protocol, 0, device)


# Whole passes
def measure(name, data, args):
    "Every turn of everything with one encoder: images/s."
    encoder, size = encoder_of(name, args)
    share = ENCODERS[name][2] if args.device.type == "cpu" else 1.
    n = max(args.least, int(args.images * share))
    few, data = data.first(min(n, 4 * args.batch_size)), repeated(data, n)
    reading, device = Reading(size, "published", 0, min(args.batch_size, n)), args.device
    here, alone = data.first(min(n, args.alone)), reading.replace(num_workers=0)
    wholes = dict(fit=(data, lambda: collect_moments(encoder, data, reading)))
    if name == "free": wholes.update(
        reading=(here, lambda: [here[i] for i in range(len(here))]),
        images=(here, lambda: [here.load_image(i) for i in range(len(here))]),
        fit_alone=(here, lambda: collect_moments(encoder, here, alone)),
        input=(data, lambda: score_input(data, reading, device)),
        input_alone=(here, lambda: score_input(here, alone, device)))
    fit_stages(encoder, few.first(reading.batch_size), reading, device)   # warms kernels and files
    faster = copy.deepcopy(encoder).compile() if args.compile and name != "free" else None
    if faster: bare_encoder(faster, size, reading.batch_size, device)
    turns = []
    for turn in range(args.turns):
        whole = {what: len(read) / seconds(do, device)[0] for what, (read, do) in wholes.items()}
        whole["encoder"] = bare_encoder(encoder, size, reading.batch_size, device)
        if faster: whole["compiled"] = bare_encoder(faster, size, reading.batch_size, device)
        turns.append(dict(whole=whole, fit=fit_stages(encoder, few, reading, device),
                          score=score_stages(encoder, few, reading, args.k, device)))
        print(f"{name}: turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
    return summary(name, size, n, len(few), turns) | dict(turns=turns)


def repeated(data, n): return Part(data, [i % len(data) for i in range(n)])


def score_input(data, reading, device):
    "What a score reads: upright images and masks, resized, on the device."
    for batch in batches(Transformed(data, Evaluation(reading.size, 100)), reading, device=device): pass
    return batch


def bare_encoder(encoder, size, batch_size, device):
    "images/s of the encoder alone, on images that lie on its device."
    images = torch.rand(batch_size, 3, size, size, device=device)
    encoder(images[:4])    # after other work
    return batch_size / seconds(lambda: encoder(images), device)[0]


def copy_bandwidth(device, megabytes=64):
    "GB/s of copies of bytes from memory to the device (on a CPU: within memory)."
    given = torch.zeros(megabytes * 2**20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = torch.empty_like(given, device=device)
    took = [seconds(lambda: room.copy_(given), device)[0] for _ in range(5)]
    return given.nbytes / min(took) / 1e9


def spread(values):
    values = list(values)
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def summary(name, size, images, staged, turns):
    "Medians over turns, and ratios taken within a turn."
    row = dict(encoder=name, image_size=size, images=images, staged=staged)
    for part in ("fit", "score"):
        def rate(stage): return statistics.median(staged / max(t[part][stage], 1e-9) for t in turns)
        rates = {stage: rate(stage) for stage in turns[0][part]}
        shares = [{stage: took / sum(t[part].values()) for stage, took in t[part].items()} for t in turns]
        row[part] = {stage: dict(images_per_s=rates[stage], share=statistics.mean(s[stage] for s in shares))
                     for stage in rates}
    row["whole"] = {what: spread(t["whole"][what] for t in turns) for what in turns[0]["whole"]}
    passes = "fit", "fit_alone", "input", "input_alone"
    pairs = [(what, "encoder") for what in ("fit", "compiled") if what in row["whole"]]
    if name == "free": pairs = [(what, base) for what in passes for base in ("reading", "images")]
    def ratio(what, base): return spread(t["whole"][what] / t["whole"][base] for t in turns)
    return row | dict(ratios={f"{what} over {base}": ratio(what, base) for what, base in pairs})


def said(v): return f"{v['median']:.2f} ({v['least']:.2f} to {v['most']:.2f})"


def markdown(record):
    machine = f"{record['device']}, {record['cores']} cores, {record['threads']} threads"
    copies = f"copies {record['copy_gb_per_s']:.1f} GB/s"
    lines = [f"{machine}, torch {record['torch']}; {copies}; {record['data']}"]
    for run in record["runs"]:
        what = f"{run['images']} images of {run['image_size']} px, stages of {run['staged']}"
        lines.append(f"**{run['encoder']}**, {what}: images/s (share)")
        for part in ("fit", "score"):
            row = {stage: f"{v['images_per_s']:.0f} ({v['share']:.0%})" for stage, v in run[part].items()}
            lines.append(pd.DataFrame(row, [part]).to_markdown())
        whole = {what: said(v) for what, v in run["whole"].items()}
        lines += [pd.DataFrame(whole, ["images/s"]).T.to_markdown(),
                  pd.DataFrame({k: said(v) for k, v in run["ratios"].items()}, ["ratio"]).T.to_markdown()]
    return "\n\n".join(lines)


def options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--voc", help="folder that holds VOCdevkit; none: photographs are made")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--images", type=int, default=1449,
                        help="of a whole pass; on a CPU fewer for slow encoders")
    parser.add_argument("--alone", type=int, default=768, help="at most, where one process reads")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--k", type=int, default=100, help="clusters of the one K-means run that is timed")
    parser.add_argument("--device", help="None: a GPU where there is one")
    parser.add_argument("--compile", action="store_true", help="and compiled blocks; needs a C++ compiler")
    parser.add_argument("--quick", action="store_true", help="a few images, two encoders, one turn")
    parser.add_argument("--out", type=Path, default=results)
    return parser.parse_args()


def main(args):
    args.least = 8   # images, whatever the encoder
    if args.quick:
        args.encoders, args.images, args.batch_size, args.turns, args.k = ["free", "tiny"], 12, 6, 1, 5
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.voc: data = VOCSegmentation(args.voc, "val")
        else: data = made_photographs(Path(folder), min(args.images, 200))
        record = dict(
            command=" ".join(["python benchmarks/throughput.py", *sys.argv[1:]]),
            device=f"{args.device.type} {device}",
            data=f"{min(len(data), args.images)} images of {data.name}",
            cores=usable_cores(), threads=torch.get_num_threads(), python=platform.python_version(),
            torch=torch.__version__, load=os.getloadavg()[0],
            copy_gb_per_s=copy_bandwidth(args.device),
            runs=[measure(name, data, args) for name in args.encoders])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(args.out) as part: part.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__": main(options())
