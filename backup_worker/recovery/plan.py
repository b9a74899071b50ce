"""In which order dead agents come back: pure functions over the dependency graph.

An agent is started only when everything it depends on lives, so agents come back in waves: the members of a wave
depend only on earlier waves or on agents that never died.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter


def waves(dead: Iterable[str], depends_on: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Return the waves in which `dead` agents are started, each in alphabetical order.

    `depends_on` maps an agent to those it needs; agents that are not dead are assumed to live, so they hold nobody
    up, but what they themselves depend on still counts. Raises graphlib.CycleError on a cycle (the configuration
    refuses one, so this is a programming error).
    """
    wanted = set(dead)
    needs = {agent: _dead_behind(agent, wanted, depends_on) for agent in wanted}
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    result = []
    while sorter.is_active():
        wave = tuple(sorted(sorter.get_ready()))
        result.append(wave)
        sorter.done(*wave)
    return result


def _dead_behind(agent: str, dead: set[str], depends_on: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the dead agents that `agent` needs, also by way of living ones."""
    found: set[str] = set()
    seen = {agent}
    queue = list(depends_on.get(agent, ()))
    while queue:
        needed = queue.pop()
        if needed in seen and needed != agent:
            continue
        seen.add(needed)
        if needed in dead:
            found.add(needed)
        else:
            queue.extend(depends_on.get(needed, ()))
    return found
