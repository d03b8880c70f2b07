"""Figures: pure functions from results to Plotly figures."""

from ui.figures.accuracy import accuracy_chart
from ui.figures.comparisons import comparison_chart
from ui.figures.contributions import contribution_bars, contribution_heatmap, surrogate_scatter
from ui.figures.healing import healing_curve
from ui.figures.interactions import interaction_graph, interaction_heatmap, pair_utilities
from ui.figures.methods import agreement_heatmap, methods_chart, methods_cost, methods_map
from ui.figures.style import empty_figure

__all__ = [
    "accuracy_chart",
    "agreement_heatmap",
    "comparison_chart",
    "contribution_bars",
    "contribution_heatmap",
    "empty_figure",
    "healing_curve",
    "interaction_graph",
    "interaction_heatmap",
    "methods_chart",
    "methods_cost",
    "methods_map",
    "pair_utilities",
    "surrogate_scatter",
]
