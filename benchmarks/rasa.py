"""What a fit costs beside one bare encoder pass: time and memory of the closed form, of sgd on cached tokens, and of sgd as published.

    python benchmarks/rasa.py                                  # tiny, and DeiT-Tiny's architecture at 224 px with random weights
    python benchmarks/rasa.py --models tiny --images 200       # a quick look

Every measurement is a process of its own, on images drawn beforehand, and all are run in turn, several times over, so that a
busy machine slows all alike. As published means 45 passes (9 heads of 5 epochs) over images augmented anew; one is timed and
multiplied. Writes benchmarks/results/rasa.json and prints Markdown.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, time
from pathlib import Path

import torch

from rasa_nb.data import Scenes, SegmentationData, Transformed, augmentation
from rasa_nb.encoders import load_encoder
from rasa_nb.rasa import RASA

results = Path(__file__).resolve().parent / "results" / "rasa.json"
SIZES = dict(tiny=96)
LABELS = dict(bare="encoder pass alone", closed="closed form", cached="sgd, tokens encoded once", published="sgd as published, 45 passes")


class Drawn(SegmentationData):
    "Images of a dataset, drawn once and kept, so that making them costs nothing here."
    def __init__(self, data):
        self.name, self.classes, self.ignore_index = data.name, data.classes, data.ignore_index
        self.items = [data.load(i) for i in range(len(data))]
    def __len__(self): return len(self.items)
    def label(self, i): return str(i)
    def load(self, i): return self.items[i]


def one(what, model, images):
    "Runs one measurement in this process: seconds of wall clock and CPU, and the peak memory of the process."
    torch.set_num_threads(os.cpu_count() if not os.environ.get("OMP_NUM_THREADS") else int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    size, encoder = SIZES.get(model, 224), load_encoder(model, pretrained=model == "tiny")
    data = Drawn(Scenes("train", images, size=size))
    encoder(torch.zeros(32, 3, size, size))   # a first pass allocates and chooses kernels
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "bare":
        for _ in encoder.encode(Transformed(data, augmentation(size), 0)): pass
    else:
        method = dict(closed=RASA(), cached=RASA("sgd"), published=RASA("sgd", basis="pairwise", n_iter=1, epochs=1, augment_every_epoch=True))[what]
        method.fit(encoder, data, size)
    times = 45 if what == "published" else 1
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(seconds=times * (time.perf_counter() - wall), cpu=times * (time.process_time() - cpu), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def measure(model, images, repeats):
    "Every method in turn, `repeats` times over; ratios are taken within a turn."
    turns = []
    for r in range(repeats):
        turns.append({what: json.loads(subprocess.run([sys.executable, __file__, "--one", what, "--models", model, "--images", str(images)], check=True, capture_output=True, text=True).stdout.splitlines()[-1]) for what in LABELS})
        print(f"{model}: turn {r + 1} of {repeats}", file=sys.stderr, flush=True)
    rows = {}
    for what in LABELS:
        ratio = {kind: [t[what][kind] / t["bare"][kind] for t in turns] for kind in ("seconds", "cpu")}
        rows[what] = {kind: dict(median=statistics.median(v), least=min(v), most=max(v)) for kind, v in ratio.items()}
        rows[what]["more_mb"] = statistics.median(t[what]["peak_mb"] - t["bare"]["peak_mb"] for t in turns)
    closed = [t["published"]["cpu"] / t["closed"]["cpu"] for t in turns]
    return dict(model=model, image_size=SIZES.get(model, 224), images=images, repeats=repeats, methods=rows, turns=turns,
                published_over_closed=dict(median=statistics.median(closed), least=min(closed), most=max(closed)))


def markdown(run):
    spread = lambda v: f"{v['median']:.2f} ({v['least']:.2f} to {v['most']:.2f})"
    lines = [f"{run['model']}, {run['images']} images of {run['image_size']} px, median (least to most) of {run['repeats']} turns:", "",
             "| | wall time, in bare passes | CPU time, in bare passes | memory beyond the bare pass |", "|---|---|---|---|"]
    lines += [f"| {LABELS[w]} | {spread(r['seconds'])} | {spread(r['cpu'])} | {r['more_mb']:+.0f} MB |" for w, r in run["methods"].items()]
    return "\n".join([*lines, "", f"As published costs {spread(run['published_over_closed'])} times the closed form (CPU time)."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "deit_tiny_patch16_224"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--one", choices=list(LABELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.models[0], args.images))); sys.exit()
    runs = [measure(m, args.images, args.repeats) for m in args.models]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(dict(command=" ".join(["python benchmarks/rasa.py", *sys.argv[1:]]), cores=os.cpu_count(), threads=os.environ.get("OMP_NUM_THREADS", "all cores"), python=platform.python_version(), torch=torch.__version__, runs=runs), indent=1))
    os.replace(part, args.out)
    print("\n\n".join(markdown(r) for r in runs))
