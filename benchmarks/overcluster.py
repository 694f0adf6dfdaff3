"""Time and memory of overclustering against a plain reference that upsamples everything, on the same tokens.

    python benchmarks/overcluster.py                         # synthetic tokens only
    python benchmarks/overcluster.py --voc DIR --checkpoint FILE   # and DeiT-Tiny tokens of VOC val

Writes benchmarks/results/overcluster.json and .png. Every measurement is a process of its own, so that its peak memory is its own.
"""
import argparse, json, platform, re, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from rasa_nb.overcluster import FRANCA, overcluster_tokens

results = Path(__file__).parent / "results"
KS = (21, 100, 300)


# The plain reference: every pixel's token in float32, every score a pass over all pixels.
def plain_points(tokens, size, components=50):
    "Principal components of standardised tokens at every pixel [n * height * width, components]."
    pixels = F.interpolate(tokens.float().permute(0, 3, 1, 2), size=size, mode="bilinear")
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, tokens.shape[-1]).numpy()
    pixels = (pixels - pixels.mean(0)) / pixels.std(0)
    return PCA(min(components, pixels.shape[1]), svd_solver="covariance_eigh").fit_transform(pixels)


def plain_clusters(points, k, seed=0, max_iter=50, n_init=5, points_per_centroid=256):
    number = min(k * points_per_centroid, len(points))
    some = np.sort(np.random.default_rng(seed).choice(len(points), number, replace=False, shuffle=False))   # the same points for the same seed
    model = KMeans(k, init="random", n_init=n_init, max_iter=max_iter, tol=0, random_state=seed).fit(points[some])
    return model.predict(points).astype(np.int64)


def plain_pair_score(clusters, classes, cluster, label, precision):
    predicted, true = clusters == cluster, classes == label
    hit, wrong, missed = np.sum(predicted & true), np.sum(predicted & ~true), np.sum(~predicted & true)
    whole = hit + wrong if precision else hit + wrong + missed
    return hit / whole if whole else 0.


def plain_miou(clusters, classes, k, num_classes, matching):
    "mIoU over the classes present, in percent: pairs of cluster and class scored one by one."
    pairs = [[plain_pair_score(clusters, classes, j, c, matching == "precision") for c in range(num_classes)] for j in range(k)]
    if matching == "hungarian":
        rows, columns = linear_sum_assignment(np.array(pairs), maximize=True)
        given = dict(zip(rows, columns))
    else: given = {j: int(np.argmax(row)) for j, row in enumerate(pairs)}
    predicted = np.full(len(clusters), -1)
    for j, c in given.items(): predicted[clusters == j] = c
    return 100 * np.mean([plain_pair_score(predicted, classes, c, c, False) for c in range(num_classes) if (classes == c).any()])


def plain_overcluster(tokens, masks, ks, num_classes, seed=0, ignore_index=255):
    "The mIoU of every k: {k: {matching: percent}}."
    points, classes = plain_points(tokens, tuple(masks.shape[1:])), masks.numpy().astype(np.int64).reshape(-1)
    valid, scores = classes != ignore_index, {}
    for k in ks:
        clusters = plain_clusters(points, k, seed)[valid]
        scores[k] = {m: plain_miou(clusters, classes[valid], k, num_classes, m) for m in (["hungarian"] if k == num_classes else ["precision", "iou"])}
    return scores


def ours(tokens, masks, ks, num_classes):
    result = overcluster_tokens({"tokens": tokens}, masks, [str(c) for c in range(num_classes)], k=ks, protocol=FRANCA, seeds=0)
    return {r.k: {"hungarian": r.miou} if r.k == num_classes else {"precision": r.miou_precision, "iou": r.miou_iou} for r in result.frame.itertuples()}


# Measuring
training = []   # seconds of wall and CPU time inside K-means' fit, which is the same library call on both sides

def timed_fit(fit):
    def timed(*args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        try: return fit(*args, **kwargs)
        finally: training.append((time.perf_counter() - wall, time.process_time() - cpu))
    return timed


def peak_memory():
    "Bytes at the peak of this process. (Not `getrusage`, which counts from before the process became this program.)"
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def one(which, file, ks):
    "Run in a process of its own: prints seconds, memory and scores."
    tokens, masks = torch.load(file, mmap=True)
    plain_clusters(np.random.default_rng(0).random((600, 2)), 2)     # first use of scikit-learn and BLAS is not what is timed
    KMeans.fit = timed_fit(KMeans.fit)
    before, start, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    scores = (plain_overcluster if which == "plain" else ours)(tokens, masks, ks, 21)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
    fit, fit_cpu = map(sum, zip(*training))
    print(json.dumps(dict(seconds=seconds, cpu_seconds=cpu, rest_seconds=seconds - fit, rest_cpu_seconds=cpu - fit_cpu, peak_gb=peak / 1e9, work_gb=(peak - before) / 1e9, miou=scores)))


def measure(which, tokens, masks, ks=KS):
    with tempfile.NamedTemporaryFile(suffix=".pt") as f:
        torch.save((tokens, masks), f.name)
        out = subprocess.run([sys.executable, __file__, "--one", which, f.name, *map(str, ks)], capture_output=True, text=True)
    if out.returncode: raise RuntimeError(out.stderr)
    row = json.loads(out.stdout.splitlines()[-1])
    shape = dict(images=len(tokens), grid=tuple(tokens.shape[1:3]), D=tokens.shape[3], ks=list(ks), which=which)
    print(f"{which:6} {shape['images']:5} images {shape['grid'][0]}x{shape['grid'][1]} D={shape['D']:4} K={','.join(map(str, ks)):12} "
          f"{row['seconds']:8.1f} s (CPU {row['cpu_seconds']:6.1f}, beside K-means training {row['rest_cpu_seconds']:6.1f}) {row['peak_gb']:7.2f} GB (work {row['work_gb']:.2f})", flush=True)
    return shape | row


def random_tokens(images, grid, dim, dtype=torch.float32, size=100):
    g = torch.Generator().manual_seed(0)
    tokens = torch.empty(images, grid, grid, dim, dtype=dtype)
    for i in range(images): tokens[i] = torch.randn(grid, grid, dim, generator=g)
    blocks = torch.randint(21, (images, 1, 5, 5), generator=g).float()
    return tokens, F.interpolate(blocks, size=(size, size))[:, 0].to(torch.uint8)


def voc_tokens(folder, checkpoint):
    from rasa_nb.data import Evaluation, Transformed, VOCSegmentation
    from rasa_nb.encoders import load_encoder
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=checkpoint)
    parts = list(encoder.encode(Transformed(VOCSegmentation(folder, "val"), Evaluation(224, 100)), desc="encode"))
    return [torch.cat(p) for p in zip(*parts)]


def compare(title, plain, ours):
    ratio = {k: plain[k] / ours[k] for k in ("seconds", "cpu_seconds", "rest_seconds", "rest_cpu_seconds", "peak_gb", "work_gb")}
    print(f"{title}: {ratio['cpu_seconds']:.1f} x faster (beside K-means training {ratio['rest_cpu_seconds']:.1f} x), "
          f"1/{ratio['peak_gb']:.1f} of the peak memory (1/{ratio['work_gb']:.1f} beyond imports)")
    return dict(title=title, plain=plain, ours=ours, ratio=ratio)


def extrapolate(row, images):
    "What the plain reference would take: training stays, all else grows with the images (see `growth`)."
    times = images / row["images"]
    return {f"{p}seconds": row[f"{p}seconds"] + (times - 1) * row[f"rest_{p}seconds"] for p in ("", "cpu_")} | dict(images=images, work_gb=row["work_gb"] * times)


def plot(grown, file):
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", sharey="row", layout="constrained")
    for column, (axis, rows) in zip(axes.T, grown.items()):
        for ax, (key, label) in zip(column, dict(cpu_seconds="CPU seconds", work_gb="GB beyond imports").items()):
            for which, colour, marker in (("plain", "#d55e00", "o"), ("ours", "#0072b2", "s")):
                x, y = zip(*[(r["ks"][0] if axis == "K" else r[axis], r[key]) for r in rows if r["which"] == which])
                ax.loglog(x, y, marker + "-", color=colour, label=which, base=10)
            ax.set(ylabel=label, xlabel=axis); ax.grid(alpha=.3)
    axes[0, 0].legend(frameon=False)
    fig.savefig(file, dpi=80)


def cases(args):
    "Everything to measure: {name: (which, tokens and masks or how to make them, ks)}."
    fits = int(min(1449, args.share * psutil.virtual_memory().available / (3 * 100 * 100 * 768 * 4)))     # the reference holds three copies for a moment
    voc = {"DeiT-Tiny, VOC val": voc_tokens(args.voc, args.checkpoint)} if args.voc else {}
    compared = {**voc, f"random tokens, {fits} images (what fits the reference)": (fits, 32, 768)}
    grown = {("images", n): ((n, 14, 192), KS[:1]) for n in (8, 16, 32)} | {("D", d): ((8, 14, d), KS[:1]) for d in (192, 384, 768)} | {("K", k): ((16, 14, 192), (k,)) for k in KS}
    both = {title: (made, KS) for title, made in compared.items()} | grown
    todo = {(name, which): (which, made, ks) for name, (made, ks) in both.items() for which in ("plain", "ours")}
    todo |= {("full", shape): ("ours", (1449, *shape, torch.float16), KS) for shape in ([(14, 192)] if args.voc else []) + [(32, 768)]}
    return list(compared), list(grown), todo


def main(args):
    machine = dict(cpus=psutil.cpu_count(), threads=torch.get_num_threads(), jobs=args.jobs, torch=torch.__version__, python=platform.python_version(), load=psutil.getloadavg()[0])
    titles, grown, todo = cases(args)
    def do(which, made, ks): return measure(which, *(random_tokens(*made) if isinstance(made, tuple) else made), ks)
    with ThreadPoolExecutor(args.jobs) as pool: rows = dict(zip(todo, pool.map(lambda case: do(*case), todo.values())))
    compared = [compare(t, rows[t, "plain"], rows[t, "ours"]) for t in titles]
    full = [dict(ours=row, plain_extrapolated=extrapolate(rows[t, "plain"], 1449)) for t, (key, row) in zip(titles, [(k, r) for k, r in rows.items() if k[0] == "full"])]
    growth = {axis: [rows[g, which] for g in grown if g[0] == axis for which in ("plain", "ours")] for axis in ("images", "D", "K")}
    results.mkdir(exist_ok=True)
    (results / "overcluster.json").write_text(json.dumps(dict(machine=machine, protocol="franca", compared=compared, full_size=full, growth=growth), indent=1) + "\n")
    plot(growth, results / "overcluster.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", help="folder that holds VOCdevkit")
    parser.add_argument("--checkpoint", help="DeiT-Tiny weights")
    parser.add_argument("--share", type=float, default=.6, help="of the free memory that the reference may take on random tokens")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at a time; seconds of the wall clock mean something for 1 only, CPU seconds always")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: one(args.one[0], args.one[1], tuple(map(int, args.one[2:])))
    else: main(args)
