"""Markdown at its headings, text by its length."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from midstream.retrieval.sections import Section, markdown_sections, split_text

GUIDE = """Before.

# Guide
Welcome.
## Install ##
### Linux
  apt install x
#hashtag and C #1

```sh
# a comment
~~~
```
after
## Use
~~~~ python
# also a comment
```
~~~
# still inside
~~~~
``` inline ```
#
nameless
# End
"""


def test_sections_have_the_headings_above_them() -> None:
    assert markdown_sections(GUIDE) == [
        Section((), "Before."),
        Section(("Guide",), "Welcome."),
        Section(
            ("Guide", "Install", "Linux"), "  apt install x\n#hashtag and C #1\n\n```sh\n# a comment\n~~~\n```\nafter"
        ),
        Section(("Guide", "Use"), "~~~~ python\n# also a comment\n```\n~~~\n# still inside\n~~~~\n``` inline ```"),
        Section((), "nameless"),
    ]
    assert markdown_sections("") == markdown_sections("# Only\n\n## Headings\n") == []
    levels = [section.path for section in markdown_sections("### c\n1\n# a\n2\n### c\n3\n## b\n4")]
    assert levels == [("c",), ("a",), ("a", "c"), ("a", "b")]


def test_a_long_text_is_cut_at_the_widest_break_there_is() -> None:
    assert split_text("one two\n\nthree four\n\nfive", 4) == ["one two\n\nthree four", "five"]
    assert split_text("one two\nthree four\nfive six", 4) == ["one two\nthree four", "five six"]
    assert split_text("One two. Three four? Five six seven.", 4) == ["One two. Three four? ", "Five six seven."]
    assert split_text("a b c d e", 2) == ["a b ", "c d ", "e"]
    assert split_text("a b\n \n\nc", 3) == ["a b\n\nc"]
    assert split_text("    code\n\n    more", 1) == ["    code", "    more"]
    assert split_text(" \n\n ", 3) == []


@given(st.text(alphabet="ab.!\n #", max_size=200), st.integers(1, 9))
def test_no_word_is_lost_and_no_part_too_long(text: str, max_words: int) -> None:
    parts = split_text(text, max_words)
    assert [word for part in parts for word in part.split()] == text.split()
    assert all(1 <= len(part.split()) <= max_words for part in parts)


@given(st.text(alphabet="ab#`~\n ", max_size=200))
def test_every_line_is_a_heading_or_in_a_section(text: str) -> None:
    body = [line for section in markdown_sections(text) for line in section.text.split("\n")]
    lines = iter(text.split("\n"))
    assert all(line in lines for line in body if line.strip()), "in their order"
    missing = Counter(text.split("\n")) - Counter(body)
    assert all(line.lstrip().startswith("#") for line in missing if line.strip())
