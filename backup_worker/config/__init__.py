"""The two configuration files: read strictly, checked against one another, watched for changes.

A configuration that loads can be worked with; one that does not is refused as a whole with `ConfigError`, which names
the file, the place in it, what is wrong and what would be right. Nothing is ignored or guessed.
"""

from backup_worker.config.agents import (
    AgentConfig,
    AgentsFile,
    Docker,
    Heartbeat,
    Recovery,
    Start,
    Supervisord,
    Systemd,
)
from backup_worker.config.explain import InvalidConfig, Problem
from backup_worker.config.files import AGENTS_FILE, SCHEDULE_FILE, Config, from_contents, load
from backup_worker.config.paging import SEVERITIES, Paging, Receiver, Severity
from backup_worker.config.schedule import DEFAULT_TIERS, Drill, Limits, Schedule, Scrub, Tier
from backup_worker.config.schemas import schema_name, schemas
from backup_worker.config.watch import ConfigWatch

__all__ = [
    "AGENTS_FILE", "DEFAULT_TIERS", "SCHEDULE_FILE", "SEVERITIES",
    "AgentConfig", "AgentsFile", "Config", "ConfigWatch", "Docker", "Drill", "Heartbeat", "InvalidConfig", "Limits",
    "Paging", "Problem", "Receiver", "Recovery", "Schedule", "Scrub", "Severity", "Start", "Supervisord", "Systemd",
    "Tier",
    "from_contents", "load", "schema_name", "schemas",
]  # fmt: skip
