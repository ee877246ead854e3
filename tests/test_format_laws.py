"""The laws of the formats of models: what is written is read, and what is cut off is never taken for a model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import toys
from torch import Tensor

from evolver.checkpoints import lora_out, shards
from evolver.checkpoints.formats import FORMATS
from evolver.checkpoints.gguf import writer
from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Checkpoint, TensorInfo

pytestmark = pytest.mark.whole

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Toy:
    """How a format is tried.

    Args:
        write: an expert into a new folder, from its base's folder, its tensors and a name of DTYPES: what is named in a
            configuration.
        files: patterns of the files that are the format's own; cut off, none of them can be read.
        exact: every bit is kept; else the numbers are near, as rounding goes.
        header: a header that is all that is read at first; a format without one is read as a whole.
    """

    write: Callable[[Path, Path, Tensors, str], Path]
    files: tuple[str, ...]
    exact: bool = True
    header: bool = True


def folder_of(target: Path, base: Path, tensors: Tensors, shard_bytes: int) -> Path:
    target.mkdir()
    infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    shards.write_shards(iter(tensors.items()), infos, target, shard_bytes)
    for file in base.glob("*.json"):
        if "index" not in file.name:
            shutil.copyfile(file, target / file.name)
    return target


def one_file(target: Path, base: Path, tensors: Tensors, kind: str) -> Path:
    return folder_of(target, base, tensors, shards.SHARD_BYTES)


def several_files(target: Path, base: Path, tensors: Tensors, kind: str) -> Path:
    return folder_of(target, base, tensors, 100_000)


def lora(target: Path, base: Path, tensors: Tensors, kind: str) -> Path:
    target.mkdir()
    origin = Checkpoint(base, "base")
    tied = bool(origin.config["tie_word_embeddings"])
    of_base = {n: origin.tensor(n) for n in origin.names()}
    lora_out.write_lora(of_base, tensors.items(), target, str(base), tied, energy=1.0)
    return target


def gguf(target: Path, base: Path, tensors: Tensors, kind: str) -> Path:
    target.mkdir()
    infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    config = json.loads((base / "config.json").read_text())
    content = writer.FileContent(config, infos, tensors.items(), base, "toy", "a law")
    writer.write_gguf(content, kind, target / "model.gguf")
    return target / "model.gguf"


TOYS = {
    "one file": Toy(one_file, ("model.safetensors", "config.json")),
    "several files": Toy(several_files, ("model-*.safetensors", "model.safetensors.index.json", "config.json")),
    "lora": Toy(lora, ("adapter_model.safetensors", "adapter_config.json"), exact=False),
    "gguf": Toy(gguf, ("*.gguf",), header=False),
}
# Plain folders are no format of the registry: what no format recognises is taken for one.
PLAIN = {"one file", "several files"}
EVERY = pytest.mark.parametrize("name", TOYS)


def test_every_format_has_a_toy():
    for name in FORMATS:
        assert name in TOYS, (
            f"the format {name!r} is held to no law; add to TOYS in tests/test_format_laws.py what writes a model in "
            "it, and the names of its files"
        )
    assert set(TOYS) == set(FORMATS) | PLAIN


@pytest.fixture(scope="module", params=DTYPES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def expert(models, kind):
    """The tensors of an expert in a dtype."""
    found = Checkpoint(models / "a", "a")
    return {n: found.tensor(n).to(DTYPES[kind]) for n in found.names()}


@pytest.fixture(scope="module")
def base(models, kind, tmp_path_factory):
    """The folder of its base in the same dtype."""
    found = Checkpoint(models / "base", "base")
    tensors = {n: found.tensor(n).to(DTYPES[kind]) for n in found.names()}
    return one_file(tmp_path_factory.mktemp(kind) / "base", models / "base", tensors, kind)


@pytest.fixture
def written(base, expert, kind, tmp_path):
    """``written(format)``: what a configuration names."""
    return lambda name: TOYS[name].write(tmp_path / "expert", base, expert, kind)


def opened(place, base):
    return open_expert(str(place), open_base(str(base)), "experts.x")


@EVERY
def test_what_is_written_is_read(written, base, expert, name, kind):
    found = opened(written(name), base)
    assert sorted(found.names()) == sorted(expert)
    for tensor, wanted in expert.items():
        got = found.tensor(tensor)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), tensor
        if TOYS[name].exact:
            assert torch.equal(got, wanted), tensor
        else:
            near = torch.finfo(wanted.dtype).eps
            assert torch.allclose(got.float(), wanted.float(), rtol=near, atol=1e-5), tensor
        assert torch.equal(got, found.tensor(tensor))


@EVERY
def test_a_model_is_the_same_whatever_holds_it(written, base, expert, name, kind, tmp_path):
    """By its digest; one that is rounded, and one of other weights, is another model."""
    digest = opened(written(name), base).digest()
    plain = opened(one_file(tmp_path / "plain", base, expert, kind), base).digest()
    assert (digest == plain) == TOYS[name].exact
    first = min(expert)
    other = {n: (t.flip(0) if n == first else t) for n, t in expert.items()}
    assert opened(TOYS[name].write(tmp_path / "other", base, other, kind), base).digest() != digest


def own_files(place, name):
    folder = place if place.is_dir() else place.parent
    found = [f for pattern in TOYS[name].files for f in sorted(folder.glob(pattern))]
    assert len(found) >= len(TOYS[name].files)
    return found


@EVERY
@pytest.mark.parametrize("keep", [0, 4, 30, 0.5, -200])
def test_a_file_that_is_cut_off_is_refused(written, base, name, kind, keep):
    place = written(name)
    for file in own_files(place, name):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        said = ["copy"] * (keep != 0)  # an empty file is one of no format
        toys.refused(lambda: opened(place, base), "experts.x: ", file, *said)
        file.write_bytes(content)
    assert opened(place, base).names()


@EVERY
def test_a_file_of_other_content_is_refused(written, base, name, kind):
    place = written(name)
    for file in own_files(place, name):
        content = file.read_bytes()
        file.write_bytes(b"PK\x03\x04 a zip, and no model" * 20)
        toys.refused(lambda: opened(place, base), "experts.x: ", file)
        file.write_bytes(content)


@EVERY
def test_a_file_that_is_gone_is_refused(written, base, name, kind):
    place = written(name)
    for file in own_files(place, name):
        content = file.read_bytes()
        file.unlink()
        toys.refused(lambda: opened(place, base), "experts.x: ", place)
        file.write_bytes(content)


def hollow(file, shapes):
    """A safetensors file of float32 whose data are a hole: it takes no room on the disk, and has all its length."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("r+b") as out:
        out.truncate(8 + len(text) + at)


LARGE, ROWS = "model.layers.0.mlp.up_proj", 1 << 20
HOLLOW = {
    "one file": {"model.safetensors": {f"{LARGE}.weight": [ROWS, 512]}},
    "several files": {"model-1.safetensors": {f"{LARGE}.weight": [ROWS, 512]}, "model-2.safetensors": {"x": [ROWS]}},
    "lora": {"adapter_model.safetensors": {f"base_model.model.{LARGE}.lora_A.weight": [512, ROWS],
                                           f"base_model.model.{LARGE}.lora_B.weight": [512, 512]}},
}  # fmt: skip


def test_every_format_with_a_header_is_tried_without_data():
    assert set(HOLLOW) == {name for name, toy in TOYS.items() if toy.header}


@pytest.mark.parametrize("name", HOLLOW)
def test_names_and_shapes_are_known_before_any_data_are_read(name, tmp_path):
    """Gigabytes of data take no memory until they are asked for."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for file, shapes in HOLLOW[name].items():
        hollow(tmp_path / file, shapes)
    if name == "several files":
        where = {n: file for file, shapes in HOLLOW[name].items() for n in shapes}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    before = psutil.Process().memory_info().rss
    if name == "lora":
        (tmp_path / "adapter_config.json").write_text("{}")
        folder = tmp_path / "base"
        folder.mkdir()
        shutil.copyfile(tmp_path / "config.json", folder / "config.json")
        hollow(folder / "model.safetensors", {f"{LARGE}.weight": [512, ROWS]})
        assert opened(tmp_path, folder).names() == [f"{LARGE}.weight"]
    else:
        shapes = {n: tuple(shape) for shapes in HOLLOW[name].values() for n, shape in shapes.items()}
        assert {n: info.shape for n, info in open_base(str(tmp_path)).headers.items()} == shapes
    assert psutil.Process().memory_info().rss - before < 2**27
