"""The files that are backed up: the same bytes on every machine and in every run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

_WORD_LIST = (
    "agent alarm answer approve archive backup balance because before branch build change charter check commit "
    "config daily decide deliver depend digest drift error event evidence fence first fleet follow given heartbeat "
    "history import incident index journal keep later learn ledger letter limit listen market measure memory merge "
    "message never night notice number offer older order outbox owner page path pattern pause plan price proof "
    "queue reason recover reject repair replay report restore result review revoke risk route rule sample score "
    "search second send sequence share signal skill sleep slot snapshot source state stream swap tier token trade "
    "trust undo update value verify wait watch weekly weight write"
)
CLASSES = {
    "charter": ["SOUL.md"],
    "weights": ["priority_weights.json"],
    "rules": ["rules/**"],
    "memory": ["memory/**"],
    "skills": ["skills/**"],
}


REST_S = 41.0
"""A file that was written less than 40 s before is read again by the next backup."""


@dataclass(frozen=True)
class Fleet:
    """Folders of agents below `root`, one each."""

    title: str
    root: Path
    agents: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0


def _text(chance: random.Random, size: int, pool: str) -> str:
    start = chance.randrange(len(pool) - size)
    return pool[start : start + size]


def _pool(chance: random.Random) -> str:
    lines = [" ".join(chance.choices(_WORD_LIST.split(), k=12)) for _ in range(40_000)]
    return "\n".join(lines)


def make_small_files(root: Path, *, agents: int, files: int, mean_bytes: int) -> Fleet:
    """Write `agents` folders of `files` files: a charter, weights, and rules, memories and skills in equal parts."""
    chance = random.Random(f"{agents}x{files}")
    pool = _pool(chance)
    names, count, total = [], 0, 0
    for number in range(agents):
        name = f"a{number:05d}"
        names.append(name)
        for path, content in _agent_files(chance, pool, files, mean_bytes):
            target = root / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            count, total = count + 1, total + len(content)
    what = "agent" if agents == 1 else "agents"
    title = f"{agents:,} {what} x {files:,} files ({total / 1e6:,.0f} MB)"
    return Fleet(title, root, names, count, total)


def _agent_files(chance: random.Random, pool: str, files: int, mean_bytes: int) -> list[tuple[str, bytes]]:
    made = [
        ("SOUL.md", "# Charter\n\n" + _text(chance, 2000, pool)),
        ("priority_weights.json", _weights(chance)),
    ]
    for number in range(files - len(made)):
        text = _text(chance, chance.randrange(mean_bytes // 3, mean_bytes * 5 // 3), pool)
        kind = number % 3
        if kind == 0:
            made.append((f"rules/{number:03d}.md", text))
        elif kind == 1:
            made.append((f"memory/{number:03d}.json", json.dumps({"score": chance.random(), "note": text})))
        else:
            made.append(
                (f"skills/skill_{number:03d}.py", f'"""{text}"""\n\n\ndef run(x):\n    return x + {number}\n')
            )
    return [(path, content.encode()) for path, content in made]


def _weights(chance: random.Random) -> str:
    return json.dumps({word: round(chance.random(), 6) for word in _WORD_LIST.split()[:40]}, indent=1)


def make_large_files(root: Path, *, agents: int, size_bytes: int) -> Fleet:
    """Write `agents` folders with one file of random bytes each."""
    chance = random.Random("large")
    names = []
    for number in range(agents):
        name = f"a{number:05d}"
        names.append(name)
        (root / name / "memory").mkdir(parents=True)
        with (root / name / "memory" / "embeddings.bin").open("wb") as file:
            for _ in range(size_bytes >> 20):
                file.write(chance.randbytes(1 << 20))
    title = f"{agents} x {size_bytes >> 20} MiB"
    return Fleet(title, root, names, agents, agents * size_bytes)


def write_config(folder: Path, fleet: Fleet, *, tiers: dict[str, object] | None = None) -> Path:
    """Write a configuration that protects `fleet`, with its repository in `folder`; return the folder of both files."""
    config = folder / "config"
    config.mkdir(parents=True, exist_ok=True)
    schedule = {
        "timezone": "UTC",
        "repository": "../backups",
        "history": "../backups/system-history.jsonl",
        "state": "../var",
        "alerts": [],
        **({"tiers": tiers} if tiers else {}),
    }
    required = [
        path
        for path in ("SOUL.md", "priority_weights.json")
        if (fleet.root / fleet.agents[0] / path).exists()
    ]
    agents = {
        name: {"root": str(fleet.root / name), "files": CLASSES, "required": required}
        for name in fleet.agents
    }
    (config / "backup_schedule.json").write_text(json.dumps(schedule))
    (config / "agents.json").write_text(json.dumps({"agents": agents}))
    return config
