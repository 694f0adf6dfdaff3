"""K-means of this package beside scikit-learn's: seconds, and how good the centers are.

    python benchmarks/kmeans.py                                # K=300, 256 points a center, 5 restarts
    python benchmarks/kmeans.py --threads 1 2 --out benchmarks/results/kmeans.json

Points are 600 overlapping blobs in 50 dimensions. Both libraries begin each restart with the same points and
run as many iterations. On a machine with a GPU torch runs there too. Nothing else should run beside it.
"""
import argparse, json, platform, time
from pathlib import Path
from types import SimpleNamespace

import torch
from threadpoolctl import threadpool_limits

from rasa_nb.kmeans import kmeans_centers, distances_to


def blobs(n, d=50, number=600):
    "Points [n, d] around centers whose spread falls from axis to axis, as that of principal components does."
    draw = torch.Generator().manual_seed(0)
    spread = 4 / torch.arange(1, d + 1).sqrt()
    centers = spread * torch.randn(number, d, generator=draw)
    return centers[torch.randint(number, (n,), generator=draw)] + torch.randn(n, d, generator=draw)


def inertia(points, centers):
    return sum((distances_to(some, centers).min(1).values + some.square().sum(1)).sum().item()
               for some in points.split(1000))


def measure(points, k, library, device, threads, n_init, max_iter, repeats):
    "A row: the least of several times, which other work on the machine disturbs least."
    protocol, walls, works = SimpleNamespace(library=library, n_init=n_init, max_iter=max_iter), [], []
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        for _ in range(repeats):
            wall, work = time.perf_counter(), time.process_time()
            centers = kmeans_centers(points, k, protocol, seed=0, device=device)
            walls.append(time.perf_counter() - wall)
            works.append(time.process_time() - work)
    row = dict(library=library, device=device, threads=threads, wall_s=min(walls), processor_s=min(works))
    return row | dict(inertia_per_point=inertia(points, centers) / len(points))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=300)
    parser.add_argument("--n-init", type=int, default=5, help="restarts")
    parser.add_argument("--max-iter", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the record, e.g. benchmarks/results/kmeans.json")
    args = parser.parse_args()

    points, rows = blobs(256 * args.k), []
    runs = [(library, "cpu", n) for n in args.threads for library in ("sklearn", "torch")]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        runs += [("torch", "cuda", max(args.threads))] * 2   # the first also loads kernels
    else: name = None
    for run in runs:
        rows.append(measure(points, args.k, *run, args.n_init, args.max_iter, args.repeats))
        print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in rows[-1].items()), flush=True)
    about = dict(k=args.k, points=len(points), dimensions=points.shape[1], n_init=args.n_init,
                 max_iter=args.max_iter, repeats=args.repeats, processor=platform.processor() or platform.machine(),
                 gpu=name, torch=torch.__version__)
    if args.out: args.out.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
