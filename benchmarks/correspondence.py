"""What removal does to correspondence on PF-WILLOW, beside position alone and chance.

    python benchmarks/correspondence.py                  # about two minutes on one core
    python benchmarks/correspondence.py --cases tiny

For each encoder before and after RASA: PCK by the keypoints' box, of the nearest token and of the
soft-argmax, with the target as it is, flipped, turned and shifted. RASA learns from 200 images of the case,
whose masks are never looked at. The two kinds of objects that lie beside the project make 180 ordered pairs
of 20 images.
Writes benchmarks/results/correspondence.json, case by case. PF-WILLOW: Ham et al., 2016, for research.
"""
import argparse
import json
from pathlib import Path

from rasa_nb.keypoints import INSID3, NEAREST, VIEWS, PFWillow, correspondence
from rasa_nb.rasa import RASA
from rasa_nb.reading import Reading
from rasa_nb.store import atomic

from cases import SHARED, open_case

RESULTS = Path(__file__).resolve().parent / "results" / "correspondence.json"
CASES = ["tiny", "deit on VOC", "mae_cifar on VOC", "galileo on VOC"]
PROTOCOLS = dict(nearest=NEAREST, kernel=INSID3.replace(name="kernel"))


def measure(case):
    "Scores, changes and notes by protocol."
    remover = RASA().fit(case.encoder, case.learn, Reading(case.size))
    encoders = dict(before=case.encoder, after=remover.attach(case.encoder))
    results = {name: correspondence(encoders, PFWillow(SHARED / "data/pf_willow"), protocol, case.size, VIEWS)
               for name, protocol in PROTOCOLS.items()}
    about = dict(size=case.size, learned_from=case.learn.name, images=len(case.learn))
    about["removed"] = remover.basis_.shape[1]
    return about | {name: told(result) for name, result in results.items()}


def told(result):
    "What is kept of a result: scores by the box, rounded."
    found = result.to_dict()
    for name in ("scores", "controls"):
        found[name] = [rounded(row) for row in found[name] if row["relative"] == "box"]
    return found | dict(change=[rounded(row) for row in found["change"]])


def rounded(row):
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    for name in parser.parse_args().cases:
        record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        record[name] = measure(open_case(name).first(200))
        with atomic(RESULTS) as path: path.write_text(json.dumps(record) + "\n")
        print(name, *record[name]["nearest"]["notes"], sep="\n", flush=True)


if __name__ == "__main__": main()
