"""The shape of agents.json, as `schedule` is of the other file: who is backed up, started and recovered, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from backup_worker.config.fields import AbsolutePath, Command, Model, Pattern, RelativeFile

AGENT_ID = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
HOST_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
MAX_STABLE_BEATS = 100
"""More than so many beats of an agent in a row are not remembered for sure; see `recovery.heartbeats`."""
CLASS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"


class Supervisord(Model):
    """A program that supervisord runs."""

    program: str = Field(
        title="name", description="The program's name in supervisord.", examples=["z"], min_length=1
    )
    server: str = Field(
        "unix:///var/run/supervisor.sock",
        title="server URL",
        description="supervisord's own server.",
        examples=["unix:///var/run/supervisor.sock", "http://127.0.0.1:9001"],
    )


class Systemd(Model):
    """A unit that systemd runs."""

    unit: str = Field(
        title="unit", description="The unit's name.", examples=["agent-z.service"], min_length=1
    )
    user: bool = Field(
        False,
        title="true or false",
        description="Whether it is a unit of the user's own manager.",
        examples=[False],
    )


class Docker(Model):
    """A container that docker runs."""

    container: str = Field(
        title="name", description="The container's name.", examples=["agent-z"], min_length=1
    )
    server: str = Field(
        "unix:///var/run/docker.sock",
        title="server URL",
        description="The API of Docker, or of Podman.",
        examples=["unix:///var/run/docker.sock", "tcp://127.0.0.1:2375"],
    )


class Start(Model):
    """How the agent is started and stopped; exactly one of the four."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    command: Command | None = Field(
        None,
        title="list of a program and its arguments",
        description="Run in the agent's root, in a process group of its own, with AGENT_ID, AGENT_ROOT and REDIS_URL "
        'set. A program that does not beat by itself: ["em-bridge", "run", "z", "--", "python3", "agent.py"].',
        examples=[["python3", "agent.py"]],
    )
    supervisord: Supervisord | None = Field(
        None,
        title="map",
        description="A program that supervisord runs; set AGENT_ID and AGENT_ROOT in its environment.",
        examples=[{"program": "z"}],
    )
    systemd: Systemd | None = Field(
        None,
        title="map",
        description="A unit that systemd runs; set AGENT_ID and AGENT_ROOT in its environment.",
        examples=[{"unit": "agent-z.service"}],
    )
    docker: Docker | None = Field(
        None,
        title="map",
        description="A container that docker runs, with the agent's root mounted into it.",
        examples=[{"container": "agent-z"}],
    )

    @property
    def adapter(self) -> str:
        """The name of the one adapter that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


class Recovery(Model):
    """How the agent is brought back."""

    first_try: Literal["restore", "current"] = Field(
        "restore",
        title="first try",
        description="restore: the newest good state replaces what is there, which is kept as evidence. current: start "
        "once on the files as they are, if they are sane, and restore only if that fails.",
        examples=["restore"],
    )
    attempts: int = Field(
        3,
        title="number of attempts",
        description="How many states are tried, newest first, before a human is called.",
        examples=[3],
        ge=1,
        le=100,
    )
    stable_for: float = Field(
        60,
        title="number of seconds",
        description="An agent that dies again within this time after its recovery did not live on that state: the next "
        "older one is chosen, and both deaths count together for attempts.",
        examples=[60],
        ge=0,
    )
    without_dependencies: Literal["hold", "start"] = Field(
        "hold",
        title="way to go on without a dependency",
        description="When an agent that this one depends on could not be recovered: hold, and start as soon as it "
        "lives again; or start all the same.",
        examples=["hold"],
    )
    stop_within: float = Field(
        10,
        title="number of seconds",
        description="How long the old process may take to end by itself before it is killed.",
        examples=[10],
        ge=0,
    )
    max_recoveries: int = Field(
        5,
        title="number of recoveries",
        description="An agent that was recovered (or fell silent and came back) this often within "
        "max_recoveries_within and dies again is given to a human instead.",
        examples=[5],
        ge=1,
    )
    max_recoveries_within: float = Field(
        3600,
        title="number of seconds",
        description="The period in which recoveries are counted, at most a week.",
        examples=[3600],
        gt=0,
        le=604800,
    )


class Heartbeat(Model):
    """What counts as alive."""

    dead_after: float = Field(
        60,
        title="number of seconds",
        description="Silence after which the agent is held for dead.",
        examples=[60],
        gt=0,
    )
    verify_within: float = Field(
        300,
        title="number of seconds",
        description="Time that a restarted agent has to prove that it lives.",
        examples=[300],
        gt=0,
    )
    stable_beats: int = Field(
        3,
        title="number of heartbeats",
        description="Heartbeats in a row of the new process that prove it.",
        examples=[3],
        ge=1,
        le=MAX_STABLE_BEATS,
    )
    health_within: float = Field(
        30,
        title="number of seconds",
        description="How long the health command may take; longer means not well.",
        examples=[30],
        gt=0,
    )


class BackupHook(Model):
    """A command that is run around a backup of the agent."""

    command: Command = Field(
        title="list of a program and its arguments",
        description="Run in the agent's root with AGENT_ID and AGENT_ROOT set; it must exit 0.",
        examples=[["python3", "flush.py"]],
    )
    timeout: float = Field(
        60,
        title="number of seconds",
        description="How long it may take before it is killed, and counts as failed.",
        examples=[60],
        gt=0,
    )


class AgentConfig(Model):
    """One agent: where it lives, what belongs to it, how it is started and what it needs."""

    root: AbsolutePath = Field(title="path", description="The agent's folder.", examples=["/agents/z"])
    files: dict[Annotated[str, Field(pattern=CLASS_NAME)], list[Pattern]] = Field(
        default_factory=dict,
        title="map of file classes",
        description="File classes by name, each a list of patterns relative to the root; ** is any number of folders.",
        examples=[{"charter": ["SOUL.md"], "weights": ["priority_weights.json"], "memory": ["memory/**"]}],
    )
    required: list[RelativeFile] = Field(
        default_factory=list,
        title="list of files",
        description="Files without which a state is not whole: if one is missing or empty, the snapshot is suspect.",
        examples=[["SOUL.md", "priority_weights.json"]],
    )
    exclude: list[Pattern] = Field(
        default_factory=list,
        title="list of patterns",
        description="What is never backed up nor replaced by a restore; outboxes (`*.outbox`) never are.",
        examples=[["**/__pycache__/**", "*.lock", "*.sock", "*.pid"]],
    )
    start: Start | None = Field(
        None,
        title="map with exactly one of command, supervisord, systemd, docker",
        description="How the agent is started. Without it the agent is backed up and restored, but not started.",
        examples=[{"command": ["python3", "agent.py"]}],
    )
    recovery: Recovery = Field(
        default_factory=Recovery, title="map", description="How the agent is brought back."
    )
    host: Annotated[str, Field(pattern=HOST_NAME)] | None = Field(
        None,
        title="host name",
        description="The host of the agent's files and process, as its `backup-worker worker --host NAME` is called. "
        "Without it, any worker may back it up and start it: all see the same files.",
        examples=["web1"],
    )
    depends_on: list[str] = Field(
        default_factory=list,
        title="list of agents",
        description="Agents that must be alive before this one is started.",
        examples=[["z"]],
    )
    critical: bool = Field(
        False,
        title="true or false",
        description="Whether a failed recovery of this agent calls a human at once.",
        examples=[True],
    )
    heartbeat: Heartbeat = Field(default_factory=Heartbeat, title="map", description="What counts as alive.")
    before_backup: BackupHook | None = Field(
        None,
        title="map with a command",
        description="Run before the agent's files are copied; if it fails, there is no backup.",
        examples=[{"command": ["python3", "flush.py"], "timeout": 60}],
    )
    after_backup: BackupHook | None = Field(
        None,
        title="map with a command",
        description="Run when the files have been copied, and also if that failed or before_backup did.",
        examples=[{"command": ["python3", "resume.py"], "timeout": 60}],
    )
    health: Command | None = Field(
        None,
        title="list of a program and its arguments",
        description="A command, run in the agent's root on its host, that exits 0 if the agent is well. A recovery "
        "is over only when it does, and is tried again until then or until verify_within.",
        examples=[["python3", "health.py"]],
    )


class AgentsFile(Model):
    """Who is backed up and recovered."""

    schema_uri: str | None = Field(
        None, alias="$schema", title="path", description="The JSON Schema of this file, for editors."
    )
    agents: dict[Annotated[str, Field(pattern=AGENT_ID)], AgentConfig] = Field(
        title="map of agents",
        description="The agents by their ids, unique ignoring case. The execution manager itself is one, named em.",
        examples=[{"z": {"root": "/agents/z", "start": {"command": ["python3", "agent.py"]}}}],
        min_length=1,
    )
