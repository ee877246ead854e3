"""The order of a set differs in every process; no candidate may depend on it, as a resumed run asks for the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import toys

# Prints what every search proposes. Its makers have layers, so that settings by layer and tensor are written as rules.
SCRIPT = """
import json, test_search as laws
found = {}
for name, settings in laws.CONFIGURATIONS.items():
    found[name] = [c.recipe.id for c in laws.simulate(laws.every_search(settings))]
print(json.dumps(found))
"""


def proposed(seed: int) -> dict[str, list[str]]:
    """The candidates of every search, in a process whose strings have other hashes."""
    path = os.pathsep.join((str(toys.ROOT), str(toys.ROOT / "tests")))
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.whole
def test_every_search_proposes_the_same_in_another_process():
    one, *others = (proposed(seed) for seed in (1, 2, 3))
    assert len(one) > 50
    for other in others:
        assert {name for name, ids in one.items() if other[name] != ids} == set()
