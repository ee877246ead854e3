"""The interface of a search, the rules that every search follows, and the registry of searches.

The tests check these rules for every search:

1. ``ask`` never blocks. It returns at most n candidates, and fewer or none while the search has to wait for results.
2. ``tell`` takes results one by one, in any order, failures included. It never changes the result that it is given.
3. The k-th candidate depends only on the settings, the seed and the results that it waits for. It does not depend on
   timing or on the number of workers, so telling a new search the same results gives the same candidates. With
   ``order: arrival`` it also depends on the ranks of the results (their places in the ledger), which a replay repeats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from evolver.config import Budget
from evolver.config.corrections import AfterSettings
from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import Candidate, Choice, ItemAnswer, Knob, Result
from evolver.records.loss import LossName
from evolver.records.objective import Objective
from evolver.records.order import OWN
from evolver.records.recipe import Expert, Recipe
from evolver.search.ending import Progress, Reason


class Search(Protocol):
    """Anything that proposes candidates and learns from their results."""

    def ask(self, n: int) -> list[Candidate]:
        """At most n new candidates; fewer or none while the search waits for results."""
        ...

    def tell(self, result: Result) -> None:
        """Take in the result of a candidate that was asked for."""
        ...

    @property
    def done(self) -> bool:
        """Whether no further candidate will come, whatever results are told."""
        ...

    @property
    def total(self) -> int | None:
        """The number of candidates of the whole search; None if it is not known in advance."""
        ...


@runtime_checkable
class Receives(Protocol):
    """A search that can take in models of another search while it goes on."""

    def receive(self, candidate: Candidate, result: Result) -> bool:
        """Take in a model with a score of all items, between two candidates; whether the search has a use for it."""
        ...


class Space(Protocol):
    """A search space of recipes, as the coefficient searches see it."""

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        """The dimensions of the space."""
        ...

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe at a point, which has a value for the name of every dimension."""
        ...

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        """A point of the space whose recipe is this one up to rounding; None for a model outside of the space."""
        ...

    def encode_equal(self, mass: float) -> dict[str, Any]:
        """The point at which all experts have equal weights, with the total mass ``mass`` if the mass is tuned."""
        ...

    @property
    def branches(self) -> Mapping[str, Space]:
        """The spaces of the methods among which a point chooses, by name; none where the method is settled."""
        ...

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """What belongs to the dimensions of a branch, under their names in this space, and what chooses the branch."""
        ...

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        """The axes of a grid: of each setting at each place the values of its dimensions, one after the other.

        Args:
            levels: the number of values of a setting that is a number, by its name.

        Raises BadInput where an axis is too long.
        """
        ...


class Merger(Protocol):
    """Merges models by one method."""

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The settings that the search varies, and their ranges."""
        ...

    @property
    def start(self) -> Mapping[str, float]:
        """Their values at the beginning."""
        ...

    def __call__(self, members: Sequence[Recipe], values: Mapping[str, float] | None = None) -> Recipe:
        """The merge of models, with these values of the settings that vary; None: with those of the beginning."""
        ...

    def parts_of(self, recipe: Recipe) -> tuple[tuple[Recipe, ...], Mapping[str, float]] | None:
        """The models and the values of which it makes this very recipe; None for a recipe that it does not make."""
        ...


class Maker(Protocol):
    """Makes recipes for searches. Its methods raise BadInput for settings that a merge method does not take, and for
    models without layers, or with layers that cannot be put together anew.
    """

    def space(
        self, method: str | Sequence[str], groups: int | Literal["per-layer"], tune: Sequence[str] | None,
        settings: Mapping[str, Any], classes: bool = False, knots: int | None = None,
        after: Sequence[AfterSettings] = (),
    ) -> Space:  # fmt: skip
        """The search space of a merge method, or of several among which a point chooses.

        Args:
            groups: number of layer groups that have coefficients of their own, or that every layer has.
            tune: names of the settings that are searched; None: total mass, weights, and settings without a default.
            settings: fixed settings.
            classes: whether attention, MLP, norms and the rest have coefficients of their own.
            knots: number of knots of a spline along the layers, instead of groups.
            after: methods that every model goes through, one after the other.
        """
        ...

    def space_in(self, recipe: Any, after: Sequence[AfterSettings] = ()) -> Space:
        """The search space of a mergekit file that leaves values free.

        Args:
            recipe: its path, or its documents.
            after: methods that every model goes through, one after the other.
        """
        ...

    def merger(
        self, settings: Mapping[str, Any], members: int | None = None, adapt: Sequence[str] | bool = False
    ) -> Merger:
        """What merges models by the method and the settings given.

        Args:
            settings: the method and its settings, and under ``after`` fixed corrections that every merge goes through.
            members: the number of models; None: as many as there are experts, in whose places they stand.
            adapt: names of the settings that the search varies; True: all numbers that a search can tune.
        """
        ...

    def crossover(self, first: Recipe, second: Recipe, ratio: float, point: float) -> Recipe:
        """Two models, mixed on the arc between them: by ``ratio`` in the first share ``point`` of their scalars, by
        1 - ``ratio`` in the rest. A ratio of 0 is the first model, a ratio of 1 the second.
        """
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors that a merge changes, by their names."""
        ...

    @property
    def changes(self) -> Callable[[], Mapping[str, tuple[float, ...]]]:
        """Reads the experts, and says of every tensor how large the task vector of each is, Σ|θ_k - θ₀|."""
        ...

    def depth(self, anew: bool) -> int:
        """The number of layers of the models.

        Args:
            anew: whether layers are going to be left out, repeated or put into another order.
        """
        ...


class Estimator(Protocol):
    """Estimates scores for searches that have only a part of the items scored."""

    @property
    def items(self) -> int:
        """The number of dev items."""
        ...

    @property
    def block(self) -> int:
        """The number of items that are scored at a time."""
        ...

    def check(self, kind: str, key: str) -> None:
        """Raise BadInput, naming ``key``, if the run's tasks allow no estimates of this kind."""
        ...

    @property
    def unjudged(self) -> str | None:
        """A task whose items have no scores of their own from 0 to 1; None where those of all tasks have."""
        ...

    def learn(self, result: Result) -> None:
        """Take in the answers of a model to all items. Incomplete results are ignored."""
        ...

    def known(self, recipe_id: str) -> Result | None:
        """The complete result of a recipe, if one was learnt."""
        ...

    def estimate(self, kind: str, items: Sequence[ItemAnswer], order: str = OWN) -> float:
        """The score of all items, estimated from the answers to the first of them in the order of this name.

        The estimate depends on these answers and on the set of learnt results, but not on the order of learning.
        """
        ...

    def estimate_tasks(self, kind: str, items: Sequence[ItemAnswer], order: str = OWN) -> Mapping[str, float]:
        """The metric of each task over all of its items, estimated in the same way. Tasks of which nothing can be said
        are left out.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What every search is built from.

    Attributes:
        experts: the experts of the run.
        base: their base model.
        seed: seed of all random draws.
        budget: when the search ends.
        maker: makes recipes.
        estimator: estimates scores from a part of the items.
        early_stopping: whether a candidate carries the score that it has to beat, so that its evaluation may stop
            early.
        racing: whether a candidate also carries the answers of its incumbent, for a sequential test against it.
        together: number of candidates that are asked for as one batch. If it is above 1, all results of a batch are
            told before the next batch is asked for.
        arrival: whether results are learnt by their ranks (in the order of arrival) instead of their candidates'
            numbers.
        tasks: names of the tasks.
        subset: whether candidates that may be scored on a part of the items meet them in one order (fixed) or in new
            ones (rotate); None: what is the default for the search.
        objectives: those of a multi-objective search; none: every task is one.
        constraints: number of constraints of the run, whose names are ``0``, ``1``, ….
        owned: for each expert, by name, the tasks that are its own; all tasks where it has none.
    """

    experts: tuple[Expert, ...]
    base: Expert
    seed: int
    budget: Budget
    maker: Maker
    estimator: Estimator
    early_stopping: bool = True
    racing: bool = False
    together: int = 1
    arrival: bool = False
    tasks: tuple[str, ...] = ()
    subset: Literal["fixed", "rotate"] | None = None
    objectives: tuple[Objective, ...] = ()
    constraints: int = 0
    owned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def rotates(self, estimate: str) -> bool:
        """Whether candidates that are told apart by this kind of estimate meet their items in new orders."""
        return self.subset == "rotate" or (self.subset is None and estimate == "difference")


@dataclass(frozen=True)
class Algorithm:
    """A registered search.

    Attributes:
        name: what ``search.algorithm`` says.
        settings: class of the section ``search``.
        build: makes the search from a setup and its settings.
        incumbent: whether a candidate has to beat an incumbent, so that its evaluation may stop early.
        inside: the key of the settings that holds the algorithm and the settings of another search; empty: there is
            none.
        several: whether it has several objectives, whether or not the configuration names any.
        partial: whether it asks for the scores of a part of the items itself, so that it cannot stand inside of another
            search and needs no estimates.
        losses: the losses whose gradients it asks for; none: it goes by scores or answers.
    """

    name: str
    settings: type[Section]
    build: Callable[[Setup, Any], Search]
    incumbent: bool = False
    inside: str = ""
    several: bool = False
    partial: bool = False
    losses: tuple[LossName, ...] = ()


SEARCHES: dict[str, Algorithm] = {}
SettingsType = TypeVar("SettingsType", bound=Section)


def algorithm(
    name: str, settings: type[SettingsType], incumbent: bool = False, inside: str = "", several: bool = False,
    partial: bool = False, losses: tuple[LossName, ...] = (),
) -> Callable[[Any], Any]:  # fmt: skip
    """Register a search under ``name``. The decorated class or function is called as ``search(setup, settings)``."""

    def register(build: Any) -> Any:
        SEARCHES[name] = Algorithm(name, settings, build, incumbent, inside, several, partial, losses)
        return build

    return register


@contextlib.contextmanager
def inside(key: str) -> Iterator[None]:
    """While a search is built inside of another one, errors name its settings by ``key``, where the section of the
    inner search stands, and not as if it were alone.
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).replace("search.", f"{key}.", 1)) from error


class Ordered:
    """A search that proposes each candidate after a fixed number of results, which it learns in a fixed order.

    A subclass defines three methods: ``waits_for(k)``, the number of results that candidate k is proposed on;
    ``propose(k)``, the candidate itself; and ``learn(candidate, result)``, which takes in a result. ``learn`` is called
    in the order of the candidates (or of the ranks, with ``order: arrival``), whatever the order in which results were
    told. So every subclass follows rule 3 of this module.

    Args:
        limit: number of candidates after which the search ends, besides the budget; None: no such limit.
    """

    def __init__(self, setup: Setup, limit: int | None = None) -> None:
        self.setup = setup
        self.limit = limit
        self._asked: list[Candidate] = []
        self._told: dict[int, Result] = {}
        self._learnt = 0
        self._progress = Progress()

    def waits_for(self, k: int) -> int:
        """The number of results that have to be learnt before candidate ``k`` is proposed; it never falls with k."""
        raise NotImplementedError  # every search defines it

    def propose(self, k: int) -> Candidate:
        """Make candidate number ``k``."""
        raise NotImplementedError  # every search defines it

    def learn(self, candidate: Candidate, result: Result) -> None:
        """Take in the next result."""
        raise NotImplementedError  # every search defines it

    @property
    def total(self) -> int | None:
        limits = [n for n in (self.limit, self.setup.budget.candidates) if n is not None]
        return min(limits) if limits else None

    @property
    def done(self) -> bool:
        return self._spent() and self._learnt == len(self._asked)

    @property
    def ended(self) -> Reason | None:
        """What ended the search; None while it goes on."""
        budget = self.setup.budget
        if not self.done or self._progress.reached:
            return self._progress.reached if self.done else None
        if self._progress.meets(budget):  # the last candidate of all has reached it
            return "target"
        return "candidates" if budget.candidates is not None and len(self._asked) >= budget.candidates else "search"

    def ask(self, n: int) -> list[Candidate]:
        out: list[Candidate] = []
        while len(out) < n and not self._spent():
            k = len(self._asked)
            if not self._learn_up_to(self.waits_for(k)) or self._spent():
                break
            candidate = self.propose(k)
            self._asked.append(candidate)
            out.append(candidate)
        if self._spent():
            self._learn_up_to(len(self._asked))  # results that were told earlier may have used up the budget
        return out

    def tell(self, result: Result) -> None:
        self._told[self._place(result)] = result
        if self._spent():
            self._learn_up_to(len(self._asked))  # no further candidate waits for these results

    def _learn_up_to(self, count: int) -> bool:
        while self._learnt < count and self._learnt in self._told:
            result = self._told.pop(self._learnt)
            following = self._progress.after(result, self.setup.budget)
            # Once all candidates are asked for, no other part of the budget can end the search.
            self._progress = replace(following, reached=self._progress.reached) if self._full() else following
            self.learn(self._asked[result.number], result)
            self._learnt += 1
        return self._learnt >= count

    def _place(self, result: Result) -> int:
        return result.number if result.rank is None or not self.setup.arrival else result.rank

    def _spent(self) -> bool:
        return self._full() or self._progress.reached is not None

    def _full(self) -> bool:
        return self.total is not None and len(self._asked) >= self.total
