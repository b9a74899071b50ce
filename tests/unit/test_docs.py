"""The documents: what is made is up to date, what is linked is there, and every command that stands in them exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperCommand, TyperGroup

from backup_worker.alerts.kinds import KINDS
from backup_worker.config import AGENTS_FILE, DEFAULT_TIERS, SCHEDULE_FILE, from_contents, schemas
from backup_worker.reference import commands as reference
from backup_worker.reference.__main__ import TOP, pages
from tests import documents

DOCS = documents.ROOT / "docs"
NAMES = [path.name for path in documents.DOCUMENTS]


PROGRAMS = reference.programs()


def document(name: str) -> Path:
    return next(path for path in documents.DOCUMENTS if path.name == name)


@pytest.mark.parametrize("name", pages())
def test_what_is_made_from_models_and_commands_is_up_to_date(name: str) -> None:
    assert (TOP / name).read_text() == pages()[name], "run `make docs`"


def test_every_shipped_schema_is_made_from_the_models() -> None:
    assert {f"config/{path.name}" for path in (TOP / "config").glob("*.schema.json")} <= set(pages())


def described() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in schemas().values():
        schema = json.loads(text)
        for model, part in {**schema.get("$defs", {}), schema["title"]: schema}.items():
            for key, value in part.get("properties", {}).items():
                found[f"{model}.{key}"] = value
    return found


@pytest.mark.parametrize("place", [place for place in described() if not place.endswith(".$schema")])
def test_every_key_of_the_configuration_says_what_it_is_and_shows_an_example(place: str) -> None:
    value = described()[place]
    is_map = "$ref" in value
    assert value.get("title") or is_map
    assert is_map or value.get("description")
    assert is_map or value.get("examples")


def commands() -> list[tuple[str, str]]:
    return [
        (" ".join(words), command.help or "")
        for name, program in PROGRAMS.items()
        for words, command in reference.walked(program, (name,))
    ]


@pytest.mark.parametrize(("name", "text"), commands())
def test_every_command_shows_an_example_of_itself(name: str, text: str) -> None:
    examples = re.findall(r"Example: `([^`]+)`", text)
    assert examples
    assert all(name in example for example in examples)


def test_every_argument_and_option_says_what_it_is() -> None:
    silent = [
        f"{' '.join(words)}: {param.name}"
        for name, program in PROGRAMS.items()
        for words, command in reference.walked(program, (name,))
        for param in command.params
        if not getattr(param, "help", None)
    ]
    assert silent == []


def called(words: list[str]) -> tuple[Any, Any]:
    """Return the command that a line calls, and its context made by our own parser, without running it."""
    command: Any = PROGRAMS[words[0]]
    context = command.make_context(words[0], words[1:])
    while isinstance(command, TyperGroup) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert isinstance(command, TyperCommand) or command.invoke_without_command, "no command is named"
    return command, context


@pytest.mark.parametrize("name", NAMES)
def test_every_command_line_in_the_documents_is_one_that_the_programs_take(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_CONFIG", "config")
    wrong = []
    for words in documents.commands(document(name)):
        try:
            if not {"--help", "--install-completion"} & set(words):
                called(words)
        except Exception as error:
            wrong.append(f"{' '.join(words)}: {getattr(error, 'message', error)}")
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_that_the_documents_mention_exists(name: str) -> None:
    wrong = []
    for words in documents.mentioned(document(name)):
        command: Any = PROGRAMS[words[0]]
        options = options_of(command) | {"--help": False, "--install-completion": False}
        is_value = False
        for word in words[1:]:
            if word == "--":
                break
            if is_value or word in ("…", "·"):
                is_value = False
            elif word.startswith("-"):
                if word not in options:
                    wrong.append(f"{' '.join(words)}: {word}")
                is_value = options.get(word, False)
            elif isinstance(command, TyperGroup):
                if word not in command.commands:
                    wrong.append(f"{' '.join(words)}: {word}")
                    break
                command = command.commands[word]
                options |= options_of(command)
    assert wrong == []


def options_of(command: Any) -> dict[str, bool]:
    """Return the options of a command, and of each whether a value follows it."""
    return {option: not getattr(param, "is_flag", False) for param in command.params for option in param.opts}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    path = document(name)
    dead = []
    for link in documents.links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and anchor not in documents.anchors(there)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("name", NAMES)
def test_every_piece_of_json_in_the_documents_is_json(name: str) -> None:
    for block in documents.blocks(document(name)):
        if block.language == "json":
            json.loads(block.text)


def test_the_agents_that_the_documents_show_are_a_configuration(tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"timezone": "UTC", "repository": "/backups", "history": "/backups/h.jsonl"}
    shown = [
        block
        for path in documents.DOCUMENTS
        for block in documents.blocks(path)
        if block.language == "json" and '"agents":' in block.text
    ]
    assert shown
    for block in shown:
        # One agent alone, to be added to others, need not have every class that the tiers want.
        whole = len(json.loads(block.text)["agents"]) > 1
        schedule["tiers"] = DEFAULT_TIERS if whole else {"weekly": DEFAULT_TIERS["weekly"]}
        files = {SCHEDULE_FILE: json.dumps(schedule).encode(), AGENTS_FILE: block.text.encode()}
        from_contents(tmp_path, files, environ={"HOME": "/home/kari"})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_runbook_says_of_each_kind_of_alert_what_it_means_and_what_to_do(kind: str) -> None:
    text = documents.sections(DOCS / "runbook.md", 3)[kind]
    for part in ("**What it means.**", "**Look.**", "**Do.**", "**It ends**"):
        assert part in text
    assert "\n```sh\n" in text
    program, command = KINDS[kind].look.split()[:2]
    assert f"{program} {command}" in text


def test_the_runbook_tells_of_no_alert_that_does_not_exist() -> None:
    assert set(documents.sections(DOCS / "runbook.md", 3)) == set(KINDS)


def test_every_document_is_named_in_the_readme() -> None:
    linked = set(documents.links(documents.ROOT / "README.md"))
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= {link.partition("#")[0] for link in linked}
