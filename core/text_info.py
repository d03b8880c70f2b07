"""Which text a result is of."""

from __future__ import annotations

from dataclasses import dataclass

from core.game import text_fingerprint
from core.text import TextBlocks


@dataclass(frozen=True)
class TextInfo:
    """Which text a study used; fingerprints identify the token blocks."""

    source: str
    blocks: int
    held_out_blocks: int
    block_length: int
    calibration_fingerprint: str
    held_out_fingerprint: str

    @classmethod
    def of(cls, text: TextBlocks) -> TextInfo:
        return cls(
            source=text.source,
            blocks=len(text.calibration),
            held_out_blocks=len(text.held_out),
            block_length=text.calibration.shape[1],
            calibration_fingerprint=text_fingerprint(text.calibration),
            held_out_fingerprint=text_fingerprint(text.held_out),
        )
