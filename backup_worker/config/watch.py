"""The configuration that is in force, re-read when a file changes.

A broken edit never takes the place of a good one: the last good configuration stays, `error` says what is wrong for
as long as it is wrong, and `take_error` says it once, so that one broken edit makes one alert. A file caught while it
is being written is read again before anybody is told.
"""

from __future__ import annotations

import os
from pathlib import Path

from backup_worker.config import document
from backup_worker.config.files import AGENTS_FILE, SCHEDULE_FILE, AlertCheck, Config, from_contents
from em_bridge import clock
from em_bridge.errors import ConfigError

_FILES = (SCHEDULE_FILE, AGENTS_FILE)
_SETTLE_S = 0.2
_SETTLE_TRIES = 5

Stamp = tuple[tuple[int, int, int, int] | None, ...]


class ConfigWatch:
    """Holds the newest good configuration of one folder. Raises `ConfigError` if there is none to begin with."""

    def __init__(self, config_dir: Path, *, check_alerts: AlertCheck | None = None) -> None:
        self._directory = config_dir
        self._check_alerts = check_alerts
        self._stamp = self._look()
        self._contents = self._read()
        self.current: Config = from_contents(config_dir, self._contents, check_alerts=check_alerts)
        self.error: ConfigError | None = None
        self._told: str | None = None

    def refresh(self) -> bool:
        """Re-read the files if they changed; return whether `current` is now another configuration."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        for attempt in range(_SETTLE_TRIES):
            try:
                contents = self._read()
                changed = contents != self._contents
                if changed:
                    self.current = from_contents(self._directory, contents, check_alerts=self._check_alerts)
            except ConfigError as error:
                if attempt + 1 < _SETTLE_TRIES and (attempt == 0 or stamp != self._look()):
                    clock.sleep(_SETTLE_S)
                    stamp = self._look()
                    continue
                self._stamp, self.error = stamp, error
                return False
            break
        self._stamp, self._contents, self.error, self._told = stamp, contents, None, None
        return changed

    def take_error(self) -> ConfigError | None:
        """Return the present error the first time it is asked for, then nothing until the error is another one."""
        if self.error is None or self.error.message == self._told:
            return None
        self._told = self.error.message
        return self.error

    def _read(self) -> dict[str, bytes]:
        return {name: document.read(self._directory / name) for name in _FILES}

    def _look(self) -> Stamp:
        return tuple(_stamp(self._directory / name) for name in _FILES)


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The change time sees what an editor that restores the modification time hides.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
