"""Commands that run the parts: up, dispatcher, worker, scheduler, watchdog, console."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup_worker.units import counted
from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, RedisUrlOption, log_to_stderr

if TYPE_CHECKING:
    from backup_worker.running.supervisor import Child, Supervisor

HostOption = Annotated[
    str | None,
    typer.Option("--host", metavar="NAME", help="This host's name in agents.json (default: its host name)."),
]
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
    host: HostOption = None,
) -> None:
    """Run all parts in one process tree, on an embedded Valkey unless a URL is given.

    Ctrl-C stops them all; your agents go on running.

    Example: `backup-worker up --config ./config`
    """
    from backup_worker.alerts import refused_urls
    from backup_worker.config import load
    from backup_worker.embedded import EmbeddedValkey, url_file
    from backup_worker.running.services import default_processes, enter
    from backup_worker.running.supervisor import Child, Supervisor

    log_to_stderr()
    loaded = load(config, check_alerts=refused_urls)
    if not no_console:
        _check_console(listen, loaded.schedule.state)
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
        host = host or socket.gethostname()
        children += _workers(default_processes(loaded, host), env)
        if not no_console:
            children.append(Child("console", _part("console", "--listen", listen), env))
            sys.stderr.write(f"console: http://{listen}\n")
        sys.stderr.write(f"{counted(len(loaded.agents), 'agent')}, {len(children)} processes; Ctrl-C stops\n")
        supervisor = Supervisor(children)
        grow = _growing(supervisor, config, host, env)

        def also() -> None:
            if keep is not None:
                keep()
            grow()

        supervisor.run(also=also)


def _check_console(listen: str, state: Path) -> None:
    """Raise UsageError for a console that could not start: it would be started again and again for ever."""
    from importlib.util import find_spec

    from backup_worker.console.address import checked

    missing = [name for name in ("flask", "rq_dashboard", "waitress") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the console needs the package “{missing[0]}”",
            hint="pip install 'agent-backup[console]', or leave it out with --no-console",
        )
    checked(listen, state)


def dispatcher(config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None) -> None:
    """Turn events on the streams into jobs. Several may run.

    Example: `backup-worker dispatcher --redis-url redis://bus:6379/0`
    """
    from backup_worker.running import services

    log_to_stderr()
    services.dispatcher(config, _url(config, redis_url))


def worker(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    queue: Annotated[
        list[str] | None, typer.Option("--queue", help="Serve this queue only; may be repeated.")
    ] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Processes a queue.")] = None,
    host: HostOption = None,
) -> None:
    """Run jobs: processes for every queue (recovery, backup, maintenance), or for those named.

    Agents with a `host` in agents.json are backed up and recovered by the workers of that host alone: its own queues
    (backup.NAME, recovery.NAME) are served too, as soon as an agent names it.

    Example: `backup-worker worker --queue backup --processes 4`
    """
    from backup_worker.cli._common import redis_url_for
    from backup_worker.config import load
    from backup_worker.queueing.queues import QUEUES, kind
    from backup_worker.running import services
    from backup_worker.running.supervisor import Supervisor

    log_to_stderr()
    here = host or socket.gethostname()
    if queue:
        for name in queue:
            if kind(name) not in QUEUES:
                raise UsageError(f"there is no queue “{name}”", hint=f"the queues are {', '.join(QUEUES)}")
    loaded = load(config)
    wanted = services.default_processes(loaded, here)
    if queue:
        wanted = {name: wanted[kind(name)] for name in queue}
    if processes:
        wanted = dict.fromkeys(wanted, processes)
    url = redis_url_for(loaded, redis_url)
    if list(wanted.values()) == [1]:
        services.worker(config, url, next(iter(wanted)))
        return
    services.enter(url).close()
    env = {"BACKUP_CONFIG": str(config.resolve())} | ({"REDIS_URL": url} if url else {})
    # A job that runs is finished before its worker ends.
    supervisor = Supervisor(_workers(wanted, env), grace_s=float(os.environ.get("WORKER_GRACE_S", "60")))
    supervisor.run(also=None if queue else _growing(supervisor, config, here, env, processes))


def _workers(wanted: Mapping[str, int], env: Mapping[str, str]) -> list[Child]:
    from backup_worker.running.supervisor import Child

    return [
        Child(f"worker {queue} {number}", _part("worker", "--queue", queue, "--processes", "1"), env)
        for queue, count in wanted.items()
        for number in range(1, count + 1)
    ]


def _growing(
    supervisor: Supervisor, config: Path, host: str, env: Mapping[str, str], processes: int | None = None
) -> Callable[[], None]:
    """Return what gives `supervisor` the workers of its host's own queues when an edit of agents.json asks for them."""
    from backup_worker.config import ConfigWatch
    from backup_worker.running.services import default_processes

    watch = ConfigWatch(config)

    def grow() -> None:
        if watch.refresh():
            wanted = default_processes(watch.current, host)
            if processes:
                wanted = dict.fromkeys(wanted, processes)
            known = {child.name for child in supervisor.children}
            supervisor.children += [one for one in _workers(wanted, env) if one.name not in known]

    return grow


def scheduler(config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None) -> None:
    """Announce scheduled backups and maintenance. Several may run: a slot is announced once.

    Example: `backup-worker scheduler`
    """
    from backup_worker.running import services

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
