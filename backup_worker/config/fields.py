"""What the models of both files are made of: strict and frozen maps, and texts that must be paths, patterns, programs.

A value is refused with a sentence that says what would be right.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """Turn the text of a path into a path, relative to the folder of the file that it stands in."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("must not be empty")
    if value.startswith("~"):
        raise ValueError(
            f'"{value}" begins with “~”, which only a shell replaces; write ${{HOME}} or the whole path'
        )
    base = (info.context or {}).get("base", Path("/"))
    return Path(os.path.normpath(base / value))


def _inside(value: str) -> str:
    """Accept a path or pattern that cannot leave the agent's root."""
    if not value or value != value.strip():
        raise ValueError(f'"{value}" is empty or has spaces around it')
    if value.startswith("/"):
        raise ValueError(f'"{value}" is absolute; write it relative to the agent\'s root')
    if ".." in value.split("/"):
        raise ValueError(f'"{value}" leaves the agent\'s root through “..”; write a path below the root')
    if value.startswith("./"):
        raise ValueError(f'"{value}" begins with “./”; write "{value[2:]}"')
    if "//" in value or "/./" in value or value.endswith("/."):
        raise ValueError(f'"{value}" has an empty or “.” part; write each folder once')
    return value


def _pattern(value: str) -> str:
    if value.endswith("/"):
        raise ValueError(f'"{value}" names a folder, not files; write "{value}**" for all that is in it')
    return _inside(value)


def _file(value: str) -> str:
    if value.endswith("/"):
        raise ValueError(
            f'"{value}" names a folder; write the path of a file, for example "{value}index.json"'
        )
    if any(char in value for char in "*?["):
        raise ValueError(f'"{value}" is a pattern; name each required file, for example "SOUL.md"')
    return _inside(value)


def _command(value: list[str]) -> list[str]:
    if not value or not value[0].strip():
        raise ValueError('names no program; write for example ["python3", "agent.py"]')
    return value


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Pattern = Annotated[str, AfterValidator(_pattern)]
RelativeFile = Annotated[str, AfterValidator(_file)]
Command = Annotated[list[str], AfterValidator(_command)]


class Model(BaseModel):
    """Strict and frozen: no key is ignored, no text becomes a number, nothing changes after loading."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
