"""Runs from settings to result: exactness, rounds, stop, resume, determinism, saved studies."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from math import factorial

import numpy as np
import pytest
import torch

import made_up
from core.analysis import AnalysisSettings, analyze, run
from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.masks import all_masks
from core.models import describe
from core.study import Comparison, Study, TextInfo, with_comparison
from core.text import TextBlocks

N = 8


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=N,
        num_attention_heads=2,
    )
    module = LlamaForCausalLM(config)
    for parameter in module.parameters():
        parameter.data.mul_(4)
    return describe(module, name="tiny")


@pytest.fixture
def game(model, tmp_path):
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    return LayerGame(model, tokens, EvaluationCache(tmp_path / "cache"))


def brute_force(values):
    """Shapley values and Shapley interaction indices straight from their definitions.

    `values` maps frozensets of kept layers to utilities.
    """
    players = range(N)
    shapley = np.zeros(N)
    interactions = np.zeros((N, N))
    for i in players:
        others = [p for p in players if p != i]
        for size in range(N):
            weight = factorial(size) * factorial(N - size - 1) / factorial(N)
            for chosen in map(frozenset, combinations(others, size)):
                shapley[i] += weight * (values[chosen | {i}] - values[chosen])
        for j in others:
            rest = [p for p in others if p != j]
            for size in range(N - 1):
                weight = factorial(size) * factorial(N - size - 2) / factorial(N - 1)
                for chosen in map(frozenset, combinations(rest, size)):
                    interactions[i, j] += weight * (
                        values[chosen | {i, j}]
                        - values[chosen | {i}]
                        - values[chosen | {j}]
                        + values[chosen]
                    )
    return shapley, interactions


def test_a_model_with_every_mask_measured_has_exact_values(game):
    shapiq = pytest.importorskip("shapiq")
    masks = all_masks(N)
    utilities = game.value(masks)
    table = {
        frozenset(np.flatnonzero(mask).tolist()): utility
        for mask, utility in zip(masks, utilities, strict=True)
    }
    shapley, interactions = brute_force(table)

    result = analyze(game, evaluations=2**N, strata=range(N + 1))

    np.testing.assert_allclose(result.estimates.shapley.values, shapley, atol=1e-9)
    np.testing.assert_allclose(
        result.estimates.shapley_interactions.values, interactions, atol=1e-9
    )
    np.testing.assert_allclose(np.ptp(result.estimates.shapley.intervals, axis=1), 0, atol=1e-9)
    oracle = shapiq.ExactComputer(
        lambda rows: np.array([table[frozenset(np.flatnonzero(r).tolist())] for r in rows]),
        n_players=N,
    )
    sv, sii = oracle("SV", order=1), oracle("SII", order=2)
    for i in range(N):
        assert sv[(i,)] == pytest.approx(result.estimates.shapley.values[i], abs=1e-9)
    for i, j in combinations(range(N), 2):
        assert sii[(i, j)] == pytest.approx(
            result.estimates.shapley_interactions.values[i, j], abs=1e-9
        )
    assert result.verdict().startswith("Exact")
    assert result.estimates.shapley.values.sum() == pytest.approx(
        table[frozenset(range(N))] - table[frozenset()]
    )


def test_the_library_call_returns_everything_with_its_shape(game):
    result = analyze(game, evaluations=60, seed=1)
    assert result.contributions.shape == (N,)
    assert result.intervals.shape == (N, 2)
    assert (result.intervals[:, 0] <= result.contributions).all()
    assert (result.contributions <= result.intervals[:, 1]).all()
    assert result.interactions.shape == (N, N)
    np.testing.assert_array_equal(result.interactions, result.interactions.T)
    predicted, low, high = result.predict_perplexity(np.ones(N, dtype=bool))
    assert low[0] <= predicted[0] <= high[0]
    assert result.complete


def test_the_same_seed_gives_the_same_result_from_a_full_or_an_empty_cache(model, tmp_path):
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))

    def once(folder):
        return analyze(LayerGame(model, tokens, EvaluationCache(folder)), evaluations=50, seed=7)

    first, cached, fresh = once(tmp_path / "a"), once(tmp_path / "a"), once(tmp_path / "b")
    for other in (cached, fresh):
        assert (first.losses == other.losses).all()
        assert (first.contributions == other.contributions).all()
        assert (first.interactions == other.interactions).all()


def test_progress_counts_every_evaluation_and_streams_partial_results(game, monkeypatch):
    monkeypatch.setattr("core.analysis.PARTIAL_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("core.analysis.PARTIAL_REST", 0.0)
    steps = list(run(game, AnalysisSettings(evaluations=70)))
    measured = [s.done for s in steps if s.stage == "Measuring layer masks"]
    assert measured == list(range(1, 71))
    results = [s.analysis for s in steps if s.analysis]
    assert [len(r.masks) for r in results] == [16, 32, 64, 70]
    assert [r.complete for r in results] == [False, False, False, True]
    assert any(s.seconds_left for s in steps)
    assert steps[-1].stage == "Done"


def test_stop_keeps_everything_measured_and_a_second_run_goes_on(game):
    seen = []
    stopped = analyze(
        game,
        evaluations=64,
        on_progress=lambda p: seen.append(p.done),
        stop=lambda: len(seen) > 40,
    )
    assert not stopped.complete
    assert stopped.planned == 64
    kept = len(game.cache)
    assert kept == max(seen) + 1  # and the full model
    asked = []
    measured = game.evaluator.losses
    game.evaluator.losses = lambda masks: asked.append(len(masks)) or measured(masks)
    finished = analyze(game, evaluations=64)
    assert finished.complete
    assert sum(asked) == 64 + 1 - kept


def test_more_evaluations_cost_only_the_new_ones(game):
    analyze(game, evaluations=40)
    before = len(game.cache)
    analyze(game, evaluations=60)
    assert len(game.cache) == before + 20


def test_published_settings_run(game):
    settings = AnalysisSettings.published(N)
    assert settings.evaluations == 8000
    *_, last = run(game, settings)
    assert last.analysis.surrogate.kind == "published"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AnalysisSettings(evaluations=-1), "evaluations is -1"),
        (AnalysisSettings(strata=(9,)), "keeps 9 layers, but this model has 8"),
        (AnalysisSettings(seed=-1), "seed is -1"),
        (AnalysisSettings(strata=()), "No strata"),
    ],
)
def test_wrong_settings_are_refused_by_name(game, settings, message):
    with pytest.raises(LayerShapError, match=message):
        next(run(game, settings))


def study_of(game):
    text = TextBlocks(game.tokens, game.tokens + 1, "made up")
    analysis = analyze(game, evaluations=40)
    comparison = Comparison((2, 5), 40.0, 30.0, 50.0, 20.0, 41.0, 21.0, float("inf"), 100, 90)
    methods = made_up.methods(game.players, 3)
    methods.results[0].held_out[2] = np.inf
    return Study(analysis, game.model.info, TextInfo.of(text), (comparison,), methods=methods)


def test_a_saved_study_opens_to_the_same_numbers(game):
    study = study_of(game)
    again = Study.from_json(study.to_json())
    assert again.to_json() == study.to_json()
    assert (again.analysis.contributions == study.analysis.contributions).all()
    assert again.comparisons == study.comparisons
    assert again.methods.result("Random").frontier == study.methods.result("Random").frontier
    assert again.methods.results[0].held_out[2] == np.inf
    assert again.model == study.model
    document = json.loads(study.to_json())
    assert document["versions"]["torch"].startswith("2.")
    assert document["settings"]["evaluations"] == 40


def test_trying_a_set_again_replaces_it(game):
    [first] = study_of(game).comparisons
    other = replace(first, dropped=(1,))
    again = replace(first, predicted=7.0)
    assert with_comparison((first, other), again) == (other, again)


def test_tables_hold_a_row_per_layer_pair_and_mask(game):
    study = study_of(game)
    assert len(study.contributions_frame()) == N
    assert len(study.interactions_frame()) == N * (N - 1) // 2
    assert len(study.measurements_frame()) == 40
    assert study.comparisons_frame()["dropped"].tolist() == ["2 5"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("measurements"),
        lambda d: d["measurements"]["masks"].pop(),
        lambda d: d["measurements"]["masks"].__setitem__(0, "11x11111"),
        lambda d: d["measurements"].__setitem__("full_loss", "0.5; import os"),
        lambda d: d["model"].__setitem__("n_layers", 10**9),
        lambda d: d["model"].__setitem__("extra", 1),
        lambda d: d["settings"].__setitem__("strata", [99]),
        lambda d: d["settings"].__setitem__("surrogate", "shell"),
        lambda d: d["methods"]["results"][0]["sets"].pop(),
        lambda d: d["methods"]["results"][0]["sets"].__setitem__(0, [99]),
        lambda d: d["methods"]["results"].append(d["methods"]["results"][0]),
        lambda d: d["methods"]["saved"]["cache"].append(0.5),
        lambda d: d.__setitem__("format_version", 99),
        lambda d: d.__setitem__("format", "something else"),
    ],
)
def test_a_damaged_study_is_one_sentence(game, damage):
    document = json.loads(study_of(game).to_json())
    damage(document)
    with pytest.raises(LayerShapError):
        Study.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "not json", "[]", "[" * 5000])
def test_a_file_that_is_no_study_is_one_sentence(text):
    with pytest.raises(LayerShapError):
        Study.from_json(text)


KILLED = """
import sys, torch
from core.analysis import AnalysisSettings, run
from core.cache import EvaluationCache
from core.game import LayerGame
from core.models import describe
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = describe(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
    num_hidden_layers=8, num_attention_heads=2)))
game = LayerGame(model, torch.arange(24).reshape(2, 12), EvaluationCache(sys.argv[1]))
for step in run(game, AnalysisSettings(evaluations=90)):
    print(step.stage, step.done, flush=True)
"""


def test_a_killed_process_loses_at_most_the_evaluation_in_flight(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    told = 0
    for line in process.stdout:
        if line.startswith("Measuring layer masks"):
            told = int(line.split()[-1])
        if told >= 37:
            process.kill()
            break
    process.wait()
    assert len(EvaluationCache(tmp_path)) >= told + 1  # and the full model
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "Done 90"
