"""A search that begins with the candidates of an earlier one, without models."""

from dataclasses import replace

import pytest

from evolver.config import Budget
from evolver.config.changes import FREE_EVALUATION_KEYS, FREE_TASK_KEYS
from evolver.config.evaluation import EvaluationSettings, TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.items import Item, ItemSource, draw
from evolver.ledger import Ledger, answer_table
from evolver.merging.maker import RecipeMaker
from evolver.records import Candidate, Question, Result
from evolver.records.leaders import leaders
from evolver.runs.origin import Use, record_use, uses_of
from evolver.search import SEARCHES
from evolver.search.ahead import Guessable
from evolver.search.base import Setup
from evolver.search.continued import continued
from evolver.storage import storage_at

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{k}.w" for k in range(4))]
MAKER = RecipeMaker(["a", "b", "c"], NAMES)


def search(name, candidates=6, maker=MAKER, **settings):
    kind = SEARCHES[name]
    setup = Setup(maker.experts, maker.base, 3, Budget(candidates=candidates), maker, None, tasks=("t", "u"))
    return kind.build(setup, kind.settings(algorithm=name, **settings))


def score(recipe):
    return int(recipe.id[:6], 16) / 16**6


def scored(candidate, rank=None):
    value = score(candidate.recipe)
    return Result(
        candidate.number, candidate.recipe.id, "ok", value, value, True, (value,), {"t": value, "u": 1 - value},
        rank=rank,
    )  # fmt: skip


def carried_out(one, workers=1):
    """The candidates of a search, in the order in which they were asked for; results come last first."""
    out = []
    while not one.done:
        asked = one.ask(workers)
        assert asked, "the search waits, and nothing is evaluated"
        out += asked
        for candidate in reversed(asked):
            one.tell(scored(candidate))
    return out


EARLIER = carried_out(search("tpe", 8, startup=4))
KINDS = {
    "tpe": {}, "cmaes": {"population": 4}, "nsga2": {"population": 3},
    "evolver": {"generations": 4},
    "m2n2": {},
    "merged": {"merger": {"method": "simple"}, "mode": "generational"},
}  # fmt: skip


def again(kind, **more):
    return search("evolver" if kind == "merged" else kind, **KINDS[kind], **more)


@pytest.mark.parametrize("kind", KINDS)
def test_it_lists_and_then_searches_on_whatever_the_number_of_workers(kind):
    found = carried_out(continued(EARLIER, again(kind)))
    assert found[: len(EARLIER)] == EARLIER
    assert [c.number for c in found] == list(range(14))
    assert found == carried_out(continued(EARLIER, again(kind)), workers=5)
    assert continued(EARLIER, again(kind)).total == 14


def test_without_a_search_it_only_lists():
    assert carried_out(continued(EARLIER, None)) == EARLIER


def test_tpe_learns_from_what_was_scored():
    inner = again("tpe")
    found = carried_out(continued(EARLIER, inner))
    told = [t for t in inner.study.trials if t.value is not None]
    assert len(told) == len(EARLIER) + 6
    plain = carried_out(again("tpe"))
    assert [c.recipe.id for c in plain[1:]] != [c.recipe.id for c in found[len(EARLIER) + 1 :]]


def test_what_breaks_a_constraint_is_no_beginning():
    broken = max(EARLIER, key=lambda c: score(c.recipe))
    pairs = [(c, replace(scored(c), violations={"0": float(c is broken)})) for c in EARLIER]
    begun = again("evolver")
    begun.inform(pairs)
    assert broken.recipe not in begun.population
    begun.inform([(c, scored(c)) for c in EARLIER])
    assert broken.recipe in begun.population


def test_evolver_starts_from_the_best():
    listed = [*EARLIER[:4]]
    best = [c.recipe for c, _ in leaders([(c, scored(c)) for c in listed])]
    assert [score(r) for r in best] == sorted((score(c.recipe) for c in listed), reverse=True)
    found = carried_out(continued(listed, again("evolver")))
    assert [c.recipe for c in found[4:7]] == best[:3]


def test_evolver_with_a_merger_starts_from_the_best_population():
    listed = carried_out(again("merged"))
    found = carried_out(continued(listed, again("merged")))
    assert found[len(listed)].recipe == leaders([(c, scored(c)) for c in listed])[0][0].recipe


def test_guesses_have_the_numbers_of_their_candidates():
    one = continued(EARLIER, again("evolver"))
    assert isinstance(one, Guessable)
    for candidate in one.ask(99):
        one.tell(scored(candidate))
    asked = one.ask(1)
    twin = one.twin()
    assert [c.number for c in twin.pending()] == [c.number for c in asked] == [8]
    twin.tell(scored(asked[0]))
    assert one.pending() == asked
    assert not isinstance(continued(EARLIER, again("tpe")), Guessable)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "della"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_point_stands_for_its_recipe(method, groups):
    maker = MAKER if method != "slerp" else RecipeMaker(["a", "b"], NAMES)
    space = maker.space(method, groups, None, {})
    for candidate in carried_out(search("tpe", 6, maker, method=method, layer_groups=groups)):
        point = space.encode(candidate.recipe)
        decoded = space.decode(point)
        for ours, theirs in zip(decoded.rules, candidate.recipe.rules, strict=True):
            for (name, value), (other, wanted) in zip(ours.values, theirs.values, strict=True):
                assert name == other
                assert value == pytest.approx(wanted, abs=0.01)


def test_models_outside_of_the_space_have_no_point():
    space = MAKER.space("task_arithmetic", 1, None, {})
    other = MAKER.space("task_arithmetic", 2, None, {})
    assert space.encode(MAKER.experts[0]) is None
    assert space.encode(other.decode(other.encode_equal(1.0))) is None
    assert (
        space.encode(MAKER.space("ties", 1, None, {}).decode(MAKER.space("ties", 1, None, {}).encode_equal(1.0)))
        is None
    )
    assert space.encode(space.decode({**space.encode_equal(1.0), "lambda": 99.0})) is None


def test_the_ledger_answers_what_was_inherited(tmp_path):
    listed = [EARLIER[0], EARLIER[1].asking(limit=2)]
    part = Result(1, EARLIER[1].recipe.id, "ok", None, 0.9, False, (0.5, 0.5))
    ledger = Ledger(storage_at(tmp_path / "ledger"), "me")
    ledger.inherit(listed, [(EARLIER[0], scored(EARLIER[0])), (EARLIER[1], part)])
    ledger.inherit(listed, [])
    ledger.close()
    ledger = Ledger(storage_at(tmp_path / "ledger"), "me")
    assert ledger.listed == listed
    answer = ledger.answer(Candidate(5, EARLIER[0].recipe, "x"))
    assert (answer.number, answer.score, answer.reused, answer.cost) == (5, score(EARLIER[0].recipe), True, 0)
    assert ledger.answer(listed[1]).items == (0.5, 0.5)
    assert ledger.answer(Candidate(6, EARLIER[1].recipe, "x")) is None
    assert ledger.with_known_items(Candidate(6, EARLIER[1].recipe, "x")).question == Question(known=(0.5, 0.5))
    assert ledger.results("search") == []
    ledger.close()


def test_answers_that_were_inherited_are_in_the_table_of_answers(tmp_path):
    from evolver.ledger import write_items

    run = storage_at(tmp_path)
    write_items(run, {"dev": [("t", 0, "h0")]})
    ledger = Ledger(run.folder("ledger"), "me")
    ledger.inherit([EARLIER[0]], [(EARLIER[0], scored(EARLIER[0]))])
    ledger.write_result(EARLIER[0], ledger.answer(EARLIER[0]))
    ledger.close()
    assert [row["hash"] for row in answer_table(run).to_pylist()] == ["h0"]


def source(name, dev, report, select, count=40, **more):
    entry = TaskEntry(task=name, dev=dev, report=report, select=select)
    return ItemSource(entry, "evaluation.tasks[0]", [Item(name, k, f"{name}{k}") for k in range(count)], **more)


def test_report_items_are_drawn_again_from_what_no_set_has():
    drawn = [draw([source("t", 8, 6, 4)], 1, fresh)[0] for fresh in range(4)]
    assert len({d.dev for d in drawn}) == len({d.select for d in drawn}) == 1
    report = [item for d in drawn for item in d.report]
    assert len(set(report)) == 24
    assert not set(report) & {*drawn[0].dev, *drawn[0].select}
    assert draw([source("t", 8, 6, 4)], 1) == [drawn[0]]
    with pytest.raises(BadInput, match=r"6 unused report items are asked for .* 4 items of t share no document"):
        draw([source("t", 8, 6, 4)], 1, 4)


def test_uses_are_counted_once_for_each_run(tmp_path):
    folder = storage_at(tmp_path)
    for use in (Use("a", "1", 0), Use("b", "2", 0), Use("a", "1", 0), Use("c", "3", 1), Use("b", "2", 0)):
        record_use(folder, use)
    assert [(u.run, u.draw) for u in uses_of(folder)] == [("a", 0), ("b", 0), ("c", 1)]
    (tmp_path / "uses" / "0002.json").write_text("[]")
    with pytest.raises(BadInput, match=r"0002\.json"):
        uses_of(folder)


def test_every_key_of_the_evaluation_is_known_to_change_answers_or_not():
    """A new key has to be told apart: which scores of a finished search still count if it changes?"""
    answers = {
        "num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs",
        "confirm_run_unsafe_code", "backend", "model_args", "serve", "batch_tokens", "batch_size", "block_items",
        "quantise", "quantise_search", "threads", "tasks", "include_path", "fitness",
    }  # fmt: skip
    assert set(EvaluationSettings.model_fields) <= answers | set(FREE_EVALUATION_KEYS)
    assert set(FREE_TASK_KEYS) <= set(TaskEntry.model_fields)
