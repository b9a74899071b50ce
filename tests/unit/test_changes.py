"""The approval inbox: what the stream of changes comes to, and which applied change counts as approved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_worker.approval import approvals, changes
from backup_worker.approval.changes import APPLIED, APPROVED, PROPOSED, REJECTED
from em_bridge import events, streams
from em_bridge.errors import NotFound, UsageError

PATHS = ("weights.json",)


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


def proposed(by: str = "em", agent: str = "z", paths: tuple[str, ...] = PATHS) -> events.ConfigProposed:
    return events.ConfigProposed("c1", agent, paths, by, "faster", proposed={"weights.json": b"{}"})


def approved(by: str = "kari") -> events.ConfigApproved:
    return events.ConfigApproved("c1", by)


def rejected(by: str = "kari") -> events.ConfigRejected:
    return events.ConfigRejected("c1", by)


def applied(
    by: str = "em", approved_by: str | None = None, agent: str = "z", paths: tuple[str, ...] = PATHS
) -> events.ConfigApplied:
    return events.ConfigApplied("c1", agent, paths, by, approved_by)


def publish(client: Any, *wanted: events.Event) -> list[str]:
    """Append the events, all in the same millisecond, as a busy EM does."""
    start = client.xlen(streams.CONFIG_CHANGE)
    ids = [f"1795441803000-{start + number}" for number in range(1, len(wanted) + 1)]
    for entry, event in zip(ids, wanted, strict=True):
        client.xadd(event.stream, events.encode(event), id=entry)
    return ids


def verdict(client: Any, *wanted: events.Event, signers: Path | None = None) -> tuple[bool, str | None]:
    """Return what is said of the last applied change among these events."""
    ids = publish(client, *wanted)
    number = max(at for at, event in enumerate(wanted) if isinstance(event, events.ConfigApplied))
    event = wanted[number]
    assert isinstance(event, events.ConfigApplied)
    ruling = approvals.judge(client, event, ids[number], rules=changes.Rules(signers))
    return ruling.approved, ruling.by


UNAPPROVED = (False, None)


def test_a_proposed_change_waits_and_tells_what_it_would_write(client: Any) -> None:
    publish(client, proposed())
    found = changes.get(client, "c1")
    assert (found.state, found.agent, found.by, found.reason) == (PROPOSED, "z", "em", "faster")
    assert found.summary()["proposed"] == {"weights.json": "{}"}


@pytest.mark.parametrize("yes", [True, False])
def test_a_decision_is_about_the_proposal_that_was_seen(client: Any, yes: bool) -> None:
    rules = changes.Rules()
    (seen,) = publish(client, proposed())
    publish(client, proposed(agent="jay"))
    with pytest.raises(UsageError, match="is not the one you have seen"):
        approvals.decide(client, "c1", "kari", yes=yes, rules=rules, proposal=seen)
    with pytest.raises(UsageError, match="is not the one you have seen"):
        approvals.decide(client, "c1", "kari", yes=yes, rules=rules, proposal="")
    assert changes.get(client, "c1").state == PROPOSED
    approvals.decide(client, "c1", "kari", yes=yes, rules=rules, proposal=changes.get(client, "c1").proposal)
    assert changes.get(client, "c1").state == (APPROVED if yes else REJECTED)


def test_the_way_of_an_approved_change(client: Any) -> None:
    publish(client, proposed(), approved())
    assert (changes.get(client, "c1").state, changes.get(client, "c1").decided_by) == (APPROVED, "kari")
    publish(client, applied())
    found = changes.get(client, "c1")
    assert (found.state, found.decision) == (APPLIED, APPROVED)


def test_an_approval_before_the_application_counts(client: Any) -> None:
    assert verdict(client, proposed(), approved(), applied()) == (True, "kari")


def test_an_approval_after_the_application_comes_too_late_also_in_the_same_millisecond(client: Any) -> None:
    assert verdict(client, proposed(), applied(), approved()) == UNAPPROVED
    # Folded further by somebody else, it is still too late.
    changes.fold(client)
    (entry, _), *_ = [row for row in client.xrange(streams.CONFIG_CHANGE) if b"applied" in row[1][b"type"]]
    assert not approvals.judge(client, applied(), entry.decode(), rules=changes.BY_NAME).approved


def test_a_rejection_after_the_application_does_not_undo_its_approval(client: Any) -> None:
    # The job may run before or behind the later entry; its snapshot must be marked the same.
    assert verdict(client, proposed(), applied(approved_by="kari"), rejected("ola")) == (True, "kari")


def test_a_rejected_change_is_unapproved_whatever_the_em_says(client: Any) -> None:
    assert verdict(client, proposed(), rejected(), applied(approved_by="ola")) == UNAPPROVED


def test_the_first_decision_stands(client: Any) -> None:
    publish(client, proposed(), rejected("ola"), approved("kari"))
    found = changes.get(client, "c1")
    assert (found.state, found.decided_by) == (REJECTED, "ola")


def test_nobody_approves_what_he_proposed(client: Any) -> None:
    assert verdict(client, proposed(by="leroy"), approved("leroy"), applied()) == UNAPPROVED
    assert changes.get(client, "c1").decision == ""


def test_the_em_may_not_name_the_proposer_as_the_one_who_approved(client: Any) -> None:
    assert verdict(client, proposed(by="leroy"), applied(approved_by="leroy")) == UNAPPROVED


def test_an_approval_given_before_the_proposal_is_not_about_it(client: Any) -> None:
    # Otherwise one approves nothing, then proposes, and is approved by himself.
    assert verdict(client, approved("leroy"), proposed(by="leroy"), applied()) == UNAPPROVED
    assert changes.get(client, "c1").agent == "z"


def test_a_second_proposal_cannot_borrow_the_approval_of_the_first(client: Any) -> None:
    other = proposed(by="leroy", paths=("SOUL.md",))
    assert verdict(client, proposed(), approved(), other, applied(paths=("SOUL.md",))) == UNAPPROVED


def test_a_proposal_may_be_mended_until_it_is_decided(client: Any) -> None:
    mended = proposed(paths=("SOUL.md",))
    assert verdict(client, proposed(), mended, approved(), applied(paths=("SOUL.md",))) == (True, "kari")


@pytest.mark.parametrize(
    "other",
    [{"agent": "jay"}, {"paths": ("SOUL.md",)}, {"paths": (*PATHS, "SOUL.md")}],
)
def test_an_approval_is_for_what_was_proposed_and_nothing_else(client: Any, other: dict[str, Any]) -> None:
    assert verdict(client, proposed(), approved(), applied(**other)) == UNAPPROVED
    assert verdict(client, applied(**other, approved_by="kari")) == UNAPPROVED


def test_the_approved_part_of_a_change_may_be_applied_under_any_case_of_the_agents_name(client: Any) -> None:
    both = proposed(paths=("weights.json", "SOUL.md"))
    assert verdict(client, both, approved(), applied(agent="Z")) == (True, "kari")


def test_the_ems_word_counts_where_nothing_was_proposed(client: Any) -> None:
    assert verdict(client, applied(approved_by="kari")) == (True, "kari")


def test_the_ems_word_counts_each_time_it_is_given(client: Any) -> None:
    # An EM that uses the same id again gives its word anew.
    assert verdict(client, applied(approved_by="kari"), applied(agent="jay", approved_by="ola")) == (
        True,
        "ola",
    )


def test_who_applies_an_unproposed_change_cannot_be_the_one_who_approved_it(client: Any) -> None:
    assert verdict(client, applied(by="leroy", approved_by="leroy")) == UNAPPROVED
    assert verdict(client, approved("leroy"), applied(by="leroy")) == UNAPPROVED


def test_a_change_without_any_approval_is_unapproved(client: Any) -> None:
    assert verdict(client, applied()) == UNAPPROVED
    assert verdict(client, applied(approved_by="")) == UNAPPROVED


@pytest.mark.parametrize("before", [[proposed(), approved()], []])
def test_where_signers_exist_no_word_without_a_signature_counts(
    client: Any, before: list[Any], tmp_path: Path
) -> None:
    signers = tmp_path / "allowed_signers"
    signers.write_text("kari ssh-ed25519 AAAA\n")
    assert verdict(client, *before, applied(approved_by="kari"), signers=signers) == UNAPPROVED


def test_an_entry_that_is_no_event_is_passed_over(client: Any) -> None:
    client.xadd(streams.CONFIG_CHANGE, {b"type": b"config.applied", b"body": b"\xc1"}, id="5-1")
    client.xadd(streams.CONFIG_CHANGE, {b"x": b"y"}, id="5-2")
    publish(client, proposed())
    assert [change.change for change in changes.all_changes(client)] == ["c1"]


def test_an_unknown_change_is_not_found(client: Any) -> None:
    with pytest.raises(NotFound, match="there is no change “c9”"):
        changes.get(client, "c9")


def test_more_changes_than_one_read_takes_are_all_folded(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_BATCH", 7)
    publish(client, *(events.ConfigProposed(f"c{number}", "z", PATHS, "em") for number in range(50)))
    assert len(changes.all_changes(client)) == 50


def test_two_who_fold_at_once_take_every_entry_in_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second one's transaction fails on the watched position, and it goes on from there.
    publish(client, *(events.ConfigProposed(f"c{number}", "z", PATHS, "em") for number in range(20)))
    advance = changes.advance
    disturbed: list[bool] = []

    def disturbing(known: Any, event: Any, entry: str) -> changes.Change:
        if not disturbed:
            disturbed.append(True)
            changes.fold(client)
            publish(client, events.ConfigApproved("c3", "kari"))
        return advance(known, event, entry)

    monkeypatch.setattr(changes, "advance", disturbing)
    changes.fold(client)
    assert changes.get(client, "c3").state == APPROVED
    assert len(changes.all_changes(client)) == 20


def _of(change: str) -> st.SearchStrategy[changes.ConfigChange]:
    who = st.sampled_from(["em", "kari", "leroy"])
    agents = st.sampled_from(["z", "jay"])
    paths = st.sampled_from([("a",), ("a", "b"), ("b",)])
    return st.one_of(
        st.builds(events.ConfigProposed, st.just(change), agents, paths, who),
        st.builds(events.ConfigApproved, st.just(change), who),
        st.builds(events.ConfigRejected, st.just(change), who),
        st.builds(events.ConfigApplied, st.just(change), agents, paths, who, st.none() | who),
    )


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(st.sampled_from(["c1", "c2"]).flatmap(_of), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_folding_in_any_parts_comes_to_the_same_and_so_does_every_verdict(
    wanted: list[changes.ConfigChange], cuts: list[int]
) -> None:
    at_once, in_parts = fakeredis.FakeRedis(), fakeredis.FakeRedis()
    ids = publish(at_once, *wanted)
    publish(in_parts, *wanted)
    early = {}
    for number, event in enumerate(wanted):
        if number in cuts:
            changes.fold(in_parts, upto=ids[number])
        if isinstance(event, events.ConfigApplied):
            early[ids[number]] = approvals.judge(in_parts, event, ids[number], rules=changes.BY_NAME)
    assert changes.all_changes(at_once) == changes.all_changes(in_parts)
    for entry, said in early.items():
        event = wanted[ids.index(entry)]
        assert isinstance(event, events.ConfigApplied)
        assert approvals.judge(at_once, event, entry, rules=changes.BY_NAME) == said


def test_who_proposed_a_change_may_take_it_back_and_the_inbox_says_why_an_own_approval_does_not_count(
    client: Any,
) -> None:
    publish(client, proposed(by="leroy"), approved(" Leroy "))
    assert changes.get(client, "c1").refused == ("approval by  Leroy : “ Leroy ” proposed it",)
    publish(client, rejected("leroy"), approved("kari"))
    found = changes.get(client, "c1")
    assert (found.state, found.decided_by) == (REJECTED, "leroy")
