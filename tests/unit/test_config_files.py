"""The two configuration files: what is accepted, and what is refused in which words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker import config
from backup_worker.alerts import refused_urls
from em_bridge.errors import ConfigError, NotFound

SHIPPED = Path(__file__).parents[2] / "config"
SCHEDULE = json.loads((SHIPPED / config.SCHEDULE_FILE).read_text())
AGENTS = json.loads((SHIPPED / config.AGENTS_FILE).read_text())

Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def contents(change: Change = lambda schedule, agents: None) -> dict[str, bytes]:
    schedule, agents = copy.deepcopy(SCHEDULE), copy.deepcopy(AGENTS)
    change(schedule, agents["agents"])
    return {
        config.SCHEDULE_FILE: json.dumps(schedule).encode(),
        config.AGENTS_FILE: json.dumps(agents).encode(),
    }


def load(
    change: Change = lambda schedule, agents: None, environ: Mapping[str, str] | None = None
) -> config.Config:
    return config.from_contents(Path("config"), contents(change), environ=environ or {})


def refusal(change: Change) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(change)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value


def z(**keys: Any) -> Change:
    return lambda schedule, agents: agents["z"].update(keys)


def daily(**keys: Any) -> Change:
    return lambda schedule, agents: schedule["tiers"]["daily"].update(keys)


def top(**keys: Any) -> Change:
    return lambda schedule, agents: schedule.update(keys)


def test_the_shipped_configuration_loads() -> None:
    loaded = config.load(SHIPPED)
    assert list(loaded.agents) == ["em", "z", "jay", "rick", "leroy"]
    assert loaded.agent("leroy").depends_on == ["jay", "rick"]
    assert loaded.tier("daily").keep == 30
    assert loaded.schedule.repository == Path("/backups")
    assert loaded.schedule.state == Path("/state")
    assert loaded.schedule.limits.alert_repeat_minutes == 60


def test_relative_paths_are_relative_to_the_file_not_to_the_current_folder(tmp_path: Path) -> None:
    files = contents(lambda s, a: (s.update(repository="../b"), a["z"].update(root="fleet/z")))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = config.load(tmp_path)
    assert loaded.schedule.repository == tmp_path.parent / "b"
    assert loaded.agent("z").root == tmp_path / "fleet" / "z"


def test_the_state_folder_is_beside_the_configuration_unless_it_is_named() -> None:
    loaded = load(lambda schedule, agents: schedule.pop("state", None))
    assert loaded.schedule.state == loaded.directory.parent / "var"


def test_a_schedule_without_tiers_has_the_three_of_the_contract() -> None:
    tiers = load(lambda s, a: s.pop("tiers")).schedule.tiers
    assert tiers["on-change"].events == ["config.applied"]
    shipped = load().schedule.tiers
    # The shipped file keeps the state before an approved change, too.
    assert shipped["on-change"].events == ["config.approved", "config.applied"]
    both = {"events": ["config.approved", "config.applied"]}
    assert tiers | {"on-change": tiers["on-change"].model_copy(update=both)} == shipped


def test_the_environment_is_read_in_any_text() -> None:
    def changed(schedule: dict[str, Any], agents: dict[str, Any]) -> None:
        schedule.update(repository="${TOP}/b", timezone="${ZONE}")
        agents["z"]["health"] = ["${BIN}/ok"]

    loaded = load(changed, {"TOP": "/top", "ZONE": "UTC", "BIN": "/bin"})
    assert loaded.schedule.repository == Path("/top/b")
    assert loaded.schedule.timezone == "UTC"
    assert loaded.agent("z").health == ["/bin/ok"]


def test_a_doubled_dollar_keeps_the_text_for_the_shell() -> None:
    start = {"command": ["sh", "-c", "exec $${PROGRAM} $1"]}
    agent = load(z(start=start)).agent("z")
    assert agent.start is not None
    assert agent.start.command == ["sh", "-c", "exec ${PROGRAM} $1"]


def test_an_unset_variable_is_named_with_its_place() -> None:
    assert refusal(top(alerts=["json://${NOWHERE}/x"])).message == (
        'config/backup_schedule.json: alerts[0]: environment variable "NOWHERE" is not set'
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (z(heartbeat={"dead_after": "sixty"}), 'dead_after: "sixty" is not a number of seconds; write for example 60'),
        (z(heartbeat={"dead_after": True}), "agents.z.heartbeat.dead_after: true is not a number of seconds"),
        (z(heartbeat={"dead_after": 0}), "agents.z.heartbeat.dead_after: 0 is not greater than 0"),
        (z(heartbeat={"stable_beats": 101}), "agents.z.heartbeat.stable_beats: 101 is greater than 100"),
        (z(dead_after=60), 'agents.z: unknown key "dead_after"; it belongs into "heartbeat"'),
        (z(depend_on=[]), 'agents.z: unknown key "depend_on"; did you mean "depends_on"?'),
        (z(critical="yes"), 'agents.z.critical: "yes" is neither true nor false'),
        (z(root=None), "agents.z.root: null is not a path"),
        (z(root="/"), 'agents.z.root: is "/"'),
        (z(root="~/z"), "agents.z.root: \"~/z\" begins with “~”"),
        (z(root="/agents/em"), 'agents.z.root: is also the root of agent "em"'),
        (z(root="/agents/em/z"), 'agents.z.root: lies in the root of agent "em"'),
        (z(root="/backups/z"), 'agents.z.root: "/backups/z" lies in the repository /backups'),
        (top(repository="/agents/z/b"), 'agents.z.root: "/agents/z" contains the repository /agents/z/b'),
        (top(history="/agents/z/h.jsonl"), 'agents.z.root: "/agents/z" contains the history'),
        (top(state="/agents/z"), 'agents.z.root: "/agents/z" contains the state'),
        (z(required="SOUL.md"), 'agents.z.required: "SOUL.md" is not a list of files'),
        (z(required=["../x"]), 'agents.z.required[0]: "../x" leaves the agent\'s root'),
        (z(required=["*.md"]), 'agents.z.required[0]: "*.md" is a pattern'),
        (z(exclude=["SOUL.*"]), 'agents.z.required[0]: "SOUL.md" is excluded by "SOUL.*"'),
        (z(files={"memory": ["memory/"]}), 'files.memory[0]: "memory/" names a folder, not files; write "memory/**"'),
        (z(files={"memory": ["/etc/*"]}), 'agents.z.files.memory[0]: "/etc/*" is absolute'),
        (z(files={"memory": ["a/../../b"]}), "agents.z.files.memory[0]: \"a/../../b\" leaves the agent's root"),
        (z(start={}), "agents.z.start: is empty; write exactly one"),
        (z(start={"command": ["a"], "systemd": {"unit": "z"}}), "agents.z.start: has command and systemd"),
        (z(start={"command": "python3 agent.py"}), 'start.command: "python3 agent.py" is not a list of a program'),
        (z(recovery={"first_try": "restor"}), 'first_try: "restor" is not known; did you mean "restore"?'),
        (z(depends_on=["jya"]), 'agents.z.depends_on[0]: there is no agent "jya"; did you mean "jay"?'),
        (z(depends_on=["leroy"]), "goes in a circle: z -> leroy -> "),
        (lambda s, a: a.update({"Backup-Worker": a.pop("z")}), "agents.Backup-Worker: is the name under which"),
        (lambda s, a: a.update(Z=a["z"]), 'agents.Z: differs from agent "z" by case only'),
        (lambda s, a: a.update({"z z": a["z"]}), 'agents: "z z" is not a name that can be used here'),
        (lambda s, a: a.clear(), "agents: must not be empty"),
        (top(timezone="Europe/Olso"), 'timezone: "Europe/Olso" is not a known time zone; did you mean "Europe/Oslo"?'),
        (top(timezone="../../etc/passwd"), 'timezone: "../../etc/passwd" is not a known time zone'),
        (top(alerts=["nobody"]), "alerts[0]: is not an alert URL"),
        (top(alerts=[{"url": "nobody"}]), "alerts[0]: is not an alert URL"),
        (top(alerts=[{"min_severity": "critical"}]), 'alerts[0]: key "url" is missing'),
        (top(alerts=[{"url": "json://x", "min_severity": "crit"}]), "alerts[0].min_severity: the value is not known"),
        (top(alerts=[{"url": "json://x", "severity": "critical"}]), 'alerts[0]: unknown key "severity"'),
        (top(alerts=[{"url": "json://x", "severities": []}]), "alerts[0].severities: must not be empty"),
        (top(alerts=[{"url": "json://x", "severities": ["info"], "min_severity": "info"}]),
         "alerts[0]: has both min_severity and severities"),
        (top(alerts=[5]), "alerts[0]: 5 is not"),
        (top(paging={"digest": "at eight"}), 'paging.digest: "at eight" is not a cron expression'),
        (top(paging={"test": "0 0 31 2 *"}), 'paging.test: "0 0 31 2 *" is not a cron expression'),
        (top(paging={"group_seconds": -1}), "paging.group_seconds: -1 is less than 0"),
        (daily(ping="hc-ping.com/x"), "tiers.daily.ping: is not a web address"),
        (lambda s, a: s["tiers"]["on-change"].update(ping="https://hc-ping.com/x"),
         'tiers.on-change.ping: needs "cron"'),
        (lambda s, a: s.pop("repository"), 'config/backup_schedule.json: key "repository" is missing'),
        (daily(cron="0 25 * * *"), 'tiers.daily.cron: "0 25 * * *" is not a cron expression: bad hour'),
        (daily(cron="0 0 0 7 * *"), "it must have five fields, not 6"),
        (daily(cron="0 0 31 2 *"), 'tiers.daily.cron: "0 0 31 2 *" is not a cron expression'),
        (daily(cron="0 * * * *"), 'tiers.daily.slot: "%Y-%m-%d" gives two runs of "0 * * * *" the same name'),
        (daily(slot="%m-%d"), 'tiers.daily.slot: "%m-%d" gives two runs of "0 7 * * *" the same name'),
        (daily(slot="%Y/%m/%d"), 'tiers.daily.slot: "%Y/%m/%d" gives names like "2025/01/01"'),
        (daily(slot="%Y_%m_%d"), "use letters, digits and single hyphens between"),
        (daily(slot="%Y-W%V"), 'write "%G-W%V"'),
        (daily(slot=""), "tiers.daily.slot: "),
        (daily(keep=0), "tiers.daily.keep: 0 is less than 1"),
        (daily(keep="30"), 'tiers.daily.keep: "30" is not a number of snapshots'),
        (daily(keep=1.5), "tiers.daily.keep: 1.5 is not a number of snapshots"),
        (daily(unchanged="links"), 'tiers.daily.unchanged: "links" is not known; did you mean "link"?'),
        (daily(include=["wieghts"]), 'include[0]: no agent has files of class "wieghts"; did you mean "weights"?'),
        (daily(include=[]), "tiers.daily.include: must not be empty"),
        (daily(events=["config.aplied"]), 'events[0]: "config.aplied" is not known; did you mean "config.applied"?'),
        (lambda s, a: s["tiers"]["daily"].pop("cron"), 'tiers.daily: is never made; give it "cron"'),
        (lambda s, a: s["tiers"].update(a_b=s["tiers"]["daily"]), 'tiers: "a_b" is not a name that can be used here'),
        (lambda s, a: s["tiers"].update(Daily=s["tiers"]["daily"]), 'tiers.Daily: differs from "daily" by case only'),
        (top(limits={"shrnk": 0.1}), 'limits: unknown key "shrnk"; did you mean "shrink"?'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place_and_what_would_be_right(change: Change, words: str) -> None:
    message = refusal(change).message
    assert words in message
    assert message.startswith(("config/agents.json: ", "config/backup_schedule.json: "))


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(config.InvalidConfig) as caught:
        load(
            lambda s, a: (s.update(timezone="Mars"), s["tiers"]["daily"].update(keep=0), a["z"].update(rot=1))
        )
    assert len(caught.value.problems) >= 2
    assert "also wrong" in (caught.value.hint or "")


def test_a_root_below_another_is_accepted_once_the_outer_agent_excludes_it() -> None:
    def nested(schedule: dict[str, Any], agents: dict[str, Any]) -> None:
        agents["z"]["root"] = "/agents/em/sub/z"
        agents["em"]["exclude"].append("sub/z/**")

    assert load(nested).agent("z").root == Path("/agents/em/sub/z")


def test_a_root_that_reaches_the_repository_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "backups")

    def change(schedule: dict[str, Any], agents: dict[str, Any]) -> None:
        schedule.update(repository=str(tmp_path / "backups"), history=str(tmp_path / "h"))
        agents["z"]["root"] = str(tmp_path / "elsewhere" / "z")

    assert "lies in the repository" in refusal(change).message


def test_an_alert_url_alone_and_a_map_with_its_severities_are_both_receivers() -> None:
    written = ["a://x", {"url": "b://x", "min_severity": "warning"}, {"url": "c://x", "severities": ["info"]}]
    receivers = load(top(alerts=written)).schedule.alerts
    takes = {one.url[0]: [word for word in config.SEVERITIES if one.takes(word)] for one in receivers}
    assert takes == {"a": ["info", "warning", "critical"], "b": ["warning", "critical"], "c": ["info"]}


def test_a_configuration_never_shows_the_secrets_of_its_urls() -> None:
    def change(schedule: dict[str, Any], agents: dict[str, Any]) -> None:
        schedule["alerts"] = [
            "json://me:hunter2@x",
            {"url": "json://me:hunter2@y", "min_severity": "critical"},
        ]
        schedule["tiers"]["daily"]["ping"] = "https://hc-ping.com/hunter2"

    assert "hunter2" not in repr(load(change))
    wrong = refusal(daily(ping=["https://hc-ping.com/hunter2"]))
    assert "hunter2" not in f"{wrong.message} {wrong.hint}"


@pytest.mark.parametrize(
    "wrong",
    [
        "mailto://me:hunter2@host",
        {"url": "mailto://me:hunter2@host"},
        ["me:hunter2"],
        [{"url": "me:hunter2"}],
        [{"url": ["json://me:hunter2@host"]}],
        [{"url": "json://me:hunter2@host", "min_severity": "hunter2"}],
    ],
)
def test_an_error_about_alerts_never_shows_the_password(wrong: Any) -> None:
    error = refusal(top(alerts=wrong))
    assert "hunter2" not in f"{error.message} {error.hint}"


def test_an_error_shows_what_is_written_not_what_a_variable_holds() -> None:
    with pytest.raises(ConfigError) as caught:
        load(z(recovery={"first_try": "${SECRET}"}), {"SECRET": "hunter2"})
    assert "${SECRET}" in caught.value.message
    assert "hunter2" not in caught.value.message


def test_apprise_judges_the_alert_urls_when_it_is_asked() -> None:
    files = contents(top(alerts=["jsn://user:hunter2@localhost/x"]))
    assert config.from_contents(Path("config"), files).schedule.alerts
    with pytest.raises(ConfigError, match=r"alerts\[0\]: no alert service is called .jsn.") as caught:
        config.from_contents(Path("config"), files, check_alerts=refused_urls)
    assert "hunter2" not in caught.value.message


def test_unknown_names_are_not_found() -> None:
    loaded = load()
    with pytest.raises(NotFound, match='there is no agent “rik”; did you mean "rick"') as caught:
        loaded.agent("rik")
    assert caught.value.exit_code == 4
    with pytest.raises(NotFound, match="there is no tier “hourly”"):
        loaded.tier("hourly")


def validator(file: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(config.schemas()[config.schema_name(file)])
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schemas_accept_the_shipped_files() -> None:
    validator(config.SCHEDULE_FILE).validate(SCHEDULE)
    validator(config.AGENTS_FILE).validate(AGENTS)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (config.SCHEDULE_FILE, top(timezon="x")),
        (config.SCHEDULE_FILE, daily(keep=0)),
        (config.SCHEDULE_FILE, daily(events=["config.aplied"])),
        (config.SCHEDULE_FILE, lambda s, a: s["tiers"].update(a_b=s["tiers"]["daily"])),
        (config.SCHEDULE_FILE, lambda s, a: s["tiers"]["daily"].pop("cron")),
        (config.AGENTS_FILE, z(depend_on=[])),
        (config.AGENTS_FILE, z(start={})),
        (config.AGENTS_FILE, z(start={"command": ["a"], "systemd": {"unit": "z"}})),
        (config.AGENTS_FILE, z(root=3)),
        (config.AGENTS_FILE, lambda s, a: a.update({"z z": a["z"]})),
    ],
)
def test_the_schemas_refuse_what_an_editor_can_see(file: str, change: Change) -> None:
    document = json.loads(contents(change)[file])
    assert list(validator(file).iter_errors(document))


def every_property(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    parts = [schema, *schema.get("$defs", {}).values()]
    return [
        (name, one) for part in parts for name, one in part.get("properties", {}).items() if name != "$schema"
    ]


@pytest.mark.parametrize("file", [config.SCHEDULE_FILE, config.AGENTS_FILE])
def test_every_key_has_a_description_for_editors(file: str) -> None:
    schema = json.loads(config.schemas()[config.schema_name(file)])
    missing = [
        name for name, one in every_property(schema) if not one.get("description") and "$ref" not in one
    ]
    assert missing == []
    assert all(part.get("description") for part in schema["$defs"].values())


@pytest.mark.parametrize("file", [config.SCHEDULE_FILE, config.AGENTS_FILE])
def test_every_value_that_is_not_a_map_has_an_example(file: str) -> None:
    schema = json.loads(config.schemas()[config.schema_name(file)])
    missing = [name for name, one in every_property(schema) if not one.get("examples") and "$ref" not in one]
    assert missing == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({*SCHEDULE, "limits", "scrub", "drill", "state"} - {"$schema"})


@given(st.sampled_from(KEYS), JSON)
def test_no_value_of_a_schedule_makes_anything_but_a_configuration_or_a_refusal(key: str, value: Any) -> None:
    try:
        load(top(**{key: value}))
    except ConfigError as error:
        assert error.message.startswith("config/")


@given(st.sampled_from(sorted(AGENTS["agents"]["z"])), JSON)
def test_no_value_of_an_agent_makes_anything_but_a_configuration_or_a_refusal(key: str, value: Any) -> None:
    try:
        load(z(**{key: value}))
    except ConfigError as error:
        assert error.message.startswith("config/")


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_cron_or_slot_makes_anything_but_a_configuration_or_a_refusal(cron: str, slot: str) -> None:
    for change in (daily(cron=cron), daily(slot=slot)):
        try:
            load(change)
        except ConfigError as error:
            assert error.message.startswith("config/")
