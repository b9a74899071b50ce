"""The rounds of the watch over guarded files: every agent, each on the host where its files are.

A round may run at any time, twice. An agent whose files cannot be read does not keep the others from being looked at;
a human is told of it, once.
"""

from __future__ import annotations

import re
from typing import Any

from backup_worker.approval import guard
from backup_worker.dispatcher import Job, rq_job
from backup_worker.queueing import hosts, queues
from backup_worker.runtime import Runtime
from em_bridge.errors import AgentBackupError

TASK = "guard"


def run(runtime: Runtime, now: float, *, host: str | None = None) -> dict[str, Any]:
    """Look at the agents of `host` (None: those that are on no host in particular, and have the others looked at)."""
    where = hosts.hosts_of(runtime.config)
    deviating: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    for agent in runtime.config.agents:
        if where.get(agent) != host:
            continue
        key = f"guard/{agent}"
        try:
            found = guard.scan(runtime, agent, now)["deviating"]
        except AgentBackupError as error:
            failed[agent] = error.message
            if runtime.config.agent(agent).root.is_dir():
                # Without its folder there is no backup either, and that is told of already.
                title = f"the guarded files of {agent} cannot be compared with what was approved"
                runtime.alert(key, "warning", title, error.message, agent=agent)
            continue
        runtime.resolve(key)
        if found:
            deviating[agent] = found
    asked = _ask_hosts(runtime, sorted(set(where.values())), now) if host is None else []
    return {"deviating": deviating, "failed": failed, "asked": asked}


def _ask_hosts(runtime: Runtime, names: list[str], now: float) -> list[str]:
    """Have the agents of each host looked at there; one round at most waits for a host that is away."""
    for host in names:
        queue = queues.name_of(queues.BACKUP, host)
        name = f"{TASK}_{re.sub(r'[^A-Za-z0-9_-]', '-', host)}"
        args = {"task": TASK, "host": host, "at": now}
        open_queue = queues.open_queue(queue, runtime.redis)
        if name not in open_queue.job_ids:
            open_queue.enqueue_many(
                [rq_job(Job(queue, "maintenance", args, name, f"maintenance: {TASK} {host}"))]
            )
    return names
