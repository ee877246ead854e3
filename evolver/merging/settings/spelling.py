"""Whether the merges of a recipe that somebody wrote name methods and settings that exist."""

from __future__ import annotations

from evolver.errors import BadInput
from evolver.merging import methods
from evolver.records.recipe import Merge, Recipe, ancestors


def refuse_unknown(recipe: Recipe, place: str) -> None:
    """Refuse a recipe with a merge that could not be computed.

    Raises BadInput that names ``place`` for an unknown method or setting, with the nearest known one, for a value that
    the method is not defined for, and for a setting without a default that no rule names.
    """
    for node in ancestors(recipe):
        if isinstance(node, Merge):
            _refuse_merge(node, place)


def _refuse_merge(node: Merge, place: str) -> None:
    method, count = methods.get(node.method, place), len(node.inputs)
    for rule in node.rules or [None]:
        method.check(dict(rule.values) if rule else {}, count, place)
    named = {key for rule in node.rules for key, _ in rule.values}
    for setting in method.settings.values():
        if setting.required and setting.name not in named:
            raise BadInput(
                f"{place}: {method.name} has no default for {setting.name}; write it in a rule of the merge."
            )
    kinds = len(dict.fromkeys(method.statistics.values()))
    of_base = all(of.base for of in method.statistics.values())  # then of any number of experts' items
    found = len(node.statistics)
    if not (kinds and of_base and found and found % kinds == 0) and found != count * kinds:
        raise BadInput(
            f"{place}: {method.name} of {count} models needs {count * kinds} statistics, and the recipe names "
            f"{found}; name one of every kind for each model."
        )
