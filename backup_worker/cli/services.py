"""Commands that run the parts: up, dispatcher, worker, scheduler, watchdog, console."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, RedisUrlOption, log_to_stderr

ListenOption = Annotated[
    str, typer.Option("--listen", metavar="HOST:PORT", help="Where the console listens.")
]
DEFAULT_LISTEN = "127.0.0.1:8080"


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(up)
    app.command()(dispatcher)
    app.command()(worker)
    app.command()(scheduler)
    app.command()(watchdog)
    app.command()(console)


def _part(*words: str) -> list[str]:
    return [sys.executable, "-m", "backup_worker", *words]


def up(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    no_console: Annotated[bool, typer.Option("--no-console", help="Leave the web console out.")] = False,
    listen: ListenOption = DEFAULT_LISTEN,
) -> None:
    """Run all parts in one process tree, on an embedded Valkey unless a URL is given.

    Ctrl-C stops them all; your agents go on running.

    Example: `backup-worker up --config ./config`
    """
    from backup_worker.config import load
    from backup_worker.embedded import EmbeddedValkey, url_file
    from backup_worker.services import default_processes, enter
    from backup_worker.supervisor import Child, Supervisor

    log_to_stderr()
    loaded = load(config, check_alerts=True)
    with contextlib.ExitStack() as stack:
        url, keep = redis_url, None
        if url is None:
            server = stack.enter_context(EmbeddedValkey(loaded.schedule.state))
            url, keep = server.url, server.keep
            sys.stderr.write(
                f"embedded Valkey: its URL, with the password, is in {url_file(loaded.schedule.state)}\n"
            )
        enter(url).close()
        env = {"REDIS_URL": url, "BACKUP_CONFIG": str(config.resolve())}
        children = [Child(name, _part(name), env) for name in ("dispatcher", "scheduler", "watchdog")]
        for queue, count in default_processes().items():
            children += [
                Child(f"worker {queue} {number}", _part("worker", "--queue", queue, "--processes", "1"), env)
                for number in range(1, count + 1)
            ]
        if not no_console:
            children.append(Child("console", _part("console", "--listen", listen), env))
            sys.stderr.write(f"console: http://{listen}\n")
        sys.stderr.write(f"{len(loaded.agents)} agents, {len(children)} processes; Ctrl-C stops\n")
        Supervisor(children).run(also=keep)


def dispatcher(config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None) -> None:
    """Turn events on the streams into jobs. Several may run.

    Example: `backup-worker dispatcher --redis-url redis://bus:6379/0`
    """
    from backup_worker import services

    log_to_stderr()
    services.dispatcher(config, _url(config, redis_url))


def worker(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    queue: Annotated[
        list[str] | None, typer.Option("--queue", help="Serve this queue only; may be repeated.")
    ] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Processes a queue.")] = None,
) -> None:
    """Run jobs: processes for every queue (recovery, backup, maintenance), or for those named.

    Example: `backup-worker worker --queue backup --processes 4`
    """
    from backup_worker import services
    from backup_worker.queues import QUEUES
    from backup_worker.supervisor import Child, Supervisor

    log_to_stderr()
    wanted = services.default_processes()
    if queue:
        for name in queue:
            if name.partition(".")[0] not in QUEUES:
                raise UsageError(f"there is no queue “{name}”", hint=f"the queues are {', '.join(QUEUES)}")
        wanted = {name: wanted[name.partition(".")[0]] for name in queue}
    if processes:
        wanted = dict.fromkeys(wanted, processes)
    url = _url(config, redis_url)
    if list(wanted.values()) == [1]:
        services.worker(config, url, next(iter(wanted)))
        return
    services.enter(url).close()
    env = {"BACKUP_CONFIG": str(config.resolve())} | ({"REDIS_URL": url} if url else {})
    Supervisor(
        [
            Child(f"worker {name} {number}", _part("worker", "--queue", name, "--processes", "1"), env)
            for name, count in wanted.items()
            for number in range(1, count + 1)
        ],
        # A job that runs is finished before its worker ends.
        grace_s=float(os.environ.get("WORKER_GRACE_S", "60")),
    ).run()


def scheduler(config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None) -> None:
    """Announce scheduled backups and maintenance. Several may run: a slot is announced once.

    Example: `backup-worker scheduler`
    """
    from backup_worker import services

    log_to_stderr()
    services.scheduler(config, _url(config, redis_url))


def watchdog(config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None) -> None:
    """Watch the EM itself, and have it recovered when it dies. Several may run: one watches.

    Example: `backup-worker watchdog`
    """
    from backup_worker.watchdog import run

    log_to_stderr()
    run(config, _url(config, redis_url))


def console(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    listen: ListenOption = DEFAULT_LISTEN,
) -> None:
    """Serve the web console, with the RQ dashboard at /rq.

    Example: `backup-worker console --listen 127.0.0.1:9000`
    """
    from backup_worker.cli._common import console_runtime

    log_to_stderr()
    try:
        from backup_worker.console import serve
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the console needs the package “{error.name}”", hint="pip install 'agent-backup[console]'"
        ) from error
    serve(console_runtime(config, redis_url), listen)


def _url(config: Path, url: str | None) -> str | None:
    from backup_worker.cli._common import redis_url_for
    from backup_worker.config import load

    return redis_url_for(load(config), url)
