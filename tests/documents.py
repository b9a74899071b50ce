"""The README and the documents in docs/, taken apart: headings, links, blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("backup-worker", "em-bridge")


@dataclass(frozen=True)
class Block:
    """A block of code: the language it is fenced with, its text, and the name that makes a test run it, if any.

    The name stands in a comment on the line before: `<!-- run: NAME -->`.
    """

    document: str
    language: str
    text: str
    name: str | None


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a document, in their order."""
    found = re.finditer(
        r"(?:^<!-- run: (?P<name>[\w-]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
        path.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [Block(path.name, one["language"], one["text"], one["name"]) for one in found]


def block(name: str) -> Block:
    """Return the block with this name."""
    (found,) = (one for path in DOCUMENTS for one in blocks(path) if one.name == name)
    return found


def prose(path: Path) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors that a document's headings get on GitHub."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def links(path: Path) -> list[str]:
    """Return the targets of a document's links and images, without those in code."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)


def sections(path: Path, level: int) -> dict[str, str]:
    """Return the text below each heading of `level`, up to the next heading of that level or a higher one."""
    mark = "#" * level
    found = re.finditer(
        rf"^{mark} (?P<title>.*)\n(?P<text>(?:(?!#{{1,{level}}} ).*\n?)*)",
        path.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {one["title"]: one["text"] for one in found}


def commands(path: Path) -> Iterator[list[str]]:
    """Yield every call of our programs in a document's blocks of shell, as words."""
    for one in blocks(path):
        if one.language in ("sh", "console"):
            for line in one.text.replace("\\\n", " ").splitlines():
                if one.language == "sh" or line.startswith("$ "):
                    yield from _calls(line.removeprefix("$ "))


def mentioned(path: Path) -> Iterator[list[str]]:
    """Yield every call of our programs in a document's text, as words; it may be shortened."""
    for code in re.findall(r"`((?:backup-worker|em-bridge) [^`\n]+)`", prose(path)):
        yield from _calls(code)


def _calls(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            if words and words[0] in PROGRAMS:
                yield words
            words = []
        else:
            words.append(word)
