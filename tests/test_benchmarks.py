"""The benchmarks run, on a tiny model, and print what they promise."""

import subprocess
import sys
from pathlib import Path

from conftest import WORDS

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


def test_parts(tiny_folder, tmp_path):
    printed = run(
        "parts.py",
        *("--model", tiny_folder, "--splits", 2, "--blocks", 2, "--block-length", 16),
        *("--dropped", 1, 2, "--cache", tmp_path),
    )
    assert "cache: an attention is worth 1.00 of a layer, an MLP 0.00" in printed
    for words in ("whole layers, greedy", "LayerShap parts, by time", "measured speed-up"):
        assert words in printed
    saved = printed.split("cache saved")[1].splitlines()
    [by_cache] = [line for line in saved if line.startswith("LayerShap parts, by cache")][:1]
    assert by_cache.split()[-2:] == ["12.5", "25.0"]


def test_sample_efficiency(tiny_folder, tmp_path):
    printed = run(
        "sample_efficiency.py",
        *("--model", tiny_folder, "--blocks", 2, "--block-length", 16, "--seeds", 1),
        *("--reference", 200, "--budgets", 64, 128, "--published", 100, "--cache", tmp_path),
    )
    for method in ("ours", "published", "shapiq SVARM", "shapiq ProxySPEX"):
        assert method in printed


def test_small_model(tmp_path):
    """What it trains is another architecture, loads, and meets only text it has not seen."""
    folder = tmp_path / "small"
    printed = run(
        "small_model.py",
        *("--out", folder, "--layers", 4, "--width", 32, "--minutes", 0.01),
        *("--architecture", "gpt_neox", "--documents", 4),
    )
    for words in ("GPTNeoXForCausalLM, 4 layers", "validation perplexity", "had no part in it"):
        assert words in printed
    printed = run(
        "methods.py",
        *("--model", folder, "--text", folder / "unseen.jsonl", "--splits", 2, "--blocks", 2),
        *("--block-length", 16, "--dropped", 1, 2, "--shapley", 0, "--cache", tmp_path / "cache"),
        *("--methods", "LayerShap search", "Last layers"),
    )
    assert "Last layers" in printed


def test_load(tiny_folder, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(" ".join(WORDS * 60))
    printed = run(
        "load.py",
        *("--users", 4, "--seconds", 6, "--model", tiny_folder, "--text", text),
        *("--evaluations", 12, "--block-length", 16),
    )
    assert printed.count("errors: 0; answers mixed up: 0") == 2
    assert "tracebacks in the server's log: 0" in printed
    for words in ("select", "analyze", "calls, ", "memory start", "memory end"):
        assert words in printed


def test_optimality(tiny_folder, tmp_path):
    printed = run(
        "optimality.py",
        *("--model", tiny_folder, "--texts", 2, "--blocks", 2, "--block-length", 16),
        *("--anneal", 3, "--annealed-model", tiny_folder, "--dropped", 2, 3),
        *("--cache", tmp_path),
    )
    best = [line for line in printed.splitlines() if line.startswith("Best possible")]
    # 8 + 28 + 56 + 70 sets; their best are above nothing and rank first.
    assert best[0].split()[2:] == ["(162)", *["0.00", "(0.00)"] * 4]
    assert best[1].split()[2:] == ["(162)", *["1.0", "(1)"] * 4]
    for words in ("annealed from random", "best found by anything", "Leave one out"):
        assert words in printed
