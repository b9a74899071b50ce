"""The shape of the two configuration files: every key, its meaning, its default and an example.

These models are also where the JSON Schemas in `config/` come from, so each field carries what an editor shows and
what an error message needs: a title that completes “… is not a …”, a description and an example. What one field can
say about itself is checked here; what several must agree on is in `checks`.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

AGENT_ID = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
TIER_NAME = r"^[A-Za-z0-9]+(-[A-Za-z0-9]+)*$"
CLASS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"

Event = Literal["config.proposed", "config.approved", "config.rejected", "config.applied"]
"""The events that a tier may wait for: those that are about a change of an agent's files."""


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


class Tier(Model):
    """One kind of snapshot: when it is made, what goes in and how many are kept."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["cron"], "properties": {"cron": {"type": "string"}}},
                {"required": ["events"], "properties": {"events": {"minItems": 1}}},
            ]
        }
    )

    cron: str | None = Field(
        None,
        title="cron expression",
        description="When the tier is due, in the schedule's time zone: minute, hour, day of month, month, weekday.",
        examples=["0 7 * * *", "*/30 * * * *"],
    )
    events: list[Event] = Field(
        default_factory=list,
        title="list of events",
        description="Events of an agent's change that make a snapshot of that agent at once.",
        examples=[["config.applied"]],
    )
    include: list[str] = Field(
        title="list of file classes",
        description="File classes of agents.json that go in; * is everything in the root that is not excluded.",
        examples=[["weights", "memory"], ["*"]],
        min_length=1,
    )
    slot: str = Field(
        title="slot pattern",
        description="How a snapshot's folder is named: strftime codes in the schedule's time zone, rendering only "
        "letters, digits and hyphens. Two runs of the tier must not get the same name.",
        examples=["%Y-%m-%d", "%G-W%V"],
    )
    keep: int = Field(
        title="number of snapshots",
        description="How many good snapshots of each agent this tier keeps at least.",
        examples=[30],
        ge=1,
    )
    unchanged: Literal["link", "copy"] = Field(
        "link",
        title="way to treat an unchanged file",
        description="What happens to a file that did not change since the agent's previous snapshot in this tier: "
        "link shares its content (no space, still re-read and verified), copy makes every snapshot independent.",
        examples=["link"],
    )


class Limits(Model):
    """Numbers that separate the normal from what a human must see."""

    shrink: float = Field(
        0.5,
        title="share between 0 and 1",
        description="A snapshot with fewer files or bytes than this share of the last good one is marked suspect.",
        examples=[0.5],
        ge=0,
        le=1,
    )
    reserve_bytes: int = Field(
        256 * 1024**2,
        title="number of bytes",
        description="Free space that a backup leaves on the repository's file system.",
        examples=[268435456],
        ge=0,
    )
    overdue_minutes: float = Field(
        60,
        title="number of minutes",
        description="How long after its time a scheduled snapshot may be missing before that alerts.",
        examples=[60],
        gt=0,
    )
    alert_repeat_minutes: float = Field(
        60,
        title="number of minutes",
        description="How often an open alert is sent again until it is acknowledged or resolved.",
        examples=[60],
        gt=0,
    )
    evidence_bytes: int = Field(
        5 * 1024**3,
        title="number of bytes",
        description="How much evidence of recoveries and restores is kept; the oldest goes first.",
        examples=[5368709120],
        ge=0,
    )
    evidence_days: float = Field(
        90, title="number of days", description="How long evidence is kept.", examples=[90], gt=0
    )
    log_days: float = Field(
        7,
        title="number of days",
        description="How long finished entries stay on the streams, so that they can be replayed.",
        examples=[7],
        gt=0,
    )


class Scrub(Model):
    """The rolling verification of everything in the repository."""

    days: float = Field(
        30,
        title="number of days",
        description="Within how many days every snapshot is read again and compared.",
        examples=[30],
        gt=0,
    )


class Drill(Model):
    """The rehearsal: restoring for real into a scratch folder."""

    days: float = Field(
        30,
        title="number of days",
        description="Within how many days each agent's newest good state is restored for proof.",
        examples=[30],
        gt=0,
    )


DEFAULT_TIERS: Mapping[str, Mapping[str, Any]] = {
    "daily": {
        "cron": "0 7 * * *",
        "include": ["weights", "memory"],
        "slot": "%Y-%m-%d",
        "keep": 30,
        "unchanged": "link",
    },
    "weekly": {"cron": "0 23 * * 0", "include": ["*"], "slot": "%G-W%V", "keep": 12, "unchanged": "copy"},
    "on-change": {
        "events": ["config.applied"],
        "include": ["weights", "rules", "charter"],
        "slot": "%Y-%m-%d-%H%M%S",
        "keep": 10,
        "unchanged": "link",
    },
}
"""The tiers of a schedule that names none."""


class Schedule(Model):
    """What is backed up, when and where to."""

    schema_uri: str | None = Field(
        None, alias="$schema", title="path", description="The JSON Schema of this file, for editors."
    )
    timezone: str = Field(
        title="time zone",
        description="Time zone of the cron expressions and of the names of slots, from the IANA database.",
        examples=["Europe/Oslo", "UTC"],
    )
    repository: AbsolutePath = Field(
        title="path", description="Folder of the snapshots.", examples=["/backups", "../backups"]
    )
    history: AbsolutePath = Field(
        title="path",
        description="The record: one JSON line for everything that was done.",
        examples=["/backups/system-history.jsonl"],
    )
    state: AbsolutePath = Field(
        Path("../var"),
        title="path",
        description="Folder of the embedded server's data, the agents' logs and evidence.",
        examples=["../var"],
        validate_default=True,
    )
    tiers: dict[Annotated[str, Field(pattern=TIER_NAME, max_length=32)], Tier] = Field(
        default_factory=lambda: {name: Tier.model_validate(tier) for name, tier in DEFAULT_TIERS.items()},
        title="map of tiers",
        description="The kinds of snapshots, by name. Without it: daily, weekly and on-change.",
        examples=[DEFAULT_TIERS],
        min_length=1,
    )
    alerts: list[str] = Field(
        default_factory=list,
        title="list of alert URLs",
        description="Where a human is told, as apprise URLs (github.com/caronc/apprise): e-mail, chat, SMS, webhooks. "
        "Keep passwords in the environment: ${SMTP_PASSWORD}.",
        examples=[["mailtos://user:${SMTP_PASSWORD}@example.com"]],
    )
    limits: Limits = Field(default_factory=Limits, title="map of limits", description="When to alert.")
    scrub: Scrub = Field(default_factory=Scrub, title="map", description="Verification of what is stored.")
    drill: Drill = Field(default_factory=Drill, title="map", description="Proof that restoring works.")


class Supervisord(Model):
    """A program that supervisord runs."""

    program: str = Field(
        title="name", description="The program's name in supervisord.", examples=["z"], min_length=1
    )
    server: str = Field(
        "unix:///var/run/supervisor.sock",
        title="server URL",
        description="supervisord's own server.",
        examples=["unix:///var/run/supervisor.sock", "http://127.0.0.1:9001"],
    )


class Systemd(Model):
    """A unit that systemd runs."""

    unit: str = Field(
        title="unit", description="The unit's name.", examples=["agent-z.service"], min_length=1
    )
    user: bool = Field(
        False,
        title="true or false",
        description="Whether it is a unit of the user's own manager.",
        examples=[False],
    )


class Docker(Model):
    """A container that docker runs."""

    container: str = Field(
        title="name", description="The container's name.", examples=["agent-z"], min_length=1
    )


class Start(Model):
    """How the agent is started and stopped; exactly one of the four."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    command: Command | None = Field(
        None,
        title="list of a program and its arguments",
        description="Run in the agent's root, in a process group of its own, with AGENT_ID, AGENT_ROOT and REDIS_URL "
        'set. A program that does not beat by itself: ["em-bridge", "run", "z", "--", "python3", "agent.py"].',
        examples=[["python3", "agent.py"]],
    )
    supervisord: Supervisord | None = Field(
        None, title="map", description="A program that supervisord runs.", examples=[{"program": "z"}]
    )
    systemd: Systemd | None = Field(
        None, title="map", description="A unit that systemd runs.", examples=[{"unit": "agent-z.service"}]
    )
    docker: Docker | None = Field(
        None, title="map", description="A container that docker runs.", examples=[{"container": "agent-z"}]
    )

    @property
    def adapter(self) -> str:
        """The name of the one adapter that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


class Recovery(Model):
    """How the agent is brought back."""

    first_try: Literal["restore", "current"] = Field(
        "restore",
        title="first try",
        description="restore: the newest good state replaces what is there, which is kept as evidence. current: start "
        "once on the files as they are, if they are sane, and restore only if that fails.",
        examples=["restore"],
    )
    attempts: int = Field(
        3,
        title="number of attempts",
        description="How many states are tried, newest first, before a human is called.",
        examples=[3],
        ge=1,
        le=100,
    )
    stop_within: float = Field(
        10,
        title="number of seconds",
        description="How long the old process may take to end by itself before it is killed.",
        examples=[10],
        ge=0,
    )


class Heartbeat(Model):
    """What counts as alive."""

    dead_after: float = Field(
        60,
        title="number of seconds",
        description="Silence after which the agent is held for dead.",
        examples=[60],
        gt=0,
    )
    verify_within: float = Field(
        300,
        title="number of seconds",
        description="Time that a restarted agent has to prove that it lives.",
        examples=[300],
        gt=0,
    )
    stable_beats: int = Field(
        3,
        title="number of heartbeats",
        description="Heartbeats in a row of the new process that prove it.",
        examples=[3],
        ge=1,
    )


class AgentConfig(Model):
    """One agent: where it lives, what belongs to it, how it is started and what it needs."""

    root: AbsolutePath = Field(title="path", description="The agent's folder.", examples=["/agents/z"])
    files: dict[Annotated[str, Field(pattern=CLASS_NAME)], list[Pattern]] = Field(
        default_factory=dict,
        title="map of file classes",
        description="File classes by name, each a list of patterns relative to the root; ** is any number of folders.",
        examples=[{"charter": ["SOUL.md"], "weights": ["priority_weights.json"], "memory": ["memory/**"]}],
    )
    required: list[RelativeFile] = Field(
        default_factory=list,
        title="list of files",
        description="Files without which a state is not whole: if one is missing or empty, the snapshot is suspect.",
        examples=[["SOUL.md", "priority_weights.json"]],
    )
    exclude: list[Pattern] = Field(
        default_factory=list,
        title="list of patterns",
        description="What is never backed up nor replaced by a restore.",
        examples=[["**/__pycache__/**", "*.lock", "*.sock", "*.pid"]],
    )
    start: Start | None = Field(
        None,
        title="map with exactly one of command, supervisord, systemd, docker",
        description="How the agent is started. Without it the agent is backed up and restored, but not started.",
        examples=[{"command": ["python3", "agent.py"]}],
    )
    recovery: Recovery = Field(
        default_factory=Recovery, title="map", description="How the agent is brought back."
    )
    depends_on: list[str] = Field(
        default_factory=list,
        title="list of agents",
        description="Agents that must be alive before this one is started.",
        examples=[["z"]],
    )
    critical: bool = Field(
        False,
        title="true or false",
        description="Whether a failed recovery of this agent calls a human at once.",
        examples=[True],
    )
    heartbeat: Heartbeat = Field(default_factory=Heartbeat, title="map", description="What counts as alive.")
    health: Command | None = Field(
        None,
        title="list of a program and its arguments",
        description="A command, run in the agent's root, that exits 0 if the agent is well.",
        examples=[["python3", "health.py"]],
    )


class AgentsFile(Model):
    """Who is backed up and recovered."""

    schema_uri: str | None = Field(
        None, alias="$schema", title="path", description="The JSON Schema of this file, for editors."
    )
    agents: dict[Annotated[str, Field(pattern=AGENT_ID)], AgentConfig] = Field(
        title="map of agents",
        description="The agents by their ids, unique ignoring case. The execution manager itself is one, named em.",
        examples=[{"z": {"root": "/agents/z", "start": {"command": ["python3", "agent.py"]}}}],
        min_length=1,
    )
