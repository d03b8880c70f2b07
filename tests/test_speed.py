"""What makes evaluation fast must not change what it measures."""

import platform
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from core import packing
from core.evaluation import Evaluator
from core.loading import load_model
from core.masks import default_strata, leave_out, sample_masks
from core.models import describe
from core.text import load_text
from tiny_models import tiny

FAULTS = """
import resource, sys
import torch
from core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(40):
        kept = [torch.ones(1_500_000) for _ in range(3)]
work()
before = faults()
work()
print(faults() - before)
"""


def losses(module, tokens):
    model = describe(module)
    masks = sample_masks(model.n_layers, default_strata(model.n_layers), 12, seed=0)
    measured = dict(Evaluator(model, tokens).losses(masks))
    return model, np.array([measured[row] for row in range(len(masks))])


def packed_linears(module):
    return [part for part in module.modules() if isinstance(vars(part).get("forward"), partial)]


needs_packing = pytest.mark.skipif(not packing.available(), reason="no bfloat16 matrix units")


@needs_packing
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral", "opt"])
def test_packed_weights_give_the_same_losses_to_the_bit(family, monkeypatch):
    module = tiny(family, 4).bfloat16().eval()
    tokens = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    model, packed = losses(module, tokens)
    assert packed_linears(model.taken_apart.shell)
    assert not packed_linears(module)
    monkeypatch.setattr(packing, "MEMORY_SHARE", 0.0)
    model, plain = losses(module, tokens)
    assert not packed_linears(model.taken_apart.shell)
    assert (packed == plain).all()


def test_full_precision_and_products_that_would_differ_stay_plain(monkeypatch):
    wide = nn.Sequential(nn.Linear(8, 8))
    packing.pack_linears(wide)
    assert not packed_linears(wide)
    narrow = nn.Sequential(nn.Linear(8, 8).bfloat16())
    monkeypatch.setattr(packing, "_packed_linear", lambda packed, bias, input: input + 1)
    packing.pack_linears(narrow)
    assert not packed_linears(narrow)


@pytest.mark.bundled
def test_bfloat16_gives_the_real_models_perplexities_to_a_hundredth():
    perplexities = {}
    for dtype in ("bfloat16", "float32"):
        model = load_model("bundled", dtype=dtype)
        text = load_text("bundled", model.tokenizer, blocks=2)
        masks = np.array([leave_out(30, dropped) for dropped in ((), (13,), (4, 16, 17, 18))])
        measured = dict(Evaluator(model, text.calibration).losses(masks))
        perplexities[dtype] = np.exp([measured[row] for row in range(3)])
    np.testing.assert_allclose(*perplexities.values(), rtol=0.01)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_kept():
    def faults(mode):
        run = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    given_back = faults("give back")
    if not given_back:
        pytest.skip("this system does not count page faults")
    assert faults("keep") * 10 < given_back
