"""What the two files must agree on: zones, cron, slots, classes, dependencies, folders. Pure; reads no agent's files.

Each check returns the problems it finds; an empty list means that nothing in its field can go wrong later.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

from backup_worker.config.agents import AgentConfig, AgentsFile
from backup_worker.config.document import Place
from backup_worker.config.explain import Problem, suggestion
from backup_worker.config.schedule import AgentRedis, Schedule, Tier

SLOT = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
OUR_NAME = "backup-worker"
_SLOT_LENGTH = 64
_FIRES = 64
_ALERT_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://\S+")
_WEB_URL = re.compile(r"https?://[^\s/?#]+[^\s?#]*")
# Any moment will do, as long as it is always the same one: a check must not depend on the day it is made.
_SAMPLE = datetime(2025, 1, 1, tzinfo=UTC)

Found = Iterator[tuple[Place, str, str | None]]


def check_schedule(schedule: Schedule, file: str) -> list[Problem]:
    """Check everything that the schedule can be wrong about by itself."""
    found = [*_timezone(schedule.timezone), *_alerts(schedule), *_paging(schedule), *_tier_names(schedule)]
    found += [
        (("agent_redis", *place), text, hint) for place, text, hint in _agent_redis(schedule.agent_redis)
    ]
    for name, tier in schedule.tiers.items():
        found += [(("tiers", name, *place), text, hint) for place, text, hint in _tier(tier)]
    if schedule.state == schedule.repository:
        found.append((("state",), "is the same folder as the repository; give it a folder of its own", None))
    if schedule.history == schedule.repository:
        found.append((("history",), "is the repository's folder; write the path of a file in it", None))
    return [Problem(file, *one) for one in found]


def check_agents(agents: AgentsFile, file: str) -> list[Problem]:
    """Check everything that agents.json can be wrong about by itself."""
    found = [*_unique(agents), *_dependencies(agents), *_nested_roots(agents)]
    for name, agent in agents.agents.items():
        found += [(("agents", name, *place), text, hint) for place, text, hint in _agent(agent)]
    return [Problem(file, *one) for one in found]


def check_together(
    schedule: Schedule, agents: AgentsFile, schedule_file: str, agents_file: str
) -> list[Problem]:
    """Check what is said in one file about the other."""
    found = [Problem(schedule_file, *one) for one in _included(schedule, agents)]
    return found + [Problem(agents_file, *one) for one in _folders(schedule, agents)]


def _timezone(name: str) -> Found:
    from zoneinfo import available_timezones

    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        near = suggestion(name, sorted(available_timezones()))
        near = near if near.startswith("; did") else '; write for example "Europe/Oslo" or "UTC"'
        yield ("timezone",), f'"{name}" is not a known time zone{near}', None


def _alerts(schedule: Schedule) -> Found:
    for index, receiver in enumerate(schedule.alerts):
        if not _ALERT_URL.fullmatch(receiver.url):
            text = 'is not an alert URL; write for example "mailtos://user:${SMTP_PASSWORD}@example.com"'
            yield ("alerts", index), text, "every service and its URL: https://github.com/caronc/apprise/wiki"


def _paging(schedule: Schedule) -> Found:
    for name in ("digest", "test"):
        expression = getattr(schedule.paging, name)
        if expression is not None:
            yield from _cron(expression, ("paging", name))


def _agent_redis(agents: AgentRedis | None) -> Found:
    if agents is None:
        return
    if "{password}" in agents.url and agents.passwords is None:
        yield (
            ("passwords",),
            "is missing: the URL asks for {password}",
            "`em-bridge acl --passwords FILE` writes it",
        )
    # Not above: only few have this, and redis takes a moment.
    from em_bridge import connection
    from em_bridge.errors import UsageError

    try:
        connection.connect(agents.url.replace("{user}", "agent-z").replace("{password}", "x"))
    except UsageError as error:
        yield ("url",), f"is wrong: {error.message}", error.hint


def _tier_names(schedule: Schedule) -> Found:
    seen: dict[str, str] = {}
    for name in schedule.tiers:
        if other := seen.setdefault(name.lower(), name) if name.lower() in seen else None:
            yield (
                ("tiers", name),
                f'differs from "{other}" by case only; some file systems take them for one',
                None,
            )
        seen[name.lower()] = name


def _tier(tier: Tier) -> Found:
    if tier.cron is None and not tier.events:
        yield (
            (),
            'is never made; give it "cron" (for example "0 7 * * *") or "events" (["config.applied"])',
            None,
        )
    if slot_fault := _slot(tier.slot):
        yield ("slot",), slot_fault, None
        return
    if tier.ping is not None and not _WEB_URL.fullmatch(tier.ping):
        yield ("ping",), 'is not a web address; write for example "https://hc-ping.com/${DAILY_PING}"', None
    if tier.cron is None:
        if tier.ping is not None:
            yield ("ping",), 'needs "cron": without one, nobody knows when the tier should be there', None
        return
    if wrong := list(_cron(tier.cron, ("cron",))):
        yield from wrong
        return
    names: dict[str, datetime] = {}
    for fire in _fires(tier.cron):
        name = fire.strftime(tier.slot)
        if names.setdefault(name, fire) != fire:
            text = f'"{tier.slot}" gives two runs of "{tier.cron}" the same name, {name}: the second is never made'
            yield (
                ("slot",),
                text,
                'name the parts that change: "%Y-%m-%d" a day, "%Y-%m-%d-%H" an hour, "%G-W%V" a week',
            )
            return


def _slot(pattern: str) -> str | None:
    codes = set(re.findall(r"%[-_0^#]?([A-Za-z])", pattern))
    if "V" in codes and "G" not in codes and codes & {"Y", "y"}:
        return f'"{pattern}" mixes the calendar year with the ISO week, wrong around New Year; write "%G-W%V"'
    if "G" in codes and not codes & {"V"}:
        return f'"{pattern}" uses the ISO week\'s year without its week; write "%Y" for the calendar\'s year'
    try:
        rendered = _SAMPLE.strftime(pattern)
    except ValueError as error:
        return f'"{pattern}" is not a slot pattern: {error}'
    if not SLOT.fullmatch(rendered):
        return f'"{pattern}" gives names like "{rendered}"; use letters, digits and single hyphens between'
    if len(rendered) > _SLOT_LENGTH:
        return f'"{pattern}" gives names longer than {_SLOT_LENGTH} characters'
    return None


def _cron(expression: str, place: Place) -> Found:
    try:
        _fires(expression)
    except ValueError as error:
        yield (
            place,
            str(error),
            'minute, hour, day of month, month, day of week: "0 7 * * *" is every day at 7',
        )


def _fires(expression: str) -> list[datetime]:
    """Return a sample of fire times, consecutive and again a year later; `ValueError` says what is wrong."""
    from cronsim import CronSim, CronSimError

    if len(expression.split()) != 5:
        raise ValueError(
            f'"{expression}" is not a cron expression: it must have five fields, not {len(expression.split())}'
        )
    try:
        fires = list(islice(CronSim(expression, _SAMPLE - timedelta(seconds=1)), _FIRES))
        if fires:
            fires += islice(
                CronSim(expression, fires[0].replace(year=fires[0].year + 1) - timedelta(seconds=1)), _FIRES
            )
    except CronSimError as error:
        raise ValueError(f'"{expression}" is not a cron expression: {str(error).lower()}') from None
    if not fires:
        raise ValueError(f'"{expression}" never comes')
    return list(dict.fromkeys(fires))


def _unique(agents: AgentsFile) -> Found:
    seen: dict[str, str] = {}
    for name in agents.agents:
        if name.lower() == OUR_NAME:
            text = "is the name under which this program itself sends messages to agents"
            yield ("agents", name), text, "give the agent another name"
        other = seen.setdefault(name.lower(), name)
        if other != name:
            yield (
                ("agents", name),
                f'differs from agent "{other}" by case only; ids are unique ignoring case',
                None,
            )


def _dependencies(agents: AgentsFile) -> Found:
    graph: dict[str, list[str]] = {}
    for name, agent in agents.agents.items():
        known = [other for other in agent.depends_on if other in agents.agents]
        graph[name] = known
        for index, other in enumerate(agent.depends_on):
            if other not in agents.agents:
                others = [one for one in agents.agents if one != name]
                yield (
                    ("agents", name, "depends_on", index),
                    f'there is no agent "{other}"{suggestion(other, others)}',
                    None,
                )
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # graphlib tells the cycle from the one that is needed to the one that needs it.
        cycle = list(reversed(error.args[1]))
        text = f"goes in a circle: {' -> '.join(cycle)}; none of them could ever be started first"
        yield ("agents", cycle[0], "depends_on"), text, "remove one of these dependencies"


def _agent(agent: AgentConfig) -> Found:
    if agent.root == Path("/"):
        yield ("root",), 'is "/"; an agent needs a folder of its own, for example "/agents/z"', None
    if agent.start is not None:
        given = [name for name in type(agent.start).model_fields if getattr(agent.start, name) is not None]
        if len(given) != 1:
            said = f"has {' and '.join(given)}" if given else "is empty"
            text = f'{said}; write exactly one, for example {{"command": ["python3", "agent.py"]}}'
            yield ("start",), text, "one of command, supervisord, systemd, docker"
    for index, path in enumerate(agent.required):
        if excluding := next((one for one in agent.exclude if _covers(one, path)), None):
            yield (
                ("required", index),
                f'"{path}" is excluded by "{excluding}", so no snapshot could ever be good',
                None,
            )


def _nested_roots(agents: AgentsFile) -> Found:
    names = list(agents.agents)
    order = {name: position for position, name in enumerate(names)}
    real = {name: _real(agents.agents[name].root) for name in names}
    # Looked up by folder, not pair by pair: the configuration of a thousand agents is read by every command.
    at: dict[Path, list[str]] = {}
    for name in names:
        if real[name] != Path("/"):
            at.setdefault(real[name], []).append(name)
    for inner in names:
        around = {outer for folder in (real[inner], *real[inner].parents) for outer in at.get(folder, ())}
        for outer in sorted(around - {inner}, key=order.__getitem__):
            if real[inner] == real[outer]:
                if order[outer] < order[inner]:
                    yield (
                        ("agents", inner, "root"),
                        f'is also the root of agent "{outer}"; each needs a folder of its own',
                        None,
                    )
            else:
                part = real[inner].relative_to(real[outer]).as_posix()
                if not any(_covers(pattern, f"{part}/x") for pattern in agents.agents[outer].exclude):
                    text = (
                        f'lies in the root of agent "{outer}": restoring "{outer}" would overwrite "{inner}"'
                    )
                    yield ("agents", inner, "root"), text, f'add "{part}/**" to agents.{outer}.exclude'


def _included(schedule: Schedule, agents: AgentsFile) -> Found:
    known = sorted({name for agent in agents.agents.values() for name in agent.files})
    for tier_name, tier in schedule.tiers.items():
        for index, name in enumerate(tier.include):
            if name != "*" and name not in known:
                text = f'no agent has files of class "{name}"{suggestion(name, [*known, "*"])}'
                yield ("tiers", tier_name, "include", index), text, None


def _folders(schedule: Schedule, agents: AgentsFile) -> Found:
    repository = _real(schedule.repository)
    own = {"repository": repository, "history": _real(schedule.history), "state": _real(schedule.state)}
    for name, agent in agents.agents.items():
        root = _real(agent.root)
        if root == Path("/"):
            continue
        for what, path in own.items():
            if path == root or _below(path, root):
                text = f'"{agent.root}" contains the {what} {path}; a restore of the agent would replace it'
                yield (
                    ("agents", name, "root"),
                    text,
                    f'move "{what}" of backup_schedule.json out of the agent\'s folder',
                )
        if _below(root, repository):
            text = f'"{agent.root}" lies in the repository {repository}'
            yield ("agents", name, "root"), text, "keep agents and snapshots in separate folders"


def _real(path: Path) -> Path:
    """Return where the path leads through symbolic links, as far as it exists."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path


def _below(inner: Path, outer: Path) -> bool:
    return inner != outer and inner.is_relative_to(outer)


def _covers(pattern: str, path: str) -> bool:
    """Tell whether the engine takes `path` as excluded by `pattern`."""
    from backup_worker.snapshots.scope import Scope

    return Scope((), (pattern,)).excludes(path)
