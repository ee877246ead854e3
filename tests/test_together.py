"""Several searches under one budget: whose turn it is, what islands receive, and what is not scored twice."""

from __future__ import annotations

import math
import re

import pytest
from test_search import EVOLVER, EXPERTS, TPE, answer, build, ids, simulate
from toys import rows, run_here

from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.recipe import Merge, Rule
from evolver.search.base import Receives
from evolver.search.together.alike import alike
from evolver.search.together.portfolio import usual_arms

GENERATIONS = EVOLVER | {"mode": "generational", "generations": 100}
MASS = {"algorithm": "tpe", "tune": ["lambda"], "startup": 3}


def portfolio(arms, **more):
    settings = {"algorithm": "portfolio", "arms": arms, "turn": 2, **more.pop("settings", {})}
    return build(settings, **{"candidates": 24, **more})


def whose(asked):
    return [c.proposer.split(": ")[0] for c in asked]


def paying(name):
    """Replies with scores that rise with the number where an arm of this name proposes, and stay low elsewhere."""

    def reply(candidate, _):
        value = 0.5 + candidate.number / 1000 if candidate.proposer.startswith(name) else 0.1
        return Result(candidate.number, candidate.recipe.id, "ok", value, value, True, (value,) * 10)

    return reply


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_the_arm_that_leads_gets_most(name):
    arms = {"one": TPE, "two": MASS, "three": GENERATIONS}
    turns = whose(simulate(portfolio(arms, candidates=56), 4, 1, reply=paying(name)))
    assert turns[:6] == ["one", "one", "two", "two", "three", "three"]
    assert turns.count(name) == 32
    others = [turns.count(other) for other in arms if other != name]
    assert sorted(others) == [8, 16]


def by_hand(scored, best, eta):
    """Whose turn it is, from the formula; of three arms there are two halvings of eta 2, one of eta 3."""
    names = list(scored)
    ranked = sorted(names, key=lambda n: -best[n])
    halvings = {1.0: 0, 2.0: 2, 3.0: 1}[eta]
    return min(ranked, key=lambda n: scored[n] * eta ** min(ranked.index(n), halvings))


@pytest.mark.parametrize("eta", [1.0, 2.0, 3.0])
def test_turns_follow_the_formula(eta):
    names = ["one", "two", "three"]
    arms = dict(zip(names, (TPE, MASS, GENERATIONS), strict=True))
    asked = simulate(portfolio(arms, candidates=60, settings={"eta": eta}), 3, 2)
    scored, best, k = dict.fromkeys(names, 0), dict.fromkeys(names, -math.inf), 0
    while k < len(asked):
        name, first = by_hand(scored, best, eta), k
        while k < min(len(asked), first + 2) and whose(asked)[k] == name:
            result = answer(asked[k])
            scored[name] += 1
            best[name] = max(best[name], result.score if result.complete else -math.inf)
            k += 1
        assert k > first, f"candidate {k} should be {name}'s"
    assert len(set(whose(asked))) == 3


def test_an_arm_that_has_ended_leaves_the_turns_to_the_others():
    arms = {"short": EVOLVER | {"generations": 1}, "two": MASS}
    asked = simulate(portfolio(arms), 4, 1, reply=paying("short"))
    assert len(asked) == 24
    assert whose(asked).count("short") == 8
    assert len(simulate(portfolio({"a": EVOLVER | {"generations": 1}, "b": EVOLVER | {"generations": 1}}))) < 24


def test_what_is_nearly_the_same_is_scored_once():
    asked = simulate(portfolio({"one": MASS, "two": MASS}, candidates=40), 4, 1)
    assert len({alike(c.recipe) for c in asked}) == len(asked)
    merges = [
        Merge("task_arithmetic", EXPERTS[:2], EXPERTS[2], (Rule.of({"lambda": x}),)) for x in (0.5, 0.5004, 0.501)
    ]
    assert alike(merges[0]) == alike(merges[1]) != alike(merges[2])


def test_arms_have_draws_of_their_own():
    asked = simulate(portfolio({"one": TPE, "two": TPE}, candidates=8), 4, 1)
    assert len({c.recipe.id for c in asked}) == 8


ISLANDS = {"algorithm": "islands", "turn": 2, "every": 2}


@pytest.mark.parametrize("receiver", [GENERATIONS, GENERATIONS | {"merger": {"method": "simple"}}, TPE])
def test_islands_really_receive_models(receiver):
    """What the second island proposes depends on what the first one has found, and on nothing before they exchange."""

    def scored(good):
        def reply(candidate, _):
            own = good if candidate.proposer.startswith("one") else 0.2 + candidate.number / 1000
            return Result(candidate.number, candidate.recipe.id, "ok", own, own, True, (own,) * 10)

        first = receiver if receiver["algorithm"] == "evolver" else TPE | {"startup": 3}
        search = build(ISLANDS | {"islands": {"one": first, "two": receiver}}, candidates=40)
        asked = simulate(search, 4, 1, reply=reply)
        return [c.recipe.id for c in asked if c.proposer.startswith("two")], search

    (with_, search), (without, _) = scored(0.9), scored(0.0)
    assert isinstance(search.arms[1].search, Receives)
    assert with_[:2] == without[:2]
    assert with_ != without


def test_a_population_takes_in_what_is_better_than_its_worst():
    search = build(GENERATIONS, candidates=40)
    for candidate in search.ask(4):
        search.tell(Result(candidate.number, candidate.recipe.id, "ok", 0.1 * candidate.number, 0, True, (0.0,) * 10))
    search.ask(1)
    stranger = Candidate(0, Merge("simple", EXPERTS[:2], EXPERTS[3]), "other")
    worse, better = (Result(0, stranger.recipe.id, "ok", s, s, True, (s,) * 10) for s in (-0.1, 0.25))
    assert not search.receive(stranger, worse)
    assert search.receive(stranger, better)
    assert search.population[0] == stranger.recipe
    assert not search.receive(stranger, better)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "portfolio", "arms": {"one": TPE}}, r"search\.arms: 1 search is given; name at least two"),
        ({"algorithm": "portfolio", "arms": {"one": TPE, "two": {"algorithm": "tpee"}}},
         r"search\.arms\.two\.algorithm: 'tpee' cannot be one of several searches; did you mean 'tpe'"),
        ({"algorithm": "islands", "islands": {"one": TPE, "two": {"algorithm": "halving", "of": TPE}}},
         r"search\.islands\.two\.algorithm: 'halving' cannot be one of several"),
        ({"algorithm": "portfolio", "arms": {"one": TPE, "two": TPE | {"startup": 0}}}, r"search\.arms\.two: startup"),
        ({"algorithm": "portfolio", "arms": {"one": TPE, "two": TPE | {"tune": ["x"]}}}, r"search\.arms\.two\.tune"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_arm_is_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        build(settings)


def test_the_usual_arms_have_the_baselines_and_fit_the_layers():
    assert {"tuned mass", "random"} < set(usual_arms(12))
    assert [usual_arms(layers)["coefficients"]["layer_groups"] for layers in (1, 2, 12)] == [1, 2, 3]


@pytest.mark.whole
def test_a_whole_run_says_what_each_search_has_found(make_config, tmp_path):
    search = {"algorithm": "portfolio", "turn": 2, "arms": {"mass": MASS, "weights": TPE, "evolver": GENERATIONS}}
    changes = {"search": search, "budget.candidates": 10}
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    report = (folder / "report.md").read_text()
    table = report.split("## The searches")[1].split("## ")[0]
    found = [r for (stage, _), r in rows(folder).items() if stage == "search"]
    for name in ("mass", "weights", "evolver"):
        own = [r for r in found if r["proposer"].startswith(f"{name}: ")]
        items = sum(0 if r["reused"] else len(r["items"]) - r["given"] for r in own)
        assert re.search(rf"\| (\*\*)?{name}(\*\*)? \| {len(own)} \| {items} \|", table)


def test_resumed_is_the_same_after_any_result():
    arms = {"one": TPE, "two": GENERATIONS}
    whole = ids(simulate(portfolio(arms), 1))
    for told in range(0, 24, 5):
        search = portfolio(arms)
        again = simulate(search, 1) if told == 0 else _replayed(search, told)
        assert ids(again) == whole


def _replayed(search, told):
    asked = []
    while len(asked) < told:
        (candidate,) = search.ask(1)
        asked.append(candidate)
        search.tell(answer(candidate))
    return [*asked, *simulate(search, 3, 5)]
