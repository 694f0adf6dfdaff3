"""The benchmark of the pipeline runs anywhere and measures what it says."""
import json
import subprocess
import sys
from pathlib import Path


def test_every_stage_is_timed(tmp_path):
    program, out = Path(__file__).parent.parent / "benchmarks/throughput.py", tmp_path / "record.json"
    run = subprocess.run([sys.executable, program, "--quick", "--device", "cpu", "--out", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    assert record["device"].startswith("cpu") and record["copy_gb_per_s"] > 0
    free, tiny = record["runs"]
    for row in (free, tiny):
        assert list(row["fit"]) == ["read", "augment", "encode", "moments"]
        assert list(row["score"]) == ["read", "resize", "encode", "moments", "reduce", "K-means", "assign"]
        for part in (row["fit"], row["score"]): assert abs(sum(stage["share"] for stage in part.values()) - 1) < 1e-9
    assert free["fit"]["encode"]["share"] < .05 < tiny["fit"]["encode"]["share"]
    assert free["ratios"]["fit over reading"]["median"] > 0 and "free" in run.stdout
