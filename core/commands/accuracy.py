"""`python -m core accuracy`: zero-shot accuracy of the full and the pruned model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.accuracy import (
    DEFAULT_QUESTIONS,
    OFFERED,
    AccuracyProgress,
    TaskAccuracy,
    compare_accuracy,
    parse_tasks,
)
from core.commands.sources import DROP_HELP, add_model, the_model
from core.errors import LayerShapError
from core.masks import leave_out
from core.players import parse_cut
from core.study import installed_versions


def add(commands: Any) -> None:
    command = commands.add_parser(
        "accuracy", help="zero-shot accuracy of the full and the pruned model (needs lm-eval)"
    )
    command.set_defaults(command=accuracy)
    add_model(command)
    command.add_argument("--drop", default="", help=DROP_HELP)
    command.add_argument(
        "--tasks",
        type=parse_tasks,
        required=True,
        help=f"lm-eval names, such as {','.join(OFFERED)}",
    )
    command.add_argument(
        "--limit",
        type=int,
        default=DEFAULT_QUESTIONS,
        help="ask the first so many questions of each task; 0 asks all",
    )
    command.add_argument(
        "--tasks-folder",
        type=Path,
        help="a folder with task files of your own (YAML); Python code they name is run",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, help="a JSON file to write the results to")


def accuracy(options: argparse.Namespace) -> None:
    if options.out and not options.out.parent.is_dir():
        raise LayerShapError(f"There is no folder {options.out.parent} to write the results to.")
    model = the_model(options)
    players, dropped = parse_cut("--drop", options.drop, model.n_layers)
    limit = options.limit or None
    results = _answer(
        compare_accuracy(
            model,
            leave_out(players.count, dropped),
            options.tasks,
            limit=limit,
            tasks_folder=options.tasks_folder,
            seed=options.seed,
        )
    )
    print(_table(results))
    if options.out:
        document = {
            "model": asdict(model.info),
            "dropped": players.labels(dropped),
            "limit": limit,
            "seed": options.seed,
            "versions": {**installed_versions(), "lm_eval": version("lm_eval")},
            "results": [{**asdict(result), "change": result.change} for result in results],
        }
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"Accuracy written to {options.out}")


def _answer(steps: Iterator[AccuracyProgress]) -> tuple[TaskAccuracy, ...]:
    from tqdm import tqdm

    step = AccuracyProgress("")
    with tqdm(unit="question", dynamic_ncols=True) as bar:
        for step in steps:
            bar.set_description(step.stage, refresh=False)
            bar.total = step.total or None
            bar.update(step.done - bar.n)
    return step.results


def _table(results: Sequence[TaskAccuracy]) -> str:
    """Shares in percent, each with its standard error."""
    rows = [("task", "metric", "full", "pruned", "change", "questions")]
    for r in results:
        rows.append(
            (
                r.label,
                r.metric,
                f"{100 * r.full:.1f} ± {100 * r.full_error:.1f}",
                f"{100 * r.pruned:.1f} ± {100 * r.pruned_error:.1f}",
                f"{100 * r.change:+.1f} ± {100 * r.change_error:.1f}",
                f"{r.questions:,}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, "Percent of the questions, ± standard error."])
