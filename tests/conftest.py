from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before any library reads its environment: no network, and caches that vanish with the session.
CACHES = Path(tempfile.mkdtemp(prefix="evolver-tests-"))
os.environ |= {
    "EVOLVER_CACHE": str(CACHES / "evolver"),
    "HF_HOME": str(CACHES / "hf"),
    "HF_HUB_OFFLINE": "1",
}

from evolver.threads import let_threads_sleep  # noqa: E402

let_threads_sleep()

import toys  # noqa: E402

MakeConfig = Callable[..., Path]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules that are left out as a whole are not imported either: it takes longer than the fast tests."""
    if collection_path.suffix != ".py" or "not whole" not in config.option.markexpr:
        return None
    marks = re.search(r"^pytestmark = (.*)$", collection_path.read_text(), re.MULTILINE)
    return True if marks and "mark.whole" in marks[1] else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules of whole runs first: the short ones then fill what is left of the time of several workers."""
    modules = {item: item.getparent(pytest.Module) for item in items}
    items.sort(key=lambda item: (module := modules[item]) is None or module.get_closest_marker("whole") is None)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    toys.make_models(folder)
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    toys.make_encoders(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tasks"
    toys.make_tasks(folder, models)
    return folder


@pytest.fixture(scope="session")
def make_config(models: Path, tasks: Path) -> MakeConfig:
    """``make_config(folder, {dotted key: value})`` writes a valid configuration with these changes."""

    def make(folder: Path, changes: Mapping[str, Any] | None = None, name: str = "run.yaml") -> Path:
        file = folder / name
        file.write_text(yaml.safe_dump(toys.settings(models, tasks, changes or {}), sort_keys=False))
        return file

    return make


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of an S3 server on the loopback, as a URI."""
    from moto.server import ThreadedMotoServer  # slow, and few tests need it

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        import s3fs

        bucket = f"bucket-{uuid.uuid4().hex}"  # the servers of one process share what they hold
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
        yield f"s3://{bucket}"
    server.stop()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the workers set it: sums must not depend on how many cores a test machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
