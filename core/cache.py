"""Every evaluation ever made, on disk: one plain float per (model, text, mask)."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diskcache
from diskcache.core import MODE_RAW

from core.bundled import cache_root
from core.errors import LayerShapError

LOCK_TIMEOUT_SECONDS = 60


class _FloatDisk(diskcache.Disk):
    """Stores text keys and float values in the database itself; never pickles or unpickles."""

    def put(self, key):
        if not isinstance(key, str):
            raise TypeError(f"cache keys are text, not {type(key).__name__}")
        return key, True

    def get(self, key, raw):
        return key if isinstance(key, str) else ""

    def store(self, value, read, key=None):
        if not isinstance(value, float):
            raise TypeError(f"cached values are floats, not {type(value).__name__}")
        return 0, MODE_RAW, None, value

    def fetch(self, mode, filename, value, read):
        # Anything but a float was not written by this class: it is as good as absent.
        return value if mode == MODE_RAW and isinstance(value, float) else None

    def remove(self, file_path):
        """Values never live in files, so a file name in the database is not to be trusted."""


class Claims:
    """What is being evaluated right now, so that what two ask for at once is evaluated once."""

    def __init__(self) -> None:
        self._held: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[dict[str, threading.Event]]:
        """Hold the keys that nobody else holds; yields the others, each with the event that says
        when its holder is done."""
        done = threading.Event()
        with self._lock:
            theirs = {key: self._held[key] for key in keys if key in self._held}
            mine = [key for key in keys if key not in theirs]
            self._held.update(dict.fromkeys(mine, done))
        try:
            yield theirs
        finally:
            with self._lock:
                for key in mine:
                    del self._held[key]
            done.set()


class EvaluationCache:
    """A persistent map from evaluation keys to losses, shared by threads and processes.

    Args:
        folder: where it lives; by default "evaluations" in the user's cache folder.

    Raises:
        LayerShapError: the folder cannot be written, or holds something else.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_root() / "evaluations"
        self.claims = Claims()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._cache = diskcache.Cache(
                str(self.folder),
                timeout=LOCK_TIMEOUT_SECONDS,
                disk=_FloatDisk,
                eviction_policy="none",
            )
        except (OSError, sqlite3.DatabaseError, diskcache.Timeout) as error:
            raise LayerShapError(
                f"The evaluation cache in {self.folder} cannot be opened ({error}); choose another "
                "folder with LAYERSHAP_CACHE, or delete that one."
            ) from error

    def get(self, keys: Iterable[str]) -> list[float | None]:
        """The stored loss of each key, None where there is none."""
        return [self._cache.get(key) for key in keys]

    def put(self, key: str, loss: float) -> None:
        """Store one loss; it is on disk when this returns.

        Raises:
            LayerShapError: the disk is full or the folder has become unwritable.
        """
        try:
            self._cache.set(key, float(loss))
        except (OSError, sqlite3.DatabaseError, diskcache.Timeout) as error:
            raise LayerShapError(
                f"An evaluation could not be stored in {self.folder} ({error}); free some disk "
                "space or choose another folder with LAYERSHAP_CACHE."
            ) from error

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def size_bytes(self) -> int:
        """What the cache takes on disk."""
        return int(self._cache.volume())

    def clear(self) -> int:
        """Forget every evaluation; return how many there were."""
        return int(self._cache.clear())


_default_lock = threading.Lock()
_defaults: dict[Path, EvaluationCache] = {}


def default_cache() -> EvaluationCache:
    """The cache in the user's cache folder, opened once per process."""
    folder = cache_root() / "evaluations"
    with _default_lock:
        if folder not in _defaults:
            _defaults[folder] = EvaluationCache(folder)
        return _defaults[folder]
