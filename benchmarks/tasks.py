"""Every method in every task: overclustering, linear and in-context segmentation, at one size, from three seeds.

    python benchmarks/tasks.py --mae runs/mae/tiny.safetensors
    python benchmarks/tasks.py --cases "galileo on water" tiny --tasks linear in_context
    python benchmarks/tasks.py --cases tiny --images 60 --steps 20 --folder quick --out quick.json
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --cases tiny --cost --steps 50 \\
        --folder runs/cost --out benchmarks/results/tasks_cost.json

Heads are those that benchmarks/methods.py fitted, and are fitted where they are not there yet. What is learned
with labels is learned on the split `pick` and scored on `report`. Fills results/tasks.json case by case and goes
on where it was stopped: finished runs are kept in --folder. Prints Markdown. The last command measures what it
costs to score all methods at once, in linear and in-context segmentation, against each task and method by itself.
"""
import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch

from rasa_nb.linear import STORED_LINEAR, linear_segmentation
from rasa_nb.matching import LEOPART
from rasa_nb.reading import Reading
from rasa_nb.retrieval import UPRIGHT, in_context
from rasa_nb.store import atomic
from rasa_nb.tasks import TASKS, evaluate

from cases import CASES, SHARED, open_case
from methods import fitted, load, rounded

here = Path(__file__).resolve().parent


def protocols(case, args):
    "The protocols of a case: K-means started once, and masks of 100 px for all tasks."
    clusters = LEOPART.replace(n_init=1, max_iter=30, k=case.k)
    linear = STORED_LINEAR.replace(unseen="score", steps=args.steps or STORED_LINEAR.steps)
    return dict(overcluster=clusters, linear=linear, in_context=UPRIGHT.replace(mask_size=100, unseen="score"))


def run_case(name, args):
    "The record of a case."
    case, start = open_case(name, args.shared, args.mae), time.perf_counter()
    heads = fitted(name, case.first(args.images) if args.images else case, args)
    if args.images: case = case.first(args.images)
    chosen = {method: heads[method] for method in args.methods or heads}
    table = evaluate({"none": case.encoder} | chosen, case.pick, case.report, args.tasks, case.size, args.seeds,
                     args.reading, args.folder / "tasks", protocols(case, args), examples=())
    print(f"# {name}\n\n{table.to_markdown()}\n", flush=True)
    about = dict(size=case.size, tasks=list(args.tasks), minutes=(time.perf_counter() - start) / 60)
    return about | table.to_dict()


def cost(name, args):
    "What linear and in-context segmentation take, of all methods at once and one by one: time, images, memory."
    case = open_case(name, args.shared, args.mae).first(args.images or 60)
    encoders = {"none": case.encoder} | fitted(name, case, args)
    knobs, splits, seen = protocols(case, args), (case.pick, case.report), []
    case.encoder.model.patch_embed.register_forward_hook(lambda module, images, out: seen.append(len(out)))
    rest = dict(image_size=case.size, seeds=(0,), reading=args.reading.replace(progress=False), examples=())
    def together(): evaluate(encoders, *splits, ("linear", "in_context"), protocols=knobs, **rest)
    def one_by_one():
        for method, encoder in encoders.items():
            linear_segmentation({method: encoder}, *splits, knobs["linear"], **rest)
            in_context({method: encoder}, *splits, knobs["in_context"], **rest)
    def measured(run):
        start, before = time.process_time(), peak_mb()
        run()
        return dict(cpu_seconds=time.process_time() - start, encoded=sum(seen), more_mb=peak_mb() - before)
    about = dict(encoders=len(encoders), images=len(case.pick) + len(case.report), threads=torch.get_num_threads())
    return about | dict(together=in_a_child(measured, together), alone=in_a_child(measured, one_by_one))


def in_a_child(function, *args):
    "What the function returns, run in a process of its own, so that its memory is its own."
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(function(*args)))
    child.start()
    theirs.close()    # so that a child that dies ends the wait
    told = ours.recv()
    child.join()
    return told


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES)[:6], metavar="CASE", help=", ".join(CASES))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--methods", nargs="+", metavar="METHOD", help="names as in benchmarks/methods.py; all by default")
    add("--mae", type=Path, help="weights of the masked autoencoder, of tiny's architecture")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, help="of the linear layer; the protocol's by default")
    add("--images", type=int, help="the first so many of each split; all by default")
    add("--cost", action="store_true", help="measure what it costs at once and one by one, instead")
    add("--shared", type=Path, default=SHARED, help="folder of real weights and data")
    add("--batch_size", type=int, default=32)
    add("--folder", type=Path, default=here.parent / "runs" / "methods", help="of fitted heads and finished runs")
    add("--out", type=Path, default=here / "results" / "tasks.json")
    args = parser.parse_args()
    args.reading = Reading(batch_size=args.batch_size, progress=True)
    return args


def main():
    args = arguments()
    if args.cost:
        told = {name: rounded(cost(name, args)) for name in args.cases}
        with atomic(args.out) as part: part.write_text(json.dumps(told, indent=1))
        return print(json.dumps(told, indent=1))
    record = load(args.out)
    asked = dict(tasks=args.tasks, methods=args.methods, seeds=args.seeds, images=args.images, steps=args.steps)
    for name in args.cases:
        if name in record and record[name].get("asked") == asked: continue
        if name == "mae" and not args.mae:
            print("mae: left out, as --mae names no weights", flush=True)
            continue
        record[name] = run_case(name, args) | dict(asked=asked)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(args.out) as part: part.write_text(json.dumps(rounded(record)))


if __name__ == "__main__": main()
