"""What an agent that a worker starts gets as REDIS_URL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backup_worker.recovery.address import redis_url_of
from em_bridge.errors import AgentBackupError, ConfigError
from tests.small_fleet import SmallFleet

OURS = "redis://worker:secret@bus:6379/0"
URL = "redis://{user}:{password}@bus:6379/0"


def fleet_with(folder: Path, **agent_redis: str) -> SmallFleet:
    fleet = SmallFleet(folder, agents=("em", "z"))
    fleet.edit("backup_schedule.json", lambda document: document.update(agent_redis=agent_redis))
    return fleet


def test_by_itself_it_is_the_workers_own(tmp_path: Path) -> None:
    assert redis_url_of("z", SmallFleet(tmp_path).config, OURS) == OURS


def test_each_agent_gets_its_own_user_and_password_and_the_em_that_of_its_role(tmp_path: Path) -> None:
    fleet = fleet_with(tmp_path, url=URL, passwords="words.json")
    (fleet.config_dir / "words.json").write_text(json.dumps({"agent-z": "a/b@c?", "em": "e", "worker": "w"}))
    assert redis_url_of("z", fleet.config, OURS) == "redis://agent-z:a%2Fb%40c%3F@bus:6379/0"
    assert redis_url_of("em", fleet.config, OURS) == "redis://em:e@bus:6379/0"


def test_a_url_without_a_password_needs_no_file(tmp_path: Path) -> None:
    fleet = fleet_with(tmp_path, url="unix:///run/agents.sock")
    assert redis_url_of("z", fleet.config, OURS) == "unix:///run/agents.sock"


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"agent-z": ""}', '{"agent-z": 7}', '{"agent-jay": "x"}']
)
def test_an_agent_without_a_password_never_gets_the_workers(tmp_path: Path, content: str | None) -> None:
    fleet = fleet_with(tmp_path, url=URL, passwords="words.json")
    if content is not None:
        (fleet.config_dir / "words.json").write_text(content)
    with pytest.raises(AgentBackupError) as refused:
        redis_url_of("z", fleet.config, OURS)
    assert "words.json" in refused.value.message and "em-bridge acl" in (refused.value.hint or "")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("agent_redis", "said"),
    [
        ({"url": URL}, "agent_redis.passwords: is missing: the URL asks for {password}"),
        ({"url": "http://{user}:hunter2@bus"}, "agent_redis.url: is wrong: wrong redis url"),
        ({}, 'agent_redis: key "url" is missing'),
    ],
)
def test_a_wrong_address_is_refused_with_the_configuration(
    tmp_path: Path, agent_redis: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _ = fleet_with(tmp_path, **agent_redis).config
    assert said in refused.value.message
    assert "hunter2" not in str(refused.value)
