"""Every way of removing position on several encoders: position left, and mIoU of clusters.

    papermill nbs/studies/tiny.ipynb out.ipynb -p objective pixels -p own_weight 0.0 -p place_weight 0.0 \\
        -p steps 1000 -p batch_size 32 -p n_train 3000 -p eval_every 1000 -p n_eval 250 -p kmeans_seeds 0 \\
        -p out_dir runs/mae
    python benchmarks/methods.py --mae runs/mae/tiny.safetensors
    python benchmarks/methods.py --cases tiny "galileo on water" --parts pick report
    python benchmarks/methods.py --cases tiny --parts pick --images 60 --k 24 --folder quick --out quick.json

The first command makes the masked autoencoder. The second fills results/methods.json part by part and goes on
where it was stopped: heads and finished K-means runs are kept in --folder. The parts of a case:

    pick      all methods, on the split whose labels the rule may look at; one K-means start
    report    the same, and raw pixels, on the other split
    full      none, RASA and position mean on that split, with all restarts of the protocol
    whole     all methods on both splits together, for the satellite scenes, of which there are few
    mlp       what a small network still reads of position, added to `report`
    matching  both ways of naming clusters, against the number of images

Prints Markdown, and the default method by the rule of nbs/03b_comparison.ipynb.
"""
import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

from rasa_nb.baselines import roster
from rasa_nb.comparison import Comparison, RandomSubspace, choose_default, compare_methods, raw_pixels
from rasa_nb.data import VOCSegmentation
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.matching import LEOPART
from rasa_nb.measures import position_r2
from rasa_nb.rasa import RASA, fit_together
from rasa_nb.reading import Reading
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import overcluster
from rasa_nb.store import atomic

from cases import CASES, SHARED, open_case

here = Path(__file__).resolve().parent
METHODS = ["RASA as released", "RASA as in the paper", "RASA", "position mean",
           "position mean + RASA, fourier", "LEACE, coords", "LEACE, fourier",
           "blank-image SVD, 4", "blank-image SVD, 10", "blank-image SVD, D/2"]
PARTS = ["pick", "report", "whole", "full", "mlp", "matching"]


def removers(names=METHODS):
    "Name -> method, not fitted, and the control of RASA's rank."
    return {name: roster()[name] for name in names} | {"random subspace": RandomSubspace()}


def compared(case, split, encoders, args, protocol, seeds):
    "The comparison of fitted methods on a split."
    reading = args.reading.replace(size=case.size)
    return compare_methods(case.encoder, case.learn, split, encoders, args.k or case.k, seeds, reading,
                           protocol=protocol, folder=args.folder)


def run_case(name, part, record, args):
    "Fills a part of a case if it is missing, and writes the record."
    if part in record.setdefault(name, {}): return
    case = open_case(name, args.shared, args.mae)
    if part == "whole" and case.whole is None: return
    if args.images: case = case.first(args.images)
    record[name][part] = RUN[part](case, fitted(name, case, args), args)
    save(args.out, record)
    print(f"{name}: {part} done", flush=True)


def fitted(name, case, args):
    "Name -> debiased encoder; fitted once, its heads are kept beside the K-means runs."
    folder = args.folder / name.replace(" ", "_")
    files = {method: folder / re.sub("[^a-zA-Z0-9]+", "_", method) for method in removers()}
    missing = {method: remover for method, remover in removers().items() if not files[method].exists()}
    if missing:
        encoders = fit_together(missing, case.encoder, case.learn, args.reading.replace(size=case.size))
        folder.mkdir(parents=True, exist_ok=True)
        for method, encoder in encoders.items(): encoder.head.save(files[method])
    heads = {method: RASAHead.load(file) for method, file in files.items()}
    return {method: DebiasedEncoder(case.encoder, head, method) for method, head in heads.items()}


def pick(case, encoders, args):
    return compared(case, case.pick, encoders, args, args.fewer, range(args.seeds)).to_dict()


def report(case, encoders, args):
    pixels = raw_pixels(case.encoder.patch_size, case.size)
    every = encoders | {"raw pixels": pixels}
    return compared(case, case.report, every, args, args.fewer, range(args.seeds)).to_dict()


def full(case, encoders, args):
    chosen = {name: encoders[name] for name in ("RASA", "position mean")}
    return compared(case, case.report, chosen, args, args.protocol, range(args.seeds)).to_dict()


def whole(case, encoders, args):
    return compared(case, case.whole, encoders, args, args.fewer, range(args.seeds)).to_dict()


def mlp(case, encoders, args):
    every, reading = {"none": case.encoder} | encoders, args.reading.replace(size=case.size)
    shown = dict(augmented=reading, upright=reading.replace(augment="none"))
    return {f"mlp {kind}": position_r2(every, case.report, how, "mlp").mean for kind, how in shown.items()}


RUN = dict(pick=pick, report=report, whole=whole, full=full, mlp=mlp)


def matching_cases(args):
    "Yields a name, its encoders, images, size, and the numbers of images that are scored."
    for name in ("tiny", "deit on VOC", "mae_cifar on VOC"):
        case = open_case(name, args.shared, args.mae)
        on_scenes = name == "tiny"
        data = Scenes("test", 1000) if on_scenes else VOCSegmentation(args.shared / "data", "trainval")
        rasa = RASA().fit(case.encoder, case.learn, args.reading.replace(size=case.size))
        encoders = {"none": case.encoder, "RASA": rasa.attach(case.encoder, "RASA")}
        yield name, encoders, data, case.size, (50, 100, 200, 500, 1000) if on_scenes else (50, 100, 200, 400)


def matching(record, args):
    "Fills the rows of the figure: both ways of naming against images and clusters."
    if "matching" in record: return
    rows, seeds = [], range(args.matching_seeds)
    for name, encoders, data, size, numbers in matching_cases(args):
        for number in numbers:
            shown, reading = data.first(number), args.reading.replace(size=size)
            result = overcluster(encoders, shown, (30, 100, 300), args.fewer, seeds, reading, args.folder)
            frame = result.frame[["encoder", "k", "seed", "miou", "held_out"]]
            rows += [dict(case=name, images=number, **row) for row in frame.to_dict("records")]
            print(f"matching: {name}, {number} images done", flush=True)
    record["matching"] = rows
    save(args.out, record)


def save(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part: part.write_text(json.dumps(rounded(record)))


def rounded(value):
    "Numbers to five digits behind the point: as many as any table shows, and more."
    if isinstance(value, dict): return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


def load(path): return json.loads(path.read_text()) if path.exists() else {}


def comparisons(record, part):
    "The comparisons of a part, `report` with what a network reads if that was measured."
    found = {name: of for name, of in record.items() if name in CASES and part in of}
    each = {name: Comparison.from_dict(of[part]) for name, of in found.items()}
    if part != "report": return each
    return {name: replace(c, r2=c.r2 | found[name].get("mlp", {})) for name, c in each.items()}


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--mae", type=Path, help="weights of the masked autoencoder, of tiny's architecture")
    add("--seeds", type=int, default=5, help="of K-means")
    add("--matching_seeds", type=int, default=3, help="of K-means, in `matching`")
    add("--k", type=int, nargs="+", help="numbers of clusters; the protocol's, or the case's, by default")
    add("--images", type=int, help="the first so many of each split; all by default")
    add("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    add("--batch_size", type=int, default=32)
    add("--folder", type=Path, default=here.parent / "runs" / "methods", help="of finished K-means runs")
    add("--out", type=Path, default=here / "results" / "methods.json")
    args = parser.parse_args()
    args.protocol, args.fewer = LEOPART, LEOPART.replace(n_init=1, max_iter=30)
    args.reading = Reading(batch_size=args.batch_size, progress=True)
    return args


def main():
    args = arguments()
    record = load(args.out)
    for part in args.parts:    # all cases of a part first, so that the rule can be applied early
        for name in args.cases if part in RUN else []: run_case(name, part, record, args)
    if "matching" in args.parts: matching(record, args)
    for part in ("report", "whole", "full"):
        for c in comparisons(record, part).values(): print(f"\n{c.to_markdown()}\n")
    picked = list(comparisons(record, "pick").values())
    if not picked: return
    choice = choose_default(picked)
    record["choice"] = choice.to_dict()
    save(args.out, record)
    print(f"Default by the rule: {choice.method or 'none'}. {choice.reason}.\n\n{choice.table.to_string()}")


if __name__ == "__main__": main()
