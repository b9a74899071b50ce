"""What an export remembers of agents, when the server behind it forgets."""

from __future__ import annotations

from em_bridge.logfile import Known


def test_an_agents_own_word_is_not_replaced_by_what_a_new_server_delivered_to_it() -> None:
    known = Known(agents={"jay": {"declared": True, "has": {"z": 20}}})
    news = known.learn(Known(agents={"jay": {"declared": False, "has": {"z": 60}}}))
    assert known.agents == {"jay": {"declared": True, "has": {"z": 20}}}
    assert news.agents == {}


def test_an_agents_newer_word_replaces_its_older_one() -> None:
    known = Known(agents={"jay": {"declared": True, "has": {"z": 20}}})
    known.learn(Known(agents={"jay": {"declared": True, "has": {"z": 21}}}))
    assert known.agents["jay"]["has"] == {"z": 21}
