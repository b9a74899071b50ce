"""Errors that tell a person what is wrong, what would be right, and a script which exit code to expect.

Every error that this project raises on purpose is an `AgentBackupError`. Its message is one line that starts in
lower case and names the offending value in quotes; its hint says what to do. The command line prints both and exits
with `exit_code`; a worker retries a job only if `retryable` is true.
"""

from __future__ import annotations


class AgentBackupError(Exception):
    """The operation failed or found a fault (exit code 1)."""

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AgentBackupError):
    """The caller asked for something that makes no sense (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file is missing, unreadable or wrong (exit code 2)."""


class RedisUnavailable(AgentBackupError):
    """Redis cannot be reached, or refuses us (exit code 3)."""

    exit_code = 3
    retryable = True


class RedisRefused(RedisUnavailable):
    """Redis is there but does not let us in, or not do this; trying again does not help (exit code 3)."""

    retryable = False


class NotFound(AgentBackupError):
    """There is no such agent, snapshot, incident or change (exit code 4)."""

    exit_code = 4


class InvalidEvent(UsageError):
    """A stream entry or an event does not keep to the contract; the message is the dead letter's reason (exit 2)."""


class OutboxFull(AgentBackupError):
    """The local queue has reached its limit of bytes; nothing was stored."""


class LeaseLost(AgentBackupError):
    """A newer holder has the lease; the write was refused."""
