"""What a fit costs beside one bare encoder pass: time and memory of the closed form and of the trained heads.

    python benchmarks/rasa.py                              # tiny, and an untrained DeiT-Tiny
    python benchmarks/rasa.py --models tiny --images 200   # a quick look

A method is timed right before and right after the bare pass, in one process and on images drawn beforehand,
as a busy machine slows two neighbors alike; every process is started several times over, and shows the memory
that it needs. As published means 45 passes (9 heads of 5 epochs) over images augmented anew; one is timed and
multiplied. Writes benchmarks/results/rasa.json, which nbs/studies/costs.ipynb shows, and prints Markdown.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, time
from pathlib import Path

import pandas as pd
import torch

from rasa_nb.data import SegmentationData
from rasa_nb.reading import Transformed, augmentation
from rasa_nb.encoders import load_encoder
from rasa_nb.rasa import RASA
from rasa_nb.scenes import Scenes
from rasa_nb.store import atomic
from rasa_nb.trained import TrainedRASA

results = Path(__file__).resolve().parent / "results" / "rasa.json"
SIZES = dict(tiny=96)
LABELS = dict(bare="encoder pass alone", closed="closed form", cached="trained, tokens encoded once",
              published="trained as published, 45 passes")


class Drawn(SegmentationData):
    "Images of a dataset, drawn once and kept, so that making them costs nothing here."
    def __init__(self, data):
        self.name, self.classes, self.ignore_index = data.name, data.classes, data.ignore_index
        self.items = [data.load(i) for i in range(len(data))]
    def __len__(self): return len(self.items)
    def load(self, i): return self.items[i]


def method(what):
    if what == "closed": return RASA()
    if what == "cached": return TrainedRASA()
    return TrainedRASA(n_heads=1, epochs=1, basis="pairwise", reaugment=True)   # one pass of 45


def one(what, model, images):
    """Seconds of wall clock and CPU of a method and of bare passes beside it, two pairs in both orders, and
    the peak memory of this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    torch.manual_seed(0)
    size, encoder = SIZES.get(model, 224), load_encoder(model, pretrained=model == "tiny")
    data = Drawn(Scenes("train", images, size=size))
    encoder(torch.zeros(32, 3, size, size))   # a first pass allocates and chooses kernels
    def bare():
        for _ in encoder.encode(Transformed(data, augmentation(size), 0)): pass
    def fitted(): method(what).fit(encoder, data, size)
    if what == "bare": took = [{"bare": timed(bare)}]
    else: took = [{kind: timed(bare if kind == "bare" else fitted) for kind in order}
                  for order in (("bare", what), (what, "bare"))]
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(took=took, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def timed(do):
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    return dict(seconds=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def alone(what, model, images):
    "Runs a measurement in a process of its own."
    command = [sys.executable, __file__, "--one", what, "--models", model, "--images", str(images)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def spread(values):
    values = list(values)
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def measure(model, images, repeats):
    "Every method in turn, `repeats` times over; ratios are taken within a pair of neighbors."
    turns = []
    for r in range(repeats):
        turns.append({what: alone(what, model, images) for what in LABELS})
        print(f"{model}: turn {r + 1} of {repeats}", file=sys.stderr, flush=True)
    def ratios(what, kind):
        times = 45 if what == "published" else 1
        pairs = [pair for turn in turns for pair in turn[what]["took"]]
        return [times * pair[what][kind] / pair["bare"][kind] for pair in pairs]
    rows = {what: dict(seconds=spread(ratios(what, "seconds")), cpu=spread(ratios(what, "cpu")))
            for what in LABELS}
    for what, row in rows.items():
        row["more_mb"] = statistics.median(t[what]["peak_mb"] - t["bare"]["peak_mb"] for t in turns)
    both = zip(ratios("published", "cpu"), ratios("closed", "cpu"))
    return dict(model=model, image_size=SIZES.get(model, 224), images=images, repeats=repeats, methods=rows,
                turns=turns, published_over_closed=spread(trained / closed for trained, closed in both))


def said(v): return f"{v['median']:.2f} ({v['least']:.2f} to {v['most']:.2f})"


def markdown(run):
    rows = {LABELS[what]: {"wall time, in bare passes": said(row["seconds"]),
                           "CPU time, in bare passes": said(row["cpu"]),
                           "memory beyond the bare pass": f"{row['more_mb']:+.0f} MB"}
            for what, row in run["methods"].items()}
    images = f"{run['images']} images of {run['image_size']} px"
    head = f"{run['model']}, {images}, {2 * run['repeats']} pairs: median (least to most)"
    tail = f"As published costs {said(run['published_over_closed'])} times the closed form (CPU time)."
    return "\n\n".join([head, pd.DataFrame(rows).T.to_markdown(), tail])


def options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--models", nargs="+", default=["tiny", "deit_tiny_patch16_224"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--one", choices=list(LABELS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args):
    runs = [measure(model, args.images, args.repeats) for model in args.models]
    record = dict(command=" ".join(["python benchmarks/rasa.py", *sys.argv[1:]]), cores=os.cpu_count(),
                  threads=os.environ.get("OMP_NUM_THREADS", "all cores"), python=platform.python_version(),
                  torch=torch.__version__, runs=runs)
    with atomic(args.out) as part: part.write_text(json.dumps(record, indent=1))
    print("\n\n".join(map(markdown, runs)))


if __name__ == "__main__":
    args = options()
    if args.one: print(json.dumps(one(args.one, args.models[0], args.images)))
    else: main(args)
