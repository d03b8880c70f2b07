"""Measure the ready-made study again: `python assets/studies/make.py` (about an hour on two cores).

The bundled model with the dashboard's default settings, the methods that need few evaluations
beside LayerShap's search, and the sets that this search chose, each also measured as a set tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from core import LayerGame, Study, load_model, load_text
from core.allocator import keep_freed_memory
from core.analysis import Analysis, AnalysisSettings, run
from core.footprint import footprint
from core.masks import leave_out
from core.methods import CONTRIBUTIONS, MethodsComparison, compare_methods
from core.models import LayeredModel
from core.pruning import prune
from core.selection import METHOD
from core.study import Comparison
from core.text_info import TextInfo

OUT = Path(__file__).parent / "smollm2-135m-instruct.json"
METHODS = (METHOD, "Leave one out", "Block Influence", "Angular distance", CONTRIBUTIONS)
DEEPEST = 10
TRIED = (2, 4, 6, 8)


def main() -> None:
    keep_freed_memory()
    model = load_model("bundled")
    text = load_text("bundled", model.tokenizer)
    games = LayerGame(model, text.calibration), LayerGame(model, text.held_out)
    analysis = _analyse(games[0])
    methods = _compare(*games, analysis)
    sets = methods.result(METHOD).frontier.sets
    tried = tuple(_try(model, *games, analysis, sets[depth - 1]) for depth in TRIED)
    study = Study(
        analysis,
        model.info,
        TextInfo.of(text),
        tried,
        model.player_parameters("blocks"),
        methods,
    )
    OUT.write_text(study.to_json(), encoding="utf-8")
    print(f"{OUT}: {analysis.verdict()}")


def _analyse(game: LayerGame) -> Analysis:
    result = None
    with tqdm(desc="Measuring layer masks", unit="mask") as bar:
        for step in run(game, AnalysisSettings(), partial=False):
            bar.total = step.total
            bar.update(step.done - bar.n)
            result = step.analysis or result
    assert result is not None
    return result


def _compare(calibration: LayerGame, held_out: LayerGame, analysis: Analysis) -> MethodsComparison:
    contributions = (analysis.contributions, len(analysis.masks))
    with tqdm(desc="Comparing methods", unit="evaluation") as bar:
        for step in compare_methods(
            calibration, held_out, METHODS, DEEPEST, contributions=contributions
        ):
            bar.total = step.total
            bar.update(step.done - bar.n)
    return step.comparison


def _try(
    model: LayeredModel,
    calibration: LayerGame,
    held_out: LayerGame,
    analysis: Analysis,
    dropped: tuple[int, ...],
) -> Comparison:
    keep = leave_out(model.n_layers, dropped)
    masks = np.array([np.ones_like(keep), keep])
    predicted, low, high = (float(value[0]) for value in analysis.predict_perplexity(keep))
    calibration_full, calibration_pruned = map(float, calibration.perplexity(masks))
    held_out_full, held_out_pruned = map(float, held_out.perplexity(masks))
    return Comparison(
        dropped,
        predicted,
        low,
        high,
        calibration_full,
        calibration_pruned,
        held_out_full,
        held_out_pruned,
        footprint(model).parameters,
        footprint(prune(model, keep)).parameters,
    )


if __name__ == "__main__":
    main()
