"""Every evaluation ever made, on disk: one plain float per (model, text, mask).

An analysis outlives its cache: a damaged database is set aside and a fresh one begun, and where
nothing can be written the evaluations stay in memory until it can. `notice` says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import diskcache
from diskcache.core import DBNAME, MODE_RAW
from filelock import FileLock

from core.bundled import cache_root
from core.errors import LayerShapError, first_line

logger = logging.getLogger("layershap")
T = TypeVar("T")

LOCK_TIMEOUT_SECONDS = 10
# After a failure the disk is left alone for so long before it is tried again.
RETRY_SECONDS = 30.0
# SQLite's own words can quote bytes that are no text.
FAILURES = (OSError, sqlite3.Error, diskcache.Timeout, UnicodeDecodeError)


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

    It never fails for want of a disk. Losses that cannot be stored are kept in memory, and written
    when the disk takes them again; a database that is damaged is renamed and replaced by a new one.

    Args:
        folder: where it lives; by default "evaluations" in the user's cache folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_root() / "evaluations"
        self.claims = Claims()
        self._database = self.folder / DBNAME
        self._lock = threading.RLock()
        self._cache: diskcache.Cache | None = None
        self._opened: tuple[int, int] | None = None
        self._waiting: dict[str, float] = {}
        self._failure: str | None = None
        self._set_aside: str | None = None
        self._retry_at = 0.0
        self._on_disk(lambda cache: None)

    @property
    def notice(self) -> str | None:
        """What the user should know of it, in whole sentences; None while all is well."""
        with self._lock:
            return " ".join(filter(None, (self._set_aside, self._failure))) or None

    def get(self, keys: Iterable[str]) -> list[float | None]:
        """The kept loss of each key, None where there is none or it cannot be read."""
        wanted = list(keys)
        with self._lock:
            self._write_waiting()
            stored = self._on_disk(lambda cache: [_stored(cache, key) for key in wanted])
            losses = stored or [None] * len(wanted)
            return [self._waiting.get(key, loss) for key, loss in zip(wanted, losses, strict=True)]

    def put(self, key: str, loss: float) -> None:
        """Keep one loss; on disk when this returns, unless `notice` says otherwise."""
        with self._lock:
            self._waiting[key] = float(loss)
            self._write_waiting()

    def __len__(self) -> int:
        with self._lock:
            return (self._on_disk(len) or 0) + len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """What the cache takes on disk."""
        return int(self._on_disk(lambda cache: cache.volume()) or 0)

    def clear(self) -> int:
        """Forget every evaluation; return how many there were.

        Raises:
            LayerShapError: what is on disk cannot be removed now.
        """
        with self._lock:
            waiting = len(self._waiting)
            self._waiting.clear()
            removed = self._on_disk(lambda cache: cache.clear(), writing=True)
            if removed is None:
                raise LayerShapError(self._failure)
            return int(removed) + waiting

    def _write_waiting(self) -> None:
        if self._waiting:
            self._on_disk(self._write, writing=True)

    def _write(self, cache: diskcache.Cache) -> None:
        while self._waiting:
            key, loss = next(iter(self._waiting.items()))
            cache.set(key, loss, tag=_checksum(key, loss))
            del self._waiting[key]

    def _on_disk(self, work: Callable[[diskcache.Cache], T], *, writing: bool = False) -> T | None:
        """What `work` makes of the database; None if that cannot be had now."""
        with self._lock:
            resting = time.monotonic() < self._retry_at
            if resting and (writing or self._cache is None):
                return None
            try:
                try:
                    result = work(self._open())
                except FAILURES as error:
                    if not _is_damage(error):
                        raise
                    self._replace()
                    result = work(self._open())
            except FAILURES as error:
                self._fail(error, writing)
                return None
            if not self._waiting:
                self._failure, self._retry_at = None, 0.0
            return result

    def _open(self) -> diskcache.Cache:
        # SQLite writes on to a file that was deleted, where nobody will find it.
        if self._cache is not None and _identity(self._database) != self._opened:
            self._close()
        if self._cache is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._opened = _identity(self._database)
            if self._opened is not None:
                _check_whole(self._database)
            try:
                self._cache = diskcache.Cache(
                    str(self.folder),
                    timeout=LOCK_TIMEOUT_SECONDS,
                    disk=_FloatDisk,
                    eviction_policy="none",
                    # Reading a mapped file that was cut short ends the process.
                    sqlite_mmap_size=0,
                )
            except (TypeError, ValueError) as error:
                raise sqlite3.DatabaseError("its settings are not readable") from error
            self._opened = _identity(self._database)
        return self._cache

    def _close(self) -> None:
        if self._cache is not None:
            with suppress(sqlite3.Error):
                self._cache.close()
            self._cache = None

    def _replace(self) -> None:
        """Rename the database that was found damaged, unless another process has done so."""
        self._close()
        with FileLock(self.folder / ".damaged.lock"):
            if _identity(self._database) != self._opened:
                return
            number = 1
            while (aside := self._database.with_name(f"{DBNAME}.damaged-{number}")).exists():
                number += 1
            # The database last: nobody may begin a new one while the old one's log lies there.
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    os.replace(f"{self._database}{suffix}", f"{aside}{suffix}")
        self._set_aside = (
            f"The evaluation cache was damaged, so it was set aside as {aside} and a new one "
            "begun; what it held will be measured again."
        )
        logger.warning(self._set_aside)

    def _fail(self, error: Exception, writing: bool) -> None:
        # An unfinished transaction ends with its connection. A database that cannot be written
        # can still be read.
        if not writing:
            self._close()
        elif self._cache is not None:
            with suppress(sqlite3.Error):
                self._cache.close()
        self._retry_at = time.monotonic() + RETRY_SECONDS
        told = self._failure is not None
        origin = _origin(error)
        reason = getattr(origin, "strerror", None) or first_line(origin)
        self._failure = (
            f"The evaluation cache in {self.folder} cannot be used ({reason}), so what is "
            "measured is kept in memory until it can; free some disk space, or choose another "
            "folder with LAYERSHAP_CACHE."
        )
        if not told:
            logger.warning(self._failure)


def _stored(cache: diskcache.Cache, key: str) -> float | None:
    """The loss stored under a key, if it is what was written there."""
    loss, checksum = cache.get(key, tag=True)
    # Databases of earlier versions have no checksums.
    if loss is None or checksum not in (None, _checksum(key, loss)):
        return None
    return loss


def _checksum(key: str, loss: float) -> str:
    return hashlib.blake2b(f"{key} {loss.hex()}".encode(), digest_size=8).hexdigest()


def _check_whole(database: Path) -> None:
    with closing(sqlite3.connect(database, timeout=LOCK_TIMEOUT_SECONDS)) as connection:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != ("ok",):
        raise sqlite3.DatabaseError("the database is damaged")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path names, whatever its content."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _origin(error: BaseException) -> BaseException:
    """The error that diskcache met first: it hides it behind a timeout or a failed rollback."""
    while isinstance(error.__context__, sqlite3.Error):
        error = error.__context__
    return error


def _is_damage(error: BaseException) -> bool:
    origin = _origin(error)
    if isinstance(origin, sqlite3.OperationalError):
        # Another layout of tables, or, without a code, text that is none.
        code = getattr(origin, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        return code & 0xFF == sqlite3.SQLITE_ERROR
    return isinstance(origin, sqlite3.DatabaseError | UnicodeDecodeError)


_default_lock = threading.Lock()
_defaults: dict[Path, EvaluationCache] = {}


def default_notice() -> str | None:
    """The notice of the cache in the user's cache folder, if that was opened."""
    opened = _defaults.get(cache_root() / "evaluations")
    return opened.notice if opened else None


def default_cache() -> EvaluationCache:
    """The cache in the user's cache folder, opened once per process."""
    folder = cache_root() / "evaluations"
    with _default_lock:
        if folder not in _defaults:
            _defaults[folder] = EvaluationCache(folder)
        return _defaults[folder]
