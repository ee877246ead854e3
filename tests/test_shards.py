"""Files of weights, written tensor by tensor and read back by the library that everybody uses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from toys import ROOT

from evolver.checkpoints import shards
from evolver.checkpoints.weights import TensorInfo

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.tensor([True, False, True]),
    "e": torch.zeros(0, 4),
}
INFOS = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in TENSORS.items()}


def test_one_file(tmp_path):
    shards.write_shards(iter(TENSORS.items()), INFOS, tmp_path, 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in TENSORS.items())


def test_shards_and_their_index(tmp_path):
    shards.write_shards(iter(TENSORS.items()), INFOS, tmp_path, 24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 + 4 + 8 + 3
    assert set(index["weight_map"]) == set(TENSORS)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a was announced"):
        shards.write_shards([("a", TENSORS["a"].double())], {"a": INFOS["a"]}, tmp_path, 1000)


@pytest.mark.whole
def test_an_interrupted_merge_leaves_nothing_under_its_name(tmp_path):
    """Killed with -9 while the weights are being written."""
    script = f"""
import sys, time; sys.path[:0] = {[os.path.dirname(__file__)]!r}
from pathlib import Path
from evolver.storage import whole_folder
from evolver.checkpoints import shards
from test_shards import TENSORS, INFOS
def slowly():
    for item in TENSORS.items():
        print("writing", flush=True); time.sleep(1); yield item
with whole_folder(Path({str(tmp_path / "out")!r})) as folder:
    shards.write_shards(slowly(), INFOS, folder, 1000)
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()
