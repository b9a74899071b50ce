"""Who is told what, and when: the pure plan, and what the messages say."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_worker.alerts import Alert, book, deliver_due, kinds, receiver_states, silences
from backup_worker.alerts.planner import STORM, Policy, ReceiverState, id_of, plan_delivery
from backup_worker.alerts.silences import Silence
from backup_worker.alerts.wording import LISTED, compose
from backup_worker.config import Receiver
from backup_worker.history import History
from em_bridge.errors import NotFound, UsageError
from tests.receivers import Phone

HOUR = 3600.0
PHONE = Receiver(url="phone://")
MAIL = Receiver(url="mail://")


def alert(key: str, severity: str = "critical", agent: str | None = None, **more: Any) -> Alert:
    return Alert(key, severity, more.get("title", key), more.get("body", "why"), agent)  # type: ignore[arg-type]  # a literal, seen as text


class Desk:
    """The whole of it on one server: alerts are raised, silenced and delivered at times of the test's choice."""

    def __init__(self, history: History, *receivers: Receiver, **policy: Any) -> None:
        self.client: Any = fakeredis.FakeRedis()
        self.history, self.receivers, self.policy = history, receivers or (PHONE,), Policy(**policy)
        self.phone = Phone()

    def raise_(self, key: str, now: float, severity: str = "critical", agent: str | None = None) -> None:
        book.raise_alert(self.client, alert(key, severity, agent), now=now)

    def resolve(self, key: str, now: float) -> None:
        book.resolve(self.client, key, now=now)

    def deliver(self, now: float) -> list[str]:
        """Deliver, and return `receiver title` of what arrived."""
        deliver_due(self.client, self.receivers, self.history, now, policy=self.policy, send=self.phone)
        got = [f"{url.removesuffix('://')} {title}" for url, title, _ in self.phone.got]
        self.phone.got.clear()
        return got

    def until(self, end: float, start: float = 0.0, step: float = 1.0) -> list[tuple[float, str]]:
        """Deliver every `step` seconds; return what arrived, with the time."""
        found, now = [], start
        while now <= end:
            found += [(now, one) for one in self.deliver(now)]
            now += step
        return found


@pytest.fixture
def history(tmp_path: Any) -> History:
    return History(tmp_path / "history.jsonl")


# -- grouping --------------------------------------------------------------------------------------------------


def test_fifty_deaths_at_once_make_one_page_with_a_list(history: History) -> None:
    desk = Desk(history)
    for number in range(50):
        desk.raise_(f"recovery/a{number:02}", number * 0.05, "warning", f"a{number:02}")
    assert desk.deliver(12) == []
    deliver_due(desk.client, desk.receivers, history, 12.5, policy=desk.policy, send=desk.phone)
    ((_, title, body),) = desk.phone.got
    recovered = kinds.KINDS["recovery"].title
    assert title == f"[warning] 50 times: {recovered}: a00, a01, a02 and 47 more"
    assert all(f"recovery/a{number:02}" in body for number in range(50))
    assert body.count("docs/runbook.md#recovery") == 1


@pytest.mark.parametrize("seconds", [1, 10, 45])
def test_deaths_that_are_taken_up_one_by_one_are_one_page_with_their_silence_and_one_end(
    seconds: int, history: History
) -> None:
    """Fifty real deaths made three pages: workers take them up over seconds, and the silence is told beside them."""
    desk = Desk(history)
    raised = [(number * seconds / 50, f"recovery/a{number:02}") for number in range(50)]
    pages, mass = [], False
    for tick in range(240):
        now = tick / 2
        while raised and raised[0][0] <= now:
            at, key = raised.pop(0)
            desk.raise_(key, at, "warning", key[-3:])
            if not mass and key == "recovery/a03":
                desk.raise_("mass-silence", at, "critical")
        pages += desk.deliver(now)
    (page,) = pages
    assert page == "phone [critical] 51 alerts: 1 mass-silence, 50 recovery"
    for number in range(50):
        desk.resolve(f"recovery/a{number:02}", 200 + number * seconds / 50)
    desk.resolve("mass-silence", 200 + seconds)
    assert [title for _, title in desk.until(400, 200 + seconds)] == [
        "phone [resolved] 51 alerts: 1 mass-silence, 50 recovery"
    ]


def test_deaths_that_all_end_with_a_human_are_a_page_and_then_one_a_minute(history: History) -> None:
    desk = Desk(history)
    told = []
    for now in range(300):
        if now < 50:
            desk.raise_(f"recovery/a{now}", now, "warning", f"a{now}")
            desk.raise_("mass-silence", now, "critical")
        if 10 <= now < 110 and now % 2 == 0:
            desk.raise_(f"escalation/a{now}", now, "critical", f"a{now}")
        told += [now for _ in desk.deliver(now)]
    assert told == [60, 120]


def test_something_critical_alone_is_a_page_after_the_window_whatever_milder_was_told_before(
    history: History,
) -> None:
    desk = Desk(history)
    desk.raise_("recovery/z", 0, "warning", "z")
    assert desk.until(30) == [(10, "phone [warning] recovery/z")]
    desk.raise_("escalation/z", 31, "critical", "z")
    assert desk.until(60, 31) == [(33, "phone [critical] escalation/z")]


def test_a_recovery_that_is_given_up_is_a_page_at_once_also_behind_one_of_its_first_failure(
    history: History,
) -> None:
    desk = Desk(history)
    desk.raise_("attempt/z", 0, "critical", "z")
    assert [at for at, _ in desk.until(9)] == [2]
    desk.raise_("escalation/z", 10, "critical", "z")
    assert desk.until(60, 10) == [(12, "phone [critical] escalation/z")]


def test_what_is_milder_of_a_group_waits_behind_a_critical_page_of_it(history: History) -> None:
    desk = Desk(history)
    desk.raise_("escalation/a", 0, "critical", "a")
    assert [at for at, _ in desk.until(4)] == [2]
    desk.raise_("recovery/b", 5, "warning", "b")
    assert desk.until(90, 5) == [(62, "phone [warning] recovery/b")]


def test_a_few_critical_ones_are_told_after_the_window_with_all_that_is_new(history: History) -> None:
    desk = Desk(history)
    for number in range(STORM - 1):
        desk.raise_(f"missing/daily/a{number}", number, agent=f"a{number}")
    desk.raise_("lag", 0.5, "warning")
    assert [at for at, _ in desk.until(30)] == [2]


def test_a_storm_waits_for_its_rest_but_not_for_ever_and_holds_up_no_other_kind(history: History) -> None:
    desk = Desk(history)
    told = []
    for now in range(200):
        for number in range(3 if now < 180 else 0):
            desk.raise_(f"missing/daily/a{now}-{number}", now, agent=f"a{now}")
        if now == 20:
            desk.raise_("lag", now)
        told += [(now, title.split(":")[0]) for title in desk.deliver(now)]
    assert told == [
        (22, "phone [critical] 70 alerts"), (83, "phone [critical] 183 times"), (144, "phone [critical] 183 times"),
    ]  # fmt: skip
    ((at, title),) = desk.until(300, 200)
    assert (at, title.split(":")[0]) == (204, "phone [critical] 105 times")


def test_what_is_milder_waits_until_no_more_comes_but_not_for_ever_and_holds_up_nothing_critical(
    history: History,
) -> None:
    desk = Desk(history)
    told = []
    for now in range(300):
        if now < 90:
            desk.raise_(f"drill-overdue/a{now}", now, "warning", f"a{now}")
        if now == 12:
            desk.raise_("space", now, "critical")
        told += [(now, title.split(":")[0]) for title in desk.deliver(now)]
    assert told == [
        (14, "phone [critical] 16 alerts"), (75, "phone [warning] 61 times"), (135, "phone [warning] 14 times"),
    ]  # fmt: skip


def test_each_end_is_told_and_many_at_once_in_one_message(history: History) -> None:
    desk = Desk(history)
    for number in range(50):
        desk.raise_(f"recovery/a{number}", 0, "warning", f"a{number}")
    assert len(desk.deliver(10)) == 1
    ends = []
    for now in range(10, 200):
        if now < 60:
            desk.resolve(f"recovery/a{now - 10}", now)
        ends += [(now, title) for title in desk.deliver(now)]
    assert [at for at, _ in ends] == [69]
    assert all(title.startswith("phone [resolved] ") for _, title in ends)
    assert desk.client.hlen(book.OPEN) == 0


def test_what_is_over_before_anybody_was_told_is_told_all_the_same(history: History) -> None:
    desk = Desk(history, group_s=5)
    desk.raise_("recovery/z", 0, "warning", "z")
    desk.resolve("recovery/z", 3)
    assert desk.until(60) == [(28, "phone [resolved] recovery/z")]


def test_a_mere_notice_that_is_over_before_it_was_told_tells_nothing(history: History) -> None:
    desk = Desk(history)
    desk.raise_("change/c1", 0, "info", "z")
    desk.resolve("change/c1", 3)
    assert desk.until(60) == []
    assert desk.client.hlen(book.OPEN) == 0


def test_repetitions_that_are_due_nearly_together_are_one_message(history: History) -> None:
    desk = Desk(history, group_s=0)
    desk.raise_("missing/daily/z", 0)
    desk.deliver(0)
    desk.raise_("lag", 600)
    desk.deliver(600)
    assert desk.deliver(HOUR) == ["phone [critical] 2 alerts: 1 missing, 1 lag"]
    assert desk.deliver(HOUR + 600) == []


def test_what_becomes_worse_is_told_again_also_if_it_was_acknowledged(history: History) -> None:
    desk = Desk(history, group_s=5)
    desk.raise_("space", 0, "warning")
    assert len(desk.deliver(25)) == 1
    book.acknowledge(desk.client, "space", "kari", 26)
    desk.raise_("space", 27, "critical")
    assert desk.until(60, 27) == [(32, "phone [critical] space")]


# -- routes ----------------------------------------------------------------------------------------------------


def test_each_receiver_hears_of_its_severities_and_of_their_end(history: History) -> None:
    pager = Receiver(url="pager://", min_severity="critical")
    quiet = Receiver(url="quiet://", severities=["info"])
    desk = Desk(history, MAIL, pager, quiet, group_s=0)
    for severity in ("info", "warning", "critical"):
        desk.raise_(f"job/{severity}", 0, severity)
    told = desk.deliver(0)
    assert sorted(told) == [
        "mail [critical] 3 times: a job failed for good",
        "pager [critical] job/critical",
        "quiet [info] job/info",
    ]
    for severity in ("info", "warning", "critical"):
        desk.resolve(f"job/{severity}", 100)
    assert sorted(desk.deliver(100)) == [
        "mail [resolved] 2 times: a job failed for good",
        "pager [resolved] job/critical",
    ]


def test_whoever_heard_of_it_hears_of_its_end_also_if_it_had_become_milder(history: History) -> None:
    desk = Desk(history, Receiver(url="pager://", min_severity="critical"), group_s=0)
    desk.raise_("space", 0, "critical")
    desk.deliver(0)
    desk.raise_("space", 10, "warning")
    desk.resolve("space", 20)
    assert desk.deliver(20) == ["pager [resolved] space"]


def test_a_severity_that_nobody_takes_is_on_the_record_as_not_told(history: History) -> None:
    desk = Desk(history, Receiver(url="pager://", min_severity="critical"), group_s=0)
    desk.raise_("space", 0, "warning")
    assert desk.deliver(0) == []
    (line,) = history.read(kind="alert-delivery")
    assert (line["told"], line["failed"]) == ([], ["no receiver takes what is warning"])
    assert book.open_alerts(desk.client)[0].last_failure == "no receiver takes what is warning"


def test_a_test_page_goes_to_everybody_and_a_digest_is_a_message_of_its_own(history: History) -> None:
    desk = Desk(history, MAIL, Receiver(url="pager://", min_severity="critical"), group_s=0)
    desk.raise_("test/2026-11", 0, "info")
    desk.raise_("digest/2026-11-23", 0, "info")
    desk.raise_("healed/x", 0, "info")
    assert sorted(desk.deliver(0)) == [
        "mail [digest] digest/2026-11-23", "mail [info] healed/x", "mail [test] test/2026-11",
        "pager [test] test/2026-11",
    ]  # fmt: skip
    assert [one.key for one in book.open_alerts(desk.client)] == ["healed/x"]


def test_a_digest_that_nobody_takes_or_that_is_out_of_date_is_dropped(history: History) -> None:
    pager = Receiver(url="pager://", min_severity="critical")
    desk = Desk(history, pager, group_s=0)
    desk.raise_("digest/monday", 0, "info")
    desk.deliver(0)
    assert book.open_alerts(desk.client) == []
    desk.receivers = (PHONE,)
    desk.phone.broken = {"phone://"}
    for day in range(3):
        desk.raise_(f"digest/{day}", day * 24 * HOUR, "info")
        assert desk.deliver(day * 24 * HOUR) == []
    desk.phone.broken.clear()
    assert desk.deliver(50 * HOUR) == ["phone [digest] digest/2"]


# -- receivers that fail -----------------------------------------------------------------------------------------


def test_a_receiver_that_is_down_is_tried_at_once_when_something_critical_is_new(history: History) -> None:
    desk = Desk(history, group_s=5)
    desk.phone.broken = {"phone://"}
    desk.raise_("space", 0, "warning")
    for now in range(0, 3000, 30):
        desk.deliver(now)
    desk.phone.broken.clear()
    (state,) = receiver_states(desk.client).values()
    assert state.retry_at > 3100
    desk.raise_("space", 3000, "critical")
    assert desk.until(3010, 3000) == [(3005, "phone [critical] space")]


def test_the_state_of_a_receiver_that_is_no_longer_configured_is_forgotten(history: History) -> None:
    desk = Desk(history, MAIL, PHONE, group_s=0)
    desk.raise_("lag", 0)
    desk.deliver(0)
    desk.receivers = (PHONE,)
    desk.deliver(1)
    assert list(receiver_states(desk.client)) == [id_of(PHONE)]


# -- silences --------------------------------------------------------------------------------------------------


def test_a_silence_holds_back_what_it_names_until_its_end(history: History) -> None:
    desk = Desk(history, group_s=0)
    silences.begin(desk.client, ["missing"], {"z"}, for_s=HOUR, by="kari", why="disks", now=0)
    desk.raise_("missing/daily/z", 10, agent="z")
    desk.raise_("lag", 10)
    assert desk.deliver(10) == ["phone [critical] lag"]
    assert {one.key for one in book.open_alerts(desk.client)} == {"missing/daily/z", "lag"}
    assert "phone [critical] 2 alerts: 1 lag, 1 missing" in desk.deliver(HOUR + 10)


def test_a_silence_can_be_ended_early(history: History) -> None:
    desk = Desk(history, group_s=0)
    silence = silences.begin(desk.client, ["z"], {"z"}, for_s=HOUR, by="kari", why="disks", now=0)
    desk.raise_("missing/daily/z", 10, agent="z")
    assert desk.deliver(10) == []
    assert silences.end(desk.client, silence.id) == silence
    assert desk.deliver(11) == ["phone [critical] missing/daily/z"]
    with pytest.raises(NotFound, match="“s1”"):
        silences.end(desk.client, silence.id)


def test_the_end_of_what_was_told_before_the_silence_is_told_and_nothing_else(history: History) -> None:
    desk = Desk(history, group_s=0)
    desk.raise_("missing/daily/z", 0, agent="z")
    desk.deliver(0)
    silences.begin(desk.client, ["z"], {"z"}, for_s=HOUR, by="kari", why="disks", now=1)
    desk.raise_("missing/weekly/z", 2, agent="z")
    desk.resolve("missing/daily/z", 3)
    desk.resolve("missing/weekly/z", 3)
    assert desk.deliver(3) == ["phone [resolved] missing/daily/z"]
    assert desk.client.hlen(book.OPEN) == 0


@pytest.mark.parametrize(
    ("names", "silenced"),
    [
        (["missing"], {"missing/daily/z", "missing/daily/jay"}),
        (["z"], {"missing/daily/z", "drill/z"}),
        (["missing", "z"], {"missing/daily/z"}),
        (["missing", "drill", "z", "jay"], {"missing/daily/z", "missing/daily/jay", "drill/z"}),
        (["missing/daily/jay"], {"missing/daily/jay"}),
        (["escalation", "z"], {"escalation/z"}),
        (["escalation/z"], {"escalation/z"}),
    ],
)
def test_a_silence_means_what_it_names_and_an_escalation_only_by_its_name(
    names: list[str], silenced: set[str]
) -> None:
    client = fakeredis.FakeRedis()
    silence = silences.begin(client, names, {"z", "jay"}, for_s=60, by="kari", why="w", now=0)
    keys = {
        "missing/daily/z": "z",
        "missing/daily/jay": "jay",
        "drill/z": "z",
        "escalation/z": "z",
        "lag": None,
    }
    for key, agent in keys.items():
        book.raise_alert(client, alert(key, agent=agent), now=0)
    assert {one.key for one in book.open_alerts(client) if silence.covers(one, 30)} == silenced
    assert not any(silence.covers(one, now) for one in book.open_alerts(client) for now in (-1, 60))


@pytest.mark.parametrize(
    ("names", "for_s", "why", "error"),
    [
        ([], 60, "w", UsageError),
        (["nonsense"], 60, "w", NotFound),
        (["lag"], 60, "w", UsageError),  # an agent has that name, too
        (["missing"], 0, "w", UsageError),
        (["missing"], float("inf"), "w", UsageError),
        (["missing"], 31 * 86400, "w", UsageError),
        (["missing"], 60, " ", UsageError),
    ],
)
def test_a_silence_without_a_meaning_an_end_or_a_reason_is_refused(
    names: list[str], for_s: float, why: str, error: type[Exception]
) -> None:
    client: Any = fakeredis.FakeRedis()
    with pytest.raises(error):
        silences.begin(client, names, {"z", "lag"}, for_s=for_s, by="kari", why=why, now=0)
    assert silences.active(client, 0) == []


def test_of_many_that_look_each_ended_silence_is_taken_by_one() -> None:
    client: Any = fakeredis.FakeRedis()
    one = silences.begin(client, ["z"], {"z"}, for_s=60, by="kari", why="w", now=0)
    assert silences.take_ended(client, 59) == []
    assert [silences.take_ended(client, 60), silences.take_ended(client, 60)] == [[one], []]


# -- the plan as a whole -------------------------------------------------------------------------------------------

KEYS = (
    "missing/daily/z",
    "missing/daily/jay",
    "lag",
    "space",
    "recovery/z",
    "healed/x",
    "digest/x",
    "test/x",
)
actions = st.lists(
    st.tuples(
        st.sampled_from(["raise", "resolve", "acknowledge", "break", "mend", "silence"]),
        st.sampled_from(KEYS),
        st.sampled_from(["info", "warning", "critical"]),
        st.floats(0, 400),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=40)
@given(actions=actions)
def test_whatever_happens_everybody_is_told_in_the_end_and_nothing_is_sent_for_ever(
    actions: list[tuple[str, str, str, float]], tmp_path_factory: Any
) -> None:
    desk = Desk(History(tmp_path_factory.mktemp("h") / "history.jsonl"), PHONE, MAIL, group_s=5)
    now = 0.0
    for what, key, severity, later_s in actions:
        now += later_s
        match what:
            case "raise":
                desk.raise_(key, now, severity)
            case "resolve":
                desk.resolve(key, now)
            case "acknowledge" if any(one.key == key for one in book.open_alerts(desk.client)):
                book.acknowledge(desk.client, key, "kari", now)
            case "break":
                desk.phone.broken = {"mail://"}
            case "mend":
                desk.phone.broken = set()
            case "silence":
                silences.begin(desk.client, [key], {"z"}, for_s=600, by="kari", why="w", now=now)
        desk.deliver(now)
    desk.phone.broken = set()
    # An hour later every pause, silence and window is over, and only repetitions are still to come.
    for _ in range(3):
        now += HOUR
        desk.deliver(now)
    for one in book.open_alerts(desk.client):
        if one.acknowledged_at is None and one.severity != "info":
            assert one.notified == [id_of(PHONE), id_of(MAIL)] or set(one.notified) == {
                id_of(PHONE),
                id_of(MAIL),
            }
    for key in KEYS:
        desk.resolve(key, now)
    now += HOUR
    desk.deliver(now)
    assert desk.client.hlen(book.OPEN) == 0
    assert desk.deliver(now + HOUR) == []


def test_the_plan_is_pure_and_says_when_to_look_again() -> None:
    client = fakeredis.FakeRedis()
    book.raise_alert(client, alert("lag"), now=100)
    found = book.open_alerts(client)
    plan = plan_delivery(found, [], [PHONE], {}, 101, Policy(group_s=5))
    assert (plan.deliveries, plan.changes, plan.next_at) == ((), (), 105)
    silence = Silence("s1", ("lag",), (), (), 90, 200, "kari", "w")
    assert plan_delivery(found, [silence], [PHONE], {}, 150, Policy()).next_at == 200
    busy = {id_of(PHONE): ReceiverState(busy_until=160)}
    assert plan_delivery(found, [], [PHONE], busy, 150, Policy()).next_at == 160
    assert len(plan_delivery(found, [], [PHONE], {}, 150, Policy()).deliveries) == 1


# -- what messages say ---------------------------------------------------------------------------------------------


def message(*raised: Alert, now: float = 0.0) -> tuple[str, str]:
    client: Any = fakeredis.FakeRedis()
    for one in raised:
        book.raise_alert(client, one, now=now)
    (delivery,) = plan_delivery(book.open_alerts(client), [], [PHONE], {}, now + 12, Policy()).deliveries
    return compose(delivery, Policy(zone="Europe/Oslo", runbook="https://example.com/book"))


def test_a_message_says_where_to_look_what_to_read_and_how_to_acknowledge() -> None:
    title, body = message(
        alert("missing/daily/z", agent="z", title="no backup of z", body="the slot is empty")
    )
    assert title == "[critical] no backup of z"
    assert body.splitlines() == [
        "the slot is empty",
        "",
        "look:    backup-worker list --agent z --tier daily",
        "runbook: https://example.com/book#missing",
        "seen:    backup-worker ack missing/daily/z",
    ]


def test_a_list_names_every_alert_and_each_kind_s_help_once() -> None:
    of_one_kind = message(
        *(
            alert(f"missing/daily/{agent}", agent=agent, title=f"no backup of {agent}")
            for agent in ("z", "jay")
        )
    )
    assert of_one_kind[1].splitlines()[-2:] == [
        "look:    backup-worker list --agent jay --tier daily",
        "runbook: https://example.com/book#missing",
    ]
    title, body = message(
        alert("missing/daily/z", agent="z", title="no backup of z"),
        alert("missing/daily/jay", agent="jay", title="no backup of jay"),
        alert("space", "warning", title="little space", body="1\n2"),
    )
    assert title == "[critical] 3 alerts: 2 missing, 1 space"
    assert body.splitlines() == [
        "- [critical] no backup of jay: why",
        "- [critical] no backup of z: why",
        "- [warning] little space: 1 2",
        "",
        "look:    backup-worker list --agent jay --tier daily",
        "runbook: https://example.com/book#missing",
        "look:    backup-worker doctor",
        "runbook: https://example.com/book#space",
    ]


def test_a_message_stays_of_a_size_that_can_be_sent_and_read() -> None:
    many = [alert(f"recovery/a{n}", "warning", f"a{n}", body="x" * 1000) for n in range(3000)]
    title, body = message(*many)
    assert len(title) < 200
    assert len(body) < 40_000
    assert f"- and {3000 - LISTED} more: backup-worker alerts" in body
    assert len(message(alert("lag", body="x" * 100_000))[1]) < 5000


def test_what_agents_and_files_are_called_cannot_forge_a_header_or_move_the_cursor() -> None:
    title, body = message(alert("lag", title="a\r\nBcc: everybody@example.com\x1b[2J", body="b\x1b[31m\x00c"))
    assert title.splitlines() == ["[critical] a  Bcc: everybody@example.com [2J"]
    assert not any(ord(char) < 32 and char != "\n" for char in body)
