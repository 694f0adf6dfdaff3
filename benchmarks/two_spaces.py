"""Raw tokens within an image, debiased ones across images? INSID3's rule, asked of patches and their classes.

    python benchmarks/two_spaces.py --mae runs/mae/tiny.safetensors

Each patch asks for its ten nearest by cosine: in its own image, in its own image but four cells or more away
(where the place is no help), and in other images (of other scenes). The score is the share of them that have its class, in
percent, mean over images; beside it stands the share among the patches that are nearest *in place*. Patches of
void are left out, and images of a single class. Heads are those that benchmarks/methods.py fitted. Writes
results/two_spaces.json, case by case, and prints Markdown.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from rasa_nb.dense import patch_classes
from rasa_nb.reading import Evaluation, Reading, Transformed
from rasa_nb.store import atomic
from rasa_nb.yardstick import number_groups

from cases import CASES, SHARED, open_case
from methods import fitted, load, rounded

here = Path(__file__).resolve().parent
METHODS = ["RASA", "position mean", "blank-image SVD, 10", "random subspace"]
NEIGHBORS, FAR = 10, 4    # patches; cells


def tokens_and_classes(encoder, data, size):
    "Unit tokens [n, P, D], the class of each patch [n, P] (-1: void), and the places of cells [P, 2]."
    z, masks = zip(*encoder.encode(Transformed(data, Evaluation(size, size)), Reading(size)))
    z, masks = torch.cat(z), torch.cat(masks)
    shares = patch_classes(masks, z.shape[1:3], data.num_classes, data.ignore_index).flatten(1, 2)
    known = shares.sum(-1) > .5
    rows, columns = torch.meshgrid(*map(torch.arange, z.shape[1:3]), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1).float()
    return F.normalize(z.flatten(1, 2).float(), dim=-1), torch.where(known, shares.argmax(-1), -1), places


def agreement(likeness, classes, others, allowed):
    "Share of the nearest allowed patches that have the class of the one that asks, mean over patches."
    likeness = likeness.masked_fill(~allowed | (others < 0), -torch.inf)
    found = likeness.topk(NEIGHBORS)
    asked = (classes >= 0) & found.values[:, -1].isfinite()    # those that have as many
    same = others[found.indices] == classes[:, None]
    return float(same[asked].float().mean()) if asked.any() else np.nan


def scores(encoder, data, size, pool=40):
    "Percent by the kind of neighbors, mean over images of two classes or more."
    z, classes, places = tokens_and_classes(encoder, data, size)
    groups = torch.as_tensor(number_groups(getattr(data, "groups", None), len(data)))
    apart = torch.cdist(places, places)
    generator, rows = torch.Generator().manual_seed(0), []
    for i in [i for i in range(len(z)) if len(set(classes[i].tolist()) - {-1}) > 1]:
        others = torch.randperm(len(z), generator=generator)
        others = others[groups[others] != groups[i]][:pool]
        own = z[i] @ z[i].T
        across = z[i] @ z[others].flatten(0, 1).T
        all_of_them = torch.ones(across.shape, dtype=torch.bool)
        rows.append({
            "within": agreement(own, classes[i], classes[i], apart > 0),
            "within, far": agreement(own, classes[i], classes[i], apart >= FAR),
            "across": agreement(across, classes[i], classes[others].flatten(), all_of_them),
            "nearest in place": agreement(-apart, classes[i], classes[i], apart > 0)})
    table = pd.DataFrame(rows)
    return {kind: [100 * value for value in table[kind]] for kind in table}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES)[:6], metavar="CASE", help=", ".join(CASES))
    add("--mae", type=Path, help="weights of the masked autoencoder, of tiny's architecture")
    add("--images", type=int, default=150, help="the first so many of the split")
    add("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    add("--folder", type=Path, default=here.parent / "runs" / "methods", help="of fitted heads")
    add("--out", type=Path, default=here / "results" / "two_spaces.json")
    args = parser.parse_args()
    args.reading, record = Reading(), load(args.out)
    for name in [name for name in args.cases if name not in record]:
        case = open_case(name, args.shared, args.mae)
        heads = fitted(name, case, args)
        encoders = {"none": case.encoder} | {method: heads[method] for method in METHODS}
        data = case.report.first(args.images)
        found = {method: scores(encoder, data, case.size) for method, encoder in encoders.items()}
        record[name] = dict(scored=data.describe(), neighbors=NEIGHBORS, far=FAR, scores=found)
        with atomic(args.out) as part: part.write_text(json.dumps(rounded(record)))
        means = {method: pd.DataFrame(of).mean() for method, of in found.items()}
        print(f"{name}\n\n{pd.DataFrame(means).T.round(1).to_markdown()}\n", flush=True)


if __name__ == "__main__": main()
