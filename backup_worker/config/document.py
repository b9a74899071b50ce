"""Read a JSON file the way a configuration deserves: nothing ambiguous gets through, and every fault has a place.

Python's own reader takes duplicate keys (the last one wins), NaN, numbers too large for a float and a byte-order mark.
Each of them is an error here, named with its line and column or its path in the document. `${NAME}` in a string is the
environment's NAME; `$${NAME}` is the text `${NAME}` itself.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from em_bridge.errors import ConfigError

MAX_BYTES = 16 * 1024 * 1024
_VARIABLE = re.compile(r"\$(\$?)\{([^}]*)(\}|\Z)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Place = tuple[str | int, ...]


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were written twice."""

    repeated: tuple[str, ...] = ()


class _BadNumber(str):
    """A number that JSON or a float cannot hold, kept until its place is known."""


def read(path: Path) -> bytes:
    """Return the content of `path`; `ConfigError` says why it cannot be read and what to do."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file",
            hint="write a starting configuration with `backup-worker init`, or name its folder with --config",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES // 1024**2} MiB; is it the right file?")
    return content


def parse(content: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `content`; `name` is what errors call the file."""
    text = _decode(content, name)
    try:
        document = json.loads(
            text, object_pairs_hook=_object, parse_constant=_BadNumber, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name}: line {error.lineno}, column {error.colno}: not valid JSON: {_lower(error.msg)}",
            hint=_syntax_hint(text, error.pos),
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: must be a JSON object; write {{ … }}")
    for place, problem, hint in _faults(document, ()):
        raise ConfigError(f"{name}: {at(place)}{problem}", hint=hint)
    return document


def expand(value: Any, environ: Mapping[str, str], name: str, place: Place = ()) -> Any:
    """Return `value` with `${NAME}` replaced in all its strings; `ConfigError` names a variable that is not set."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _variable(match, environ, name, place), value)
    if isinstance(value, dict):
        return {key: expand(item, environ, name, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environ, name, (*place, index)) for index, item in enumerate(value)]
    return value


def dotted(place: Place) -> str:
    """Return a place as people write it: `agents.z.required[0]`."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text


def at(place: Place) -> str:
    """Return `place` as the beginning of a message."""
    return f"{dotted(place)}: " if place else ""


def _decode(content: bytes, name: str) -> str:
    for mark in (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if content.startswith(mark):
            raise ConfigError(
                f"{name}: line 1, column 1: starts with a byte-order mark",
                hint="save the file as UTF-8 without a byte-order mark (BOM)",
            )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise ConfigError(
            f"{name}: line {line}, column {column}: is not UTF-8 (byte 0x{content[error.start]:02x})",
            hint="save the file as UTF-8",
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        result.repeated = tuple(key for key in result if names.count(key) > 1)
    return result


def _float(text: str) -> float | _BadNumber:
    number = float(text)
    return number if math.isfinite(number) else _BadNumber(text)


def _int(text: str) -> int | _BadNumber:
    # Integers of thousands of digits are refused by Python itself; nothing here needs more than a few.
    return int(text) if len(text) <= 20 else _BadNumber(text)


def _faults(value: Any, place: Place) -> Iterator[tuple[Place, str, str | None]]:
    if isinstance(value, _BadNumber):
        shown = value if len(value) <= 24 else f"{value[:20]}…"
        yield place, f"{shown} is not a number that can be used here", "write a plain decimal number"
    elif isinstance(value, str):
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            yield (
                place,
                "holds a character that no path or name can have (NUL or half a surrogate pair)",
                None,
            )
    elif isinstance(value, _Object):
        for key in value.repeated:
            yield (
                place,
                f'key "{key}" is written twice',
                "keep one of the two; JSON readers disagree about which one counts",
            )
        for key, item in value.items():
            yield from _faults(key, place)
            yield from _faults(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, (*place, index))


def _variable(match: re.Match[str], environ: Mapping[str, str], name: str, place: Place) -> str:
    escaped, variable, closing = match.groups()
    if escaped:
        return f"${{{variable}{closing}"
    if not closing or not _NAME.fullmatch(variable):
        raise ConfigError(
            f'{name}: {at(place)}"{match.group()}" does not name an environment variable',
            hint="write ${NAME} for a variable, or $${…} for the text itself",
        )
    if variable not in environ:
        raise ConfigError(
            f'{name}: {at(place)}environment variable "{variable}" is not set',
            hint=f"set it (export {variable}=…), or write $${{{variable}}} if the text itself is meant",
        )
    return environ[variable]


def _syntax_hint(text: str, position: int) -> str | None:
    before, here = text[:position].rstrip(), text[position : position + 2]
    if here in ("//", "/*") or here.startswith("#"):
        return "JSON has no comments; remove it"
    if here.startswith("'"):
        return 'JSON writes strings in double quotes: "…"'
    if before.endswith(",") and here[:1] in ("}", "]"):
        return "remove the comma before the closing bracket"
    if re.match("True|False|None", text[position : position + 5]):
        return "JSON writes true, false and null in lower case"
    if not here.strip():
        return "the file ends too early; is a closing bracket missing?"
    return None


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
