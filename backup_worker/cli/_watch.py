"""`status --watch`: the state of the fleet on one screen, asked for anew every second or so, until Ctrl-C.

What needs a human stands first, in words; colours only underline them. While Redis is away, or the configuration is
broken, the screen says so and goes on asking: it is looked at most when things are bad.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backup_worker.cli._common import age, described_pause, moment, new_table
from em_bridge import clock
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

NARROW = 72
"""Columns below which a table would fold every word: there, an agent is a line."""

MOST = 8
"""How many of what needs a human are named; the others are counted."""


def stay(config: Path, redis_url: str | None, every_s: float) -> None:
    """Show the state on the terminal until Ctrl-C or SIGTERM; the screen is then as it was before."""
    from rich.console import Console
    from rich.live import Live

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    # Also out of a call that waits for a server which does not answer.
    signal.signal(signal.SIGTERM, leave)
    console = Console(highlight=False, markup=False, emoji=False)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            began = clock.monotonic()
            live.update(_look(config, redis_url, console.width, every_s), refresh=True)
            # With many snapshots a look takes long: half of the time is for others.
            clock.sleep(max(every_s, clock.monotonic() - began))


def _look(config: Path, redis_url: str | None, width: int, every_s: float) -> Group | Text:
    from redis.exceptions import RedisError
    from rich.text import Text

    from backup_worker.cli._common import try_runtime
    from backup_worker.runtime import Runtime
    from backup_worker.status import overview

    try:
        runtime, _ = try_runtime(config, redis_url)
        try:
            facts = overview(runtime, clock.now())
        except RedisError:
            facts = overview(Runtime(runtime.config), clock.now())
    except AgentBackupError as error:
        return Text(
            f"CANNOT LOOK: {error.message}\n{error.hint or ''}\nAsked again every {every_s:g} s; Ctrl-C leaves."
        )
    return view(facts, runtime.config.schedule.timezone, width, every_s)


def view(facts: dict[str, Any], zone: str, width: int, every_s: float) -> Group:
    """Return what is shown of what `status.overview` returned, on a screen of `width` columns."""
    from rich.console import Group
    from rich.text import Text

    wrong = list(_wrong(facts, zone))
    verdict = (
        f"LOOK: {len(wrong)} {'thing needs' if len(wrong) == 1 else 'things need'} you"
        if wrong
        else "ALL WELL"
    )
    top = Text(f"{verdict}  ", style="bold red" if wrong else "bold green")
    top.append(f"{moment(facts['at'], zone)} {zone}", "default")
    lines = [Text(f"  ! {text}") for text in wrong[:MOST]]
    if len(wrong) > MOST:
        lines.append(Text(f"  ! and {len(wrong) - MOST} more: see `backup-worker status`"))
    fleet = [_line(row) for row in facts["agents"]] if width < NARROW else [_table(facts)]
    return Group(top, *lines, Text(), *fleet, Text(), *_rest(facts, zone, every_s))


def _wrong(facts: dict[str, Any], zone: str) -> Iterator[str]:
    """Yield what needs a human, the worst first."""
    if not facts["redis"]:
        yield "Redis cannot be reached: states, queues, incidents and alerts are unknown"
    if facts["recovery_paused"] is not None:
        yield f"RECOVERY IS PAUSED, {described_pause(facts['recovery_paused'], zone)}"
    for row in facts["agents"]:
        if row["state"] not in (None, "ALIVE"):
            yield f"{row['agent']} is {row['state']}"
    for incident in facts["incidents"] or ():
        yield f"open incident {incident['id']} in {incident['phase']}: {incident['reason']}"
    for identifier in facts["scrub"]["damaged"]:
        yield f"damaged snapshot {identifier}"
    for identifier in facts["overdue"]:
        yield f"overdue backup {identifier}"
    for alert in facts["alerts"] or ():
        seen = f" (seen by {alert['acknowledged_by']})" if alert["acknowledged_by"] else ""
        yield f"alert, {alert['severity']}: {alert['title']}{seen}"
    for place in facts["stale"]:
        yield f"no recent good snapshot {place}"
    if facts["drills_overdue"]:
        yield f"no restore was proven in time for {', '.join(facts['drills_overdue'])}"
    if facts["scrub"]["overdue"]:
        yield f"{facts['scrub']['overdue']} snapshots were not verified in time"
    for stream, queue in (facts["held"] or {}).items():
        yield f"{stream} is not read: the {queue} queue is full"


def _tier(cell: dict[str, Any]) -> str:
    text = age(cell["age_s"]) if cell["age_s"] is not None else "none"
    return f"{text}, OVERDUE" if cell["overdue"] else f"{text}, STALE" if cell["stale"] else text


def _proven(drill: dict[str, Any]) -> str:
    text = "never" if drill["age_s"] is None else age(drill["age_s"])
    if drill["last_ok"] is False:
        return f"{text}, FAILED"
    return f"{text}, OVERDUE" if drill["overdue"] else text


def _table(facts: dict[str, Any]) -> Table:
    table = new_table("", "agent", "state", *facts["next_runs"], "restore proven")
    for row in facts["agents"]:
        cells = [_tier(row["tiers"][tier]) for tier in facts["next_runs"]]
        table.add_row(
            *(
                _marked(text)
                for text in (row["agent"], row["state"] or "unknown", *cells, _proven(row["drill"]))
            )
        )
    return table


def _line(row: dict[str, Any]) -> Text:
    tiers = ", ".join(f"{name} {_tier(cell)}" for name, cell in row["tiers"].items())
    return _marked(f"{row['agent']}: {row['state'] or 'unknown'}; {tiers}; proven {_proven(row['drill'])}")


def _marked(text: str) -> Text:
    """Return `text`, with the words in it that say that something is wrong underlined by colour."""
    from rich.text import Text

    marked = Text(text)
    marked.highlight_regex(r"OVERDUE|FAILED|DEAD|DEGRADED", "bold red")
    marked.highlight_regex(r"\bALIVE\b", "green")
    return marked


def _rest(facts: dict[str, Any], zone: str, every_s: float) -> Iterator[Text]:
    from rich.text import Text

    runs = ", ".join(f"{tier} {moment(at, zone)}" for tier, at in facts["next_runs"].items() if at)
    yield Text(f"next runs: {runs or 'none'}")
    if facts["queues"] is not None:
        waiting = ", ".join(f"{name} {count}" for name, count in facts["queues"].items())
        yield Text(
            f"jobs waiting: {waiting}; oldest event waits {age(facts['lag_s'])}; dead letters: {facts['dead_letters']}"
        )
    yield Text(f"asked again every {every_s:g} s; Ctrl-C leaves", style="dim")
