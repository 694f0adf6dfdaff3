"""What counts of single images cost, and what scores and intervals from them cost, at the size of VOC val.

    python benchmarks/yardstick.py                     # about four minutes on one core
    torchrun --nproc_per_node 2 benchmarks/yardstick.py --only score

Writes benchmarks/results/yardstick.json. Images, masks and tokens are made up: 1,449 images of 448 px, masks
of 100 x 100 with 21 classes and void, tokens 32 x 32 of D=768 from an encoder that costs next to nothing.
`score` is a whole call for K=300 and one seed, with one restart of K-means instead of five. `counts` gives
all pixels to 300 centers, once with the counts of the whole split as version 0.1 kept them, once with those
of each image. `scores` reads both columns and both intervals off the counts of two encoders, K=21, 100 and
300 and five seeds. Each is a process of its own, so that its peak memory is its own.
"""
import argparse, json, os, platform, resource, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from rasa_nb.data import SegmentationData
from rasa_nb.kmeans import nearest_centers
from rasa_nb.matching import LEOPART, confusion_matrix
from rasa_nb.moments import this_process
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.reading import Reading
from rasa_nb.run import process_group
from rasa_nb.segmentation import OverclusterResult, Run, count_maps, overcluster
from rasa_nb.yardstick import what_clusters_follow

RESULTS = Path(__file__).parent / "results" / "yardstick.json"
IMAGES, CLASSES, GRID, D, MASK = 1449, 21, 32, 768, 100


class Rectangles(SegmentationData):
    "An object of one color before a ground of another, with a border of void."
    name, classes = "rectangles", [str(c) for c in range(CLASSES)]
    def __init__(self, n): self.n = n
    def __len__(self): return self.n

    def load(self, i):
        rng = np.random.default_rng(i)
        color = torch.from_numpy(rng.integers(256, size=(2, 3, 1, 1)).astype(np.uint8))
        top, left, height, width = rng.integers((20, 20, 100, 100), (200, 200, 220, 220))
        image, mask = color[0].repeat(1, 448, 448), torch.zeros(448, 448, dtype=torch.uint8)
        mask[top - 5:top + height + 5, left - 5:left + width + 5] = 255
        mask[top:top + height, left:left + width] = int(rng.integers(1, CLASSES))
        image[:, top:top + height, left:left + width] = color[1]
        return image, mask


def free_encoder():
    "Mean colors of patches through a random matrix, and noise."
    weight = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    def tokens(model, images):
        pooled = F.avg_pool2d(images, 14).permute(0, 2, 3, 1) @ weight
        return pooled + .3 * torch.randn_like(pooled)
    return PatchEncoder(torch.nn.Identity(), tokens, D, 14, 448, name="free")


@contextmanager
def measured():
    "CPU seconds of a block, and the memory it takes beyond what was there, sampled, in MB."
    process, found, done = psutil.Process(), {}, threading.Event()
    before = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not done.wait(.005): most = max(most, process.memory_info().rss)

    watcher, start = threading.Thread(target=watch), time.process_time()
    watcher.start()
    yield found
    found["cpu_seconds"] = round(time.process_time() - start, 2)
    done.set()
    watcher.join()
    found["more_memory_mb"] = round((most - before) / 2**20)


def peak_gb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_score():
    "Seconds and peak memory of a whole call, in each process."
    protocol, torch_only = LEOPART.replace(n_init=1, library="sklearn"), peak_gb()
    start = time.perf_counter()
    result = overcluster(free_encoder(), Rectangles(IMAGES), 300, protocol, 0, Reading(batch_size=16),
                         store="float16", examples=())
    said = dict(seconds=round(time.perf_counter() - start, 1), peak_gb=round(peak_gb(), 2))
    counts = result.runs[0].counts.matrix
    return said | dict(before_call_gb=round(torch_only, 2), processes=this_process()[1],
                       counts_not_zero=counts.nnz, counts_mb=round(_megabytes(counts), 2))


def _megabytes(matrix): return sum(a.nbytes for a in (matrix.data, matrix.indices, matrix.indptr)) / 1e6


def stand_in(n=IMAGES):
    "Reduced tokens [n, 32, 32, 50] that follow masks [n, 100, 100], and those masks."
    data, generator = Rectangles(n), torch.Generator().manual_seed(0)
    masks = torch.stack([data.load(i)[1] for i in range(n)])[:, None].float()
    masks, patches = (F.interpolate(masks, size=(s, s))[:, 0].long() for s in (MASK, GRID))
    centers = torch.randn(256, 50, generator=generator)
    own = .7 * torch.randn(n, 1, 1, 50, generator=generator)
    return centers[patches] + own + .5 * torch.randn(n, GRID, GRID, 50, generator=generator), masks.byte()


def centers_of(maps, k, seed):
    "Tokens drawn at random: stand-ins for the centers of K-means, which would take minutes."
    rng = np.random.default_rng(seed)
    return maps.flatten(0, 2)[rng.choice(maps[..., 0].numel(), k, replace=False)]


def measure_counts(kind):
    "Giving all pixels to 300 centers and counting them."
    maps, masks = stand_in()
    centers = centers_of(maps, 300, 0)
    with measured() as found:
        parts = nearest_centers(maps, centers, (MASK, MASK), False)
        if kind == "whole":
            confusion, done = np.zeros((300, CLASSES), np.int64), 0
            for labels in parts:
                confusion += confusion_matrix(labels, masks[done:done + len(labels)], 300, CLASSES)
                done += len(labels)
        else:
            counts, patches = count_maps(parts, masks, 300, (GRID, GRID), CLASSES)
            what_clusters_follow(patches)
    return found


def measure_scores():
    "Both columns, and both intervals, from the counts of thirty runs."
    maps, masks = stand_in()
    runs, nothing = [], np.zeros((0, 1, 1), np.uint16)
    encoders = dict(before=maps, after=maps + .3 * torch.randn(50))
    for name, z in encoders.items():
        for k in (21, 100, 300):
            for seed in range(5):
                parts = nearest_centers(z, centers_of(z, k, seed), (MASK, MASK), False)
                counts, _ = count_maps(parts, masks, k, (GRID, GRID), CLASSES)
                runs.append(Run(name, k, seed, counts, nothing))
    about = dict(name="rectangles", images=IMAGES, ignore_index=255)
    protocol = LEOPART.replace(seeds=tuple(range(5)), k=(21, 100, 300))
    result = OverclusterResult(runs, protocol, about, tuple(Rectangles.classes))
    with measured() as columns: result.frame
    with measured() as intervals: result.change
    counts_mb = round(sum(_megabytes(run.counts.matrix) for run in runs), 1)
    return dict(runs=len(runs), draws=protocol.draws, counts_mb=counts_mb, both_columns=columns,
                both_intervals=intervals)


MEASURES = dict(score=measure_score, scores=measure_scores,
                counts_of_the_split=lambda: measure_counts("whole"),
                counts_of_each_image=lambda: measure_counts("each"))


def keep(name, found):
    "Adds a measurement to the record."
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = dict(machine=platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                   torch=torch.__version__)
    record |= dict(machine=machine, **{name: found})
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(name, found, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=MEASURES)
    only = parser.parse_args().only
    if not only:
        for name in MEASURES: subprocess.run([sys.executable, __file__, "--only", name], check=True)
        return
    with process_group():
        found, (rank, world) = MEASURES[only](), this_process()
        if world > 1:
            peaks = [None] * world
            torch.distributed.all_gather_object(peaks, found["peak_gb"])
            found["peak_gb"] = peaks
    if rank == 0: keep(only if world == 1 else f"{only}_in_{world}_processes", found)


if __name__ == "__main__": main()
