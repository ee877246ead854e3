"""Runs that score less: by races against the incumbent, and by successive halving; and what stays as it was."""

from __future__ import annotations

import pytest
import toys
from toys import rows, run_here

from evolver.commands.explain import explain
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.records.order import reordered
from evolver.records.recipe import load_recipe
from evolver.workers.pools.local import LocalPool
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

# More items than the other toy runs have: a race needs some to save any.
ITEMS = {"evaluation.tasks": [{"task": "toy", "dev": 80, "report": 30}], "evaluation.block_items": 4}
RACING = ITEMS | {"evaluation.racing": 0.1, "budget.candidates": 18, "search.generations": 6}
HALVING = {"algorithm": "halving", "of": {"algorithm": "tpe", "startup": 4}, "first": 8, "eta": 2, "batch": 4}
HALVED = {
    "tpe": ITEMS | {"search": HALVING, "budget.candidates": 16},
    "cmaes p-irt": ITEMS
    | {"search": HALVING | {"of": {"algorithm": "cmaes"}, "estimate": "p-irt"}, "budget.candidates": 13},
    "evolver gp-irt": ITEMS
    | {
        "search": HALVING | {"of": {"algorithm": "evolver", "mode": "generational"}, "estimate": "gp-irt"},
        "budget.candidates": 12,
    },
}


class Reversed(LocalPool):
    """Takes many candidates at once and hands their results back last first."""

    def free(self):
        return 8 - len(self._waiting)

    def wait(self):
        self._waiting.insert(0, self._waiting.pop())
        return super().wait()


class Dying(LocalPool):
    """Dies after a few evaluations."""

    left = 5

    def wait(self):
        Dying.left -= 1
        if Dying.left < 0:
            raise KeyboardInterrupt
        return super().wait()


def killed(file, results, times):
    """A run that is killed so often, each time after five evaluations, then let through."""
    for _ in range(times):
        Dying.left = 5
        with pytest.raises(KeyboardInterrupt):
            run_here(file, results, Dying)
    return run_here(file, results)


def searched(folder):
    """The search's rows of the ledger by number."""
    return {number: row for (stage, number), row in rows(folder).items() if stage == "search"}


def cost(folder):
    return sum(len(r["items"]) - r["given"] for r in searched(folder).values() if not r["reused"])


@pytest.fixture(scope="module", params=["alone", "generational", pytest.param("merged", marks=pytest.mark.slow)])
def race(request, make_config, tmp_path_factory):
    """A run that races: its configuration, its folder, the folder of the same run without racing."""
    folder = tmp_path_factory.mktemp("race")
    more = {"search.mode": "generational"} if request.param == "generational" else {}
    more |= {"search.merger": {"method": "simple"}} if request.param == "merged" else {}
    file = make_config(folder, RACING | more)
    plain = make_config(folder, RACING | more | {"evaluation.racing": None}, "plain.yaml")
    return file, run_here(file, folder / "raced"), run_here(plain, folder / "plain")


def test_races_save_items(race):
    _, raced, plain = race
    assert len(searched(raced)) == len(searched(plain)) == 18
    assert cost(raced) < cost(plain)
    assert not any(r["raced"] for r in searched(plain).values())


def test_those_that_a_race_rejects_are_not_better(race):
    """Scored in full afterwards. At a rate of 0.1, of some 15 duels at most one is decided wrongly here."""
    file, raced, _ = race
    ready = prepare(config_at(file))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    rejected = [r for r in searched(raced).values() if r["raced"]]
    assert rejected
    wrong = 0
    for row in rejected:
        assert (row["score"], row["complete"], row["bound"]) == (None, False, row["bar"])
        full = worker.evaluate(Candidate(0, load_recipe(row["recipe"]), "test"))
        assert row["order"] == f"{ready.config.seed}:race:{row['number']}"
        assert reordered(full.items, row["order"])[: len(row["items"])] == tuple(row["items"])
        wrong += full.score > row["bar"]
    assert wrong <= 1


def test_a_race_goes_the_same_with_many_workers_and_after_kills(race, tmp_path):
    file, raced, _ = race
    many = run_here(file, tmp_path / "many", Reversed)
    torn = killed(file, tmp_path / "torn", 2)
    assert toys.essence(many) == toys.essence(torn) == toys.essence(raced)
    assert toys.winner(many) == toys.winner(torn) == toys.winner(raced)


@pytest.fixture(scope="module", params=[h if h == "tpe" else pytest.param(h, marks=pytest.mark.slow) for h in HALVED])
def halved(request, make_config, tmp_path_factory):
    """A run that halves: its configuration, its folder."""
    folder = tmp_path_factory.mktemp("halved")
    file = make_config(folder, HALVED[request.param])
    return file, run_here(file, folder / "results")


def test_the_winner_of_a_halved_run_was_scored_in_full(halved):
    _, folder = halved
    found = searched(folder)
    full = [r for r in found.values() if r["complete"]]
    best = max(full, key=lambda r: (r["score"], -r["number"]))
    assert best["recipe"] == toys.winner(folder)
    assert {len(r["items"]) for r in full} == {80}
    assert 0 < len(full) < len({r["recipe_id"] for r in found.values()})
    assert all(r["score"] is None for r in found.values() if not r["complete"])


def test_a_halved_run_pays_no_item_twice(halved):
    _, folder = halved
    paid, longest = {}, {}
    for row in rows(folder).values():
        if row["stage"] != "report":
            new = 0 if row["reused"] else len(row["items"]) - row["given"]
            paid[row["recipe_id"]] = paid.get(row["recipe_id"], 0) + new
            longest[row["recipe_id"]] = max(longest.get(row["recipe_id"], 0), len(row["items"]))
    assert paid == longest
    assert cost(folder) < 80 * len({r["recipe_id"] for r in searched(folder).values()}) / 2


def test_a_halved_run_goes_the_same_with_many_workers_and_after_kills(halved, tmp_path):
    file, folder = halved
    many = run_here(file, tmp_path / "many", Reversed)
    torn = killed(file, tmp_path / "torn", 2)
    assert toys.essence(many) == toys.essence(torn) == toys.essence(folder)
    assert toys.winner(many) == toys.winner(torn) == toys.winner(folder)


def test_a_halved_run_goes_on_with_a_raised_budget(make_config, tmp_path):
    """The first run ends in the middle of a batch."""
    first = HALVED["tpe"] | {"budget.candidates": 6}
    raised = run_here(make_config(tmp_path, first), tmp_path / "results")
    file = make_config(tmp_path, HALVED["tpe"])
    run_here(file, tmp_path / "results")
    assert toys.winner(raised) == toys.winner(run_here(file, tmp_path / "once"))


def test_what_a_setting_leaves_out_is_the_same_run(make_config, tmp_path):
    file = make_config(tmp_path, HALVED["tpe"])
    spelt = make_config(tmp_path, {**HALVED["tpe"], "search": HALVING | {"of": {**HALVING["of"], "in_flight": 1}}}, "2")
    assert prepare(config_at(file)).identity == prepare(config_at(spelt)).identity


def test_explain_looks_inside(make_config, tmp_path):
    assert any(s.get("weight") == "tuned" for _, _, s in explain(make_config(tmp_path, HALVED["tpe"])))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"search": {"algorithm": "tpe"}},
            (
                "evaluation.racing: in a race, a candidate competes with the model that it would replace, and tpe "
                "replaces none; leave"
            ),
        ),
        (
            {"search": HALVING},
            (
                "evaluation.racing: in a race, a candidate competes with the model that it would replace, and halving "
                "replaces none; leave"
            ),
        ),
        (
            {"evaluation.early_stopping": False},
            (
                "evaluation.racing: racing stops candidates early, but early_stopping is false; leave racing out, or "
                "write early"
            ),
        ),
        (
            {"evaluation.tasks": [{"task": "yesno", "metric": "mcc", "dev": 40, "report": 30}]},
            (
                "evaluation.racing: racing needs a score from 0 to 1 for each item, which the metric of yesno does "
                "not give; leave racing out, or"
            ),
        ),
    ],
)
def test_races_that_cannot_be_held_are_refused_before_any_weight_is_read(
    make_config, tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr("evolver.driver.prepare.RecipeMaker", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(BadInput) as refused:
        prepare(config_at(make_config(tmp_path, RACING | changes)))
    assert str(refused.value).startswith(f"{tmp_path / 'run.yaml'}: {says}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"of": {"algorithm": "tep"}}, r"run\.yaml: search\.of\.algorithm: unknown search 'tep'; did you mean 'tpe'"),
        ({"of": {"algorithm": "tpe", "statrup": 1}}, r"run\.yaml: search\.of\.statrup: unknown key; did you mean"),
        ({"of": {"algorithm": "evolver"}}, r"run\.yaml: search\.of\.mode: .* write generational"),
        ({"first": 80}, r"run\.yaml: search\.first: 80 items"),
    ],
)
def test_halving_that_cannot_work_is_refused(make_config, tmp_path, changes, says):
    with pytest.raises(BadInput, match=says):
        prepare(config_at(make_config(tmp_path, ITEMS | {"search": HALVING | changes})))


def test_a_part_is_chosen_only_where_a_search_scores_parts(make_config, tmp_path):
    """Every other search scores all items, whatever comes first."""
    for number, search in enumerate(({"algorithm": "tpe"}, {"algorithm": "evolver"})):
        file = make_config(tmp_path, {"search": search, "evaluation.subset": "rotate"}, f"{number}.yaml")
        toys.refused(
            lambda file=file: prepare(config_at(file)), "evaluation.subset: this search scores every candidate"
        )
    file = make_config(tmp_path, {"search": HALVING, "evaluation.subset": "rotate", **ITEMS})
    assert prepare(config_at(file), weights=False).config.evaluation.subset == "rotate"


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ["mean", "difference"])
def test_batches_in_orders_of_their_own_end_the_same_however_they_run(make_config, tmp_path, estimate):
    search = HALVING | {"estimate": estimate}
    file = make_config(tmp_path, ITEMS | {"search": search, "budget.candidates": 12, "evaluation.subset": "rotate"})
    folder = run_here(file, tmp_path / "one")
    many = run_here(file, tmp_path / "many", Reversed)
    assert toys.essence(many) == toys.essence(folder)
    orders = {r["order"] for r in searched(folder).values() if not r["complete"]}
    assert len(orders) == 3
