"""Which host's queue the jobs of an agent go to: that of the host where its files and its process are.

Promise: a job that touches an agent with a `host` runs on that host. The dispatcher sends it there at once where the
event names the agent. Where it does not (a decision about a change, the deadline of an incident), or the configuration
has changed since, the worker that finds the job passes it on, once: hosts whose configurations contradict each other
must not pass a job to and fro for ever.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rq.job import Job

from backup_worker.dispatcher import Job as Planned
from backup_worker.dispatcher import rq_job
from backup_worker.queueing import queues

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config

PASSED_ON = "passed_on"
"""Key in a job's arguments: it was sent on by a worker already."""


def hosts_of(config: Config) -> dict[str, str]:
    """Return agent -> host, of the agents that have one."""
    return {name: agent.host for name, agent in config.agents.items() if agent.host}


def elsewhere(config: Config, agent: str) -> str | None:
    """Return the host where the files of `agent` are, None if they can be had from here."""
    host = config.agent(agent).host
    return host if host and host != socket.gethostname() else None


def queues_of(config: Config, host: str) -> list[str]:
    """Return the queues of `host` alone: none while no agent is there."""
    if host not in hosts_of(config).values():
        return []
    return [queues.name_of(kind, host) for kind in queues.OF_A_HOST]


def unserved(client: Redis, waiting: Mapping[str, int]) -> set[str]:
    """Return those of the queues in which jobs wait (queue -> number) that no living worker serves."""
    found = set()
    for queue, jobs in waiting.items():
        workers: Any = client.smembers(f"rq:workers:{queue}") if jobs else ()
        # A killed worker stays in that set for a while; its own key expires.
        if jobs and not (workers and client.exists(*workers)):
            found.add(queue)
    return found


def pass_on(client: Redis, job: Job, agent: str | None, hosts: Mapping[str, str]) -> str | None:
    """Send `job` to the queue of the host of `agent` if it is not there; return that queue, None if it may run here.

    Run twice, it is sent twice under one id: jobs may run twice.
    """
    args: dict[str, Any] = job.args[0]
    queue = queues.name_of(queues.kind(job.origin), hosts.get(agent or ""))
    if queue == job.origin or args.get(PASSED_ON):
        return None
    function = str(job.func_name).rpartition(".")[2]
    there = Planned(queue, function, args | {PASSED_ON: True}, f"{job.id}_passed-on", job.description or "")
    queues.open_queue(queue, client).enqueue_many([rq_job(there)])
    return queue
