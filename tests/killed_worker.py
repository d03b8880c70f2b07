"""Runs analyses in forked children and kills them: one command a line on standard input.

    <folder> <study file> <evaluations before the end> <milliseconds after them>

It answers a line of JSON: whether the child was killed or ended by itself, and the stages and
evaluations it told of. Forking a process that has the model loaded makes a restart cost
milliseconds.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.analysis import AnalysisSettings, run
from core.cache import EvaluationCache
from core.game import LayerGame
from core.models import LayeredModel, describe
from core.study import Study, TextInfo
from core.text import TextBlocks

LAYERS, EVALUATIONS = 10, 800
PATIENCE_SECONDS = 60


def model() -> LayeredModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    module = LlamaForCausalLM(config)
    for parameter in module.parameters():
        parameter.data.mul_(4)
    return describe(module, name="tiny")


def text() -> TextBlocks:
    tokens = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    return TextBlocks(tokens[:3], tokens[3:], "made up")


def analyse(loaded: LayeredModel, blocks: TextBlocks, folder: str, out: str, told: int) -> None:
    game = LayerGame(loaded, blocks.calibration, EvaluationCache(folder))
    analysis = None
    for step in run(game, AnalysisSettings(evaluations=EVALUATIONS, seed=3), partial=False):
        os.write(told, f"{step.stage}\n".encode())
        analysis = step.analysis or analysis
    Path(out).write_text(Study(analysis, loaded.info, TextInfo.of(blocks), created="").to_json())


def main() -> None:
    torch.set_num_threads(1)
    loaded, blocks = model(), text()
    print("ready", flush=True)
    for line in sys.stdin:
        folder, out, evaluations, milliseconds = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            status = 1
            try:
                analyse(loaded, blocks, folder, out, writing)
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        said = _listen(reading, lambda s, stop=int(evaluations): s.count(b"Measuring l") >= stop)
        time.sleep(float(milliseconds) / 1000)
        os.kill(child, signal.SIGKILL)
        said += _listen(reading, lambda _: False)
        os.close(reading)
        _, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status), "status": status, "said": said.decode()}
        print(json.dumps(answer), flush=True)


def _listen(pipe: int, enough: Callable[[bytes], bool]) -> bytes:
    said = b""
    while not enough(said):
        ready, _, _ = select.select([pipe], [], [], PATIENCE_SECONDS)
        part = os.read(pipe, 1 << 16) if ready else b""
        if not part:
            break
        said += part
    return said


if __name__ == "__main__":
    main()
