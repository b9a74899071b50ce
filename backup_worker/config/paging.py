"""The shape of what is said about humans in backup_schedule.json: who is told of what, and when.

A receiver's URL carries passwords: it is in no text that a model makes of itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from backup_worker.config.fields import Model

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From the mildest to the worst."""


class Receiver(Model):
    """Where messages go, and of which severities."""

    url: str = Field(
        title="alert URL",
        description="An apprise URL. Keep passwords in the environment: ${SMTP_PASSWORD}.",
        examples=["mailtos://user:${SMTP_PASSWORD}@example.com"],
        repr=False,
    )
    min_severity: Severity = Field(
        "info",
        title="severity",
        description="The mildest alerts that go there: info, warning or critical.",
        examples=["critical"],
    )
    severities: list[Severity] | None = Field(
        None,
        title="list of severities",
        description="Exactly these alerts go there, instead of min_severity.",
        examples=[["warning", "critical"]],
        min_length=1,
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Receiver:
        if self.severities is not None and "min_severity" in self.model_fields_set:
            raise ValueError("has both min_severity and severities; write one of them")
        return self

    def takes(self, severity: Severity) -> bool:
        """Tell whether alerts of `severity` go there."""
        if self.severities is not None:
            return severity in self.severities
        return SEVERITIES.index(severity) >= SEVERITIES.index(self.min_severity)


def _from_text(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


ReceiverItem = Annotated[Receiver, BeforeValidator(_from_text, json_schema_input_type=Receiver | str)]
"""An item of `alerts`: a URL alone, or a map."""

Cron = Annotated[
    str | None,
    Field(examples=["0 8 * * *"], title="cron expression"),
]


class Paging(Model):
    """How humans are told."""

    group_seconds: float = Field(
        2,
        title="number of seconds",
        description="How long something critical waits for more, so that what happens at once is one message; "
        "what is milder, and a storm, waits until there was nothing more for 5 times as long, at most 30 times.",
        examples=[2],
        ge=0,
        le=300,
    )
    digest: Cron = Field(
        "0 8 * * *",
        description="When the digest is sent, in the schedule's time zone, to all that take info; null for never.",
    )
    test: Cron = Field(
        "0 9 1 * *",
        description="When a test page goes to every receiver, in the schedule's time zone; null for never.",
    )
    runbook: str = Field(
        "docs/runbook.md",
        title="path or URL",
        description="The runbook that each alert links to; the alert's kind is the anchor.",
        examples=["https://wiki.example.com/agent-backup"],
        min_length=1,
    )
