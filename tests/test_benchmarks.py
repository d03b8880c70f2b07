"""The benchmarks run, on a tiny model, and print what they promise."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"


def run(name, *arguments):
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_masked_evaluation(tiny_folder):
    printed = run(
        "masked_evaluation.py",
        *("--model", tiny_folder, "--masks", 12, "--blocks", 2),
        *("--block-length", 16, "--sample", 3, "--dtype", "float32"),
    )
    [difference] = [line for line in printed.splitlines() if "difference to (b)" in line]
    assert float(difference.split()[-1]) < 1e-5
    for words in ("(c) against (a)", "times the floor", "GiB peak", "GFLOP/s"):
        assert words in printed


def test_methods(tiny_folder, tmp_path):
    printed = run(
        "methods.py",
        *("--model", tiny_folder, "--splits", 2, "--blocks", 2, "--block-length", 16),
        *("--dropped", 2, 3, "--shapley", 20, "--cache", tmp_path),
    )
    rows = [line for line in printed.splitlines() if line.startswith("LayerShap search")]
    assert any("+0.0 ± 0.0" in row for row in rows)
    for method in ("Greedy re-evaluation", "Block Influence", "Shapley contribution"):
        assert method in printed


def test_sample_efficiency(tiny_folder, tmp_path):
    printed = run(
        "sample_efficiency.py",
        *("--model", tiny_folder, "--blocks", 2, "--block-length", 16, "--seeds", 1),
        *("--reference", 200, "--budgets", 64, 128, "--published", 100, "--cache", tmp_path),
    )
    for method in ("ours", "published", "shapiq SVARM", "shapiq ProxySPEX"):
        assert method in printed
