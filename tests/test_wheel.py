"""A wheel of this tree, installed where nothing of the tree can be imported: it holds all files, and it runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import toys

pytestmark = pytest.mark.whole

PACKAGES = ("evolver", "cluster")
# Instructions and manifests for people, which no code reads: they are taken from the repository.
NOT_INSTALLED = ("cluster/deploy/",)


def run(*command: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that knows nothing of this tree."""
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a build leaves files beside what it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(toys.ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(toys.ROOT / file, tree / file)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", out, tree, cwd=out,
    )  # fmt: skip
    (built,) = out.glob("evolver-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it, and the packages that these tests run with.

    They are named one by one: this environment's own folder would bring the tree with it, where it is installed in
    a form that can be edited.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    place = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    # Some systems name folders here that nobody has made.
    for packages in filter(Path.is_dir, map(Path, site.getsitepackages())):
        for found in packages.iterdir():
            if "evolver" not in found.name and found.suffix != ".pth" and not (place / found.name).exists():
                (place / found.name).symlink_to(found)
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder
    )  # fmt: skip
    return python


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {n: archive.read(n) for n in archive.namelist()}
    files = [p for package in PACKAGES for p in (toys.ROOT / package).rglob("*") if p.is_file()]
    meant = {str(p.relative_to(toys.ROOT)): p for p in files if "__pycache__" not in p.parts}
    meant = {name: path for name, path in meant.items() if not name.startswith(NOT_INSTALLED)}
    kinds = {"native.c": "kernels", "native.h": "kernels", "index.html": "dashboard/static"}
    assert {"evolver/py.typed", *(f"evolver/{folder}/{name}" for name, folder in kinds.items())} <= set(meant)
    for name, path in meant.items():
        assert name in held, f"{name} is not in the wheel: name its kind in pyproject.toml under package-data"
        assert held[name] == path.read_bytes()
    beside = {n for n in held if n not in meant}
    assert all(".dist-info/" in n for n in beside), beside


def test_nothing_that_code_reads_is_left_out():
    """Of the files that are not installed no code in the packages speaks."""
    for folder in NOT_INSTALLED:
        name = Path(folder).name
        for package in PACKAGES:
            for path in (toys.ROOT / package).rglob("*.py"):
                words = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
                assert not [w for w in words if isinstance(w, str) and re.fullmatch(rf"(.*/)?{name}(/.*)?", w)], path


def test_the_installed_package_is_the_one_that_is_imported(installed, tmp_path):
    code = "import evolver, cluster, json; print(json.dumps([evolver.__file__, cluster.__file__]))"
    places = [Path(p) for p in json.loads(run(installed, "-c", code, cwd=tmp_path).stdout)]
    for place in places:
        assert place.is_relative_to(installed.parents[1])
        assert not place.is_relative_to(toys.ROOT)


def test_it_runs_a_configuration_in_an_empty_folder(installed, make_config, tmp_path):
    file = make_config(tmp_path, {"budget.candidates": 4, "search.generations": 2})
    empty = tmp_path / "empty"
    empty.mkdir()
    cache = str(tmp_path / "cache")  # so that the loops in C are compiled from the installed source
    evolver = installed.parent / "evolver"
    run(evolver, "validate", file, cwd=empty, EVOLVER_CACHE=cache)
    done = run(evolver, "run", file, cwd=empty, EVOLVER_CACHE=cache)
    assert "Traceback" not in done.stderr
    folder = empty / "results" / "toy"
    assert len([k for k in toys.rows(folder) if k[0] == "search"]) == 4
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    assert (folder / "report.md").exists()
    assert (folder / "report.html").exists()
    if shutil.which("cc") or shutil.which("gcc"):
        code = "from evolver.kernels import native; print(native.library() is not None)"
        assert run(installed, "-c", code, cwd=empty, EVOLVER_CACHE=cache).stdout.strip() == "True"


def interpreter(version: str) -> Path:
    """An interpreter of another version of Python on this machine; the test is skipped where there is none."""
    names = [f"python{version}", *map(str, Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))]
    for found in filter(None, map(shutil.which, names)):
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        if subprocess.run([found, "-c", asked], capture_output=True, text=True, check=False).stdout.strip() == version:
            return Path(found)
    pytest.skip(f"there is no Python {version} on this machine")


# Imports every module of both packages, and prints those that could be; a package that is missing is no fault of ours.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
done = []
for package in ("evolver", "cluster"):
    place = importlib.util.find_spec(package).submodule_search_locations
    for found in pkgutil.walk_packages(place, package + ".", onerror=lambda name: None):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("evolver", "cluster"):
                raise
        else:
            done.append(found.name)
print(json.dumps(done))
"""


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_it_is_installed_and_compiled_by_other_versions_of_python(wheel, version, tmp_path):
    """Without torch, which not every machine has for all of them: so nothing is run but what needs no package."""
    run(interpreter(version), "-m", "venv", "--without-pip", tmp_path / "environment", cwd=tmp_path)
    python = tmp_path / "environment" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path
    )  # fmt: skip
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    run(python, "-W", "error", "-m", "compileall", "-q", "-f", *(Path(place) / p for p in PACKAGES), cwd=tmp_path)
    imported = json.loads(run(python, "-W", "error", "-c", IMPORT_ALL, cwd=tmp_path).stdout)
    assert {"evolver.version", "evolver.errors", "evolver.records", "evolver.pool"} <= set(imported)


def test_python_versions_before_the_oldest_one_are_refused(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.11"


def test_its_dashboard_shows_its_pages(installed, tmp_path):
    code = (
        "from starlette.testclient import TestClient; from evolver.dashboard.app import build_app; "
        "from evolver.storage import storage_at; "
        "app = build_app(storage_at('.'), 'secret', None); browser = TestClient(app, base_url='http://127.0.0.1'); "
        "print(*[browser.get(p).status_code for p in ('/?token=secret', '/static/app.js', '/static/style.css')])"
    )
    assert run(installed, "-c", code, cwd=tmp_path).stdout.split() == ["200"] * 3
