"""docs/configuration.md, made from the JSON Schemas: every key with its unit, default, bounds and an example."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from backup_worker.config import AGENTS_FILE, SCHEDULE_FILE, schema_name, schemas

_FIRST = """\
# Configuration

Two files in one folder (`--config DIR`, `$BACKUP_CONFIG`, or `./config`): `backup_schedule.json` says what is backed
up, when and where to; `agents.json` says who. `backup-worker init` writes both, with their JSON Schemas, so that an
editor explains and checks every key. `backup-worker doctor` checks what a schema cannot: folders, programs, space.

- Unknown keys, duplicate keys and values of another type are errors: nothing is ignored or guessed. An error names
  the file, the place in it, what is wrong and what would be right.
- Both files are read again when they change. A broken edit keeps the last good configuration, and alerts.
- A relative path is relative to the file that it stands in. `~` is not replaced; `${HOME}` is.
- `${NAME}` anywhere in a text is replaced by that environment variable; a variable that is not set is an error.
  `$${NAME}` is the text `${NAME}` itself. Keep passwords in the environment.
- Patterns of files: `*` and `?` stay within one name, `**` is any number of folders, `[abc]` is one of these; a
  pattern that names a folder means all that is below it. Patterns of `files` begin at the agent's root; a pattern of
  `exclude` without a slash matches at any depth, as in a `.gitignore`.
- A third file is read if it is there: `allowed_signers`, in OpenSSH's format. See
  [what a signature proves](guarantees.md#what-a-signature-proves).

This page is made by `make docs` from the schemas; change the descriptions there.
"""


def page() -> str:
    """Return the text of the page."""
    texts = schemas()
    parts = [_FIRST]
    for file in (SCHEDULE_FILE, AGENTS_FILE):
        parts += _file(file, json.loads(texts[schema_name(file)]))
    return "\n".join(parts).rstrip("\n") + "\n"


def _file(file: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"## {file}\n"
    yield from _map(schema, schema, "")


def _map(schema: dict[str, Any], part: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the table of the map at `path`, then those of the maps in it."""
    below: list[tuple[str, dict[str, Any]]] = []
    if path:
        yield f"### `{path}`\n"
        yield f"{part.get('description', '')}\n"
    yield "| key | is a | default | meaning |\n| --- | --- | --- | --- |"
    required = part.get("required", [])
    for key, value in part["properties"].items():
        inner = _inner(schema, value)
        if inner is not None:
            name, shape = inner
            below.append((f"{path}.{key}{name}" if path else f"{key}{name}", shape))
        yield f"| `{key}` | {_is_a(value)} | {_default(key, value, required, inner)} | {_meaning(value)} |"
    yield ""
    for place, shape in below:
        yield from _map(schema, shape, place)


def _inner(schema: dict[str, Any], value: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the map that `value` is, or is a map of, and what stands in the path for its keys."""
    for one in (value, *value.get("anyOf", ())):
        if "$ref" in one:
            shape = _shape(schema, one)
            return ("", shape) if "properties" in shape else None
        for inner in one.get("patternProperties", {}).values():
            if "$ref" in inner:
                return ".NAME", _shape(schema, inner)
        items = one.get("items", {})
        for inner in (items, *items.get("anyOf", ())):
            if "$ref" in inner and "properties" in _shape(schema, inner):
                return "[]", _shape(schema, inner)
    return None


def _shape(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][reference["$ref"].removeprefix("#/$defs/")]
    return found


def _is_a(value: dict[str, Any]) -> str:
    words: list[str] = [value.get("title", "value")]
    for one in (value, *value.get("anyOf", ())):
        if "enum" in one:
            words.append(": " + ", ".join(f"`{item}`" for item in one["enum"]))
        words += [
            f", {word} {one[name]:g}"
            for name, word in (
                ("minimum", "at least"), ("exclusiveMinimum", "more than"),
                ("maximum", "at most"), ("exclusiveMaximum", "less than"),
            )
            if name in one
        ]  # fmt: skip
    return "".join(words)


def _default(key: str, value: dict[str, Any], required: list[str], inner: object) -> str:
    if key in required:
        return "required"
    if value.get("default") is not None:
        return f"`{json.dumps(value['default'], ensure_ascii=False)}`"
    if inner is not None and "default" not in value and value.get("type") != "array":
        return "see below"
    kind = value.get("type")
    return {"array": "`[]`", "object": "`{}`"}.get(str(kind), "none")


def _meaning(value: dict[str, Any]) -> str:
    text = str(value.get("description", "")).replace("|", "\\|").replace("*", "\\*")
    examples = value.get("examples", ())
    shown = [f"`{json.dumps(example, ensure_ascii=False)}`" for example in examples]
    if not shown or sum(map(len, shown)) > 160:
        return text
    return f"{text} Example: {' or '.join(shown)}"
