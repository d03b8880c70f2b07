"""Model cards, and pushing at the border to huggingface_hub."""

import json
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from markdown_it import MarkdownIt

from core.card import Measured, Perplexities, model_card, origin, plain
from core.errors import LayerShapError
from core.healing import Healing, HealingCurve, HealingSettings
from core.masks import leave_out
from core.models import describe
from core.pruning import prune
from core.publishing import push
from core.recipe import mergekit_yaml
from core.saving import save_pruned
from core.study import TextInfo

DROPPED = (1, 4)
KEEP = leave_out(6, DROPPED)
TEXT = TextInfo("speeches", 10, 12, 128, "a" * 32, "b" * 32)
MEASURED = Measured(TEXT, Perplexities(20.125, 41.5, 25.25), Perplexities(19.5, 40.0, 24.75))
HOSTILE = "a](javascript:alert(1)) <script>x</script> | `b` *c* # d https://e.example\n\n# f"


@pytest.fixture
def model(tiny_llama):
    return describe(tiny_llama(6), name="owner/tiny", source="owner/tiny", revision="main")


def healing_of(model):
    return Healing(
        model=prune(model, KEEP),
        settings=HealingSettings(steps=40),
        curve=HealingCurve((3.0,) * 40, ((0, 3.5), (40, 3.1))),
        kept_step=40,
        measured=MEASURED,
        ended="Done",
        adapter_parameters=1000,
        training_blocks=150,
        block_length=128,
        seconds=60.0,
    )


def card_of(model, **options):
    return ModelCard(model_card(model, prune(model, KEEP), KEEP, **options))


def rows_of(card):
    lines = [line.strip("| ") for line in card.text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in s.split("|")] for s in lines)}


def test_the_card_of_a_cut_holds_the_cut_the_figures_and_the_recipe(model):
    recipe = mergekit_yaml(model.info, KEEP)
    card = card_of(model, measured=MEASURED, recipe=recipe)
    assert card.data.base_model == "owner/tiny"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license is None
    assert card.data.tags == ["layershap", "layer-pruning"]
    rows = rows_of(card)
    assert rows["Held-out perplexity"] == ["20.12", "41.50"]
    assert rows["Calibration perplexity"] == ["19.50", "40.00"]
    assert rows["Dropped layers (the first is 0)"] == ["1, 4"]
    assert rows["Layers left"] == ["4 of 6"]
    assert rows["Revision"] == ["main"]
    assert rows["Fingerprint of the source"] == [model.info.fingerprint]
    assert "speeches; 10 calibration and 12 held-out blocks of 128 tokens" in card.text
    assert TEXT.held_out_fingerprint in card.text
    [code] = [t.content for t in MarkdownIt().parse(card.text) if t.type == "fence"]
    assert yaml.safe_load(code) == yaml.safe_load(recipe)


def test_the_card_of_a_healed_model_says_how_it_was_trained(model):
    card = card_of(model, measured=MEASURED, healing=healing_of(model))
    rows = rows_of(card)
    assert rows["Held-out perplexity"] == ["20.12", "41.50", "25.25"]
    assert rows["steps"] == ["40"]
    assert rows["learning rate"] == [str(HealingSettings().learning_rate)]
    assert rows["training blocks"] == ["150 of 128 tokens"]
    assert "lora-healed" in card.data.tags
    assert "mergekit" not in card.text
    assert "peft" in card.text


def test_a_cut_that_was_not_measured_says_so(model):
    assert "was not measured" in card_of(model).text
    endless = Measured(TEXT, Perplexities(20.0, float("inf")), Perplexities(20.0, float("inf")))
    assert rows_of(card_of(model, measured=endless))["Held-out perplexity"] == [
        "20.00",
        "not finite",
    ]


@pytest.mark.parametrize("text", [HOSTILE, "||| --- |||", "```\n---\nlicense: mit\n---", "$x$ ~a~"])
def test_names_are_text_never_markup(model, text):
    [paragraph] = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(plain(text))[1:-1]
    kinds = {token.type for token in paragraph.children}
    assert kinds <= {"text", "text_special"}
    assert "".join(t.content for t in paragraph.children) == " ".join(text.split())
    info = replace(model.info, name=text, source="", revision=text, fingerprint=text, dtype=text)
    hostile = replace(model, info=info)
    measured = replace(MEASURED, text=replace(TEXT, source=text, held_out_fingerprint=text))
    card = card_of(hostile, measured=measured)
    assert card.data.base_model is None
    assert card.data.license is None
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    assert [t.tag for t in tokens if t.type == "heading_open"] == ["h1", "h2", "h2"]
    inline = {child.type for t in tokens for child in t.children or ()}
    assert inline <= {"text", "text_special", "code_inline", "softbreak"}
    assert rows_of(card)["Layers left"] == ["4 of 6"]


def test_a_recipe_cannot_break_out_of_its_code_block(model):
    card = card_of(model, recipe="a: b\n````\n# not a heading\n")
    tokens = MarkdownIt().parse(card.text)
    [code] = [token.content for token in tokens if token.type == "fence"]
    assert "# not a heading" in code


def test_licence_and_base_are_stated_only_where_the_source_states_them(tiny_llama, tmp_path):
    folder = tmp_path / "source"
    tiny_llama(6).save_pretrained(folder)

    def source():
        module = type(tiny_llama(6)).from_pretrained(folder)
        return describe(module, name="source", source=str(folder))

    assert origin(source()).licence == {}
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own-terms\nlicense_link: LICENSE\n---\n# Model\n"
    )
    assert origin(source()).licence == {"license": "other", "license_name": "own-terms"}
    (folder / "README.md").write_text("---\nlicense: [broken\n---\n")
    (folder / "origin.json").write_text('{"model": "owner/base", "licence": "Apache-2.0"}')
    found = origin(source())
    assert (found.name, found.base_model) == ("source", "owner/base")
    assert found.licence == {"license": "apache-2.0"}
    card = card_of(source())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "owner/base"


def test_a_saved_folder_has_a_card_and_no_path_of_this_machine(tiny_llama, tmp_path):
    folder = tmp_path / "home-of-alice" / "source"
    tiny_llama(6).save_pretrained(folder)
    module = type(tiny_llama(6)).from_pretrained(folder)
    model = describe(module, name="source", source=str(folder))
    saved = save_pruned(model, KEEP, tmp_path / "cut", measured=MEASURED)
    card = ModelCard.load(saved / "README.md")
    assert "20.12" in card.text
    assert "passthrough" in card.text
    for file in ("README.md", "layershap.json", "config.json"):
        assert "home-of-alice" not in (saved / file).read_text()
    assert json.loads((saved / "layershap.json").read_text())["source"] == "source"


@pytest.fixture
def folder(model, tmp_path):
    return save_pruned(model, KEEP, tmp_path / "cut")


@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of the Hub; set `fails` to have the next calls answered otherwise."""
    seen = SimpleNamespace(calls=[], fails={}, info=None)

    def recorded(name, answer):
        def method(self, *args, **kwargs):
            seen.calls.append((name, self.token, args, kwargs))
            if name in seen.fails:
                raise seen.fails[name]
            return answer(*args)

        monkeypatch.setattr(huggingface_hub.HfApi, name, method)

    recorded("create_repo", lambda repo: SimpleNamespace(repo_id=f"me/{repo.split('/')[-1]}"))
    recorded("upload_folder", lambda *_: None)
    recorded("whoami", lambda: {"name": "me"})
    recorded("model_info", lambda repo: seen.info)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return seen


def http_error(status, message="", kind=HfHubHTTPError):
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://huggingface.co"))
    return kind(f"{status} Client Error\n{message}", response=response, server_message=message)


@pytest.mark.parametrize("private", [True, False])
def test_a_push_makes_a_new_repository_and_uploads_the_folder(hub, folder, private):
    stages = []
    address = push(
        folder, "me/small", private=private, progress=lambda stage, _: stages.append(stage)
    )
    assert address == "https://huggingface.co/me/small"
    assert hub.calls == [
        (
            "create_repo",
            "hf_secret",
            ("me/small",),
            {"private": private, "repo_type": "model", "exist_ok": False},
        ),
        (
            "upload_folder",
            "hf_secret",
            (),
            {
                "repo_id": "me/small",
                "folder_path": folder,
                "repo_type": "model",
                "commit_message": "Upload pruned model",
            },
        ),
    ]
    assert stages == ["Making the repository me/small", "Uploading to me/small", "Pushed"]


def test_a_repository_is_private_unless_asked_otherwise(hub, folder):
    assert push(folder, "small") == "https://huggingface.co/me/small"
    assert hub.calls[0][3]["private"] is True


def test_nobody_logged_in_is_one_sentence_and_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(LayerShapError, match="hf auth login"):
        push(folder, "me/small")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["", "a/b/c", "-x", "me/a b", "me/..", "me/" + "x" * 200, "é/x"])
def test_a_bad_name_is_one_sentence_and_nothing_is_asked(hub, folder, name):
    with pytest.raises(LayerShapError, match="not a name that the Hub takes"):
        push(folder, name)
    assert hub.calls == []


def test_a_folder_that_is_no_model_is_one_sentence(hub, tmp_path):
    with pytest.raises(LayerShapError, match="save one first"):
        push(tmp_path, "me/small")
    assert hub.calls == []


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(401), "does not accept this machine's login"),
        (http_error(403, "You don't have the rights"), "may not write to me/small"),
        (http_error(404, "", RepositoryNotFoundError), "may not write to me/small"),
        (http_error(400, "Bad README"), r"refused me/small \(Bad README\)"),
        (http_error(503), "cannot be reached"),
        (httpx2.ConnectError("no route"), "cannot be reached"),
        (httpx2.ReadTimeout("slow"), "cannot be reached"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
    ],
)
def test_what_the_hub_or_the_network_refuses_is_one_sentence(hub, folder, call, error, words):
    hub.fails[call] = error
    with pytest.raises(LayerShapError, match=words) as caught:
        push(folder, "me/small")
    assert "hf_secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def repository(files, private):
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    return SimpleNamespace(id="me/small", siblings=siblings, private=private)


@pytest.mark.parametrize(
    ("files", "private"), [([".gitattributes", "config.json"], True), ([".gitattributes"], False)]
)
def test_a_repository_that_exists_is_not_overwritten(hub, folder, files, private):
    hub.fails["create_repo"] = http_error(409, "You already created this model repo")
    hub.info = repository(files, private)
    with pytest.raises(LayerShapError, match="me/small exists already"):
        push(folder, "small", private=True)
    assert "upload_folder" not in [name for name, *_ in hub.calls]


def test_an_upload_that_was_cut_off_can_be_tried_again(hub, folder):
    hub.fails["create_repo"] = http_error(409, "You already created this model repo")
    hub.info = repository([".gitattributes"], private=True)
    assert push(folder, "small", private=True) == "https://huggingface.co/me/small"
    assert hub.calls[-1][3]["repo_id"] == "me/small"
