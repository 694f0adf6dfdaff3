"""What removal does beside clusters: segmentation in context, and a ridge probe of the classes.

    python benchmarks/tasks.py --mae runs/mae/tiny.safetensors

In context: the patches of the split `pick` are the memory, the mean class of a patch is its value; a patch of
`report` takes the 30 nearest by cosine, weighted by a softmax at temperature 0.02. The probe is a ridge
regression on the same patches. Beside them stand the most frequent class, and the classes of each cell alone.
Heads are those that benchmarks/methods.py fitted. Writes benchmarks/results/tasks.json, case by case.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rasa_nb.matching import class_iou, confusion_matrix
from rasa_nb.reading import Reading
from rasa_nb.store import atomic

from cases import CASES, SHARED, open_case
from methods import fitted

here = Path(__file__).resolve().parent
METHODS = ["RASA", "position mean", "RASA as in the paper", "blank-image SVD, 10", "random subspace"]


def patches_of(encoder, data, size):
    "Tokens [n, gh, gw, D], the mean class of each patch [n, gh, gw, C], and masks [n, size, size]."
    reading, tokens, masks = Reading(size), [], []
    for z, mask in encoder.encode(reading.apply(data), reading, "tasks"):
        tokens.append(z)
        masks.append(mask.long())
    tokens, masks = torch.cat(tokens), torch.cat(masks)
    known = (masks != data.ignore_index)[..., None]
    one_hot = F.one_hot(masks.where(known[..., 0], 0), data.num_classes) * known
    pooled = F.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), tokens.shape[1:3])
    return tokens, pooled.permute(0, 2, 3, 1), masks


def in_context(keys, values, queries):
    "Mean value of each query's 30 nearest keys [q, C]."
    keys, queries = F.normalize(keys, dim=-1), F.normalize(queries, dim=-1)
    found = []
    for some in queries.split(1024):
        cosine, nearest = (some @ keys.T).topk(30)
        weights = (cosine / .02).softmax(-1)
        found.append((weights[..., None] * values[nearest]).sum(1))
    return torch.cat(found)


def ridge(keys, values, queries):
    "What a ridge regression of the values on the standardized keys says of the queries [q, C]."
    mean, std = keys.mean(0), keys.std(0).clamp_min(1e-6)
    x, y = ((keys - mean) / std).double(), values.double()
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return ((queries - mean) / std).double() @ weights + y.mean(0)


def miou(told, masks, ignore_index):
    "mIoU in percent of class scores [n, gh, gw, C], upsampled to the masks, over the classes that occur."
    maps = F.interpolate(told.float().permute(0, 3, 1, 2), masks.shape[1:], mode="bilinear")
    classes = told.shape[-1]
    counts = confusion_matrix(maps.argmax(1), masks, classes, classes, ignore_index)
    return 100 * float(np.nanmean(class_iou(counts, np.arange(classes))))


def scores(encoder, case):
    "Score of each task by name."
    tokens, labels, _ = patches_of(encoder, case.pick, case.size)
    asked, _, masks = patches_of(encoder, case.report, case.size)
    there = labels.sum(-1).flatten() > .5    # patches that are mostly void name nothing
    keys, values = tokens.flatten(0, 2)[there], labels.flatten(0, 2)[there]
    queries, shape = asked.flatten(0, 2), (*asked.shape[:3], labels.shape[-1])
    told = {name: task(keys, values, queries).view(shape)
            for name, task in dict(context=in_context, ridge=ridge).items()}
    told["cell alone"] = labels.mean(0).expand(shape)
    told["constant class"] = labels.mean((0, 1, 2)).expand(shape)
    return {name: miou(each, masks, case.report.ignore_index) for name, each in told.items()}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES)[:6], metavar="CASE")
    add("--mae", type=Path, help="weights of the masked autoencoder, of tiny's architecture")
    add("--shared", type=Path, default=SHARED)
    add("--images", type=int, default=200, help="the first so many of each split of scenes")
    add("--folder", type=Path, default=here.parent / "runs" / "methods", help="of fitted heads")
    add("--out", type=Path, default=here / "results" / "tasks.json")
    args = parser.parse_args()
    args.reading = Reading()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in [name for name in args.cases if name not in record]:
        case = open_case(name, args.shared, args.mae)
        heads = fitted(name, case, args)
        if "VOC" not in name and "water" not in name: case = case.first(args.images)
        encoders = {"none": case.encoder} | {method: heads[method] for method in METHODS}
        about = dict(memory=case.pick.describe(), scored=case.report.describe(), size=case.size)
        record[name] = about | dict(scores={method: scores(e, case) for method, e in encoders.items()})
        with atomic(args.out) as part: part.write_text(json.dumps(record))
        print(name, json.dumps(record[name]["scores"], indent=1), flush=True)


if __name__ == "__main__": main()
