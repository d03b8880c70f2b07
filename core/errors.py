"""The one exception whose text is meant for the user, and what goes into such texts."""

from __future__ import annotations

import errno

# Disk full, over the quota, file too large for a limit, read-only file system.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class LayerShapError(Exception):
    """Something the user can put right; the message is one plain sentence that says how."""


def first_line(error: Exception, longest: int = 200) -> str:
    """What another library says went wrong, fit for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]


def advice(error: BaseException) -> str | None:
    """The sentence for what a machine can run out of anywhere; None for any other error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The device's memory is full; choose a smaller dtype, shorter or fewer blocks, or the "
            "CPU, or end what else uses the device."
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename} could not be written" if error.filename else "Writing failed"
        return f"{where} ({error.strerror}); free some disk space, or choose another place."
    return None


def check_one_of(parameter: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises LayerShapError unless a parameter has one of the values it may have."""
    if value not in allowed:
        raise LayerShapError(f"{parameter} is {value!r}; it must be one of {', '.join(allowed)}.")
