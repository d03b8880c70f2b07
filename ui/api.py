"""The API for programs: functions that name their model themselves and answer in plain data.

The page's own endpoints go on from what was loaded and selected before, and answer with what the
page shows. These need nothing from before, so that a client of the Model Context Protocol, whose
calls share no session, can use them as tools. They use the same models, the same cache and the same
queues as the page.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar

import gradio as gr
import numpy as np

from core.analysis import Analysis, AnalysisSettings, run
from core.comparing import full_and_pruned
from core.errors import LayerShapError
from core.footprint import footprint
from core.game import LayerGame
from core.loading import Progress
from core.masks import leave_out
from core.methods import MethodResult
from core.methods import compare_methods as compare
from core.models import ModelInfo
from core.players import PlayerKind, Players, parse_cut
from core.pruning import prune
from core.study import Study
from ui.methods_view import DEFAULT_METHODS
from ui.settings import AppSettings
from ui.setup_view import REFRESH_SECONDS, whole
from ui.status import streamed
from ui.workspace import ModelChoice, TextChoice, Workspace, Workspaces

logger = logging.getLogger("layershap")

NO_MCP = (
    "Serving tools over the Model Context Protocol needs the mcp package: pip install mcp==1.30.0."
)
EVALUATIONS, DEEPEST, STRONGEST = 256, 6, 10
# What the page's own endpoints do; their parameters are the page's controls.
PAGE_ENDPOINTS = {
    "load": "Load a model and a text into this session; the other endpoints of the page use them.",
    "analyze": "Analyse the loaded model: streams the status line and the charts.",
    "stop": "Stop this session's work; what was measured is kept.",
    "pair": "Measure the four utilities behind the interaction of two layers.",
    "methods": "Compare methods of choosing layers on the loaded model, on held-out text.",
    "select": "Drop these layers, for example '13, 17', and predict what that costs.",
    "drop_least": "Drop the layers with the smallest contributions; needs an analysis.",
    "find": "Search for the best set of layers for a target, and select it.",
    "take_set": "Select the set that a compared method chose at one depth.",
    "compare": "Measure the full and the pruned model: perplexities, size and speed.",
    "continue_prompt": "Let the full and the pruned model continue a prompt.",
    "save": "Save the pruned model in a folder on the server.",
    "accuracy": "Measure zero-shot accuracy of the full and the pruned model.",
    "heal": "Fine-tune the pruned model briefly with LoRA.",
    "save_healed": "Save the healed model in a folder on the server.",
    "push": "Push a saved folder to the Hugging Face Hub, under the server's own login.",
    "export": "Files of the session's study: JSON, and CSV of each table.",
    "open_study": "Open a saved study, without its model.",
}
TOOLS = ("list_layers", "analyze_model", "measure_cut", "compare_methods", "export_study")

Answer = dict[str, Any]
T = TypeVar("T")


def add_api(
    page: gr.Blocks,
    settings: AppSettings,
    workspaces: Workspaces,
    *,
    analysing: str,
    measuring: str,
) -> None:
    """Add the endpoints for programs to a page, and say what its own are for.

    Args:
        analysing, measuring: the page's queues, in which these wait too.
    """
    for endpoint in page.fns.values():
        if endpoint.api_visibility == "public":
            endpoint.api_description = PAGE_ENDPOINTS[str(endpoint.api_name)]
    tools = Tools(settings, workspaces)
    for name in TOOLS:
        quick = name in ("list_layers", "measure_cut")
        gr.api(
            getattr(tools, name),
            api_name=name,
            concurrency_id=measuring if quick else analysing,
            concurrency_limit=1,
        )


def prepare_mcp() -> None:
    """Before a page is launched with an MCP server.

    Raises:
        LayerShapError: the package for the Model Context Protocol is missing.
    """
    if find_spec("mcp") is None:
        raise LayerShapError(NO_MCP)
    # About the page's own endpoints, which `offer_tools` takes away.
    warnings.filterwarnings("ignore", message="This MCP server includes a tool that has a gr.State")


def offer_tools(page: gr.Blocks) -> None:
    """Of a page launched with an MCP server, offer as tools only what needs no session, in JSON.

    Gradio offers every endpoint, but the page's own would forget between two calls what was loaded;
    and it writes dictionaries as Python does.
    """
    from mcp.types import TextContent

    server = page.mcp_server_obj
    assert server is not None
    server.postprocess_output_data = lambda answers, _: [
        TextContent(type="text", text=json.dumps(answer)) for answer in answers
    ]
    server.tool_to_endpoint = {
        tool: endpoint
        for tool, endpoint in server.tool_to_endpoint.items()
        if endpoint.removeprefix("/") in TOOLS
    }


def _answering(tool: Callable[..., Iterator[Answer]]) -> Callable[..., Iterator[Answer]]:
    """What goes wrong reaches the caller as one sentence."""

    @wraps(tool)
    def safe(*args: Any, **kwargs: Any) -> Iterator[Answer]:
        try:
            yield from tool(*args, **kwargs)
        except LayerShapError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception("%s failed", tool.__name__)
            raise gr.Error(
                "Something went wrong that was not foreseen; the details are in the server's log.",
                print_exception=False,
            ) from error

    return safe


class Tools:
    """The functions; each yields its progress now and then, and its answer last."""

    def __init__(self, settings: AppSettings, workspaces: Workspaces) -> None:
        self._settings, self._workspaces = settings, workspaces

    @_answering
    def list_layers(self, model: str = "bundled") -> Iterator[dict[str, Any]]:
        """What a language model consists of: its decoder layers and their parameters.

        Answers with its name, size, context length and number format, and each layer's parameters.

        Args:
            model: "bundled" (SmolLM2-135M), or a Hugging Face id that this dashboard allows.
        """
        choice = self._choice(model)
        loaded = yield from _loading(lambda report: self._workspaces.model(choice, report))
        info = loaded.info
        yield {
            "model": _described(info),
            "layers": [
                {"layer": layer, "parameters": count}
                for layer, count in enumerate(info.block_parameters)
            ],
        }

    @_answering
    def analyze_model(
        self,
        model: str = "bundled",
        evaluations: int = EVALUATIONS,
        seed: int = 0,
        attention_and_mlp_apart: bool = False,
        text: str = "bundled",
        blocks: int = 10,
        block_length: int = 128,
    ) -> Iterator[dict[str, Any]]:
        """What each layer of a language model contributes, with 95 % intervals and a verdict.

        Measures the perplexity of many layer subsets; with the default 256 evaluations the bundled
        model takes minutes on a CPU. Every measurement is kept, so a second call is quick.
        Answers with the contribution of each layer, the layers in order from the least needed, the
        strongest interactions, how the surrogate agrees with subsets it never saw, and a verdict on
        whether the ranking can be trusted.

        Args:
            model: "bundled" (SmolLM2-135M), or a Hugging Face id that this dashboard allows.
            evaluations: how many layer subsets to measure; more sharpen the ranking.
            seed: which subsets are drawn.
            attention_and_mlp_apart: analyse attention ("12a") and MLP ("12m") of each layer apart.
            text: "bundled" (presidential messages), or a Hugging Face data set such as "wikitext".
            blocks: blocks of calibration text.
            block_length: tokens in a block.
        """
        kind: PlayerKind = "sub-blocks" if attention_and_mlp_apart else "blocks"
        workspace = yield from self._open(model, text, blocks, block_length, kind)
        analysis = yield from self._analysed(workspace, evaluations, seed)
        yield {"model": _described(workspace.model.info), **_analysis(workspace, analysis)}

    @_answering
    def measure_cut(
        self,
        dropped: str,
        model: str = "bundled",
        text: str = "bundled",
        blocks: int = 10,
        block_length: int = 128,
    ) -> Iterator[dict[str, Any]]:
        """What dropping certain layers really does: perplexities and sizes, full and pruned.

        Answers with measured perplexity on held-out text (the one to decide by) and on calibration
        text, parameters, and bytes of weights and of key/value cache per token.

        Args:
            dropped: layers to drop, such as "13, 17"; "12a" is an attention alone, "12m" an MLP.
            model: "bundled" (SmolLM2-135M), or a Hugging Face id that this dashboard allows.
            text: "bundled" (presidential messages), or a Hugging Face data set such as "wikitext".
            blocks: blocks of calibration text, and as many of held-out text.
            block_length: tokens in a block.
        """
        choice = self._choice(model)
        loaded = yield from _loading(lambda report: self._workspaces.model(choice, report))
        players, cut = parse_cut("Dropped layers", str(dropped), loaded.n_layers)
        keep = leave_out(players.count, cut)
        if not keep.any():
            raise LayerShapError("No layers are kept; keep at least one.")
        workspace = yield from self._open(model, text, blocks, block_length, players.kind)
        perplexities = {}
        for name, game in (
            ("held_out", workspace.held_out),
            ("calibration", workspace.calibration),
        ):
            yield {"stage": f"Measuring {name} perplexity"}
            perplexities[name] = _full_and_pruned(game, keep)
        sizes = [asdict(footprint(m)) for m in (workspace.model, prune(workspace.model, keep))]
        yield {
            "model": _described(workspace.model.info),
            "text": asdict(workspace.text_info),
            "dropped": players.labels(cut),
            "perplexity": perplexities,
            "size": dict(zip(("full", "pruned"), sizes, strict=True)),
        }

    @_answering
    def compare_methods(
        self,
        methods: list[str] = list(DEFAULT_METHODS),  # noqa: B006 (shown as the default; only read)
        deepest: int = DEEPEST,
        model: str = "bundled",
        text: str = "bundled",
        blocks: int = 10,
        block_length: int = 128,
    ) -> Iterator[dict[str, Any]]:
        """Which layers different pruning methods would drop, judged on held-out text.

        Answers with the full model's held-out perplexity and, for each method and number of layers,
        the set it drops, its calibration and held-out perplexity and the evaluations it took.

        Args:
            methods: names such as "LayerShap search", "Greedy re-evaluation", "Block Influence".
            deepest: compare sets of 1 to this many dropped layers.
            model: "bundled" (SmolLM2-135M), or a Hugging Face id that this dashboard allows.
            text: "bundled" (presidential messages), or a Hugging Face data set such as "wikitext".
            blocks: blocks of calibration text, and as many of held-out text.
            block_length: tokens in a block.
        """
        workspace = yield from self._open(model, text, blocks, block_length)
        shown = 0.0
        for step in compare(
            workspace.calibration, workspace.held_out, methods, _number("deepest", deepest)
        ):
            if time.monotonic() - shown >= REFRESH_SECONDS:
                shown = time.monotonic()
                yield _progress(step.stage, step.done, step.total)
        comparison = step.comparison
        yield {
            "model": _described(workspace.model.info),
            "text": asdict(workspace.text_info),
            "full_held_out_perplexity": _finite(np.exp(comparison.full_held_out)),
            "methods": [_method(workspace, result) for result in comparison.results],
        }

    @_answering
    def export_study(
        self,
        model: str = "bundled",
        evaluations: int = EVALUATIONS,
        seed: int = 0,
        attention_and_mlp_apart: bool = False,
        text: str = "bundled",
        blocks: int = 10,
        block_length: int = 128,
    ) -> Iterator[dict[str, Any]]:
        """The whole study of an analysis as JSON: every measured mask, estimates and provenance.

        The dashboard opens the answer once it is saved as a .json file.

        Args:
            model: "bundled" (SmolLM2-135M), or a Hugging Face id that this dashboard allows.
            evaluations: how many layer subsets to measure; those measured before cost nothing.
            seed: which subsets are drawn.
            attention_and_mlp_apart: analyse attention and MLP of each layer apart.
            text: "bundled" (presidential messages), or a Hugging Face data set such as "wikitext".
            blocks: blocks of calibration text.
            block_length: tokens in a block.
        """
        kind: PlayerKind = "sub-blocks" if attention_and_mlp_apart else "blocks"
        workspace = yield from self._open(model, text, blocks, block_length, kind)
        analysis = yield from self._analysed(workspace, evaluations, seed)
        parameters = workspace.model.player_parameters(kind)
        study = Study(
            analysis, workspace.model.info, workspace.text_info, player_parameters=parameters
        )
        yield json.loads(study.to_json())

    def _choice(self, model: str) -> ModelChoice:
        self._settings.check_model(str(model))
        return ModelChoice(str(model))

    def _open(
        self,
        model: str,
        text: str,
        blocks: int,
        block_length: int,
        players: PlayerKind = "blocks",
    ) -> Generator[Answer, None, Workspace]:
        self._settings.check_data_set(str(text))
        count = _number("blocks", blocks)
        chosen = TextChoice(str(text), count, _number("block_length", block_length), count)
        choice = self._choice(model)
        return (
            yield from _loading(
                lambda report: self._workspaces.open(choice, chosen, report, players)
            )
        )

    def _analysed(
        self, workspace: Workspace, evaluations: int, seed: int
    ) -> Generator[Answer, None, Analysis]:
        """Yields progress; returns the analysis."""
        chosen = AnalysisSettings(_number("evaluations", evaluations), _number("seed", seed))
        self._settings.check_evaluations(chosen.evaluations)
        shown = 0.0
        for step in run(workspace.calibration, chosen, partial=False):
            if time.monotonic() - shown >= REFRESH_SECONDS:
                shown = time.monotonic()
                yield _progress(step.stage, step.done, step.total)
        return step.analysis


def _loading(work: Callable[[Progress], T]) -> Generator[Answer, None, T]:
    """Yields the stages of loading; returns what was loaded."""
    for item in streamed(work):
        if isinstance(item, tuple):
            yield {"stage": item[0]}
        else:
            loaded = item
    return loaded


def _progress(stage: str, done: int, total: int) -> Answer:
    return {"stage": stage, "done": done, "total": total}


def _number(name: str, value: object) -> int:
    """A whole number from a caller, whose values nobody has checked yet."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LayerShapError(f"{name} must be a whole number.")
    return whole(name, value)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def _described(info: ModelInfo) -> Answer:
    names = ("name", "revision", "architecture", "n_layers", "parameters", "context_length")
    more = ("dtype", "device", "fingerprint")
    return {name: getattr(info, name) for name in (*names, *more)}


def _full_and_pruned(game: LayerGame, keep: np.ndarray) -> Answer:
    full, pruned = full_and_pruned(game, keep)
    return {"full": _finite(full), "pruned": _finite(pruned)}


def _analysis(workspace: Workspace, analysis: Analysis) -> Answer:
    players, quality = analysis.players, analysis.surrogate.quality
    parameters = workspace.model.player_parameters(players.kind)
    return {
        "text": asdict(workspace.text_info),
        "settings": asdict(analysis.settings),
        "full_perplexity": _finite(np.exp(analysis.full_loss)),
        "verdict": analysis.verdict(),
        "surrogate": {
            "kind": analysis.surrogate.kind,
            "r2": _finite(quality.r2),
            "spearman": _finite(quality.spearman),
            "unseen_masks": quality.count,
        },
        "contributions": [
            {
                players.noun: players.label(player),
                "contribution": _finite(analysis.contributions[player]),
                "low": _finite(analysis.intervals[player, 0]),
                "high": _finite(analysis.intervals[player, 1]),
                "parameters": parameters[player],
            }
            for player in range(players.count)
        ],
        "least_needed": [
            players.label(int(player)) for player in np.argsort(analysis.contributions)
        ],
        "strongest_interactions": _strongest(analysis, players),
    }


def _strongest(analysis: Analysis, players: Players) -> list[Answer]:
    """The pairs that depend on one another most, strongest first."""
    first, second = np.triu_indices(players.count, 1)
    values = analysis.interactions[first, second]
    order = np.argsort(-np.abs(values), kind="stable")[:STRONGEST]
    return [
        {
            "pair": [players.label(int(first[pair])), players.label(int(second[pair]))],
            "interaction": _finite(values[pair]),
        }
        for pair in order
    ]


def _method(workspace: Workspace, result: MethodResult) -> Answer:
    frontier, players = result.frontier, workspace.calibration.players
    return {
        "method": frontier.method,
        "sets": [
            {
                "dropped": players.labels(chosen),
                "calibration_perplexity": _finite(np.exp(result.calibration[depth])),
                "held_out_perplexity": _finite(np.exp(result.held_out[depth])),
                "evaluations": frontier.evaluations[depth],
            }
            for depth, chosen in enumerate(frontier.sets)
        ],
    }
