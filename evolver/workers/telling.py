"""Which nodes of recipes a worker has been told, as the driver and as the worker itself remember it.

A message holds the nodes that its worker lacks, as far as the driver knows. What the driver remembers is a guess, and
no result depends on it: a worker that lacks a node after all answers ``LACKS``, and is then sent the whole recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evolver.records import Candidate, Result
from evolver.records.graph import NodeTable, UnknownNode, texts_of
from evolver.workers.messages import pack_candidate, pack_result, unpack_candidate

# A worker's answer to a message whose recipe it cannot build, as it does not know all of its nodes.
LACKS = b"lacks nodes"
# The most nodes that a worker is told; then the driver begins anew, and the worker lets go what it kept. No recipe may
# have more nodes. So many take some 40 MB in a worker.
MOST_NODES = 1 << 16


class LongRecipe(ValueError):
    """A recipe has more nodes than a worker keeps."""


class Inbox:
    """Reads the messages that a worker gets, and keeps the nodes of recipes that came with them."""

    def __init__(self) -> None:
        self._nodes = NodeTable()

    def answer(self, message: bytes, evaluate: Callable[[Candidate], Result]) -> bytes:
        """The worker's answer to a message: the result of the candidate, or ``LACKS``."""
        try:
            candidate = self.candidate(message)
        except UnknownNode:
            return LACKS
        return pack_result(evaluate(candidate))

    def candidate(self, message: bytes) -> Candidate:
        """The candidate of a message.

        Raises UnknownNode where nodes of its recipe have not come.
        """
        return unpack_candidate(message, self._nodes)


class Told:
    """What a driver has told its workers."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._workers: dict[int, _Known] = {}

    def pack(self, worker: int, candidate: Candidate) -> bytes:
        """The message of a candidate to a worker, who is taken to know its nodes then.

        Raises LongRecipe.
        """
        known = self._workers.get(worker)
        nodes = texts_of(candidate.recipe, () if known is None else known)
        if known is not None and known.count + len(nodes) <= MOST_NODES:
            known.update(nodes)
            return pack_candidate(candidate, nodes.values())
        nodes = texts_of(candidate.recipe)
        if len(nodes) > MOST_NODES:
            raise LongRecipe(
                f"its recipe has {len(nodes):,} nodes, and workers take recipes of at most {MOST_NODES:,}; start a "
                "search of its own from the best model of this run, exported as a checkpoint"
            )
        self._workers[worker] = _Known(self._numbers)
        self._workers[worker].update(nodes)
        return pack_candidate(candidate)

    def forget(self, worker: int) -> None:
        """A worker is gone, or has lost what it was told."""
        self._workers.pop(worker, None)


class _Known:
    """The nodes that one worker knows: of each number of a node whether it is one of them. Sets of ids would take
    hundreds of megabytes where there are a thousand workers.

    Args:
        numbers: of all nodes by their ids, which all workers share.
    """

    def __init__(self, numbers: dict[str, int]) -> None:
        self._numbers, self._flags = numbers, bytearray()
        self.count = 0

    def __contains__(self, key: object) -> bool:
        number = self._numbers.get(key, len(self._flags))  # type: ignore[call-overload]  # ids are asked for only
        return number < len(self._flags) and bool(self._flags[number])

    def update(self, keys: Iterable[str]) -> None:
        for key in keys:
            number = self._numbers.setdefault(key, len(self._numbers))
            self._flags.extend(bytes(max(0, number + 1 - len(self._flags))))
            self.count += not self._flags[number]
            self._flags[number] = 1
