"""Every method against mergekit 0.1.5, whose results are stored as digests and samples (see run_mergekit.py)."""

import gzip
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.whole

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cases import UNORDERED, cases, located  # noqa: E402
from checkpoints import make  # noqa: E402
from prints import prints  # noqa: E402

from evolver.checkpoints.sources import open_base, open_expert  # noqa: E402
from evolver.merging import mergekit  # noqa: E402
from evolver.merging.materialise import Materialiser  # noqa: E402
from evolver.records.recipe import Expert  # noqa: E402

STORED = json.loads(gzip.decompress((HERE / "mergekit.json.gz").read_bytes()))["results"]
# Where the order of operations is the same, so are the bits.
EXACT = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "ram", "passthrough", "arcee_fusion"}  # fmt: skip
CLOSE = 2e-7
# mergekit rounds every step of these in float32. What their formulas say is compared in float64, within CLOSE.
OWN_ROUNDING = {"multislerp": 4e-7, "karcher": 4e-7}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folders = {n: str(p) for n, p in make(tmp_path_factory.mktemp("models") / "m").items()}
    base = open_base(folders["base"])
    sources = {n: base if n == "base" else open_expert(p, base, n) for n, p in folders.items()}
    nodes = {folders[n]: Expert(n, s.digest()) for n, s in sources.items()}
    materialiser = Materialiser(base, {nodes[folders[n]].digest: s for n, s in sources.items()}, torch.float32)
    return folders, nodes, materialiser


@pytest.mark.parametrize("case", cases(), ids=lambda c: c["name"])
def test_the_numbers_are_mergekits(case, world):
    folders, nodes, materialiser = world
    configuration = mergekit.parse(located(case["config"], folders), case["name"])
    recipe = configuration.recipe(nodes, materialiser.base.names())
    ours, theirs = prints(dict(materialiser.stream(recipe))), STORED[case["name"]]
    assert set(ours) == set(theirs)
    method = case["config"]["merge_method"]
    rescaled = case["config"].get("parameters", {}).get("rescale")
    limit = OWN_ROUNDING.get(method, CLOSE) if case["config"]["dtype"] == "float32" else CLOSE
    for name, wanted in theirs.items():
        got = ours[name]
        assert got["shape"] == wanted["shape"], name
        if method in EXACT and not rescaled:
            assert got["digest"] == wanted["digest"], name
        assert math.isclose(got["norm"], wanted["norm"], rel_tol=limit), name
        error = math.dist(got["samples"], wanted["samples"]) / math.hypot(*wanted["samples"])
        assert error <= limit, name


def test_every_method_of_mergekit_is_among_the_cases():
    assert {c["config"]["merge_method"] for c in cases()} == mergekit.MERGEKIT_NAMES
    assert UNORDERED < mergekit.MERGEKIT_NAMES
    assert len(mergekit.MERGEKIT_NAMES) == 20
