"""Turn what pydantic found wrong into sentences that name the place, the fault and what would be right.

Everything comes from the JSON Schema of the file, so that an error message, an editor's tooltip and the reference
never disagree. Values are shown as they are written in the file (not as `${NAME}` expands), and never those of alerts
and pings: their URLs carry passwords.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from backup_worker.config.document import Place, dotted
from em_bridge.errors import ConfigError

JsonSchema = dict[str, Any]

_WRONG_TYPE = {
    "string_type", "int_type", "int_from_float", "float_type", "bool_type", "list_type", "dict_type", "model_type",
    "path_type", "none_required", "model_attributes_type", "is_instance_of", "finite_number",
}  # fmt: skip
_SECRET = frozenset(("alerts", "ping"))
_SHOWN_LENGTH = 60
_EXAMPLE_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: where it is, what is wrong (with what would be right), and what may help beyond that."""

    file: str
    place: Place
    text: str
    hint: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.file}: {dotted(self.place)}: {self.text}" if self.place else f"{self.file}: {self.text}"
        )


class InvalidConfig(ConfigError):
    """The files are well-formed but wrong; `problems` has every fault found, the message the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *more = problems
        hint = first.hint
        if more:
            others = "; ".join(str(problem) for problem in more[:4]) + ("; …" if len(more) > 4 else "")
            hint = f"{hint + '; ' if hint else ''}also wrong: {others}"
        super().__init__(str(first), hint=hint)
        self.problems = tuple(problems)


def explain(error: ValidationError, schema: JsonSchema, document: Any, file: str) -> list[Problem]:
    """Return one problem for each of `error`'s faults; `document` is the file before `${NAME}` is expanded."""
    return [_problem(details, schema, document, file) for details in error.errors(include_url=False)]


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return what may have been meant by `word`, as the end of a sentence: `; did you mean "keep"?`."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known are {', '.join(sorted(known))}" if known else ""


def _problem(details: ErrorDetails, schema: JsonSchema, document: Any, file: str) -> Problem:
    place = tuple(step for step in details["loc"] if step != "[key]")
    here = _schema_at(schema, place)
    title, example = _title(here), _example(here)
    value = _shown(_value_at(document, place, details["input"]), place)
    hint = here.get("description")
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(place, schema, file)
    if kind == "missing":
        return Problem(file, place[:-1], f'key "{place[-1]}" is missing{example}', hint)
    if "[key]" in details["loc"]:
        return _bad_name(details, place, file)
    if kind == "value_error":
        return Problem(file, place, str(details["ctx"]["error"]), hint)
    if kind == "literal_error":
        known = [str(choice) for choice in here.get("enum", [])] or [str(here.get("const"))]
        raw = details["input"]
        return Problem(file, place, f"{value} is not known{suggestion(str(raw), known)}", hint)
    if kind == "bool_type":
        return Problem(file, place, f"{value} is neither true nor false; write it without quotes", hint)
    if kind in _WRONG_TYPE:
        return Problem(file, place, f"{value} is not a {title}{example}".replace(" a a", " an a"), hint)
    if kind in ("too_short", "string_too_short"):
        return Problem(file, place, f"must not be empty{example}", hint)
    return Problem(file, place, f"{value} {_limit(details)}{example}", hint)


def _limit(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    words = {
        "greater_than_equal": ("ge", "is less than"),
        "greater_than": ("gt", "is not greater than"),
        "less_than_equal": ("le", "is greater than"),
        "string_too_long": ("max_length", "is longer than"),
    }
    if details["type"] in words:
        key, text = words[details["type"]]
        return f"{text} {context[key]:g}"
    return f"is wrong: {details['msg'][:1].lower()}{details['msg'][1:]}"


def _bad_name(details: ErrorDetails, place: Place, file: str) -> Problem:
    shown = json.dumps(place[-1], ensure_ascii=False)
    if details["type"] != "string_pattern_mismatch":
        return Problem(file, place[:-1], f"{shown} is too long for a name")
    allowed = "letters, digits, - and _ (the first a letter or digit, at most 63)"
    if "_" not in details["ctx"]["pattern"]:
        allowed = "letters, digits and single hyphens between them: it becomes a folder's name"
    return Problem(file, place[:-1], f"{shown} is not a name that can be used here; write {allowed}")


def _unknown_key(place: Place, schema: JsonSchema, file: str) -> Problem:
    key, parent = str(place[-1]), place[:-1]
    here = _schema_at(schema, parent)
    known = [name for name in here.get("properties", {}) if name != "$schema"]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        for name in known:
            if key in _resolve(schema, here["properties"][name]).get("properties", {}):
                return Problem(
                    file,
                    parent,
                    f'unknown key "{key}"; it belongs into "{name}": {{"{name}": {{"{key}": …}}}}',
                )
    return Problem(file, parent, f'unknown key "{key}"{suggestion(key, known)}')


def _resolve(schema: JsonSchema, part: JsonSchema) -> JsonSchema:
    """Follow a reference, keeping the title and description that stand beside it; the non-null branch of a choice."""
    while True:
        own = {key: value for key, value in part.items() if key in ("title", "description", "examples")}
        if "$ref" in part:
            part = {**schema["$defs"][part["$ref"].rsplit("/", 1)[-1]], **own}
        elif "anyOf" in part and "type" not in part:
            part = {**next(branch for branch in part["anyOf"] if branch.get("type") != "null"), **own}
        else:
            return part


def _schema_at(schema: JsonSchema, place: Place) -> JsonSchema:
    here = _resolve(schema, schema)
    for step in place:
        if isinstance(step, int):
            inner = {**here.get("items", {})}
        else:
            inner = {**(here.get("properties", {}).get(step) or _entry(here))}
        here = _resolve(schema, inner)
    return here


def _entry(here: JsonSchema) -> JsonSchema:
    entry: Any = here.get("additionalProperties") or next(
        iter(here.get("patternProperties", {}).values()), {}
    )
    return entry if isinstance(entry, dict) else {}


def _title(here: JsonSchema) -> str:
    words = {"string": "text", "object": "map", "array": "list"}
    # A model's own title is the name of its class, which means nothing to whoever writes the file.
    title = str(here.get("title", ""))
    return (
        title
        if title and not title[0].isupper()
        else words.get(str(here.get("type")), "value of the right kind")
    )


def _example(here: JsonSchema) -> str:
    if not here.get("examples") or len(json.dumps(here["examples"][0])) > _EXAMPLE_LENGTH:
        words = {"string": ' a text in quotes, "…"', "object": " a map, {…}", "array": " a list, […]"}
        return f"; write{words[here['type']]}" if here.get("type") in words else ""
    return f"; write for example {json.dumps(here['examples'][0], ensure_ascii=False)}"


def _value_at(document: Any, place: Place, otherwise: Any) -> Any:
    for step in place:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return otherwise
    return document


def _shown(value: Any, place: Place) -> str:
    if not _SECRET.isdisjoint(place) and not isinstance(value, int | float | None):
        return "the value"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"
