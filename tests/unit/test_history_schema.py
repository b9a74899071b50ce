"""The record's lines keep to the schema that is shipped, and the page about it is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from backup_worker.history import digest, kept
from em_bridge import events
from tests.change_house import NEW, OTHER, House

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((DOCS / "history.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_all_that_a_change_leaves_on_the_record_keeps_to_the_schema(
    tmp_path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    house = House(tmp_path)
    house.scan()
    house.propose()
    house.approve()
    house.write(NEW)
    house.apply()
    house.write(OTHER)
    house.scan(600)
    house.handle(events.ConfigRejected("c9", "kari"))
    house.client.set(kept.DROPPED, 3)
    kept.write(house.client, house.runtime.history, house.now)
    lines = house.fleet.history()
    kinds = {line["kind"] for line in lines}
    assert {"backup", "change", "approved-state", "unapproved", "alert", "history-lost"} <= kinds
    for line in lines:
        validator.validate(line)
    assert house.runtime.history.verify().ok


@pytest.mark.parametrize(
    "wrong", [{"seq": 0}, {"kind": "Back up"}, {"hash": "0"}, {"prev": 5}, {"at": "now"}, {"status": "fine"}]
)
def test_the_schema_refuses_what_is_no_line(
    wrong: dict[str, object], validator: jsonschema.Draft202012Validator
) -> None:
    line = {
        "seq": 1, "at": 1.5, "kind": "backup", "id": "daily/s/z", "agent": "z", "tier": "daily", "status": "good",
        "files": 1, "bytes": 1, "reason": "", "approved": None, "prev": "0" * 64, "hash": "0" * 64,
    }  # fmt: skip
    validator.validate(line)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(line | wrong)


def test_the_check_that_the_page_shows_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path)
    (line,) = [house.runtime.history.append("backup", now=1.5, agent="z", id="daily/s/z")]
    assert line["hash"] == digest(line)
    (tmp_path / "history.jsonl").rename(tmp_path / "system-history.jsonl")
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)```", (DOCS / "history.md").read_text(), re.DOTALL)
    assert found is not None
    exec(found[1], {})
