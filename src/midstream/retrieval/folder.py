"""Documents from files: a folder of Markdown and text, or a corpus in JSON Lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from midstream.errors import InputError
from midstream.jsonl import read_lines
from midstream.retrieval.sections import Section, markdown_sections, split_text
from midstream.types import Document

MAX_WORDS = 200
SUFFIXES = (".md", ".txt")


def read_documents(path: Path | str) -> list[Document]:
    """The documents of a folder, a .jsonl corpus, or one .md or .txt file. Raises InputError, DataError."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_corpus(path)
    if suffix in SUFFIXES:
        return _some(list(_passages(path, path.name, MAX_WORDS)), path)
    raise InputError(f"documents are read from a folder or a .jsonl, .md or .txt file, and {path} is none of them")


def read_folder(path: Path | str, *, max_words: int = MAX_WORDS) -> list[Document]:
    """The passages of all *.md and *.txt files (UTF-8) below a folder, in the order of the files' names.

    A file is cut at its Markdown headings and then into passages of at most `max_words` words. A passage's doc_id is
    the file's path in the folder and the passage's number ("guide/install.md#2"), its title the headings above it
    ("Guide > Install"); before the first heading the file's first one, without any the file's name. Names that
    begin with a dot and links to folders are passed over. Raises InputError for a file that cannot be read or is not
    UTF-8, and for a folder without any text.
    """
    root = Path(path)
    if max_words < 1:
        raise InputError(f"passages have at least one word, not {max_words}")
    names = sorted((file.relative_to(root).as_posix() for file in _files(root)), key=lambda name: name.split("/"))
    return _some([passage for name in names for passage in _passages(root / name, name, max_words)], root)


def read_corpus(*files: Path | str) -> list[Document]:
    """Documents from JSON Lines: `doc_id` and `text`, and `title` or none; other fields are not read.

    Raises DataError with every bad row of all files, or where there is none at all.
    """
    return read_lines([Path(file) for file in files], _read_row)


def _read_row(row: dict[str, Any]) -> Document:
    if not isinstance(row["text"], str):
        raise ValueError(f"text is a string, not {type(row['text']).__name__}")
    return Document(doc_id=str(row["doc_id"]), title=str(row.get("title") or ""), text=row["text"])


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(folder, name)


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _passages(file: Path, name: str, max_words: int) -> Iterator[Document]:
    sections = _sections(file)
    first = next((section.path[0] for section in sections if section.path), file.stem)
    parts = [(section, part) for section in sections for part in split_text(section.text, max_words)]
    for number, (section, part) in enumerate(parts, 1):
        yield Document(doc_id=f"{name}#{number}", title=" > ".join(section.path) or first, text=part)


def _sections(file: Path) -> list[Section]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
    # In a text file a line that begins with # is no heading.
    return markdown_sections(text) if file.suffix.lower() == ".md" else [Section((), text)]


def _some(documents: list[Document], path: Path) -> list[Document]:
    if not documents:
        raise InputError(f"there is no text in {path}; {' and '.join(SUFFIXES)} files are read")
    return documents
