"""The bus between an execution manager, its agents and Agent Backup."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from em_bridge.agent import Agent
    from em_bridge.em import ExecutionManager
    from em_bridge.errors import (
        AgentBackupError,
        ConfigError,
        InvalidEvent,
        LeaseLost,
        NotFound,
        OutboxFull,
        RedisUnavailable,
        UsageError,
    )
    from em_bridge.events import Message
    from em_bridge.publisher import Publisher

_HOMES = {
    "Agent": "agent",
    "ExecutionManager": "em",
    "Message": "events",
    "Publisher": "publisher",
    "AgentBackupError": "errors",
    "ConfigError": "errors",
    "InvalidEvent": "errors",
    "LeaseLost": "errors",
    "NotFound": "errors",
    "OutboxFull": "errors",
    "RedisUnavailable": "errors",
    "UsageError": "errors",
}

__all__ = [
    "Agent",
    "AgentBackupError",
    "ConfigError",
    "ExecutionManager",
    "InvalidEvent",
    "LeaseLost",
    "Message",
    "NotFound",
    "OutboxFull",
    "Publisher",
    "RedisUnavailable",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a program that only wants the errors does not pay for redis and sqlite.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"em_bridge.{home}"), name)
