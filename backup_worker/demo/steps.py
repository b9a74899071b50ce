"""The steps of the demo, each on the living fleet that the ones before left."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.tree import Tree

from backup_worker.demo.fleet import AGENTS, DEPENDS_ON, Fleet
from backup_worker.demo.pager import Pager
from backup_worker.demo.show import Show, Step, StepFailed, wait_for
from backup_worker.queueing.due import STREAM
from backup_worker.recovery import notice as notices
from backup_worker.recovery import processes
from backup_worker.recovery.incident import ESCALATED, RECOVERED, Incident, IncidentStore
from backup_worker.recovery.plan import waves
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Head, compare, diff, plan_restore
from em_bridge import Publisher, clock, streams
from em_bridge.monitor import read_record

MESSAGES = 200
PER_SECOND = 60
APPROVER = "kari"


@dataclass
class Demo:
    """The steps, on a living fleet."""

    fleet: Fleet
    show: Show
    pager: Pager
    runtime: Runtime
    verified: int = 0

    # ── 1 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def first_backups(self) -> None:
        """Daily and weekly snapshots of all, made by themselves because there were none; proven by coreutils."""
        with self.show.step("daily and weekly backups of all, proven with sha256sum") as step:
            wanted = 2 * len(DEPENDS_ON)
            wait_for(f"{wanted} snapshots", 30, lambda: len(self._snapshots()) >= wanted)
            heads = self._snapshots()
            for head in heads:
                step.check(head.is_good, f"snapshot {head.id} is {head.status}")
                self._prove(head, step)
            self.show.console.print(self._tree(heads))
            files = sum(head.files for head in heads)
            self.show.say(
                f"{len(heads)} snapshots, {files} files: `sha256sum -c SHA256SUMS` says OK for every one"
            )
            step.facts = {"snapshots": len(heads), "files": files}

    def _prove(self, head: Head, step: Step) -> None:
        folder = self.runtime.repository.path(head.id)
        proof = subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        step.check(proof.returncode == 0, f"sha256sum finds a fault in {head.id}: {proof.stderr.strip()}")
        self.verified += proof.stdout.count(": OK")

    def _tree(self, heads: list[Head]) -> Tree:
        tree = Tree(f"   {self.runtime.config.schedule.repository}", guide_style="dim")
        slots: dict[str, Tree] = {}
        for head in sorted(heads, key=lambda head: head.id):
            slot = f"{head.tier}/{head.slot}"
            branch = slots.get(slot) or slots.setdefault(slot, tree.add(slot))
            branch.add(
                f"{head.agent:<6} {head.files:>3} files {head.bytes:>7} bytes  [green]{head.status}[/]"
            )
        return tree

    # ── 2 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def approved_change(self) -> None:
        """A change of Z's weights, approved by a human: a snapshot at once, and the difference."""
        with self.show.step("an approved change of Z's weights") as step:
            weights = self.fleet.root("z") / "priority_weights.json"
            content = weights.read_text().replace("0.5", "0.45").replace("0.3", "0.35")
            em = Publisher(self.runtime.redis)
            em.config_proposed(
                change="c1", agent="z", paths=["priority_weights.json"], by="em", reason="impact counts more",
                proposed={"priority_weights.json": content.encode()},
            )  # fmt: skip
            em.config_approved(change="c1", by=APPROVER, reason="tried on last week's tasks")
            weights.write_text(content)
            em.config_applied(change="c1", agent="z", paths=["priority_weights.json"], by="em")
            took_s = wait_for("the on-change snapshot", 15, lambda: bool(self._snapshots("z", "on-change")))
            made = self._snapshots("z", "on-change")[-1]
            step.check(
                made.approved is True and made.approved_by == APPROVER, f"{made.id} is not marked approved"
            )
            self._prove(made, step)
            before = self._snapshots("z", "weekly")[-1]
            found = diff(self.runtime.repository, before.id, made.id)
            changed = [(change.path, key) for change in found.changed for key in change.keys]
            step.check(len(changed) == 2, f"expected two changed weights, found {changed}")
            table = Table("weight", "old", "new", "delta", box=None, padding=(0, 2))
            for _, key in changed:
                table.add_row(
                    key.key, str(key.old), str(key.new), f"{key.delta:+g}" if key.delta is not None else ""
                )
            self.show.console.print(table)
            self.show.say(
                f"{made.id}, approved by {made.approved_by}, {took_s * 1000:.0f} ms after the event"
            )
            step.facts = {"snapshot": made.id, "approved_by": made.approved_by, "changed": len(changed)}

    # ── 3 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def wiped_and_killed(self) -> None:
        """Rick loses his memory and his life; he comes back with what the backup holds."""
        with self.show.step("Rick's memory wiped and Rick killed") as step:
            memory = self.fleet.root("rick") / "memory"
            for file in memory.iterdir():
                file.unlink()
            died_at = self._kill("rick")
            incident = self._await_incident("rick", died_at, RECOVERED)
            took_s = (incident.closed_at or 0) - died_at
            wrong = self._unequal("rick", incident.chosen)
            step.check(not wrong, f"these files of rick differ from the backup: {wrong}")
            evidence = [Path(place) for place in incident.evidence]
            step.check(bool(evidence) and evidence[0].is_dir(), "what stood there was not kept as evidence")
            notice = self.fleet.root("rick") / notices.FILE
            step.check(notice.is_file(), f"rick was not told what happened to him: {notice} is not there")
            self._print_steps(incident)
            self.show.say(f"from death to verified: {took_s:.1f} s; every file equals {incident.chosen[0]}")
            self.show.say(f"what he lives on now, and what he has lost, he reads in {notice.name}")
            step.facts = {"seconds_from_death_to_verified": round(took_s, 2), "from": list(incident.chosen)}

    def _unequal(self, agent: str, sources: tuple[str, ...]) -> list[str]:
        """Return the files of `agent` that are not as the newest of `sources` that holds them says."""
        plan = plan_restore(self.runtime.repository, self.runtime.config.files_of(agent), from_id=sources[0])
        found = compare(plan, self.fleet.root(agent))
        return [*found.added, *found.changed, *found.removed]

    # ── 4 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def all_killed(self) -> None:
        """Everybody dies at once; they come back in waves, each after those it depends on."""
        with self.show.step("Z, Jay, Rick and Leroy killed at once") as step:
            plan = waves(AGENTS, DEPENDS_ON)
            self.show.say("plan: " + "  →  ".join(" + ".join(wave) for wave in plan))
            died_at = self._kill(*AGENTS)
            incidents = {agent: self._await_incident(agent, died_at, RECOVERED) for agent in AGENTS}
            table = Table("agent", "started", "verified", "needs", box=None, padding=(0, 2))
            for agent in (agent for wave in plan for agent in wave):
                started, proven = _at(incidents[agent], "start"), _at(incidents[agent], "prove")
                table.add_row(
                    agent,
                    f"{started - died_at:.1f} s",
                    f"{proven - died_at:.1f} s",
                    ", ".join(DEPENDS_ON[agent]) or "nobody",
                )
                for needed in DEPENDS_ON[agent]:
                    order_kept = _at(incidents[needed], "prove") <= started
                    step.check(order_kept, f"{agent} was started before {needed} was verified")
            self.show.console.print(table)
            took_s = max((incident.closed_at or 0) for incident in incidents.values()) - died_at
            self.show.say(
                f"nobody was started before those it needs were verified; all are back after {took_s:.1f} s"
            )
            step.facts = {"waves": [list(wave) for wave in plan], "seconds": round(took_s, 2)}

    # ── 5 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def em_killed(self) -> None:
        """The EM dies while everybody talks; nothing is lost, doubled or out of order."""
        with self.show.step("the EM killed with -9 while agents send numbered messages") as step:
            pairs = [("z", "jay"), ("jay", "rick"), ("rick", "leroy"), ("leroy", "z")]
            before = self._logged()
            for sender, to in pairs:
                self.fleet.order(sender, to, MESSAGES, PER_SECOND)
            total = MESSAGES * len(pairs)
            wait_for("the first messages", 15, lambda: self._delivered(pairs) >= total // 8)
            died_at = self._kill("em")
            clock.sleep(1.5)
            delivered = self._delivered(pairs)
            waiting = self._logged() - before - delivered
            step.check(waiting > 0, "the agents stopped sending when the EM died")
            self.show.say(
                f"{delivered} of {total} messages had arrived; 1.5 s later {waiting} more waited in the log"
            )
            incident = self._await_incident("em", died_at, RECOVERED)
            took_s = (incident.closed_at or 0) - died_at
            self.show.say(f"the watchdog had the EM restored and verified after {took_s:.1f} s")
            wait_for(f"all {total} messages", 30, lambda: self._delivered(pairs) >= total)
            expected = list(range(1, MESSAGES + 1))
            for sender, to in pairs:
                got = self.fleet.heard(to, sender)
                step.check(
                    got == expected,
                    f"{to} did not get 1 to {MESSAGES} from {sender} in order, but {got[:5]}…",
                )
            self.show.say(
                f"replayed: each of {total} messages from {len(pairs)} senders arrived exactly once, in order"
            )
            step.facts = {"messages": total, "delivered_before_crash": delivered, "waited_in_log": waiting}

    def _delivered(self, pairs: list[tuple[str, str]]) -> int:
        return sum(len(self.fleet.heard(to, sender)) for sender, to in pairs)

    def _logged(self) -> int:
        return int(self.runtime.redis.xlen(streams.MESSAGES))

    # ── 6 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def no_state_to_trust(self) -> None:
        """Leroy's every backup is poisoned: nothing is restored from them, and a human gets everything."""
        with self.show.step("Leroy killed, and his every backup poisoned") as step:
            poisoned = self._snapshots("leroy")
            for head in poisoned:
                soul = self.runtime.repository.path(head.id) / "files" / "memory" / "people.json"
                os.chmod(soul, 0o600)
                soul.write_bytes(soul.read_bytes().replace(b"kind", b"evil", 1))
            before = (self.fleet.root("leroy") / "SOUL.md").read_bytes()
            died_at = self._kill("leroy")
            incident = self._await_incident("leroy", died_at, ESCALATED)
            report = Path(incident.evidence[-1]) / "REPORT.md"
            step.check(report.is_file(), f"there is no report {report}")
            step.check(
                (self.fleet.root("leroy") / "SOUL.md").read_bytes() == before, "leroy's files were touched"
            )
            step.check(
                not processes.find_agent(self.fleet.process("leroy")), "leroy was started on a poisoned state"
            )
            self.show.say(f"{len(poisoned)} snapshots, one word changed in each: none of them is used")
            title = "leroy could not be recovered"
            wait_for(
                "the human's page",
                15,
                lambda: any(title in f"{head} {body}" for head, body in self.pager.pages),
            )
            self.show.say(f"a human was told: “{title}”; everything that is known: {report}")
            step.facts = {"evidence": str(report.parent), "poisoned": len(poisoned)}

    # ── 7 ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def totals(self) -> None:
        """The figures, the record, and what to try next."""
        with self.show.step("what was done") as step:
            report = self.runtime.history.verify()
            step.check(report.ok, f"the history does not prove: {report.problem}")
            incidents = list(IncidentStore(self.runtime.redis).all())
            lines = list(self.runtime.history.read())
            totals = {
                "snapshots": len(self._snapshots()),
                "files_verified": self.verified,
                "events": self._events(),
                "messages": self._logged(),
                "recoveries": sum(incident.state == RECOVERED for incident in incidents),
                "escalations": sum(incident.state == ESCALATED for incident in incidents),
                "alerts": sum(line["kind"] == "alert" for line in lines),
                "pages_delivered": len(self.pager.pages),
                "history_lines": report.lines,
            }
            self.show.say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items()))
            schedule = self.runtime.config.schedule
            self.show.say(f"history:    {schedule.history} (chain of {report.lines} lines proven)")
            self.show.say(f"repository: {schedule.repository}")
            program = str(Path(sys.executable).with_name("backup-worker")).removeprefix(f"{Path.cwd()}/")
            self.show.say("try next:")
            self.show.say(f"  export BACKUP_CONFIG={self.fleet.config_dir}")
            for command in ("list", "verify", "history", "restore rick --to /tmp/rick --dry-run"):
                self.show.say(f"  {program} {command}")
            step.facts = {**totals, "history": str(schedule.history), "repository": str(schedule.repository)}

    def _events(self) -> int:
        return sum(
            int(self.runtime.redis.xlen(stream))
            for stream in (streams.AGENT_STATE, streams.CONFIG_CHANGE, STREAM)
        )

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────

    def state_of(self, agent: str) -> str | None:
        """Return the agent's state as the EM sees it."""
        record = self.runtime.redis.hget(streams.STATES, agent)
        return read_record(record if isinstance(record, bytes) else None).get("state")

    def _snapshots(self, agent: str | None = None, tier: str | None = None) -> list[Head]:
        return self.runtime.repository.snapshots(agent, tier)

    def _kill(self, *agents: str) -> float:
        at = clock.now()
        self.fleet.kill(agents)
        self.show.say(f"kill -9 {' '.join(agents)}")
        return at

    def _await_incident(self, agent: str, since: float, state: str) -> Incident:
        """Wait until the incident of `agent` opened after `since` is closed; it must have ended as `state`."""
        store = IncidentStore(self.runtime.redis)
        found: list[Incident] = []

        def closed() -> bool:
            found[:] = [
                one
                for one in store.all()
                if one.agent == agent and one.opened_at >= since and not one.is_open
            ]
            return bool(found)

        wait_for(f"the recovery of {agent}", 45, closed)
        if found[0].state != state:
            raise StepFailed(
                f"the recovery of {agent} ended as {found[0].state}: {found[0].steps[-1].detail}"
            )
        return found[0]

    def _print_steps(self, incident: Incident) -> None:
        table = Table("step", "after", "what", box=None, padding=(0, 2))
        for one in incident.steps:
            table.add_row(one.step, f"{one.at - incident.opened_at:.1f} s", one.detail)
        self.show.console.print(table)


def _at(incident: Incident, name: str) -> float:
    return next(one.at for one in reversed(incident.steps) if one.step == name)
