"""Approvals signed with an SSH key: what a signature proves, and everything that does not."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker.approval import approvals, changes, signatures
from backup_worker.approval.changes import APPROVED, PROPOSED, Rules
from em_bridge import events
from em_bridge.errors import AgentBackupError, UsageError
from tests.tools import needs

DAY = 86400.0


class Keys:
    """SSH keys in a folder, made by ssh-keygen, and the file of allowed signers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signers = folder / "allowed_signers"

    def make(self, name: str) -> Path:
        key = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        return key

    def allow(self, *lines: tuple[str, str]) -> None:
        """Write the file: each line is (principals and options, name of the key)."""
        rows = [
            f"{start} {' '.join((self.folder / f'{key}.pub').read_text().split()[:2])}"
            for start, key in lines
        ]
        self.signers.write_text("\n".join(rows) + "\n")


class Inbox:
    """A bus with one proposed change, and decisions on it."""

    def __init__(self, keys: Keys) -> None:
        self.client: Any = fakeredis.FakeRedis()
        self.keys = keys
        self.propose("c1")

    def rules(self, expire_s: float | None = None) -> Rules:
        return Rules(self.keys.signers, expire_s, time.time())

    def propose(self, change: str, content: bytes = b"{}", by: str = "em", agent: str = "z") -> None:
        event = events.ConfigProposed(change, agent, ("w.json",), by, "faster", proposed={"w.json": content})
        self.client.xadd(event.stream, events.encode(event))

    def get(self, change: str = "c1", **rules: Any) -> changes.Change:
        return changes.get(self.client, change, self.rules(**rules))

    def sign(self, key: str = "kari", who: str = "kari", change: str = "c1", **other: Any) -> str:
        known = replace(self.get(change), **other)
        return signatures.sign(changes.statement(known, who), self.keys.folder / key)

    def send(self, signature: str | bytes | None, by: str = "kari", change: str = "c1") -> changes.Change:
        """Put an approval on the stream, past every check, as somebody with the password of Redis can."""
        event = events.ConfigApproved(change, by, signature=signature)
        self.client.xadd(event.stream, events.encode(event))
        return self.get(change)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    needs("ssh-keygen", why="approvals are signed with it")
    keys = Keys(tmp_path)
    for name in ("kari", "mallory"):
        keys.make(name)
    keys.allow(("kari", "kari"))
    return keys


@pytest.fixture
def inbox(keys: Keys) -> Inbox:
    return Inbox(keys)


def test_a_signature_of_an_allowed_signer_approves(inbox: Inbox) -> None:
    found = inbox.send(inbox.sign())
    assert (found.decision, found.decided_by, found.signed) == (APPROVED, "kari", True)


def test_a_signature_may_travel_as_bytes(inbox: Inbox) -> None:
    assert inbox.send(inbox.sign().encode()).decision == APPROVED


def test_the_statement_is_canonical_json_that_anybody_can_write(inbox: Inbox) -> None:
    change = inbox.get()
    text = changes.statement(change, "kari").decode()
    facts = json.loads(text)
    assert text == json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert facts["paths"] == {"w.json": change.sha256["w.json"]}
    assert (facts["change"], facts["agent"], facts["by"], facts["decision"]) == (
        "c1",
        "z",
        "kari",
        "approved",
    )
    assert facts["proposal"] == change.proposal


@pytest.mark.parametrize(
    "signature", [None, "", "kari", b"\x00" * 99, "-----BEGIN SSH SIGNATURE-----\n", "x" * 70_000]
)
def test_no_signature_or_garbage_is_no_approval(inbox: Inbox, signature: Any) -> None:
    found = inbox.send(signature)
    assert (found.state, found.decision) == (PROPOSED, "")
    assert found.refused[0].startswith("approval by kari: ")


def test_somebody_else_s_key_does_not_approve_in_kari_s_name(inbox: Inbox) -> None:
    assert inbox.send(inbox.sign(key="mallory")).decision == ""


def test_kari_s_key_does_not_approve_in_another_name(inbox: Inbox) -> None:
    assert inbox.send(inbox.sign(who="ola"), by="ola").decision == ""


def test_who_is_not_in_the_file_cannot_approve(inbox: Inbox) -> None:
    assert inbox.send(inbox.sign(key="mallory", who="mallory"), by="mallory").decision == ""


def test_a_signature_replayed_for_another_change_fails(inbox: Inbox) -> None:
    signature = inbox.sign()
    inbox.propose("c2")
    assert inbox.send(signature, change="c2").decision == ""


def test_a_signature_replayed_for_other_bytes_under_the_same_name_fails(inbox: Inbox) -> None:
    signature = inbox.sign()
    inbox.propose("c1", b'{"speed": 9}')
    assert inbox.send(signature).decision == ""


def test_a_signature_replayed_for_a_later_proposal_of_the_same_bytes_fails(inbox: Inbox) -> None:
    signature = inbox.sign()
    inbox.propose("c1")
    assert inbox.send(signature).decision == ""


@pytest.mark.parametrize(
    "other", [{"agent": "jay"}, {"paths": ("x.json",)}, {"by": "leroy"}, {"reason": "x"}]
)
def test_a_signature_over_anything_else_in_the_statement_fails(inbox: Inbox, other: Any) -> None:
    assert inbox.send(inbox.sign(**other)).decision == ""


def test_a_signature_made_for_another_purpose_fails(inbox: Inbox, keys: Keys) -> None:
    statement = keys.folder / "statement"
    statement.write_bytes(changes.statement(inbox.get(), "kari"))
    command: list[str | Path] = [
        "ssh-keygen",
        "-Y",
        "sign",
        "-q",
        "-n",
        "git",
        "-f",
        keys.folder / "kari",
        statement,
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert inbox.send(statement.with_suffix(".sig").read_text()).decision == ""


def test_a_rubbish_approval_does_not_keep_a_signed_one_from_counting(inbox: Inbox) -> None:
    inbox.send(None, by="ola")
    found = inbox.send(inbox.sign())
    assert (found.decision, found.decided_by, len(found.refused)) == (APPROVED, "kari", 1)


def test_the_proposer_s_own_signature_does_not_count(inbox: Inbox) -> None:
    inbox.propose("c3", by="Kari ")
    assert inbox.send(inbox.sign(change="c3"), change="c3").decision == ""


def at(moment: float) -> str:
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(moment))


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ('namespaces="agent-backup"', True),
        ('namespaces="git"', False),
        (f'valid-before="{at(time.time() + DAY)}"', True),
        (f'valid-before="{at(time.time() - DAY)}"', False),
        (f'valid-after="{at(time.time() + DAY)}"', False),
        (f'valid-after="{at(time.time() - DAY)}"', True),
    ],
    # Named, because each of several test processes has its own time.
    ids=["our namespace", "another", "still valid", "no longer", "not yet", "already"],
)
def test_the_options_of_the_file_are_openssh_s_own(
    inbox: Inbox, keys: Keys, options: str, counts: bool
) -> None:
    keys.allow((f"kari {options}", "kari"))
    assert (inbox.send(inbox.sign()).decision == APPROVED) is counts


def test_a_key_that_was_valid_when_it_signed_counts_afterwards_too(inbox: Inbox, keys: Keys) -> None:
    # What was approved stays approved when the approver's key ends, if the line is kept with its valid-before.
    found = inbox.send(inbox.sign())
    assert found.decided_at is not None
    keys.allow((f'kari valid-before="{at(found.decided_at + 5)}"', "kari"))
    assert inbox.get().decision == APPROVED
    keys.allow((f'kari valid-before="{at(found.decided_at - 5)}"', "kari"))
    assert inbox.get().decision == ""


def test_a_certificate_of_a_listed_authority_approves(inbox: Inbox, keys: Keys) -> None:
    keys.make("authority")
    command: list[str | Path] = [
        "ssh-keygen",
        "-q",
        "-s",
        keys.folder / "authority",
        "-I",
        "ola's",
        "-n",
        "ola",
        keys.folder / "mallory",
    ]
    subprocess.run(command, check=True)
    keys.allow(('ola cert-authority,namespaces="agent-backup"', "authority"))
    statement = changes.statement(inbox.get(), "ola")
    signature = _cert_sign(keys, statement)
    assert inbox.send(signature, by="ola").decision == APPROVED
    assert inbox.get().signed


def _cert_sign(keys: Keys, statement: bytes) -> str:
    """Sign with a certificate: ssh-keygen finds it beside the private key when that is named by the certificate."""
    done = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-q", "-n", "agent-backup", "-f", keys.folder / "mallory-cert.pub"],
        input=statement, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_an_approval_after_the_proposal_has_expired_does_not_count(inbox: Inbox) -> None:
    inbox.send(inbox.sign())
    assert inbox.get(expire_s=3600.0).decision == APPROVED
    late = replace(inbox.get(), proposed_at=(inbox.get().proposed_at or 0) - 7200)
    assert changes.settle(late, inbox.rules(3600.0)).decision == ""


def test_without_ssh_keygen_nothing_counts_and_the_reason_is_told(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = inbox.sign()
    monkeypatch.setattr(signatures, "PROGRAM", "no-such-ssh-keygen")
    found = inbox.send(signature)
    assert found.decision == ""
    assert "not installed" in found.refused[0]
    monkeypatch.undo()
    assert inbox.get().decision == APPROVED


def test_a_file_of_signers_that_cannot_be_read_lets_nobody_approve(inbox: Inbox, keys: Keys) -> None:
    signature = inbox.sign()
    keys.signers.unlink()
    keys.signers.mkdir()
    assert inbox.send(signature).decision == ""


def test_an_empty_file_of_signers_lets_nobody_approve(inbox: Inbox, keys: Keys) -> None:
    signature = inbox.sign()
    keys.signers.write_text("")
    assert inbox.send(signature).decision == ""


def test_deciding_proves_the_signature_before_anything_is_published(inbox: Inbox) -> None:
    wrong = inbox.sign(key="mallory")

    def decide(signature: str | None, who: str = "kari", now: float | None = None) -> str:
        rules = replace(inbox.rules(3600.0), now=now or time.time())
        return approvals.decide(inbox.client, "c1", who, yes=True, rules=rules, signature=signature)

    for signature, message in ((None, "by name alone"), (wrong, "does not prove")):
        with pytest.raises(UsageError, match=message):
            decide(signature)
    with pytest.raises(UsageError, match="has expired"):
        decide(inbox.sign(), now=time.time() + 7200)
    with pytest.raises(UsageError, match="proposed change"):
        decide(inbox.sign(who="em"), who="EM")
    assert inbox.get().decisions == ()
    decide(inbox.sign())
    assert inbox.get().decision == APPROVED
    with pytest.raises(UsageError, match="already approved by kari"):
        decide(inbox.sign())


def test_a_key_that_is_none_says_so(tmp_path: Path) -> None:
    needs("ssh-keygen", why="approvals are signed with it")
    with pytest.raises(AgentBackupError, match="there is no key file"):
        signatures.sign(b"x", tmp_path / "none")
    (tmp_path / "none").write_text("not a key")
    with pytest.raises(AgentBackupError, match="could not sign"):
        signatures.sign(b"x", tmp_path / "none")


def test_a_check_that_got_no_answer_in_time_is_made_again(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signature = inbox.sign()
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    with monkeypatch.context() as slow:
        slow.setattr(signatures, "PROGRAM", str(hangs))
        slow.setattr(signatures, "_TIMEOUT_S", 0.2)
        assert inbox.send(signature).decision != APPROVED
    assert inbox.get().decision == APPROVED
