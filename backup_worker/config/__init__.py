"""The two configuration files: read strictly, checked against one another, watched for changes.

A configuration that loads can be worked with; one that does not is refused as a whole with `ConfigError`, which names
the file, the place in it, what is wrong and what would be right. Nothing is ignored or guessed.
"""

from backup_worker.config.explain import InvalidConfig, Problem
from backup_worker.config.files import AGENTS_FILE, SCHEDULE_FILE, Config, from_contents, load
from backup_worker.config.models import (
    AgentConfig,
    AgentsFile,
    Docker,
    Drill,
    Heartbeat,
    Limits,
    Recovery,
    Schedule,
    Scrub,
    Start,
    Supervisord,
    Systemd,
    Tier,
)
from backup_worker.config.schemas import schema_name, schemas
from backup_worker.config.watch import ConfigWatch

__all__ = [
    "AGENTS_FILE", "SCHEDULE_FILE",
    "AgentConfig", "AgentsFile", "Config", "ConfigWatch", "Docker", "Drill", "Heartbeat", "InvalidConfig", "Limits",
    "Problem", "Recovery", "Schedule", "Scrub", "Start", "Supervisord", "Systemd", "Tier",
    "from_contents", "load", "schema_name", "schemas",
]  # fmt: skip
