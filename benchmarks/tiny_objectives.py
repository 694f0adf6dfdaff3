"""Runs nbs/01a_tiny.ipynb once per objective with one budget, and writes benchmarks/results/tiny_objectives.json.

    python benchmarks/tiny_objectives.py [--steps 130] [--only NAME]

Rows that the file already holds for the same parameters are kept, so that it can be interrupted and started again.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

import papermill as pm

root = Path(__file__).parent.parent
table = root / "benchmarks" / "results" / "tiny_objectives.json"
quiet = dict(place_weight=0.0)
ROWS = {
    "pixels (MAE)": dict(objective="pixels", own_weight=0.0, **quiet),
    "latents (data2vec, I-JEPA)": dict(objective="latents", own_weight=0.0, **quiet),
    "gradients, not seen (MaskFeat)": dict(own_weight=0.0, **quiet),
    "gradients, seen": dict(dropped_weight=0.0, **quiet),
    "gradients, both": quiet,
    "gradients, both, place to 1.2 nats (chosen)": {},
    "gradients, both, place without end": dict(place_level=0.0),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--n-train", type=int, default=3000)
parser.add_argument("--only", choices=list(ROWS))
args = parser.parse_args()


def write(runs):
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_name(table.name + ".part")
    part.write_text(json.dumps(dict(command="python benchmarks/tiny_objectives.py", note="rows with `by` in their parameters come from exploration, all others from nbs/01a_tiny.ipynb", runs=runs), indent=1))
    os.replace(part, table)


runs = json.loads(table.read_text())["runs"] if table.exists() else []
for name, changes in ROWS.items():
    parameters = dict(steps=args.steps, batch_size=args.batch_size, n_train=args.n_train, eval_every=args.steps, n_eval=250, **changes)
    if args.only not in (None, name) or any(r["what"] == name and r["parameters"] == parameters for r in runs): continue
    with tempfile.TemporaryDirectory() as folder:
        pm.execute_notebook(root / "nbs" / "01a_tiny.ipynb", Path(folder) / "out.ipynb", dict(parameters, out_dir=folder, kmeans_seeds=0), progress_bar=False)
        record = json.loads((Path(folder) / "run.json").read_text())
    row = dict(what=name, **{k: v for k, v in record["curve"][-1].items() if k != "step"}, images=record["images"])
    runs = [r for r in runs if r["what"] != name] + [dict(row, parameters=parameters)]
    write(runs)
    print(row, flush=True)
