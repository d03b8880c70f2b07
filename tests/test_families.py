"""Every causal LM family that transformers knows: measured rightly, or refused in a sentence.

The table of what works and what is refused, and why, is written to tests/output/families.md.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.errors import LayerShapError
from core.evaluation import Evaluator
from core.loading import load_model
from core.masks import leave_out
from core.models import describe
from core.pruning import prune
from core.saving import check_saving, save_pruned
from families import LAYERS, VOCABULARY, tiny
from tiny_models import ALTERNATING

TABLE = Path(__file__).parent / "output" / "families.md"
CUTS = [(), (1,), (0, 2)]
WORKS, NOT_SAVED = "measured and cut", "measured, but this cut cannot be saved"
REFUSED, NOT_BUILT = "refused", "not built by transformers"
# Of every family that does not work, the verdict and a part of what is said.
EXPECTED = {
    "cpmant": (REFUSED, "words to come"),
    "gemma3n_text": (REFUSED, "could not be found"),
    "hy_v4": (REFUSED, "more than one"),
    "inkling2_text": (REFUSED, "more than one"),
    "mllama": (REFUSED, "could not be found"),
    "prophetnet": (REFUSED, "words to come"),
    "reformer": (REFUSED, "does not run without"),
    "xlm": (REFUSED, "could not be found"),
    "xlnet": (REFUSED, "could not be found"),
    "zaya": (REFUSED, "does not run without"),
    "dots3_note": (NOT_BUILT, "adapter_in_dim"),
    "gemma3n": (NOT_BUILT, "timm"),
    # Drafts that read another model's keys and values.
    "gemma4_assistant": (NOT_BUILT, "must be 0"),
    "gemma4_unified_assistant": (NOT_BUILT, "producing a cache"),
    "musicgen": (NOT_BUILT, "no attribute"),
    "musicgen_melody": (NOT_BUILT, "no attribute"),
    "emu3": (NOT_SAVED, "cannot read"),
    "xlstm": (NOT_SAVED, "does not run"),
    **dict.fromkeys(
        (
            "beam",
            "big_bird",
            "blt",
            "diffllama",
            "gemma4",
            "gemma4_text",
            "hrm_text",
            "jamba",
            "minicpm3",
            "minimax",
            "recurrent_gemma",
            "zamba",
            "zamba2",
        ),
        (NOT_SAVED, "position"),
    ),
}
# Where what describes the layers is changed in ways of its own: per-layer settings, counts of first
# layers, other names for the depth, numbers that JSON does not have.
DESCRIBED_OTHERWISE = ("bamba", "bart", "deepseek_v3", "gemma4_unified_text", "laguna")
# Models that also see or hear, by why they are refused, if they are.
MULTIMODAL = {
    "gemma3": "",
    "idefics3": "",
    "internvl": "",
    "llava": "",
    "mistral3": "",
    "paligemma": "words to come",
    "qwen2_5_vl": "",
    "qwen2_audio": "",
    "qwen3_vl": "",
    "smolvlm": "",
}
TOWERS = "vision|visual|audio|projector|connector"


@pytest.fixture(scope="module")
def table():
    """Rows (family, verdict, message), written when all are known."""
    rows = []
    yield rows
    lines = [
        "| family | model | result |",
        "|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def text():
    """Longer than the tiny models' sliding windows."""
    return torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def loss(module, tokens):
    logits = module(input_ids=tokens, use_cache=False).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()))


def loss_without(model, cut, tokens):
    """The model's own loss while what these blocks return is thrown away."""

    def undo(block, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return given if isinstance(output, torch.Tensor) else (given, *output[1:])

    hooks = [model.blocks[n].register_forward_hook(undo, with_kwargs=True) for n in cut]
    try:
        return loss(model.module, tokens)
    finally:
        for hook in hooks:
            hook.remove()


def judge(family):
    """What becomes of a family, and what is said of it: (verdict, message)."""
    try:
        module = tiny(family)
    except Exception as error:
        return NOT_BUILT, str(error)
    try:
        model = describe(module)
    except LayerShapError as error:
        return REFUSED, str(error)
    masks = np.array([leave_out(LAYERS, cut) for cut in CUTS])
    losses = dict(Evaluator(model, text()).losses(masks))
    truths = [loss_without(model, cut, text()) for cut in CUTS]
    assert [losses[row] for row in range(len(CUTS))] == pytest.approx(truths, rel=1e-5)
    assert np.ptp(truths) > 1e-3
    try:
        cut = prune(model, masks[1])
        check_saving(cut)
    except LayerShapError as error:
        return NOT_SAVED, str(error)
    assert cut.n_layers == LAYERS - 1
    assert loss(cut.module, text()) == pytest.approx(losses[1], rel=1e-5)
    return WORKS, ""


@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_family_is_measured_rightly_or_refused(family, table):
    verdict, message = judge(family)
    table.append((family, verdict, " ".join(message.split())))
    expected, part = EXPECTED.get(family, (WORKS, ""))
    assert (verdict, part in message) == (expected, True), message


@pytest.mark.parametrize("family", DESCRIBED_OTHERWISE)
def test_a_saved_cut_is_read_back_as_it_was_measured(family, tmp_path):
    model = describe(tiny(family))
    keep = leave_out(LAYERS, (2,))
    [(_, measured)] = Evaluator(model, text()).losses(keep[None])
    folder = save_pruned(model, keep, tmp_path / "cut")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert loss(again, text()) == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize(("family", "refusal"), MULTIMODAL.items())
def test_a_multimodal_model_is_analysed_by_its_language_model(
    family, refusal, tiny_folder, tmp_path
):
    loader = transformers.AutoModelForMultimodalLM
    whole = tiny(family, loader)
    whole.save_pretrained(tmp_path / "whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "preprocessor_config.json").write_text('{"size": 16}')
    source = {"device": "cpu", "dtype": "float32"}
    if refusal:
        with pytest.raises(LayerShapError, match=refusal):
            load_model(str(tmp_path / "whole"), **source)
        return
    model = load_model(str(tmp_path / "whole"), **source)
    assert model.n_layers == LAYERS
    assert model.info.parameters == sum(p.numel() for p in whole.parameters())
    towers = {name: p for name, p in whole.named_parameters() if re.search(TOWERS, name)}
    assert model.info.tower_parameters == sum(p.numel() for p in towers.values()) > 0
    masks = np.array([leave_out(LAYERS, cut) for cut in CUTS])
    losses = dict(Evaluator(model, text()).losses(masks))
    truths = [loss_without(model, cut, text()) for cut in CUTS]
    assert [losses[row] for row in range(len(CUTS))] == pytest.approx(truths, rel=1e-5)
    folder = save_pruned(model, masks[1], tmp_path / "cut")
    again = loader.from_pretrained(folder, dtype=torch.float32).eval()
    assert loss(again, text()) == pytest.approx(losses[1], rel=1e-5)
    assert (folder / "preprocessor_config.json").is_file()
    after = dict(again.named_parameters())
    assert all(torch.equal(tower, after[name]) for name, tower in towers.items())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma4_text", {"num_kv_shared_layers": 2, "layer_types": ALTERNATING * 2}),
        ("zaya", {}),
        ("inkling2_text", {}),
    ],
)
def test_layers_that_hand_on_more_than_a_hidden_state_are_refused(family, changes):
    with pytest.raises(LayerShapError, match=r"more than one|does not run without"):
        describe(tiny(family, **changes))


def test_gemma_4_without_per_layer_embeddings_is_cut():
    model = describe(tiny("gemma4_text", hidden_size_per_layer_input=0))
    keep = leave_out(LAYERS, (1,))
    [(_, measured)] = Evaluator(model, text()).losses(keep[None])
    assert loss(prune(model, keep).module, text()) == pytest.approx(measured, rel=1e-5)
