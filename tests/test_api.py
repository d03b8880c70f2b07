"""The API for programs, through `gradio_client` and as tools of the Model Context Protocol."""

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from conftest import TINY_LAYERS
from core import LayerGame, Study, analyze, load_model, load_text
from core.errors import LayerShapError
from ui import api
from ui.page import build
from ui.settings import AppSettings

LAYERS = TINY_LAYERS
PAGE_NAMES = ("load", "analyze", "compare", "methods", "export")


@pytest.fixture(scope="module")
def common(tiny_folder, text_file):
    return {"model": str(tiny_folder), "text": str(text_file), "blocks": 3, "block_length": 16}


@pytest.fixture(scope="module")
def games(common, cache):
    """The library's games on calibration and on held-out text."""
    model = load_model(common["model"])
    text = load_text(common["text"], model.tokenizer, blocks=3, block_length=16, held_out_blocks=3)
    return LayerGame(model, text.calibration), LayerGame(model, text.held_out)


@pytest.fixture(scope="module")
def address(cache):
    page = build(AppSettings(max_evaluations=100))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, mcp_server=True)
    api.offer_tools(page)
    yield url
    page.close()


@pytest.fixture(scope="module")
def program(address):
    return Client(address, verbose=False)


def test_layers_and_their_parameters_are_those_of_the_model(program, tiny_folder):
    answer = program.predict(model=str(tiny_folder), api_name="/list_layers")
    module = load_model(str(tiny_folder)).module
    assert [layer["layer"] for layer in answer["layers"]] == list(range(LAYERS))
    assert [layer["parameters"] for layer in answer["layers"]] == [
        sum(p.numel() for p in block.parameters()) for block in module.model.layers
    ]
    assert answer["model"]["parameters"] == module.num_parameters()
    assert answer["model"]["context_length"] == 256


def test_an_analysis_is_the_librarys_and_streams_its_progress(program, common, games):
    job = program.submit(**common, evaluations=40, seed=1, api_name="/analyze_model")
    answer = job.result()
    assert any("stage" in output for output in job.outputs()[:-1])
    truth = analyze(games[0], evaluations=40, seed=1)
    for name, values in (
        ("contribution", truth.contributions),
        ("low", truth.intervals[:, 0]),
        ("high", truth.intervals[:, 1]),
    ):
        np.testing.assert_allclose([row[name] for row in answer["contributions"]], values)
    assert answer["verdict"] == truth.verdict()
    assert answer["least_needed"][0] == str(int(np.argmin(truth.contributions)))
    strongest = answer["strongest_interactions"][0]
    assert abs(strongest["interaction"]) == pytest.approx(np.abs(truth.interactions).max())
    study = Study.from_json(
        json.dumps(program.predict(**common, evaluations=40, seed=1, api_name="/export_study"))
    )
    np.testing.assert_array_equal(study.analysis.masks, truth.masks)
    np.testing.assert_allclose(study.analysis.losses, truth.losses)


def test_a_cut_is_measured_as_a_model_without_those_layers_would_be(program, common, games):
    answer = program.predict("2, 5", **common, api_name="/measure_cut")
    calibration, held_out = (game.tokens for game in games)
    module = load_model(common["model"]).module

    def perplexity(tokens):
        with torch.no_grad():
            logits = module(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return float(loss.exp())

    full = perplexity(held_out)
    for layer in (5, 2):
        del module.model.layers[layer]
    assert answer["perplexity"]["held_out"]["full"] == pytest.approx(full, rel=1e-4)
    assert answer["perplexity"]["held_out"]["pruned"] == pytest.approx(
        perplexity(held_out), rel=1e-4
    )
    assert answer["perplexity"]["calibration"]["pruned"] == pytest.approx(
        perplexity(calibration), rel=1e-4
    )
    assert answer["size"]["pruned"]["parameters"] == module.num_parameters()
    assert answer["dropped"] == "2, 5"
    apart = program.predict("2a, 2m, 5", **common, api_name="/measure_cut")
    assert apart["dropped"] == "2, 5"
    assert apart["perplexity"] == answer["perplexity"]


def test_methods_are_compared(program, common, games):
    names = ["Leave one out", "Last layers"]
    answer = program.predict(names, 2, **common, api_name="/compare_methods")
    assert [method["method"] for method in answer["methods"]] == names
    last = answer["methods"][1]["sets"]
    assert [chosen["dropped"] for chosen in last] == ["7", "6, 7"]
    keep = np.arange(LAYERS) < LAYERS - 2
    assert last[1]["held_out_perplexity"] == pytest.approx(games[1].perplexity(keep)[0])
    best = int(np.argmin(games[0].losses(~np.eye(LAYERS, dtype=bool))))
    assert answer["methods"][0]["sets"][0]["dropped"] == str(best)


@pytest.mark.parametrize(
    ("endpoint", "asked", "words"),
    [
        ("/analyze_model", {"evaluations": 101}, "allows at most 100"),
        ("/analyze_model", {"evaluations": "many"}, "evaluations must be a whole number"),
        ("/analyze_model", {"evaluations": 10, "seed": 1.5}, "seed must be a whole number"),
        ("/measure_cut", {"dropped": "8"}, "no layer 8"),
        ("/measure_cut", {"dropped": "0 1 2 3 4 5 6 7"}, "No layers are kept"),
        ("/compare_methods", {"methods": ["Magic"]}, "no method 'Magic'"),
        ("/list_layers", {"model": "/no/such/folder"}, "no folder"),
    ],
)
def test_wrong_input_is_one_sentence(program, common, endpoint, asked, words):
    known = {} if endpoint == "/list_layers" else common
    with pytest.raises(AppError, match=words):
        program.predict(**{**known, **asked}, api_name=endpoint)


def test_what_was_not_foreseen_tells_no_secrets(program, monkeypatch, tiny_folder, caplog):
    def broken(*_):
        raise KeyError("secret detail")

    monkeypatch.setattr("ui.workspace.Workspaces.model", broken)
    with pytest.raises(AppError, match="not foreseen") as error:
        program.predict(model=str(tiny_folder), api_name="/list_layers")
    assert "secret" not in str(error.value)
    assert "secret detail" in caplog.text


def test_every_endpoint_is_described_on_the_api_page(address):
    endpoints = httpx.get(f"{address}gradio_api/info").json()["named_endpoints"]
    assert {f"/{name}" for name in (*PAGE_NAMES, *api.TOOLS)} <= set(endpoints)
    assert all(endpoint["description"] for endpoint in endpoints.values())
    parameters = {p["parameter_name"]: p for p in endpoints["/analyze_model"]["parameters"]}
    assert parameters["evaluations"]["type"]["type"] == "integer"
    assert parameters["evaluations"]["parameter_default"] == api.EVALUATIONS


def test_a_client_of_the_model_context_protocol_calls_tools(address, program, common):
    async def talk():
        async with (
            streamable_http_client(f"{address}gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            listed = (await session.list_tools()).tools
            layers = await session.call_tool("list_layers", {"model": common["model"]})
            cut = await session.call_tool("measure_cut", {**common, "dropped": "1"})
            wrong = await session.call_tool("measure_cut", {**common, "dropped": "99"})
            return listed, layers, cut, wrong

    listed, layers, cut, wrong = asyncio.run(talk())
    assert {tool.name for tool in listed} == set(api.TOOLS)
    [dropped] = [t for t in listed if t.name == "measure_cut"]
    assert "13, 17" in dropped.inputSchema["properties"]["dropped"]["description"]
    assert dropped.inputSchema["required"] == ["dropped"]
    assert "held-out text" in dropped.description
    for answered, asked in (
        (layers, {"model": common["model"], "api_name": "/list_layers"}),
        (cut, {**common, "dropped": "1", "api_name": "/measure_cut"}),
    ):
        assert not answered.isError
        assert json.loads(answered.content[0].text) == program.predict(**asked)
    assert wrong.isError
    assert "no layer 99" in wrong.content[0].text


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    with pytest.raises(LayerShapError, match="pip install mcp"):
        api.prepare_mcp()
