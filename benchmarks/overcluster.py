"""Time and memory of overclustering against a plain reference that upsamples everything, on the same tokens.

    python benchmarks/overcluster.py --voc ../shared/data --checkpoint ../shared/weights/deit_tiny_patch16_224_fp16.safetensors
    python benchmarks/overcluster.py --share .01 --ks 21 30      # a quick look: small cases, no photographs

Nothing else should run beside it; the first takes about ten minutes on two cores. Writes benchmarks/results/overcluster.json and .png. Every measurement is a process of its
own, so that its peak memory is its own. The reference works as the earlier code does (protocol `franca`): tokens of all images
upsampled to the mask size and held in float32, standardized, PCA; K-means of 50 iterations and 5 restarts on 256 points per
centroid; all pixels assigned; every pair of cluster and class scored by passes over all pixels, for both matchings. Its K-means
is the same scikit-learn call as ours, where the earlier code calls faiss: the table `training` tells what each takes.
"""
import argparse, json, os, platform, re, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from rasa_nb.segmentation import FRANCA, class_iou, confusion_matrix, draw_points, match_clusters, new_moments, overcluster_tokens, reduce_tokens

results = Path(__file__).parent / "results"
KS, CLASSES = (21, 100, 300), 21


# The plain reference: every pixel's token in float32, every score a pass over all pixels.
def plain_points(tokens, size, components=50):
    "Principal components of standardized tokens at every pixel [n * height * width, components]."
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
    hit, wrong = np.sum(predicted & true), np.sum(predicted & ~true)
    whole = hit + wrong if precision else hit + wrong + np.sum(~predicted & true)
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
    "The mIoU of every k, {k: {matching: percent}}, and the clusters of all pixels, {k: [n]}."
    points, classes = plain_points(tokens, tuple(masks.shape[1:])), masks.numpy().astype(np.int64).reshape(-1)
    valid, scores, labels = classes != ignore_index, {}, {}
    for k in ks:
        clusters = plain_clusters(points, k, seed)
        labels[k], clusters = clusters.astype(np.uint16), clusters[valid]
        scores[k] = {m: plain_miou(clusters, classes[valid], k, num_classes, m) for m in (["hungarian"] if k == num_classes else ["precision", "iou"])}
    return scores, labels


def ours(tokens, masks, ks, num_classes, seeds=0):
    "A row per k and seed."
    return overcluster_tokens({"tokens": tokens}, masks, [str(c) for c in range(num_classes)], k=ks, protocol=FRANCA, seeds=seeds).frame


def by_matching(frame, num_classes):
    return {r.k: {"hungarian": r.miou} if r.k == num_classes else {"precision": r.miou_precision, "iou": r.miou_iou} for r in frame.itertuples()}


def from_counts(labels, masks, scores, num_classes):
    "What the library makes of the reference's own clusters: the largest difference of mIoU, in points."
    names = dict(hungarian="hungarian", precision="many_to_one_precision", iou="many_to_one_iou")
    def again(k, m): confusion = confusion_matrix(labels[k].astype(int), masks, k, num_classes); return 100 * np.nanmean(class_iou(confusion, match_clusters(confusion, names[m])))
    return max(abs(again(k, m) - v) for k, of in scores.items() for m, v in of.items())


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
    "One measurement: seconds, memory and scores."
    tokens, masks = torch.load(file, mmap=True)
    plain_clusters(np.random.default_rng(0).random((600, 2)), 2)     # first use of scikit-learn and BLAS is not what is timed
    KMeans.fit = timed_fit(KMeans.fit)
    before, start, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    made = (plain_overcluster if which == "plain" else ours)(tokens, masks, ks, CLASSES)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
    fit, fit_cpu = map(sum, zip(*training))
    scores = made[0] if which == "plain" else by_matching(made, CLASSES)
    row = dict(seconds=seconds, cpu_seconds=cpu, rest_seconds=seconds - fit, rest_cpu_seconds=cpu - fit_cpu, peak_gb=peak / 1e9, import_gb=before / 1e9, work_gb=(peak - before) / 1e9, miou=scores)
    return row | (dict(from_counts=from_counts(made[1], masks, scores, CLASSES)) if which == "plain" else {})


def spread(file, ks, seeds=range(4)):
    "Mean and std of the library's mIoU over seeds: {k: [mean, std]}."
    frame = ours(*torch.load(file, mmap=True), ks, CLASSES, seeds).groupby("k").miou
    return {k: [scores.mean(), scores.std()] for k, scores in frame}


def train_seconds(file, ks):
    "CPU seconds of one restart of K-means on the points of each k, by several means."
    tokens, _ = torch.load(file, mmap=True)
    maps, rows = reduce_tokens(tokens, new_moments(tokens.shape[1:3], tokens.shape[3], FRANCA).update(tokens), FRANCA), []
    def lloyd(points, k, algorithm="lloyd"): KMeans(k, init="random", n_init=1, max_iter=FRANCA.max_iter, tol=0, random_state=0, algorithm=algorithm).fit(points)
    def elkan(points, k): lloyd(points, k, "elkan")
    def faiss(points, k): import faiss; faiss.Kmeans(points.shape[1], k, niter=FRANCA.max_iter, nredo=1, seed=0, max_points_per_centroid=len(points)).train(points)
    for k in ks:
        points = draw_points(maps, FRANCA.points_per_centroid * k, 0, (100, 100)).numpy()
        row = dict(k=k, points=len(points))
        for fit in (lloyd, elkan, faiss):
            start = time.process_time()
            try: fit(points, k); row[fit.__name__] = time.process_time() - start
            except ImportError: row[fit.__name__] = None   # faiss is optional
        rows.append(row)
    return rows


def alone(what, tokens, masks, ks, threads):
    "Runs a measurement in a process of its own, with so many threads."
    with tempfile.NamedTemporaryFile(suffix=".pt") as f:
        torch.save((tokens, masks), f.name)
        env = os.environ | {f"{lib}_NUM_THREADS": str(threads) for lib in ("OMP", "OPENBLAS", "MKL")}
        out = subprocess.run([sys.executable, __file__, "--one", what, f.name, *map(str, ks)], capture_output=True, text=True, env=env)
    if out.returncode: raise RuntimeError(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def measure(which, tokens, masks, ks, threads):
    shape = dict(images=len(tokens), grid=tuple(tokens.shape[1:3]), D=tokens.shape[3], ks=list(ks), which=which, threads=threads)
    row = alone(which, tokens, masks, ks, threads)
    print(f"{which:6} {shape['images']:5} images {shape['grid'][0]}x{shape['grid'][1]} D={shape['D']:4} K={','.join(map(str, ks)):12} "
          f"{row['seconds']:8.1f} s (CPU {row['cpu_seconds']:6.1f}, beside K-means training {row['rest_cpu_seconds']:6.1f}) {row['peak_gb']:7.2f} GB (work {row['work_gb']:.2f})", flush=True)
    return shape | row


def random_tokens(images, grid, dim, dtype=torch.float32, size=100):
    "Tokens that tell their class weakly and are noise otherwise, and masks of 5x5 blocks."
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(CLASSES, (images, 1, 5, 5), generator=g).float()
    means = torch.randn(CLASSES, dim, generator=g) / 2
    tokens, cells = torch.empty(images, grid, grid, dim, dtype=dtype), F.interpolate(blocks, size=(grid, grid))[:, 0].long()
    for i in range(images): tokens[i] = means[cells[i]] + torch.randn(grid, grid, dim, generator=g)
    return tokens, F.interpolate(blocks, size=(size, size))[:, 0].to(torch.uint8)


def voc_tokens(folder, checkpoint, most):
    from rasa_nb.data import Evaluation, Transformed, VOCSegmentation
    from rasa_nb.encoders import load_encoder
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=checkpoint)
    data = VOCSegmentation(folder, "val")
    parts = list(encoder.encode(Transformed(data.first(min(most, len(data))), Evaluation(224, 100)), desc="encode"))
    return [torch.cat(p) for p in zip(*parts)]


def compare(title, tokens, masks, ks, threads):
    "Both sides on the same tokens."
    plain, mine = (measure(which, tokens, masks, ks, threads) for which in ("plain", "ours"))
    ratio = {k: plain[k] / mine[k] for k in ("seconds", "cpu_seconds", "rest_seconds", "rest_cpu_seconds", "peak_gb", "work_gb")}
    off = max(abs(v - mine["miou"][k][m]) for k, of in plain["miou"].items() for m, v in of.items())
    print(f"{title}: {ratio['seconds']:.1f} x faster (CPU {ratio['cpu_seconds']:.1f} x, beside K-means training {ratio['rest_cpu_seconds']:.1f} x), 1/{ratio['peak_gb']:.1f} of the peak memory "
          f"(1/{ratio['work_gb']:.1f} beyond imports); mIoU of the same clusters within {plain['from_counts']:.0e} points, of both sides' own within {off:.2f}", flush=True)
    if plain["from_counts"] > 1e-9: raise AssertionError(f"{title}: the same clusters score differently, by {plain['from_counts']} points")
    return dict(title=title, plain=plain, ours=mine, ratio=ratio)


def extrapolate(case, images, dim):
    "What the plain reference would take at least: training stays, all else grows with the images, memory with the numbers held (see `growth`)."
    row = case["plain"]; times = images / row["images"]
    return {f"{p}seconds": row[f"{p}seconds"] + (times - 1) * row[f"rest_{p}seconds"] for p in ("", "cpu_")} | dict(images=images, D=dim, work_gb=row["work_gb"] * times * dim / row["D"])


def grow(images, ks, threads=1):
    "Time and memory of both sides along each axis, two processes of one thread at a time: CPU seconds are what counts."
    cases = {("images", n): (n, 192, ks[:1]) for n in (images, 2 * images, 4 * images)} | {("D", d): (images, d, ks[:1]) for d in (192, 384, 768)} | {("K", k): (images, 192, (k,)) for k in ks}
    distinct = [(which, case) for case in dict.fromkeys(cases.values()) for which in ("plain", "ours")]
    def do(job): which, (n, dim, ks) = job; return measure(which, *random_tokens(n, 14, dim), ks, threads)
    with ThreadPoolExecutor(max(1, psutil.cpu_count() // threads)) as pool: rows = dict(zip(distinct, pool.map(do, distinct)))
    return {axis: [rows[which, case] for (a, _), case in cases.items() if a == axis for which in ("plain", "ours")] for axis in ("images", "D", "K")}


def plot(grown, file):
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", sharey="row", layout="constrained")
    for column, (axis, rows) in zip(axes.T, grown.items()):
        for ax, (key, label) in zip(column, dict(cpu_seconds="CPU seconds", work_gb="GB beyond imports").items()):
            for which, color, marker in (("plain", "#d55e00", "o"), ("ours", "#0072b2", "s")):
                x, y = zip(*[(r["ks"][0] if axis == "K" else r[axis], r[key]) for r in rows if r["which"] == which])
                ax.loglog(x, y, marker + "-", color=color, label=which, base=10)
            if ax in axes[:, 0]: ax.set_ylabel(label)
            ax.set_xticks(x, map(str, x)); ax.xaxis.set_minor_locator(plt.NullLocator()); ax.grid(alpha=.3)
        base = grown["images"][0]
        fixed = {"images": f"{base['images']} images", "D": f"D={base['D']}", "K": f"K={base['ks'][0]}"}
        column[0].set_title(", ".join(v for a, v in fixed.items() if a != axis), fontsize=9)
        column[1].set_xlabel(axis)
    axes[0, 0].legend(frameon=False)
    fig.savefig(file, dpi=80)


def held(images, dim): return 3 * images * 100 * 100 * dim * 4   # bytes: the reference has three copies of all pixels' tokens for a moment

def affordable(free, most=445, dim=192):
    "Images and D of the largest random case whose reference fits: fewer dimensions before fewer images."
    while dim > 64 and held(most, dim) > free: dim -= 64
    return max(2, min(most, int(free / held(1, dim)))), dim


def main(args):
    free = args.share * psutil.virtual_memory().available
    machine = dict(cpus=psutil.cpu_count(), threads=args.threads, free_gb=round(psutil.virtual_memory().available / 1e9, 1), torch=torch.__version__, python=platform.python_version(), load=psutil.getloadavg()[0])
    images, dim = affordable(free, args.images)
    compared, extra = [], {}
    if args.voc:
        tokens, masks = voc_tokens(args.voc, args.checkpoint, max(2, int(free / held(1, 192))))
        compared.append(compare(f"DeiT-Tiny tokens of {len(tokens)} VOC val images", tokens, masks, args.ks, args.threads))
        extra = dict(over_seeds=alone("spread", tokens, masks, args.ks, args.threads), training=alone("training", tokens, masks, args.ks, 1))
    compared.append(compare(f"random tokens, {images} images, D={dim}", *random_tokens(images, 32, dim, torch.float16), args.ks, args.threads))
    scaled = f"VOC val has 1449 images and ViT-B D=768, which would take the reference {held(1449, 768) / 1e9:.0f} GB: scaled down to {images} images and D={dim}, what fits in {free / 1e9:.0f} GB and in minutes"
    growth = grow(max(2, min(25, images // 4)), args.ks)
    size = (1449 if args.share > .2 else images, 32, 768)
    full = dict(ours=measure("ours", *random_tokens(*size, torch.float16), args.ks, args.threads), plain_extrapolated=extrapolate(compared[-1], size[0], size[2]))
    results.mkdir(exist_ok=True)
    (results / "overcluster.json").write_text(json.dumps(dict(machine=machine, protocol="franca", share=args.share, scaled=scaled, compared=compared, **extra, full_size=full, growth=growth), indent=1) + "\n")
    plot(growth, results / "overcluster.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", help="folder that holds VOCdevkit")
    parser.add_argument("--checkpoint", help="DeiT-Tiny weights")
    parser.add_argument("--ks", type=int, nargs="+", default=KS, help="numbers of clusters")
    parser.add_argument("--share", type=float, default=.6, help="of the free memory that the reference may take; below .2 all is small, for a quick look")
    parser.add_argument("--images", type=int, default=445, help="of the random case, at most; its reference takes about half a second for each")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(), help="of each compared process")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ks = tuple(args.ks)
    if not args.one: main(args)
    else:
        what, file, *ks = args.one; ks = tuple(map(int, ks))
        print(json.dumps(spread(file, ks) if what == "spread" else train_seconds(file, ks) if what == "training" else one(what, file, ks)))
