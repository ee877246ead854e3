"""Train the demo's four experts, pack each into a small adapter, and measure what lies in `experts/`.

Run `python configs/demo/make_experts.py` after `prepare_demo.py`. All weights but the embeddings are trained; of what a
matrix learns, the adapter keeps the part of the largest singular values.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prepare_demo import BASE
from safetensors.torch import load_file, save_file

from evolver.checkpoints.lora_out import write_lora
from evolver.errors import BadInput
from evolver.storage import whole_folder
from evolver.training.experts import make_experts
from evolver.training.settings import load_pool
from evolver.training.show import show
from evolver.training.table import measure

HERE = Path(__file__).parent
EXPERTS = HERE / "experts"
RANK = 40


def pack(base: Path, expert: Path, target: Path) -> None:
    """Write an expert as a low-rank difference from its base, in half precision: 1.8 of 70 MB."""
    origin, trained = (load_file(folder / "model.safetensors") for folder in (base, expert))
    with whole_folder(target) as folder:
        packed = write_lora(origin, trained.items(), folder, BASE, tied=False, rank=RANK)
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        (folder / "training.json").write_bytes((expert / "training.json").read_bytes())
    print(f"{target.name}: {packed.share:.0%} of the squared difference kept", flush=True)


def main() -> int:
    """Train what is missing, pack it, and print a table of what the packed experts are good at."""
    try:
        pool, told = load_pool(HERE / "experts.yaml"), show()
        folders = make_experts(pool, told)
        told.close()
        packed = {name: EXPERTS / name for name in pool.experts}
        for name, target in packed.items():
            pack(folders["base"], folders[name], target)
        table = measure(pool, {"base": folders["base"], **packed})
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
