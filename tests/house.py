"""The figures of the house, counted from the code's own imports and definitions: ``python tests/house.py`` prints them.

A room is a folder of ``evolver/`` with all that lies in it, or a file at its top, or ``cluster/``. A floor
stands above all that it imports, whenever it does so.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """Which rooms a room imports from."""
    out: dict[str, set[str]] = {rooms[n]: set() for n in needed}
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


@dataclass(frozen=True)
class Figures:
    """What is counted of a house.

    Attributes:
        drawn: which rooms a room imports from. The face of the whole package stands above them, and is no room.
        needed: which modules a module imports.
        twice: public classes and functions that are defined in more than one module.
        constants: the same of public constants, and of constants that bear the name of something else.
        flat: modules at the top of ``evolver/``.
        long: functions of more than ``LONGEST_FUNCTION`` lines.
    """

    drawn: dict[str, set[str]]
    needed: dict[str, set[str]]
    twice: list[str]
    constants: list[str]
    flat: list[str]
    long: list[str]


def figures(root: Path = ROOT) -> Figures:
    """Count a house."""
    found = files(root)
    trees = {name: ast.parse(file.read_text()) for name, file in found.items()}
    inside = [n for n in found if n not in ("evolver", "evolver.__main__")]
    needed = {n: imports(trees[n], inside) for n in inside}
    homes: dict[str, set[str]] = defaultdict(set)
    constants: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for all_of, names in zip((homes, constants), defined(tree), strict=True):
            for n in names:
                all_of[n].add(name)
    return Figures(
        arrows({n: room_of(n) for n in found}, needed),
        needed,
        sorted(n for n, at in homes.items() if len(at) > 1),
        sorted(n for n, at in constants.items() if len(at | homes.get(n, set())) > 1),
        [n for n, f in found.items() if f.parent == root / "evolver"],
        sorted(name for n, t in trees.items() for lines, name in lengths(n, t) if lines > LONGEST_FUNCTION),
    )


def main() -> None:
    """Print the figures of a checkout, by default of this one."""
    found = figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    drawn, level = found.drawn, floors(found.drawn)
    for n, there in sorted(Counter(level.values()).items()):
        print(f"floor {n}: {' '.join(sorted(r for r in level if level[r] == n))}  ({there})")
    print(f"rooms {len(drawn)}, floors {max(level.values())}, arrows {sum(map(len, drawn.values()))}")
    for circle in circles(drawn):
        print(f"circle: {' '.join(circle)}")
        for name in sorted(n for n in found.needed if room_of(n) in circle):
            others = sorted(o for o in found.needed[name] if room_of(o) in {*circle} - {room_of(name)})
            if others:
                print(f"    {name} → {' '.join(others)}")
    print(f"circles {len(circles(drawn))}")
    print(f"public classes and functions with two homes {len(found.twice)}: {' '.join(found.twice)}")
    print(f"constants with two homes {len(found.constants)}: {' '.join(found.constants)}")
    print(f"modules flat in evolver/ {len(found.flat)}; functions over {LONGEST_FUNCTION} lines {len(found.long)}")


if __name__ == "__main__":
    main()
