"""The JSON Schemas of the two files, made from the models: what an editor checks is what `load` checks."""

from __future__ import annotations

import json
from typing import Any

from backup_worker.config.agents import AgentsFile
from backup_worker.config.fields import Model
from backup_worker.config.files import AGENTS_FILE, SCHEDULE_FILE
from backup_worker.config.schedule import Schedule

_FILES: dict[str, tuple[type[Model], str]] = {
    SCHEDULE_FILE: (Schedule, "Agent Backup: what, when, where"),
    AGENTS_FILE: (AgentsFile, "Agent Backup: who"),
}


def schema_name(file: str) -> str:
    """Return the name of the schema's file beside `file`: `agents.schema.json`."""
    return file.removesuffix(".json") + ".schema.json"


def schemas() -> dict[str, str]:
    """Return the text of each schema file by its name."""
    return {schema_name(file): _text(model, title) for file, (model, title) in _FILES.items()}


def _close(part: Any) -> None:
    """Refuse keys that no pattern takes: to JSON Schema, a key that matches no pattern is any value."""
    if isinstance(part, dict):
        if "patternProperties" in part:
            part["additionalProperties"] = False
        for inner in part.values():
            _close(inner)


def _text(model: type[Model], title: str) -> str:
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(),
    }
    schema["title"] = title
    _close(schema)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
