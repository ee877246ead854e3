"""The strategies of Evolver are known to two rooms that may not import each other; here they are held together."""

from typing import get_args

from evolver.merging.crossing import STRATEGIES
from evolver.search.evolution.offspring import LED_BY_BEST, PARTNERS
from evolver.search.evolution.settings import Strategy


def test_crossing_and_search_agree_on_the_strategies():
    assert {name: partners for name, (_, partners) in STRATEGIES.items()} == PARTNERS
    assert set(get_args(Strategy)) == set(PARTNERS)
    assert set(LED_BY_BEST) < set(PARTNERS)
