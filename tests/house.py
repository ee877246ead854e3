"""The figures of the house, counted from the code's own imports and definitions: ``python tests/house.py`` prints them.

A room is a folder of ``evolver/`` with all that lies in it, or a file at its top, or ``cluster/``. A floor
stands above all that it imports, whenever it does so.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST_FUNCTION = 60


def files(root: Path = ROOT) -> dict[str, Path]:
    """The project's modules: name → source file."""
    found = [root / "evolve.py", *(root / "evolver").rglob("*.py"), *(root / "cluster").rglob("*.py")]
    return {name_of(f, root): f for f in found}


def name_of(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, known: Iterable[str]) -> set[str]:
    """Which of the known modules a module imports, also inside of functions; a name of a package is the package."""
    found, known = set(), set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {below[n] if below[n] in known else node.module for n in below}
    return found & known


def room_of(name: str) -> str:
    """The folder of ``evolver/`` that a module lies in, or the module where it lies at the top; or another folder."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "evolver" else parts[0]


def arrows(rooms: Mapping[str, str], needed: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms a room imports from. What a package's face hands on is no arrow."""
    out: dict[str, set[str]] = {r: set() for r in rooms.values()}
    for name, others in needed.items():
        out[rooms[name]] |= {rooms[o] for o in others} - {rooms[name]}
    return out


def circles(drawn: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms that import each other in a loop: strongly connected ones (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(room: str) -> None:
        index[room] = low[room] = len(index)
        stack.append(room)
        for other in drawn[room]:
            if other not in index:
                visit(other)
            if other in stack:
                low[room] = min(low[room], low[other])
        if low[room] == index[room]:
            at = stack.index(room)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for room in drawn:
        if room not in index:
            visit(room)
    return [c for c in found if len(c) > 1]


def floors(drawn: Mapping[str, set[str]]) -> dict[str, int]:
    """On which floor a room stands, from 1; rooms of one circle stand on one floor."""
    same = {r: c for c in circles(drawn) for r in c}
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            ours = same.get(room, [room])
            below = {o for r in ours for o in drawn[r]} - set(ours)
            found = 1 + max((floor(o) for o in below), default=0)
            known.update(dict.fromkeys(ours, found))
        return known[room]

    return {room: floor(room) for room in drawn}


def defined(tree: ast.Module) -> tuple[set[str], set[str]]:
    """A module's public classes and functions, and its public constants."""
    things = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    constants: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            constants |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return ({t for t in things if t[0] != "_"}, {c for c in constants if c[0] != "_"})


def lengths(name: str, tree: ast.AST) -> Iterable[tuple[int, str]]:
    """How many lines every function of a module has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{name}.{node.name}"


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    found = files(root)
    trees = {name: ast.parse(file.read_text()) for name, file in found.items()}
    packages = {n for n, f in found.items() if f.name == "__init__.py"}
    rooms = {n: room_of(n) for n in found if found[n].name != "__main__.py"}
    needed = {n: imports(trees[n], rooms) for n in rooms if n not in packages}
    drawn = {r: o for r, o in arrows(rooms, needed).items() if r != "evolver"}
    drawn = {r: o - {"evolver"} for r, o in drawn.items()}
    level = floors(drawn)

    homes: dict[str, set[str]] = defaultdict(set)
    constants: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for all_of, names in zip((homes, constants), defined(tree), strict=True):
            for n in names:
                all_of[n].add(name)
    twice = sorted(n for n, at in homes.items() if len(at) > 1)
    twice_constants = sorted(n for n, at in constants.items() if len(at | homes.get(n, set())) > 1)
    long = sorted((found for n, t in trees.items() for found in lengths(n, t) if found[0] > LONGEST_FUNCTION))
    flat = [n for n, f in found.items() if f.parent == root / "evolver"]

    for n, there in sorted(Counter(level.values()).items()):
        print(f"floor {n}: {' '.join(sorted(r for r in level if level[r] == n))}  ({there})")
    print(f"rooms {len(drawn)}, floors {max(level.values())}, arrows {sum(map(len, drawn.values()))}")
    for circle in circles(drawn):
        print(f"circle: {' '.join(circle)}")
        for room in circle:
            for name in sorted(n for n in needed if rooms[n] == room):
                others = sorted(o for o in needed[name] if rooms[o] in circle and rooms[o] != room)
                if others:
                    print(f"    {name} → {' '.join(others)}")
    print(f"circles {len(circles(drawn))}")
    print(f"public classes and functions with two homes {len(twice)}: {' '.join(twice)}")
    print(f"constants with two homes {len(twice_constants)}: {' '.join(twice_constants)}")
    print(f"modules flat in evolver/ {len(flat)}; functions over {LONGEST_FUNCTION} lines {len(long)}: {long}")


if __name__ == "__main__":
    main()
