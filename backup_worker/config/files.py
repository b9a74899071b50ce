"""Load the two files into one configuration that holds together, or say in one line why not.

`load` reads nothing but the two files and changes nothing. Whatever it returns has passed every check; whatever it
refuses, it refuses with `ConfigError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from backup_worker.config import checks, document
from backup_worker.config.agents import AgentConfig, AgentsFile, BackupHook
from backup_worker.config.explain import InvalidConfig, Problem, explain, suggestion
from backup_worker.config.fields import Model
from backup_worker.config.schedule import Schedule, Tier
from em_bridge.errors import NotFound

if TYPE_CHECKING:
    from backup_worker.snapshots import AgentFiles, Limits, Policy

SCHEDULE_FILE = "backup_schedule.json"
NOTICES = ("/RECOVERY.md", "/.RECOVERY.md.new")
"""What a recovery leaves for the agent in its root; see `backup_worker.recovery.notice`."""
OUTBOXES = ("*.outbox", "*.outbox-shm", "*.outbox-wal", "*.outbox.lock")
"""What an agent has yet to say; see `em_bridge.outbox`."""

AGENTS_FILE = "agents.json"

DAYS_OF_EVENT_TIERS = 7
"""A burst of changes must not push out the last snapshot of each of so many earlier days."""

AnyModel = TypeVar("AnyModel", bound=Model)

AlertCheck = Callable[[Sequence[str]], Sequence[tuple[int, str]]]
"""Says of alert URLs the place of each that is refused, and why; see `backup_worker.alerts.refused_urls`."""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration: `directory` holds the two files, every path is absolute."""

    directory: Path
    schedule: Schedule
    agents: dict[str, AgentConfig]

    @property
    def allowed_signers(self) -> Path:
        """Where the keys of those stand who may approve changes; the file may be absent."""
        return self.directory / "allowed_signers"

    def agent(self, name: str) -> AgentConfig:
        """Return an agent; `NotFound` if there is none of that name."""
        return _named("agent", name, self.agents, self.directory / AGENTS_FILE)

    def id_of(self, name: str) -> str:
        """Return the agent's id as it is configured, for ids are unique ignoring case; an unknown `name` as it is."""
        return next((agent for agent in self.agents if agent.lower() == name.lower()), name)

    def tier(self, name: str) -> Tier:
        """Return a tier; `NotFound` if there is none of that name."""
        return _named("tier", name, self.schedule.tiers, self.directory / SCHEDULE_FILE)

    def files_of(self, name: str) -> AgentFiles:
        """Return what the snapshot engine needs to know about an agent; `NotFound` if there is none of that name.

        Our own notice of a recovery is never part of it, else the next state would differ by it; nor is an outbox,
        else a restore would take back what an agent was promised to be delivered.
        """
        from backup_worker.snapshots import AgentFiles, Hook

        def hook(wanted: BackupHook | None) -> Hook | None:
            return Hook(tuple(wanted.command), wanted.timeout) if wanted is not None else None

        agent = self.agent(name)
        exclude = [*agent.exclude, *NOTICES, *OUTBOXES]
        return AgentFiles(
            name=name, root=agent.root, files=agent.files, required=agent.required, exclude=exclude,
            before_backup=hook(agent.before_backup), after_backup=hook(agent.after_backup),
        )  # fmt: skip

    def retention(self) -> dict[str, Policy]:
        """Return by tier which snapshots the engine is to keep."""
        from backup_worker.snapshots import Policy

        return {
            name: Policy(
                keep=tier.keep,
                days=DAYS_OF_EVENT_TIERS if tier.events else 0,
                timezone=self.schedule.timezone,
            )
            for name, tier in self.schedule.tiers.items()
        }

    def snapshot_limits(self, *, allow_shrink: bool = False) -> Limits:
        """Return what the engine judges a new snapshot by; with `allow_shrink` it may be smaller than the last."""
        from backup_worker.snapshots import Limits

        limits = self.schedule.limits
        return Limits(shrink=None if allow_shrink else limits.shrink, reserve_bytes=limits.reserve_bytes)


def load(
    config_dir: Path, *, environ: Mapping[str, str] | None = None, check_alerts: AlertCheck | None = None
) -> Config:
    """Read and check both files in `config_dir`.

    `check_alerts` judges the alert URLs. Apprise takes a third of a second for it: services and `doctor` hand it
    in; a command that only lists snapshots does not.

    Raises `ConfigError` that names the file, the place and what would be right.
    """
    contents = {name: document.read(config_dir / name) for name in (SCHEDULE_FILE, AGENTS_FILE)}
    return from_contents(config_dir, contents, environ=environ, check_alerts=check_alerts)


def from_contents(
    config_dir: Path,
    contents: Mapping[str, bytes],
    *,
    environ: Mapping[str, str] | None = None,
    check_alerts: AlertCheck | None = None,
) -> Config:
    """As `load`, from what stands (or would stand) in the two files."""
    environ = os.environ if environ is None else environ
    directory = Path(os.path.abspath(config_dir))
    schedule_file, agents_file = str(config_dir / SCHEDULE_FILE), str(config_dir / AGENTS_FILE)
    schedule, problems = _model(Schedule, contents[SCHEDULE_FILE], schedule_file, directory, environ)
    agents, more = _model(AgentsFile, contents[AGENTS_FILE], agents_file, directory, environ)
    problems += more
    if schedule is not None:
        problems += checks.check_schedule(schedule, schedule_file)
        if check_alerts is not None and not problems:
            problems += _refused_alerts(schedule, schedule_file, check_alerts)
    if agents is not None:
        problems += checks.check_agents(agents, agents_file)
    if schedule is not None and agents is not None and not problems:
        problems += checks.check_together(schedule, agents, schedule_file, agents_file)
    if problems or schedule is None or agents is None:
        raise InvalidConfig(problems)
    return Config(directory, schedule, dict(agents.agents))


def _model(
    model: type[AnyModel], content: bytes, file: str, base: Path, environ: Mapping[str, str]
) -> tuple[AnyModel | None, list[Problem]]:
    written = document.parse(content, file)
    expanded = document.expand(written, environ, file)
    try:
        return model.model_validate(expanded, context={"base": base}), []
    except ValidationError as error:
        return None, explain(error, model.model_json_schema(), written, file)


def _refused_alerts(schedule: Schedule, file: str, check: AlertCheck) -> list[Problem]:
    if not schedule.alerts:
        return []
    return [
        Problem(
            file, ("alerts", index), text, "every service and its URL: https://github.com/caronc/apprise/wiki"
        )
        for index, text in check([receiver.url for receiver in schedule.alerts])
    ]


Named = TypeVar("Named")


def _named(what: str, name: str, known: Mapping[str, Named], file: Path) -> Named:
    try:
        return known[name]
    except KeyError:
        near: Any = suggestion(name, list(known))
        raise NotFound(f"there is no {what} “{name}”{near}", hint=f"{what}s are listed in {file}") from None
