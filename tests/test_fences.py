"""The house's fences: who may import what. Read from the source, so that nothing has to be imported."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = ("evolver.records", "evolver.config", "evolver.errors", "evolver.storage")
ROOMS = ("evolver.merging", "evolver.search", "evolver.evaluation", "evolver.ledger", "evolver.loggers")
# Who may import a library at all. No name here covers more than its package.
FENCES = {
    "ray": ("cluster",),
    "torch": (
        "evolver.merging",
        "evolver.evaluation",
        "evolver.worker",
        "evolver.compute",
        "evolver.run",
        "evolver.shards",
        "evolver.merge",
        "evolver.cli",
        "evolver.doctor",
        "evolver.evaluate",
        "evolver.training",
        "evolver.loggers.tensorboard",
    ),
    "safetensors": ("evolver.merging", "evolver.training"),
    "optuna": ("evolver.search",),
    "lm_eval": ("evolver.evaluation",),
    "datasets": ("evolver.evaluation",),
    "transformers": (
        "evolver.evaluation",
        "evolver.merging.gguf",
        "evolver.merging.gguf_keys",
        "evolver.merging.gguf_words",
        "evolver.training",
    ),
    "gguf": (
        "evolver.merging.gguf",
        "evolver.merging.gguf_keys",
        "evolver.merging.gguf_out",
        "evolver.merging.gguf_words",
    ),
    "peft": ("evolver.training",),
    "fsspec": ("evolver.storage",),
    "starlette": ("evolver.dashboard",),
    "uvicorn": ("evolver.cli",),
    "markdown_it": ("evolver.html",),
    "torch.utils.tensorboard": ("evolver.loggers.tensorboard",),
    "tensorboard": (),
    "mlflow": ("evolver.loggers.mlflow",),
    "wandb": ("evolver.loggers.wandb",),
}


def modules():
    """Our modules: name → source file."""
    files = [ROOT / "evolve.py", *(ROOT / "evolver").rglob("*.py"), *(ROOT / "cluster").rglob("*.py")]
    return {name_of(f): f for f in files}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = modules()


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
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _top(getattr(node, part, []))


def within(name, packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_the_house_is_seen():
    assert {"evolve", "cluster.pool", "evolver", "evolver.merging.methods", "evolver.records"} <= MODULES.keys()
    assert "torch" in imports("evolver.merging.operators")
    assert "evolver.merging.apply" in imports("evolver.merging.materialise")


def test_the_plan_of_the_house_names_every_room():
    import evolver

    rooms = {n.split(".")[1] for n in MODULES if n.startswith("evolver.")} - {"__main__"}
    assert {r for r in rooms if f"``{r}``" not in evolver.__doc__ and f"``{r}/``" not in evolver.__doc__} == set()


@pytest.mark.parametrize("library", FENCES)
def test_libraries_stay_in_their_rooms(library):
    users = {n for n in MODULES if within_library(imports(n), library)}
    assert {u for u in users if not within(u, FENCES[library])} == set()
    assert users or not FENCES[library]


def within_library(names, library):
    return any(within(n, [library]) for n in names)


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrows_between_the_rooms(room):
    others = [r for r in ROOMS if r != room]
    for name in MODULES:
        if within(name, [room]):
            assert not [i for i in imports(name) if within(i, others)], name


def test_the_ground_floor_stands_on_nothing():
    for name in MODULES:
        if within(name, GROUND):
            ours = {i for i in imports(name) if within(i, ["evolver", "cluster"])}
            assert [i for i in ours if not within(i, GROUND)] == [], name


def test_the_rooms_stand_on_the_ground_floor_only():
    for name in MODULES:
        for room in ROOMS:
            if within(name, [room]):
                ours = {i for i in imports(name) if within(i, ["evolver", "cluster"])}
                assert [i for i in ours if not within(i, [room, *GROUND])] == [], name


def test_the_library_knows_no_cluster():
    """But its command line, which stands at the top of the house, beside ``evolve.py``."""
    for name in MODULES:
        if within(name, ["evolver"]) and name != "evolver.cli":
            assert not [i for i in imports(name) if within(i, ["cluster", "evolve"])], name


def test_the_loop_and_the_worker_do_not_know_each_other():
    assert not [i for i in imports("evolver.loop") if within(i, ["evolver.worker", "evolver.merging", "evolver.run"])]
    assert not [i for i in imports("evolver.worker") if within(i, ["evolver.loop", "evolver.search", "evolver.ledger"])]


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
    code = "import sys, evolver.run, cluster.job; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
