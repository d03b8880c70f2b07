"""Measure the ready-made study again: `python assets/studies/make.py`; half an hour on two cores.

The bundled model with the dashboard's default settings, the methods that need few evaluations
beside LayerShap's search, and the sets that this search chose, each also measured as a set tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from core import LayerGame, Study, load_model, load_text
from core.allocator import keep_freed_memory
from core.analysis import Analysis, AnalysisSettings, run
from core.comparing import compare_cut
from core.masks import leave_out
from core.methods import CONTRIBUTIONS, MethodsComparison, compare_methods
from core.selection import METHOD
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
    tried = tuple(
        compare_cut(*games, leave_out(model.n_layers, sets[depth - 1]), analysis) for depth in TRIED
    )
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


if __name__ == "__main__":
    main()
