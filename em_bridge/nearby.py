"""The embedded server of a configuration, found without the rest of the project.

Promise: beside a running `backup-worker up` the commands of `em-bridge` need no URL. Where there is no configuration,
or it has no embedded server, the answer is None. Raises `ConfigError` if backup_schedule.json cannot be understood.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from em_bridge.errors import ConfigError

SCHEDULE = "backup_schedule.json"
DEFAULT_STATE = "../var"
_HINT = "mend it, or say --redis-url"


def embedded_url(config_dir: Path) -> str | None:
    """Return the URL, with its password, of the embedded server that belongs to the configuration in `config_dir`."""
    path = config_dir / SCHEDULE
    try:
        schedule = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise ConfigError(f"“{path}” is not JSON", hint=_HINT) from None
    state = schedule.get("state", DEFAULT_STATE) if isinstance(schedule, dict) else None
    if not isinstance(state, str):
        raise ConfigError(f"“{path}”: “state” is not a path", hint=_HINT)
    known = config_dir / _from_environment(state, path) / "valkey" / "url"
    try:
        return known.read_text("utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None


def _from_environment(text: str, path: Path) -> str:
    def value(found: re.Match[str]) -> str:
        try:
            return os.environ[found[1]]
        except KeyError:
            raise ConfigError(
                f"“{path}”: the variable “{found[1]}” is not set", hint=f"set it, or {_HINT}"
            ) from None

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, text)
