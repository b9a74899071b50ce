"""The table of phases: whole, and drawn in the documentation as it is."""

from __future__ import annotations

from pathlib import Path

from backup_worker.recovery import phases
from backup_worker.recovery.machine import Recovery
from backup_worker.recovery.phases import ESCALATED, FENCE, NEXT, PHASES, RECOVERED, TABLE

DOCS = Path(__file__).parents[2] / "docs" / "recovery.md"


def test_what_follows_is_a_phase_or_an_end_and_every_phase_can_be_reached() -> None:
    after = {name for phase in TABLE for name, _ in phase.then}
    assert after <= {*PHASES, RECOVERED, ESCALATED}
    assert after | {phases.CONFIRM, FENCE} == {*PHASES, RECOVERED, ESCALATED}


def test_every_loop_goes_through_the_fence_or_chooses_anew() -> None:
    # What fences or selects counts attempts or passes over what is damaged, so no incident goes round for ever.
    for start in PHASES:
        seen, now = set(), {start}
        while now:
            now = {name for one in now for name in NEXT[one] if name not in (FENCE, phases.SELECT)} - seen
            assert start not in now
            seen |= now


def test_the_machine_has_a_method_for_each_phase_and_no_more() -> None:
    assert all(hasattr(Recovery, f"_{name}") for name in PHASES)


def test_the_drawing_and_the_table_in_the_documentation_are_made_of_this_table() -> None:
    text = DOCS.read_text()
    hint = "print(phases.drawing(), phases.table()) and put both into docs/recovery.md"
    assert f"```mermaid\n{phases.drawing()}```" in text, hint
    assert phases.table() in text, hint
