"""LayerShap's engine: what each layer of a causal language model is worth.

Layers are players of a cooperative game whose utility is model quality on calibration text. The
engine measures coalitions, learns to predict the rest, and estimates contributions and
interactions; it knows nothing of the dashboard that shows them.
"""

from core.analysis import Analysis, AnalysisSettings, analyze, run
from core.cache import EvaluationCache
from core.errors import LayerShapError
from core.game import LayerGame
from core.loading import load_model
from core.saving import load_pruned
from core.selection import best_sets
from core.study import Study
from core.text import load_text
from core.workers import start_workers

__all__ = [
    "Analysis",
    "AnalysisSettings",
    "EvaluationCache",
    "LayerGame",
    "LayerShapError",
    "Study",
    "analyze",
    "best_sets",
    "load_model",
    "load_pruned",
    "load_text",
    "run",
    "start_workers",
]
