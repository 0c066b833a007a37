"""From texts, code and changes to markup; whatever comes from a report is escaped here."""

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from rich.text import Text

from nanhunt.report.layout import clean

_CLASSES = {
    "red": "bad", "green": "good", "yellow": "odd", "dim": "faint", "bold": "strong",
    "italic": "code",
}  # fmt: skip
_WORD = re.compile(r"\w+|\s+|.")


def safe(value: object) -> str:
    """Anything as text on one line, with escapes for what would not be seen; markup as it is."""
    return value if isinstance(value, Markup) else clean(str(value))


def marked(text: Text | str) -> Markup:
    """A styled text, its styles as classes."""
    if isinstance(text, str):
        return escape(safe(text))
    edges = sorted({0, len(text), *(edge for s in text.spans for edge in (s.start, s.end))})
    parts = []
    for start, end in pairwise(edges):
        around = [str(s.style) for s in text.spans if s.start <= start and end <= s.end]
        names = [_CLASSES[word] for style in around for word in style.split() if word in _CLASSES]
        words = escape(clean(text.plain[start:end]))
        parts.append(_span(" ".join(names), words) if names else words)
    return Markup().join(parts)


def code(lines: Sequence[str]) -> list[Markup]:
    """Lines of Python, their words told apart by classes."""
    plain = [clean(line.expandtabs(4).rstrip()) for line in lines]
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    shown = highlight("\n".join(plain), lexer, HtmlFormatter(nowrap=True)).split("\n")
    return [Markup(line) for line in shown[: len(plain)]]  # noqa: S704 - escaped by pygments


def change(before: str, after: str) -> tuple[Markup, Markup]:
    """A line before and after, with what differs marked in both."""
    old, new = (_WORD.findall(clean(line.strip())) for line in (before, after))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    left = [(old[a:b], tag != "equal") for tag, a, b, _, _ in blocks]
    right = [(new[a:b], tag != "equal") for tag, _, _, a, b in blocks]
    return Markup().join(_told(left)), Markup().join(_told(right))


def _told(pieces: Sequence[tuple[list[str], bool]]) -> Iterator[Markup]:
    for words, differs in pieces:
        text = escape("".join(words))
        yield Markup("<mark>{}</mark>").format(text) if differs and text else text


def _span(names: str, words: Markup) -> Markup:
    return Markup('<span class="{}">{}</span>').format(names, words)
