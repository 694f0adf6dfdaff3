"""Runs nbs/studies/tiny.ipynb once per objective, into benchmarks/results/tiny_objectives.json.

    python benchmarks/tiny_objectives.py [--steps 130] [--only NAME]

Rows that the file already holds for the same parameters are kept, so you can stop it and start it again.
"""
import argparse
import json
import tempfile
from pathlib import Path

import papermill as pm

from rasa_nb.store import atomic

root = Path(__file__).parent.parent
notebook = root / "nbs" / "studies" / "tiny.ipynb"
table = root / "benchmarks" / "results" / "tiny_objectives.json"
note = "rows with `by` in their parameters come from exploration, all others from nbs/studies/tiny.ipynb"
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


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--n-train", type=int, default=3000)
    parser.add_argument("--only", choices=list(ROWS))
    return parser.parse_args()


def run(parameters):
    "The record of one run of the notebook."
    with tempfile.TemporaryDirectory() as folder:
        given = dict(parameters, out_dir=folder, kmeans_seeds=0)
        pm.execute_notebook(notebook, Path(folder) / "out.ipynb", given, progress_bar=False)
        return json.loads((Path(folder) / "run.json").read_text())


def row_of(name, parameters):
    record = run(parameters)
    scores = {key: value for key, value in record["curve"][-1].items() if key != "step"}
    return dict(what=name, **scores, images=record["images"], parameters=parameters)


def write(rows):
    held = dict(command="python benchmarks/tiny_objectives.py", note=note, runs=rows)
    with atomic(table) as part: part.write_text(json.dumps(held, indent=1))


def main():
    args = arguments()
    budget = dict(steps=args.steps, batch_size=args.batch_size, n_train=args.n_train)
    rows = json.loads(table.read_text())["runs"] if table.exists() else []
    for name in [args.only] if args.only else ROWS:
        parameters = dict(budget, eval_every=args.steps, n_eval=250, **ROWS[name])
        if any(row["what"] == name and row["parameters"] == parameters for row in rows): continue
        new = row_of(name, parameters)
        rows = [row for row in rows if row["what"] != name] + [new]
        write(rows)
        print(new, flush=True)


if __name__ == "__main__": main()
