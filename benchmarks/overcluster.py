"""Time and memory of overclustering against a plain reference that upsamples everything, on the same tokens.

    python benchmarks/overcluster.py --voc FOLDER --checkpoint DEIT_TINY   # FOLDER holds VOCdevkit
    python benchmarks/overcluster.py --share .01 --ks 21 30                # a quick look, no photographs

Nothing else should run beside it; the first takes about ten minutes on two cores. Writes
benchmarks/results/overcluster.json, which nbs/studies/costs.ipynb shows. Every measurement is a process of
its own, so that its peak memory is its own. The reference works as earlier code does (protocol `franca`):
tokens of all images upsampled to the mask size and held in float32, standardized, PCA; K-means of 50
iterations and 5 restarts on 256 points per centroid; all pixels assigned; every pair of cluster and class
scored by passes over all pixels, for both matchings. Its K-means is the same scikit-learn call as ours,
where earlier code calls faiss: the table `training` tells what each takes.
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

from rasa_nb.kmeans import draw_points, new_moments, reduce_tokens
from rasa_nb.matching import FRANCA, class_iou, confusion_matrix, match_clusters
from rasa_nb.segmentation import overcluster_tokens

results = Path(__file__).parent / "results" / "overcluster.json"
KS, CLASSES, IGNORE = (21, 100, 300), 21, 255
MATCHINGS = dict(hungarian="hungarian", precision="many_to_one_precision", iou="many_to_one_iou")


# The plain reference: every pixel's token in float32, every score a pass over all pixels.
def plain_points(tokens, size, components=50):
    "Principal components of standardized tokens at every pixel [n * height * width, components]."
    pixels = F.interpolate(tokens.float().permute(0, 3, 1, 2), size=size, mode="bilinear")
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, tokens.shape[-1]).numpy()
    pixels = (pixels - pixels.mean(0)) / pixels.std(0)
    return PCA(min(components, pixels.shape[1]), svd_solver="covariance_eigh").fit_transform(pixels)


def plain_clusters(points, k, seed=0, max_iter=50, n_init=5, points_per_centroid=256):
    number, rng = min(k * points_per_centroid, len(points)), np.random.default_rng(seed)
    some = np.sort(rng.choice(len(points), number, replace=False, shuffle=False))   # ours, for the same seed
    model = KMeans(k, init="random", n_init=n_init, max_iter=max_iter, tol=0, random_state=seed)
    return model.fit(points[some]).predict(points).astype(np.int64)


def plain_pair_score(clusters, classes, cluster, label, precision):
    predicted, true = clusters == cluster, classes == label
    hit, wrong = np.sum(predicted & true), np.sum(predicted & ~true)
    whole = hit + wrong if precision else hit + wrong + np.sum(~predicted & true)
    return hit / whole if whole else 0.


def plain_matching(clusters, classes, k, num_classes, matching):
    "The class of each cluster, {cluster: class}: pairs scored one by one."
    def score(j, c): return plain_pair_score(clusters, classes, j, c, matching == "precision")
    pairs = [[score(j, c) for c in range(num_classes)] for j in range(k)]
    if matching == "hungarian": return dict(zip(*linear_sum_assignment(np.array(pairs), maximize=True)))
    return {j: int(np.argmax(row)) for j, row in enumerate(pairs)}


def plain_miou(clusters, classes, k, num_classes, matching):
    "mIoU over the classes present, in percent."
    predicted = np.full(len(clusters), -1)
    given = plain_matching(clusters, classes, k, num_classes, matching)
    for j, c in given.items(): predicted[clusters == j] = c
    present = [c for c in range(num_classes) if (classes == c).any()]
    return 100 * np.mean([plain_pair_score(predicted, classes, c, c, False) for c in present])


def plain_overcluster(tokens, masks, ks, num_classes, seed=0):
    "The mIoU of every k, {k: {matching: percent}}, and the clusters of all pixels, {k: [n]}."
    points, classes = plain_points(tokens, tuple(masks.shape[1:])), masks.numpy().astype(np.int64).reshape(-1)
    valid, scores, labels = classes != IGNORE, {}, {}
    for k in ks:
        clusters = plain_clusters(points, k, seed)
        labels[k], clusters = clusters.astype(np.uint16), clusters[valid]
        rules = ["hungarian"] if k == num_classes else ["precision", "iou"]
        scores[k] = {rule: plain_miou(clusters, classes[valid], k, num_classes, rule) for rule in rules}
    return scores, labels


# Ours
def ours(tokens, masks, ks, num_classes, seeds=0):
    "A row per k and seed."
    classes = [str(c) for c in range(num_classes)]
    return overcluster_tokens({"tokens": tokens}, masks, classes, ks, FRANCA, seeds).frame


def by_matching(frame, num_classes):
    def scores(row):
        if row.k == num_classes: return {"hungarian": row.miou}
        return {"precision": row.miou_precision, "iou": row.miou_iou}
    return {row.k: scores(row) for row in frame.itertuples()}


def from_counts(labels, masks, scores, num_classes):
    "What the library makes of the reference's own clusters: the largest difference of mIoU, in points."
    differences = []
    for k, of in scores.items():
        confusion = confusion_matrix(labels[k].astype(int), masks, k, num_classes)
        for rule, miou in of.items():
            iou = class_iou(confusion, match_clusters(confusion, MATCHINGS[rule]))
            differences.append(abs(100 * np.nanmean(iou) - miou))
    return max(differences)


# Measuring
training = []   # seconds of wall and CPU time inside K-means' fit, the same library call on both sides

def timed(fit):
    def wrapped(*args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        try: return fit(*args, **kwargs)
        finally: training.append((time.perf_counter() - wall, time.process_time() - cpu))
    return wrapped


def peak_memory():
    "Bytes at the peak of this process. (`getrusage` counts from before the process became this program.)"
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def one(which, file, ks):
    "One measurement: seconds, memory and scores."
    tokens, masks = torch.load(file, mmap=True)
    warm = np.random.default_rng(0).random((600, 2))
    plain_clusters(warm, 2)     # first use of scikit-learn and BLAS is not what is timed
    KMeans.fit = timed(KMeans.fit)
    before, start, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    made = (plain_overcluster if which == "plain" else ours)(tokens, masks, ks, CLASSES)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
    fit, fit_cpu = map(sum, zip(*training))
    row = dict(seconds=seconds, cpu_seconds=cpu, rest_seconds=seconds - fit, rest_cpu_seconds=cpu - fit_cpu,
               peak_gb=peak / 1e9, import_gb=before / 1e9, work_gb=(peak - before) / 1e9)
    if which == "ours": return row | dict(miou=by_matching(made, CLASSES))
    scores, labels = made
    return row | dict(miou=scores, from_counts=from_counts(labels, masks, scores, CLASSES))


def spread(file, ks, seeds=range(4)):
    "Mean and std of the library's mIoU over seeds: {k: [mean, std]}."
    frame = ours(*torch.load(file, mmap=True), ks, CLASSES, seeds).groupby("k").miou
    return {k: [scores.mean(), scores.std()] for k, scores in frame}


def lloyd(points, k, algorithm="lloyd"):
    once = dict(n_init=1, max_iter=FRANCA.max_iter, tol=0, random_state=0)
    KMeans(k, init="random", algorithm=algorithm, **once).fit(points)

def elkan(points, k): lloyd(points, k, "elkan")

def faiss(points, k):
    import faiss
    once = dict(nredo=1, niter=FRANCA.max_iter, seed=0)
    faiss.Kmeans(points.shape[1], k, max_points_per_centroid=len(points), **once).train(points)


def train_seconds(file, ks):
    "CPU seconds of one restart of K-means on the points of each k, by several means."
    tokens, _ = torch.load(file, mmap=True)
    moments = new_moments(tokens.shape[1:3], tokens.shape[3], FRANCA).update(tokens)
    maps, rows = reduce_tokens(tokens, moments, FRANCA), []
    for k in ks:
        points = draw_points(maps, FRANCA.points_per_centroid * k, 0, (100, 100)).numpy()
        row = dict(k=k, points=len(points))
        for fit in (lloyd, elkan, faiss):
            start = time.process_time()
            try: fit(points, k)
            except ImportError: row[fit.__name__] = None   # faiss is optional
            else: row[fit.__name__] = time.process_time() - start
        rows.append(row)
    return rows


def alone(what, tokens, masks, ks, threads):
    "Runs a measurement in a process of its own, with so many threads."
    with tempfile.NamedTemporaryFile(suffix=".pt") as f:
        torch.save((tokens, masks), f.name)
        env = os.environ | {f"{lib}_NUM_THREADS": str(threads) for lib in ("OMP", "OPENBLAS", "MKL")}
        command = [sys.executable, __file__, "--one", what, f.name, *map(str, ks)]
        out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode: raise RuntimeError(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def measure(which, tokens, masks, ks, threads):
    images, height, width, dim = tokens.shape
    row = alone(which, tokens, masks, ks, threads)
    print(f"{which:6} {images:5} images {height}x{width} D={dim:4} K={','.join(map(str, ks)):12} "
          f"{row['seconds']:8.1f} s (CPU {row['cpu_seconds']:6.1f}, "
          f"beside K-means training {row['rest_cpu_seconds']:6.1f}) "
          f"{row['peak_gb']:7.2f} GB (work {row['work_gb']:.2f})", flush=True)
    return dict(images=images, grid=(height, width), D=dim, ks=list(ks), which=which, threads=threads) | row


# What is measured
def random_tokens(images, grid, dim, dtype=torch.float32, size=100):
    "Tokens that tell their class weakly and are noise otherwise, and masks of 5x5 blocks."
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(CLASSES, (images, 1, 5, 5), generator=g).float()
    means = torch.randn(CLASSES, dim, generator=g) / 2
    cells = F.interpolate(blocks, size=(grid, grid))[:, 0].long()
    tokens = torch.empty(images, grid, grid, dim, dtype=dtype)
    for i in range(images): tokens[i] = means[cells[i]] + torch.randn(grid, grid, dim, generator=g)
    return tokens, F.interpolate(blocks, size=(size, size))[:, 0].to(torch.uint8)


def voc_tokens(folder, checkpoint, most):
    from rasa_nb.data import VOCSegmentation
    from rasa_nb.reading import Evaluation, Transformed
    from rasa_nb.encoders import load_encoder
    encoder = load_encoder("deit_tiny_patch16_224", checkpoint=checkpoint)
    data = VOCSegmentation(folder, "val")
    shown = Transformed(data.first(min(most, len(data))), Evaluation(224, 100))
    return [torch.cat(parts) for parts in zip(*encoder.encode(shown))]


def compare(title, tokens, masks, ks, threads):
    "Both sides on the same tokens."
    plain, mine = (measure(which, tokens, masks, ks, threads) for which in ("plain", "ours"))
    measured = ("seconds", "cpu_seconds", "rest_seconds", "rest_cpu_seconds", "peak_gb", "work_gb")
    ratio = {key: plain[key] / mine[key] for key in measured}
    print(f"{title}: {ratio['seconds']:.1f} x faster ({ratio['rest_seconds']:.1f} x beside training), "
          f"1/{ratio['peak_gb']:.1f} of the memory (1/{ratio['work_gb']:.1f} beyond imports)", flush=True)
    off = plain["from_counts"]
    if off > 1e-9: raise AssertionError(f"{title}: the same clusters score differently, by {off} points")
    return dict(title=title, plain=plain, ours=mine, ratio=ratio)


def extrapolate(case, images, dim):
    "What the reference would take at least: training stays, all else grows with images and numbers held."
    row, times = case["plain"], images / case["plain"]["images"]
    def longer(kind): return row[f"{kind}seconds"] + (times - 1) * row[f"rest_{kind}seconds"]
    held = row["work_gb"] * times * dim / row["D"]
    return dict(seconds=longer(""), cpu_seconds=longer("cpu_"), images=images, D=dim, work_gb=held)


def grow(images, ks, threads=1):
    "Time and memory of both sides along each axis, two processes of one thread at a time."
    axes = dict(images=[(n, 192, ks[:1]) for n in (images, 2 * images, 4 * images)],
                D=[(images, dim, ks[:1]) for dim in (192, 384, 768)],
                K=[(images, 192, (k,)) for k in ks])
    def both(cases): return [(which, case) for case in cases for which in ("plain", "ours")]
    def do(job):
        which, (n, dim, ks) = job
        return measure(which, *random_tokens(n, 14, dim), ks, threads)
    jobs = list(dict.fromkeys(sum(map(both, axes.values()), [])))   # the axes meet in one case
    with ThreadPoolExecutor(max(1, psutil.cpu_count() // threads)) as pool:
        rows = dict(zip(jobs, pool.map(do, jobs)))
    return {axis: [rows[job] for job in both(cases)] for axis, cases in axes.items()}


def held(images, dim):
    "Bytes that the reference holds at most: three copies of all pixels' tokens."
    return 3 * images * 100 * 100 * dim * 4


def affordable(free, most=445, dim=192):
    "Images and D of the largest random case whose reference fits: fewer dimensions before fewer images."
    while dim > 64 and held(most, dim) > free: dim -= 64
    return max(2, min(most, int(free / held(1, dim)))), dim


def main(args):
    memory = psutil.virtual_memory().available
    free = args.share * memory
    machine = dict(cpus=psutil.cpu_count(), threads=args.threads, free_gb=round(memory / 1e9, 1),
                   torch=torch.__version__, python=platform.python_version(), load=psutil.getloadavg()[0])
    images, dim = affordable(free, args.images)
    compared, extra = [], {}
    if args.voc:
        case = voc_tokens(args.voc, args.checkpoint, max(2, int(free / held(1, 192))))
        title = f"DeiT-Tiny tokens of {len(case[0])} VOC val images"
        compared.append(compare(title, *case, args.ks, args.threads))
        extra = dict(over_seeds=alone("spread", *case, args.ks, args.threads),
                     training=alone("training", *case, args.ks, 1))
    case = random_tokens(images, 32, dim, torch.float16)
    compared.append(compare(f"random tokens, {images} images, D={dim}", *case, args.ks, args.threads))
    scaled = (f"VOC val has 1449 images and ViT-B D=768, which would take the reference "
              f"{held(1449, 768) / 1e9:.0f} GB: scaled down to {images} images and D={dim}, "
              f"what fits in {free / 1e9:.0f} GB and in minutes")
    growth = grow(max(2, min(25, images // 4)), args.ks)
    whole = 1449 if args.share > .2 else images
    full = measure("ours", *random_tokens(whole, 32, 768, torch.float16), args.ks, args.threads)
    full = dict(ours=full, plain_extrapolated=extrapolate(compared[-1], whole, 768))
    record = dict(machine=machine, protocol="franca", share=args.share, scaled=scaled, compared=compared,
                  **extra, full_size=full, growth=growth)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def options():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--voc", help="folder that holds VOCdevkit")
    parser.add_argument("--checkpoint", help="DeiT-Tiny weights")
    parser.add_argument("--ks", type=int, nargs="+", default=KS, help="numbers of clusters")
    parser.add_argument("--share", type=float, default=.6,
                        help="of the free memory that the reference may take; below .2 all is small")
    parser.add_argument("--images", type=int, default=445,
                        help="of the random case, at most; its reference takes about half a second for each")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(), help="of each compared process")
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    args = options()
    args.ks = tuple(args.ks)
    if args.one:
        what, file, *ks = args.one
        do = dict(spread=spread, training=train_seconds).get(what) or (lambda *case: one(what, *case))
        print(json.dumps(do(file, tuple(map(int, ks)))))
    else: main(args)
