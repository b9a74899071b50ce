"""Hints that a guarded file has been written, so that the next look at it need not wait for its round.

A hint only: watchers lose events (a full queue, writes through a memory map, new folders, agents of other hosts). What
is missed here is found by the rounds, and nothing depends on a hint. Where the system refuses to watch, that is logged
once and there are none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import watchfiles

from backup_worker.approval import guarded
from backup_worker.config import Config
from backup_worker.snapshots import Scope
from em_bridge import clock

log = logging.getLogger(__name__)

_WAKE_MS = 5000
_DEBOUNCE_MS = 500
_STEP_MS = 500
"""How often the watcher looks what has come; by itself it would twenty times a second, for ever."""
_LOOK_AGAIN_S = 60.0
"""How often folders that have appeared since are taken in."""


class Hints:
    """Watches the folders of guarded files in a thread of its own; `due` says when a look is worth it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._look_at: float | None = None
        self._stop = threading.Event()
        self._watched: Mapping[Path, Scope] | None = None
        self._settle_s = 0.0
        self._config: Config | None = None
        self._follow_at = 0.0

    def follow(self, config: Config) -> None:
        """Watch the agents of `config` from now on, as far as their folders are on this machine.

        To be called as often as one likes: the folders are looked for when `config` is another one, and now and then.
        """
        now = clock.monotonic()
        if config is self._config and now < self._follow_at:
            return
        self._config, self._follow_at = config, now + _LOOK_AGAIN_S
        watched = {
            agent.root.resolve(): guarded.scope_of(config, name)
            for name, agent in config.agents.items()
            if agent.root.is_dir()
        }
        self._settle_s = config.schedule.approvals.settle_seconds
        if watched == self._watched:
            return
        self.close()
        self._stop, self._watched = threading.Event(), watched
        if watched:
            arguments = (watched, self._stop)
            threading.Thread(target=self._watch, args=arguments, name="hints", daemon=True).start()

    def due(self, now: float) -> bool:
        """Tell, once, that something was written long enough ago to be told of if nobody has explained it."""
        with self._lock:
            if self._look_at is None or now < self._look_at:
                return False
            self._look_at = None
            return True

    def close(self) -> None:
        """Stop watching; the thread ends by itself."""
        self._stop.set()

    def _watch(self, watched: Mapping[Path, Scope], stop: threading.Event) -> None:
        try:
            for found in watchfiles.watch(
                *folders(watched), watch_filter=None, debounce=_DEBOUNCE_MS, step=_STEP_MS, rust_timeout=_WAKE_MS,
                stop_event=stop, recursive=False, raise_interrupt=False,
            ):  # fmt: skip
                if any(_is_guarded(Path(path), watched) for _, path in found):
                    with self._lock:
                        self._look_at = self._look_at or clock.now() + self._settle_s + 1.0
        except (OSError, RuntimeError) as error:
            log.warning("guarded files are looked at in rounds alone: they cannot be watched (%s)", error)


def folders(watched: Mapping[Path, Scope]) -> list[Path]:
    """Return the folders that hold guarded files, by the patterns: each by itself, not what is below it."""
    found: dict[Path, None] = {}
    for root, scope in watched.items():
        for pattern in scope.include:
            parts = pattern.split("/")
            literal = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
            folder = root.joinpath(*parts[:literal])
            found[folder if folder.is_dir() else root] = None
    return list(found)


def _is_guarded(path: Path, watched: Mapping[Path, Scope]) -> bool:
    return any(
        path.is_relative_to(root) and scope.covers(path.relative_to(root).as_posix())
        for root, scope in watched.items()
    )
