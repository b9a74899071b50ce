"""Any order of backups, changes, prunes, pins, damage, healing, restores and forgetting keeps the promises: a model.

The memory of heads is at work all the while, and is damaged, cut off, and put back to an older one at will.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backup_worker.snapshots import (
    Policy,
    capture,
    capture_file,
    execute,
    heal_snapshot,
    index,
    plan_prune,
    plan_restore,
    prune,
    verify_snapshot,
)
from backup_worker.snapshots.repository import INDEX
from backup_worker.snapshots.retention import forget, plan_forget
from backup_worker.snapshots.sanity import Limits
from em_bridge.errors import NotFound
from tests.agent_on_disk import NOON, Place, content_of

KEEP = 2
PATHS = ("SOUL.md", "weights.json", "memory/a.md", "memory/b/c.md", "skills/x.py")
CONTENTS = (b"", b"1\n", b'{"a": 1}\n', b"[" + b"2, " * 300 + b"2]\n", b"{ broken")
Files = dict[str, bytes]


@dataclass
class Known:
    """What the model knows of one snapshot."""

    files: Files
    good: bool
    pinned: bool = False
    rotten: set[str] = field(default_factory=set)


def is_good(files: Files) -> bool:
    broken = files.get("weights.json") in (b"", b"{ broken", None) or files.get("skills/x.py") == b"{ broken"
    return bool(files.get("SOUL.md")) and not broken


class Life(RuleBasedStateMachine):
    """An agent and its repository beside a model of both."""

    def __init__(self) -> None:
        super().__init__()
        self.older_memory = b""
        self.place = Place(Path(tempfile.mkdtemp(prefix="agent-backup-model-")))
        self.files: Files = {}
        self.known: dict[str, Known] = {}
        self.time = 0

    def teardown(self) -> None:
        shutil.rmtree(self.place.base)

    @initialize()
    def begin(self) -> None:
        for path, content in zip(PATHS, (b"me\n", b"{}\n", b"a\n", b"c\n", b"x = 1\n"), strict=True):
            self.change(path, content)
        self.back_up("link")

    @rule(path=st.sampled_from(PATHS), content=st.sampled_from(CONTENTS))
    def change(self, path: str, content: bytes) -> None:
        self.place.write(path, content)
        self.files[path] = content

    @rule(path=st.sampled_from(PATHS))
    def remove(self, path: str) -> None:
        (self.place.root / path).unlink(missing_ok=True)
        self.files.pop(path, None)

    @rule(unchanged=st.sampled_from(["link", "copy"]))
    def back_up(self, unchanged: str) -> None:
        self.time += 1
        made = self.place.take(
            slot=f"s{self.time}", now=NOON + self.time, unchanged=unchanged, limits=Limits(shrink=None)
        )
        assert (made.status == "good") == is_good(self.files), made.problems
        self.known[made.id] = Known(dict(self.files), is_good(self.files))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        identifier = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[identifier]
        known.pinned = not known.pinned
        (self.place.repo.pin if known.pinned else self.place.repo.unpin)(identifier)

    @precondition(lambda self: any(any(known.files.values()) for known in self.known.values()))
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        places = [(i, p) for i, known in sorted(self.known.items()) for p, c in known.files.items() if c]
        identifier, path = data.draw(st.sampled_from(places))
        file = self.place.stored(identifier, path)
        content = bytearray(self.known[identifier].files[path])
        content[-1] ^= 1
        file.write_bytes(content)
        for other, known in self.known.items():
            # What shares the file shares the rot.
            if path in known.files and self.place.stored(other, path).samefile(file):
                known.rotten.add(path)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def heal(self, data: st.DataObject) -> None:
        identifier = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[identifier]
        sound = {c for o in self.known.values() for p, c in o.files.items() if p not in o.rotten}
        problems, _ = heal_snapshot(self.place.repo, identifier, NOON)
        known.rotten = {path for path in known.rotten if known.files[path] not in sound}
        assert {problem.path for problem in problems} == known.rotten

    @rule()
    def prune(self) -> None:
        repo = self.place.repo
        before = {head.id: head for head in repo.snapshots()}
        deleted = prune(repo, plan_prune(repo, {"daily": Policy(KEEP)}, now=NOON + self.time))
        good = [identifier for identifier, head in before.items() if head.is_good]
        assert not set(good[-KEEP:]) & set(deleted)
        assert not any(self.known[identifier].pinned for identifier in deleted)
        for identifier in deleted:
            del self.known[identifier]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def verify(self, data: st.DataObject) -> None:
        identifier = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[identifier]
        problems = verify_snapshot(self.place.repo, identifier, NOON)
        assert {problem.path for problem in problems} == known.rotten
        assert self.place.repo.get_head(identifier).damaged == bool(known.rotten)

    @precondition(lambda self: len(self.known) > 3)
    @rule()
    def forget(self) -> None:
        repo = self.place.repo
        deleted = forget(repo, self.place.name, plan_forget(repo, self.place.name))
        assert set(deleted) == {identifier for identifier, known in self.known.items() if not known.pinned}
        for identifier in deleted:
            del self.known[identifier]

    @rule(position=st.integers(0, 1 << 16), flip=st.integers(0, 255))
    def damage_the_memory(self, position: int, flip: int) -> None:
        content = bytearray(self.memory.read_bytes() if self.memory.exists() else b"") or bytearray(b"heads")
        content[position % len(content)] ^= flip
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        self.memory.write_bytes(content if position % 3 else content[: position % len(content)])

    @rule(put_back=st.booleans())
    def remember_the_past(self, put_back: bool) -> None:
        if put_back:
            self.memory.write_bytes(self.older_memory)
        elif self.memory.exists():
            self.older_memory = self.memory.read_bytes()

    @property
    def memory(self) -> Path:
        return self.place.repo.hidden / INDEX

    @rule()
    def restore(self) -> None:
        sound = [known for known in self.known.values() if known.good and not known.rotten]
        if not sound:
            with pytest.raises(NotFound):
                plan_restore(self.place.repo, self.place.agent)
            return
        plan = plan_restore(self.place.repo, self.place.agent)
        self.time += 1
        execute(plan, self.place.root, evidence=self.place.base / "evidence" / "e", now=NOON + self.time)
        self.files = dict(sound[-1].files)
        assert self.on_disk(self.place.root) == self.files

    @invariant()
    def the_repository_holds_what_the_model_says(self) -> None:
        repo = self.place.repo
        heads, unreadable = repo.survey()
        assert {head.id: head.pinned for head in heads} == {
            i: known.pinned for i, known in self.known.items()
        }
        assert unreadable == []
        assert heads == repo.snapshots(self.place.name), "with and without the memory"
        for identifier, known in self.known.items():
            found = self.on_disk(repo.path(identifier) / "files")
            assert {path: c for path, c in found.items() if path not in known.rotten} == {
                path: c for path, c in known.files.items() if path not in known.rotten
            }

    def on_disk(self, root: Path) -> Files:
        return {path: c for path, c in content_of(root).items() if isinstance(c, bytes)}


def test_any_order_of_what_can_happen_keeps_the_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SETTLED_S", 0.0)
    monkeypatch.setattr(capture_file, "HOT_S", 0.0)
    monkeypatch.setattr(index, "WRITE_FROM", 1)
    monkeypatch.setattr(index, "SETTLED_S", -1e9)
    life = Life.TestCase
    life.settings = settings(
        max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    life().runTest()


def test_the_model_would_notice_a_restore_of_rot(tmp_path: Path) -> None:
    place = Place(tmp_path).fill()
    made = place.take()
    place.stored(made.id, "SOUL.md").write_text("rotten")
    assert [problem.path for problem in verify_snapshot(place.repo, made.id, NOON)] == ["SOUL.md"]
