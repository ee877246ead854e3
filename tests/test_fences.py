"""The house's fences: who may import what. Read from the source, so that nothing has to be imported."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).parent.parent
# Who may import a library at all. No name here covers more than its package.
FENCES = {
    "ray": ("cluster",),
    "torch": (
        "evolver.kernels",
        "evolver.checkpoints",
        "evolver.merging",
        "evolver.evaluation",
        "evolver.workers",
        "evolver.driver.check",
        "evolver.commands",
        "evolver.training",
        "evolver.loggers.tensorboard",
    ),
    "safetensors": ("evolver.checkpoints", "evolver.merging", "evolver.training"),
    "optuna": ("evolver.search",),
    "lm_eval": ("evolver.evaluation.language", "evolver.evaluation.judges.language"),
    "datasets": ("evolver.evaluation",),
    "transformers": (
        "evolver.evaluation",
        "evolver.checkpoints.gguf",
        "evolver.checkpoints.names",
        "evolver.checkpoints.peft_layers",
        "evolver.training",
    ),
    "gguf": ("evolver.checkpoints.gguf",),
    # Training makes adapters, and what an adapter that is no low-rank delta makes of a layer is said by PEFT alone.
    "peft": ("evolver.training", "evolver.checkpoints.peft_layers"),
    "fsspec": ("evolver.storage",),
    "starlette": ("evolver.dashboard",),
    "uvicorn": ("evolver.commands.cli",),
    "markdown_it": ("evolver.report.html",),
    "torch.utils.tensorboard": ("evolver.loggers.tensorboard",),
    "tensorboard": (),
    "mlflow": ("evolver.loggers.mlflow",),
    "wandb": ("evolver.loggers.wandb",),
}


MODULES = house.files()


def floors():
    """The floors that the README draws, the ground first: modules and packages on each."""
    picture = re.search(r"^```\nevolve\.py .*?^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.split(r" {2,}(?=[^ ]+ [^ ])", line)[0] for line in picture[0].splitlines()[1:-1]]
    return [[_module(room) for room in line.split()] for line in reversed(lines)]


def _module(room):
    name = room.removesuffix("/").removesuffix(".py")
    return name if name in ("evolve", "cluster") else f"evolver.{name}"


FLOORS = floors()


@functools.cache
def imports(name, whole=True):
    """What a module imports, as dotted names; with ``whole`` also inside of functions."""
    tree = ast.parse(MODULES[name].read_text())
    found = set()
    for node in ast.walk(tree) if whole else _top(tree.body):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            below = {f"{node.module}.{a.name}" for a in node.names}
            found |= {b for b in below if b in MODULES} or {node.module}
    return found


def _top(body):
    """Statements that run at import: not those inside of functions or of ``if TYPE_CHECKING``."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _top(getattr(node, part, []))


def within(name, packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_the_house_is_seen():
    assert {"evolve", "cluster.pools.ray", "evolver", "evolver.merging.methods", "evolver.records"} <= MODULES.keys()
    assert "torch" in imports("evolver.merging.methods.operators")
    assert "evolver.merging.engine.apply" in imports("evolver.merging.materialise")


@pytest.mark.parametrize("library", FENCES)
def test_libraries_stay_in_their_rooms(library):
    users = {n for n in MODULES if within_library(imports(n), library)}
    assert {u for u in users if not within(u, FENCES[library])} == set()
    assert users or not FENCES[library]


def within_library(names, library):
    return any(within(n, [library]) for n in names)


def test_the_picture_shows_every_room():
    drawn = [room for floor in FLOORS for room in floor]
    rooms = {house.room_of(n) for n in MODULES} - {"evolver", "evolver.__main__"}
    assert sorted(drawn) == sorted(rooms)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("evolver", "evolver.__main__")])
def test_imports_come_from_lower_floors(name):
    floor = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    room = house.room_of(name)
    others = {house.room_of(i) for i in imports(name) if i in MODULES} - {room, "evolver"}
    assert [o for o in others if floor[o] >= floor[room]] == []


def test_nobody_imports_the_face():
    """It hands on the Python API, which stands above everything."""
    assert [n for n in MODULES if "evolver" in imports(n)] == []


def test_the_library_knows_no_cluster():
    """But its command line, which stands at the top of the house, beside ``evolve.py``."""
    for name in MODULES:
        if within(name, ["evolver"]) and not within(name, ["evolver.commands"]):
            assert not [i for i in imports(name) if within(i, ["cluster", "evolve"])], name


def test_the_loop_and_the_worker_do_not_know_each_other():
    makers = ["evolver.workers", "evolver.merging", "evolver.driver"]
    assert not [i for i in imports("evolver.loop") if within(i, makers)]
    choosers = ["evolver.loop", "evolver.search", "evolver.ledger"]
    assert not [i for i in imports("evolver.workers.worker") if within(i, choosers)]


def test_no_import_goes_round_in_a_circle():
    """At module level. A package's ``__init__`` may gather its own modules: that is how methods register themselves."""
    edges = {
        n: {i for i in imports(n, whole=False) if i in MODULES and not i.startswith(n + ".")} for n in MODULES
    }  # fmt: skip
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(edges[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in MODULES:
        visit(name)
    assert done == MODULES.keys()


def test_importing_the_ground_floor_loads_nothing_heavy():
    code = (
        "import sys, evolver.records, evolver.config, evolver.loop, evolver.search.base, evolver.loggers; "
        "heavy = ('ray', 'torch', 'transformers', 'lm_eval', 'tensorboard', 'mlflow', 'wandb'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.whole
def test_importing_a_run_does_not_load_ray():
    code = "import sys, evolver.driver.run, cluster.job; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_house_stays_as_it_was_built():
    """Rooms, floors and words: see tests/house.py, which prints them."""
    found = house.figures()
    assert len(found.drawn) <= 24
    assert max(house.floors(found.drawn).values()) <= 9
    assert house.circles(found.drawn) == []
    assert len(found.twice) <= 5, found.twice
    assert len({*found.twice, *found.constants}) <= 10, found.constants
    assert len(found.flat) <= 10
    assert found.long == []


@pytest.mark.whole  # it imports everything
def test_errors_have_one_ancestor_and_can_be_sent():
    import importlib
    import pickle

    from evolver.errors import BadInput, EvolverError

    for name in MODULES:
        if not name.startswith("evolver.__main__"):
            importlib.import_module(name)
    kinds, found = [EvolverError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.add(kind)
    assert BadInput in found
    for kind in found:
        again = pickle.loads(pickle.dumps(kind("run.yaml: mend it.")))
        assert (type(again), str(again)) == (kind, "run.yaml: mend it.")
