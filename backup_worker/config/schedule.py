"""The shape of backup_schedule.json: every key, its meaning, its default and an example.

These models are also where the JSON Schemas in `config/` come from, so each field carries what an editor shows and
what an error message needs: a title that completes “… is not a …”, a description and an example. What one field can
say about itself is checked here; what several must agree on is in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from backup_worker.config.fields import AbsolutePath, Model
from backup_worker.config.paging import Paging, ReceiverItem

TIER_NAME = r"^[A-Za-z0-9]+(-[A-Za-z0-9]+)*$"

Event = Literal["config.proposed", "config.approved", "config.rejected", "config.applied"]
"""The events that a tier may wait for: those that are about a change of an agent's files."""


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
    ping: str | None = Field(
        None,
        title="URL",
        description="A dead man's switch as healthchecks.io has them: it is told when a round of this tier begins, "
        "when every agent's snapshot is there and proven, and when one is not. Needs cron.",
        examples=["https://hc-ping.com/${DAILY_PING}"],
        repr=False,
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
        description="How long after it was sent an open alert is sent again, until it is acknowledged or resolved; "
        "each further pause is twice as long, up to a day.",
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
    fleet_recoveries: int | None = Field(
        None,
        title="number of recoveries",
        description="So many recoveries of the whole fleet within fleet_recoveries_minutes pause all further ones "
        "until `backup-worker resume-recovery`, those started by hand not counted; default: 10, or two for every "
        "agent if that is more.",
        examples=[10],
        ge=1,
    )
    fleet_recoveries_minutes: float = Field(
        60,
        title="number of minutes",
        description="The period in which recoveries of the fleet are counted, at most a week.",
        examples=[60],
        gt=0,
        le=10080,
    )
    mass_silence: float = Field(
        0.5,
        title="share between 0 and 1",
        description="If more than this share of the fleet (and at least three agents) falls silent at once, the bus "
        "and the host are proven well first, and nobody is recovered whose process still runs.",
        examples=[0.5],
        ge=0,
        le=1,
    )
    history_bytes: int = Field(
        64 * 1024**2,
        title="number of bytes",
        description="When the record has this size, it goes on in a new file; the old one is kept beside it.",
        examples=[67108864],
        ge=4096,
    )
    log_days: float = Field(
        7,
        title="number of days",
        description="How long finished entries stay on the streams, so that they can be replayed.",
        examples=[7],
        gt=0,
    )
    queue_jobs: int = Field(
        10_000,
        title="number of jobs",
        description="Jobs that may wait in a queue before no more events are read for it; they wait on their stream.",
        examples=[10000],
        ge=1,
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


class Approvals(Model):
    """The watch over the files that change only with a human's approval."""

    classes: list[str] = Field(
        default_factory=lambda: ["weights", "rules", "charter"],
        title="list of file classes",
        description="File classes of agents.json whose every change needs an approval.",
        examples=[["weights", "rules", "charter"]],
    )
    expire_days: float = Field(
        14,
        title="number of days",
        description="After so many days a proposal can no longer be approved.",
        examples=[14],
        gt=0,
    )
    scan_minutes: float = Field(
        5,
        title="number of minutes",
        description="How often these files are compared with what was approved.",
        examples=[5],
        gt=0,
    )
    settle_seconds: float = Field(
        60,
        title="number of seconds",
        description="How long such a file may differ before that is told of: the time that an EM has to say what it "
        "has just written.",
        examples=[60],
        ge=0,
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


class AgentRedis(Model):
    """The server as agents reach it, each with the rights of its own user."""

    url: str = Field(
        title="server URL",
        description="What an agent that a worker starts gets as REDIS_URL: {user} becomes agent-NAME (em for the EM), "
        "{password} the password of that user.",
        examples=["redis://{user}:{password}@bus:6379/0"],
        repr=False,
    )
    passwords: AbsolutePath | None = Field(
        None,
        title="path",
        description="The file of passwords that `em-bridge acl --passwords FILE` writes.",
        examples=["/etc/agent-backup/passwords.json"],
    )


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
    alerts: list[ReceiverItem] = Field(
        default_factory=list,
        title="list of alert URLs",
        description="Where a human is told, as apprise URLs (github.com/caronc/apprise): e-mail, chat, SMS, webhooks; "
        "or as maps with url and min_severity or severities. Keep passwords in the environment: ${SMTP_PASSWORD}.",
        examples=[
            ["mailtos://user:${SMTP_PASSWORD}@example.com"],
            [{"url": "ntfys://ntfy.example.com/oncall", "min_severity": "critical"}],
        ],
    )
    paging: Paging = Field(default_factory=Paging, title="map", description="How and when humans are told.")
    limits: Limits = Field(default_factory=Limits, title="map of limits", description="When to alert.")
    agent_redis: AgentRedis | None = Field(
        None,
        title="map with url",
        description="The server for the agents that a worker starts. Without it they get the worker's own URL, and so "
        "its rights.",
        examples=[{"url": "redis://{user}:{password}@bus:6379/0", "passwords": "passwords.json"}],
    )
    scrub: Scrub = Field(default_factory=Scrub, title="map", description="Verification of what is stored.")
    drill: Drill = Field(default_factory=Drill, title="map", description="Proof that restoring works.")
    approvals: Approvals = Field(
        default_factory=Approvals, title="map", description="Changes that need an approval."
    )
