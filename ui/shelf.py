"""Studies that an address can name: the ready-made one, and those that were analysed here."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

from core.bundled import cache_root
from core.errors import LayerShapError
from core.study import Study
from ui.theme import ASSETS

READY_MADE = ASSETS / "studies" / "smollm2-135m-instruct.json"
STUDY_ID = re.compile(r"[0-9a-f]{32}")
# The oldest go first; one of 512 masks of 30 layers takes about 150 KB.
MOST_BYTES = 256 << 20


@lru_cache(maxsize=1)
def ready_made() -> Study:
    """The finished study that a visitor sees first; `assets/studies/make.py` measured it."""
    return Study.from_json(READY_MADE.read_text(encoding="utf-8"))


def keep(study: Study) -> str:
    """Keep a finished study for whoever has its address; returns its id.

    Raises:
        LayerShapError: the folder cannot be written.
    """
    content = study.to_json()
    name = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, suffix=".part", encoding="utf-8", delete=False
        ) as file:
            file.write(content)
        os.replace(file.name, folder / f"{name}.json")
        _make_room(folder)
    except OSError as error:
        raise LayerShapError(
            f"The study could not be kept in {folder} ({error}), so its address will not work "
            "later; download it instead."
        ) from error
    return name


def find(name: str) -> Study:
    """The study with that id.

    Raises:
        LayerShapError: there is none.
    """
    file = _folder() / f"{name}.json"
    if not STUDY_ID.fullmatch(name) or not file.is_file():
        raise LayerShapError(
            "The study that this address names is not on this server any more; open its saved "
            "file in the Study tab."
        )
    return Study.from_json(file.read_text(encoding="utf-8"))


def _make_room(folder: Path) -> None:
    kept = [(path, path.stat()) for path in folder.glob("*.json")]
    excess = sum(about.st_size for _, about in kept) - MOST_BYTES
    for path, about in sorted(kept, key=lambda item: item[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= about.st_size


def _folder() -> Path:
    return cache_root() / "studies"
