"""Look at a set-up as it is, and say of each part whether it works and, if not, how it is mended.

Changes nothing that lasts: what it writes to try a folder, it removes. One part that cannot be examined never hides
another.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from backup_worker.alerts import receivers, refused_urls
from backup_worker.config import SEVERITIES, AgentConfig, Config, InvalidConfig, load
from backup_worker.recovery.adapters import adapter_for
from backup_worker.units import counted
from em_bridge import connection
from em_bridge.errors import AgentBackupError, ConfigError
from em_bridge.events import EM

OLDEST_MAJOR = {"redis": 7, "valkey": 8}
_SKEW_S = 5.0
_SANE_SINCE = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it stands, what was seen, and what mends it."""

    check: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    mend: str | None = None


def examine(config_dir: Path, redis_url: str | None, *, now: float, test_alert: bool = False) -> list[Check]:
    """Return the checks of the set-up in `config_dir`, in the order in which they are best mended.

    `redis_url` is what the user gave, None for the embedded server. `test_alert` sends a real message.
    """
    try:
        config = load(config_dir, check_alerts=refused_urls)
    except InvalidConfig as error:
        return [Check("configuration", "fail", str(problem), problem.hint) for problem in error.problems]
    except ConfigError as error:
        return [Check("configuration", "fail", error.message, error.hint)]
    count = len(config.agents)
    return [
        Check(
            "configuration",
            "ok",
            f"{config_dir}: {counted(count, 'agent')}, tiers {', '.join(config.schedule.tiers)}",
        ),
        *_clock(config, now),
        *(
            check
            for name, agent in config.agents.items()
            for check in _careful(f"agent {name}", _agent(name, agent, config.schedule.state))
        ),
        *_manager(config),
        *_careful("repository", _repository(config)),
        *_careful("state folder", _state(config)),
        *_careful("history", _history(config)),
        *_careful("redis", _redis(config, redis_url, now)),
        *_careful("alerts", _alerts(config, test_alert=test_alert)),
        *_careful("dead man's switch", _pings(config)),
        *_careful("approvals", _approvals(config)),
    ]


def _careful(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield `checks`, and make a failed check of what keeps them from being made."""
    try:
        yield from checks
    except OSError as error:
        where = f" “{os.fsdecode(error.filename)}”" if error.filename else ""
        yield Check(
            name, "fail", f"{_reason(error)}{where}", "check the path, its owner and mode, and who you run as"
        )
    except AgentBackupError as error:
        yield Check(name, "fail", error.message, error.hint)


def _clock(config: Config, now: float) -> Iterator[Check]:
    zone = config.schedule.timezone
    there = datetime.fromtimestamp(now, ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M")
    if now < _SANE_SINCE:
        mend = "set the clock (timedatectl set-ntp true): slots and retention go by it"
        yield Check("clock", "fail", f"it is {there} in {zone}, which cannot be", mend)
    else:
        yield Check("clock", "ok", f"it is {there} in {zone}")


def _agent(name: str, agent: AgentConfig, state: Path) -> Iterator[Check]:
    check = f"agent {name}"
    if not agent.root.is_dir():
        mend = f"correct agents.{name}.root, or make the folder"
        yield Check(check, "fail", f"there is no folder “{agent.root}”", mend)
        return
    if not os.access(agent.root, os.R_OK | os.X_OK):
        mend = f"run as a user who may read it: chown -R or setfacl -R -m u:$(id -un):rX {agent.root}"
        yield Check(check, "fail", f"“{agent.root}” cannot be read", mend)
        return
    faults = []
    for path in agent.required:
        file = agent.root / path
        if not file.is_file():
            faults.append(f"“{path}” is missing")
        elif file.stat().st_size == 0:
            faults.append(f"“{path}” is empty")
        elif not os.access(file, os.R_OK):
            faults.append(f"“{path}” cannot be read")
    if faults:
        mend = "restore it, or correct what is required: until then every snapshot is suspect"
        yield Check(check, "fail", "; ".join(faults), mend)
    else:
        yield Check(check, "ok", f"{agent.root} is readable; required and there: {len(agent.required)}")
    yield from _start(name, agent, state)


def _manager(config: Config) -> Iterator[Check]:
    if any(name.lower() == EM for name in config.agents):
        return
    detail = "no agent is called “em”: nobody watches heartbeats, unless a program of yours publishes deaths"
    mend = 'add agents.em with a folder of its own as root, and {"command": ["em-bridge", "em"]} as start'
    yield Check("manager", "warn", detail, mend)


def _start(name: str, agent: AgentConfig, state: Path) -> Iterator[Check]:
    check = f"start of {name}"
    if agent.start is None:
        own = '["em-bridge", "em"]'
        example = (
            own if name.lower() == EM else f'["em-bridge", "run", "{name}", "--", "python3", "agent.py"]'
        )
        mend = f'add agents.{name}.start, for example {{"command": {example}}}'
        yield Check(check, "warn", "it is backed up and restored, but cannot be started after a death", mend)
        return
    command = agent.start.command
    programs = {"start": command, "health": agent.health}
    for what, program in ((what, words[0]) for what, words in programs.items() if words):
        if not _is_program(program, agent.root):
            mend = f"install it, write its whole path, or correct agents.{name}.{what}"
            yield Check(check, "fail", f"{what}: there is no program “{program}”", mend)
            return
    if command:
        yield Check(check, "ok", f"command: “{command[0]}” is there")
        return
    adapter = adapter_for(name, agent, state)
    running = ", ".join(map(str, adapter.running())) or "not running"
    yield Check(check, "ok", f"{adapter.describe()}: {running}")


def _is_program(program: str, root: Path) -> bool:
    # A name with a slash is looked up from the agent's root, as the kernel does when it starts there.
    found = str(root / program) if "/" in program else shutil.which(program)
    return found is not None and os.path.isfile(found) and os.access(found, os.X_OK)


def _repository(config: Config) -> Iterator[Check]:
    path, reserve = config.schedule.repository, config.schedule.limits.reserve_bytes
    place = _existing(path)
    try:
        _try_writing(place)
    except OSError as error:
        mend = f"make “{path}” writable for the user you run as (id -un)"
        yield Check("repository", "fail", f"“{place}” cannot be written: {_reason(error)}", mend)
        return
    missing = [what for what, works in _features(place).items() if not works]
    if "hard links" in missing and any(tier.unchanged == "link" for tier in config.schedule.tiers.values()):
        mend = 'use another file system, or "unchanged": "copy" in every tier'
        yield Check("repository", "fail", f"“{place}” has no hard links", mend)
    elif missing:
        yield Check("repository", "warn", f"“{place}” has no {', '.join(missing)}; a slower way is used")
    else:
        new = "" if path.exists() else " (it will be made)"
        yield Check("repository", "ok", f"{path} is writable{new}, with hard links and atomic exchange")
    if path.exists() and path.stat().st_mode & 0o077:
        mend = f"chmod 700 {path}"
        yield Check("repository mode", "warn", "others on this machine may look into the repository", mend)
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB are free, {reserve / 1e9:.2f} GB are kept in reserve"
    if free <= reserve:
        mend = (
            "free some space (backup-worker prune), or lower limits.reserve_bytes: no backup is made below it"
        )
        yield Check("space", "fail", detail, mend)
    else:
        yield Check("space", "warn" if free < 4 * reserve else "ok", detail)


def _state(config: Config) -> Iterator[Check]:
    place = _existing(config.schedule.state)
    try:
        _try_writing(place)
    except OSError as error:
        mend = 'correct "state" in backup_schedule.json, or make the folder writable'
        yield Check("state folder", "fail", f"“{place}” cannot be written: {_reason(error)}", mend)
    else:
        yield Check("state folder", "ok", f"{config.schedule.state} is writable")


def _history(config: Config) -> Iterator[Check]:
    from backup_worker.history import history_of

    path = config.schedule.history
    try:
        report = history_of(config.schedule).verify()
    except FileNotFoundError:
        yield Check("history", "ok", f"{path}: nothing has been recorded yet")
        return
    except OSError as error:
        yield Check(
            "history", "fail", f"“{path}” cannot be read: {_reason(error)}", f"check owner and mode of {path}"
        )
        return
    if report.ok:
        vouched = f", and the repository vouches for line {report.noted.seq}" if report.noted else ""
        yield Check(
            "history", "ok", f"{counted(report.lines, 'line')}, each proves the one before it{vouched}"
        )
    else:
        mend = "find out who changed it (backup-worker history verify); keep a copy, and start a new file"
        yield Check("history", "fail", f"line {report.first_broken}: {report.problem}", mend)


def _redis(config: Config, redis_url: str | None, now: float) -> Iterator[Check]:
    from backup_worker.embedded import url_file

    embedded = url_file(config.schedule.state)
    url = redis_url or (embedded.read_text().strip() if embedded.exists() else None)
    try:
        client = connection.connect(url, retrying=False, socket_timeout_s=3.0)
        with connection.translate_errors(client):
            facts = client.info()
            server_now = float(client.time()[0])
    except AgentBackupError as error:
        if redis_url is None and not embedded.exists():
            detail = "no --redis-url is given, and no server runs on this machine"
            yield Check("redis", "warn", detail, "`backup-worker up` brings its own; or pass --redis-url")
        elif redis_url is None:
            detail = f"the embedded server does not answer: {error.message}"
            yield Check("redis", "warn", detail, "it runs while `backup-worker up` runs")
        else:
            yield Check("redis", "fail", error.message, error.hint)
        return
    yield from _server(facts, url or connection.DEFAULT_URL)
    if abs(server_now - now) > _SKEW_S:
        detail = f"Redis and this machine differ by {abs(server_now - now):.0f} s"
        yield Check("redis clock", "warn", detail, "let both machines take their time from NTP")


def _server(facts: dict[str, Any], url: str) -> Iterator[Check]:
    kind = "valkey" if "valkey_version" in facts else "redis"
    version = str(facts.get(f"{kind}_version", "0"))
    where = f"{kind} {version} at {connection.hide_password(url)}"
    if int(version.split(".")[0]) < OLDEST_MAJOR[kind]:
        yield Check("redis", "fail", f"{where} is too old", "use Redis 7 or Valkey 8, or later")
        return
    yield Check("redis", "ok", where)
    if str(facts.get("aof_enabled", 0)) != "1":
        mend = "redis-cli CONFIG SET appendonly yes, and appendonly yes in its configuration file"
        yield Check("redis durability", "fail", "without an append-only file, a restart loses events", mend)
    else:
        yield Check("redis durability", "ok", "the append-only file is on")
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        mend = "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in its configuration file"
        yield Check(
            "redis memory", "fail", f"maxmemory-policy is “{policy}”: a full server drops events", mend
        )
    else:
        yield Check("redis memory", "ok", "nothing is dropped when memory is full")


def _alerts(config: Config, *, test_alert: bool) -> Iterator[Check]:
    urls = [receiver.url for receiver in config.schedule.alerts]
    if not urls:
        mend = (
            'add "alerts": ["mailtos://…"] to backup_schedule.json (https://github.com/caronc/apprise/wiki)'
        )
        yield Check(
            "alerts", "warn", "no receiver is configured: what goes wrong reaches the log, and no human", mend
        )
        return
    unheard = [
        one
        for one in SEVERITIES
        if one != "info" and not any(receiver.takes(one) for receiver in config.schedule.alerts)
    ]
    if unheard:
        detail = f"no receiver takes what is {' or '.join(unheard)}: it reaches the log, and no human"
        yield Check("alert routes", "warn", detail, 'give one receiver a lower "min_severity"')
    if not test_alert:
        shown = ", ".join(receivers.receiver_of(url) for url in urls)
        mend = "backup-worker doctor --test-alert sends a real message"
        yield Check("alerts", "ok", f"{shown} (not tried)", mend)
        return
    for url in urls:
        sent = receivers.send_with_apprise(
            url, "[test] Agent Backup", "This is a test of the alerts.", "info"
        )
        if sent.told:
            yield Check("alerts", "ok", f"{sent.receiver} took a test message")
        else:
            yield Check(
                "alerts", "fail", f"{sent.receiver}: {sent.detail}", "correct the URL, or the receiver"
            )


def _pings(config: Config) -> Iterator[Check]:
    """A machine that is gone can tell nobody of it."""
    from backup_worker.maintenance.pings import host_of

    told = {name: host_of(tier.ping) for name, tier in config.schedule.tiers.items() if tier.ping}
    if told:
        shown = ", ".join(f"{name} to {host}" for name, host in told.items())
        yield Check("dead man's switch", "ok", f"told of each round: {shown}")
    else:
        detail = "nobody outside expects to hear from here: if this whole machine dies, no human is told"
        mend = 'give a tier a "ping" URL (as healthchecks.io has them), at least daily'
        yield Check("dead man's switch", "warn", detail, mend)


def _approvals(config: Config) -> Iterator[Check]:
    from backup_worker.approval import signatures

    path = config.allowed_signers
    if not path.exists():
        detail = "approvals are by name: whoever reaches Redis can approve in anybody's name"
        mend = f"put the approvers' SSH keys into {path} (as in ssh-keygen(1), ALLOWED SIGNERS)"
        yield Check("approvals", "warn", detail, mend)
    elif path.stat().st_mode & 0o022:
        yield Check("approvals", "fail", f"others can write {path}, and so approve", f"chmod 644 {path}")
    elif not signatures.available():
        detail = f"{path} exists and ssh-keygen is not installed: nothing counts as approved"
        yield Check(
            "approvals", "fail", detail, "install OpenSSH's client (Debian: apt-get install openssh-client)"
        )
    else:
        yield Check("approvals", "ok", f"only what somebody in {path} has signed counts as approved")


def _existing(path: Path) -> Path:
    """Return `path`, or the folder in which it would be made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _try_writing(folder: Path) -> None:
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        with probe.open("xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _features(folder: Path) -> dict[str, bool]:
    from backup_worker.snapshots.disk import exchange

    base = folder / f".doctor-{secrets.token_hex(4)}"
    works = {"hard links": False, "atomic exchange": False}
    base.mkdir(mode=0o700)
    try:
        (base / "one").write_bytes(b"1")
        (base / "a").mkdir()
        (base / "b").mkdir()
        with contextlib.suppress(OSError):
            os.link(base / "one", base / "two")
            works["hard links"] = True
        with contextlib.suppress(OSError):
            exchange(base / "a", base / "b")
            works["atomic exchange"] = True
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return works


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
