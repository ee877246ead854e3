"""What mergekit 0.1.5 makes of the cases: run by mergekit's own Python, it writes mergekit.json.gz beside this file.

    python -m venv OTHER && OTHER/bin/pip install torch==2.13.0 mergekit==0.1.5
    OTHER/bin/python tests/oracles/run_mergekit.py

It is an oracle and no dependency: tests read the stored digests and samples.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import cases, located
from checkpoints import make
from prints import prints
from safetensors.torch import load_file

OUT = Path(__file__).parent / "mergekit.json.gz"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
IN_PROCESS = """
import sys, yaml, pathlib, traceback
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for folder in map(pathlib.Path, sys.argv[1:]):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load((folder / "config.yml").read_text()))
        run_merge(config, str(folder / "out"), options=MergeOptions(random_seed=0, write_model_card=False, copy_tokenizer=False, quiet=True))
    except Exception as error:
        traceback.print_exc()
        (folder / "error").write_text(f"{type(error).__name__}: {error}"[:300])
"""


def result(folder: Path) -> Any:
    if (folder / "error").exists():
        return {"error": (folder / "error").read_text()}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "out").glob("*.safetensors")):
        tensors |= load_file(file)
    return prints(tensors)


def main() -> None:
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        places = {n: str(p) for n, p in make(root / "models").items()}
        folders = []
        for number, case in enumerate(cases()):
            folders.append(root / str(number))
            folders[-1].mkdir()
            (folders[-1] / "config.yml").write_text(yaml.safe_dump(located(case["config"], places)))
        command = [sys.executable, "-c", IN_PROCESS, *map(str, folders)]
        subprocess.run(command, env=os.environ | ENVIRONMENT, check=True)
        results = {c["name"]: result(f) for c, f in zip(cases(), folders, strict=True)}
    raw = json.dumps({"versions": versions, "results": results}, sort_keys=True).encode()
    OUT.write_bytes(gzip.compress(raw, mtime=0))
    print({n: r["error"] for n, r in results.items() if "error" in r}, len(results), OUT.stat().st_size)


if __name__ == "__main__":
    main()
