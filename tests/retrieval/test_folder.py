"""Documents from folders and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from midstream.errors import DataError, InputError
from midstream.retrieval import read_corpus, read_documents, read_folder
from midstream.types import Document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b.md": "Before.\n\n# Guide\n\nWelcome.\n\n## Install\n\none two three\n\nfour five",
        "a/deep/notes.TXT": "# no heading\nplain",
        "a/plain.md": "\ufeffno heading here\r\nat all",
        "a.b/x.md": "# X\ntext",
        "a/ignored.rst": "other",
        ".git/hidden.md": "hidden",
        "a/.draft.md": "hidden",
        "empty.md": "\n \n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_a_folder_becomes_passages_in_a_stable_order(folder: Path) -> None:
    documents = read_folder(folder, max_words=4)
    assert documents == [
        Document(doc_id="a/deep/notes.TXT#1", title="notes", text="# no heading\nplain"),
        Document(doc_id="a/plain.md#1", title="plain", text="no heading here\n"[:-1]),
        Document(doc_id="a/plain.md#2", title="plain", text="at all"),
        Document(doc_id="a.b/x.md#1", title="X", text="text"),
        Document(doc_id="b.md#1", title="Guide", text="Before."),
        Document(doc_id="b.md#2", title="Guide", text="Welcome."),
        Document(doc_id="b.md#3", title="Guide > Install", text="one two three"),
        Document(doc_id="b.md#4", title="Guide > Install", text="four five"),
    ]
    assert len({document.doc_id for document in documents}) == len(documents)
    assert read_documents(str(folder)) == read_folder(folder)
    assert len(read_folder(folder)) == 6


def test_one_file_is_read_like_one_of_a_folder(folder: Path) -> None:
    assert read_documents(folder / "b.md") == [d for d in read_folder(folder) if d.doc_id.startswith("b.md#")]
    assert read_documents(folder / "a/deep/notes.TXT")[0].doc_id == "notes.TXT#1"


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "a" / "latin.txt").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: .* at byte 1"):
        read_folder(folder)
    (folder / "a" / "latin.txt").unlink()
    (folder / "a" / "gone.md").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match=r"gone\.md cannot be read: No such file"):
        read_folder(folder)
    with pytest.raises(InputError, match=r"nowhere cannot be read: No such file"):
        read_folder(folder / "nowhere")
    with pytest.raises(InputError, match=r"nowhere\.md cannot be read"):
        read_documents(folder / "nowhere.md")
    with pytest.raises(InputError, match=r"ignored\.rst is none of them"):
        read_documents(folder / "a" / "ignored.rst")
    with pytest.raises(InputError, match="at least one word"):
        read_folder(folder, max_words=0)


def test_a_folder_or_file_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Only a heading\n")
    (tmp_path / "b.rst").write_text("not read")
    for path in (tmp_path, tmp_path / "a.md"):
        with pytest.raises(InputError, match="there is no text in"):
            read_documents(path)


def test_corpora_are_read_and_every_bad_row_named(tmp_path: Path) -> None:
    rows = [
        {"doc_id": "1", "title": "T", "text": "x"},
        {"doc_id": 2, "title": None, "text": "y", "url": "z"},
        {"doc_id": "1", "text": "again"},
    ]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    documents = read_documents(tmp_path / "good.jsonl")
    assert documents == [
        Document(doc_id="1", title="T", text="x"),
        Document(doc_id="2", text="y"),
        Document(doc_id="1", text="again"),
    ]
    assert read_corpus(tmp_path / "good.jsonl", tmp_path / "good.jsonl") == documents * 2
    (tmp_path / "bad.jsonl").write_text('{"doc_id": "1"}\n{"doc_id": "1", "text": 3}\nno json\n[]')
    with pytest.raises(DataError, match="bad rows") as raised:
        read_corpus(tmp_path / "good.jsonl", tmp_path / "bad.jsonl")
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [
        f"bad.jsonl line {i}" for i in (1, 2, 3, 4)
    ]
    assert "text is a string, not int" in raised.value.problems[1]
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(DataError, match="no row"):
        read_documents(tmp_path / "none.jsonl")
