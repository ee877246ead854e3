"""What works with which models: ``make families`` tries it and writes docs/models.md.

``--figures`` measures what reading and checking such models costs, and writes results/benchmarks/models.md. The exit
status is 1 where a family gives a wrong answer, or none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

import torch  # noqa: E402
import toys  # noqa: E402
import yaml  # noqa: E402
from abilities import ABILITIES, TEXTS, Trial, Wrong, trials, write_data  # noqa: E402
from families import FAMILIES  # noqa: E402
from merging import peak_mb  # noqa: E402

MAP, FIGURES = ROOT / "docs" / "models.md", ROOT / "results" / "benchmarks" / "models.md"
KEPT = FIGURES.with_name("models-before.json")
Found = dict[str, dict[str, str | None]]
SEEDS = 3
HEAD = """# What works with which models

`make families` writes this page. It makes tiny random models of each architecture: a base and two fine-tunes, saved by
the class of Transformers itself, in the oldest layout that Transformers still reads (names without the prefix of the
class, `gamma` and `beta`, computed tables, copies of tied tensors), and in shards. Then it does with them what you
would do, by the commands, and compares the outcome with what Transformers and PEFT make of the same folders.

| column | a tick means that |
| --- | --- |
| read | all layouts have the same tensors under the same names, and `evolver explain FOLDER` shows them |
| merge | a merge of different layouts is the one in float64 of what the class loads, and loads without a rest |
| search | `evolver validate` and `evolver run` take the models, and every candidate gets a score |
| evaluate | `evolver evaluate` gives a model the same score in every layout |
| export | `evolver export` writes the winner, which loads in the same way, and scores what the ledger says |
| LoRA | an adapter of the base is merged to what PEFT makes of the two |
| GGUF | `evolver export --gguf` writes the winner, and Transformers reads it back with the same answers |

Without a rest means that the class misses no tensor and finds none that it has no place for. A number stands for the
sentence with which Evolver refuses it, [below](#sentences).

"""


OF_TEXTS = """## Text experts on models that also read images

A tick means that `evolver merge` merges fine-tunes of the text model into the language part of the base, in every
layout, as the reference in float64 does, and that all other tensors are the base's to the bit."""
OF_SENTENCES = """## Sentence encoders

`evolver merge` keeps a folder of sentence-transformers whole ([merging](merging.md#models)). A test loads merged
folders with that library: embeddings equal those of a model built from the mean of the state dicts in float64, the
prompts and modules are the base's, and the weights of a Dense module are merged. The library is no dependency of
Evolver, so `make test` skips this test. To run it, put the library into a folder of its own:

```
.venv/bin/pip install --target FOLDER --no-deps sentence-transformers
PYTHONPATH=FOLDER .venv/bin/python -m pytest tests/oracles/test_sentence_transformers.py
```"""


def try_all(names: Sequence[str], strict: bool) -> tuple[Found, list[str]]:
    """What every family can do, and what is wrong."""
    found, wrong = Found(), list[str]()
    with tempfile.TemporaryDirectory(prefix="families-") as place:
        home = Path(place)
        os.environ |= {"EVOLVER_CACHE": str(home / "cache"), "HF_HOME": str(home / "hf")}
        toys.make_models(home / "toys")
        toys.make_tasks(home / "tasks", home / "toys")
        write_data(home / "data", home / "tasks")
        for number, name in enumerate(names):
            began, folder = time.perf_counter(), home / f"{number}"
            try:
                trial = Trial(FAMILIES[name], folder, home / "data")
                found[name] = trials(trial, strict=strict)
                for seed in range(SEEDS if strict else 0):
                    trial.renamed(seed)
            except Wrong as error:
                wrong.append(str(error))
            except Exception:
                wrong.append(f"{name}: {traceback.format_exc()}")
            said = {k: v or "✓" for k, v in found.get(name, {}).items()}
            print(f"{name}: {time.perf_counter() - began:.1f} s {said or wrong[-1]}", flush=True)
    return found, wrong


def write_map(found: Found) -> None:
    """Write docs/models.md."""
    sentences: dict[str, int] = {}

    def cell(value: str | None) -> str:
        return "✓" if value is None else f"✗ {sentences.setdefault(plain(value), len(sentences) + 1)}"

    lines = [f"| family | class | {' | '.join(ABILITIES)} |", "| --- | --- |" + " --- |" * len(ABILITIES)]
    for name, abilities in found.items():
        cells = " | ".join(cell(abilities[a]) for a in ABILITIES)
        lines.append(f"| {name} | `{FAMILIES[name].class_name}` | {cells} |")
    seeing = {n: row[TEXTS] for n, row in found.items() if TEXTS in row}
    lines += ["", OF_TEXTS, "", "| base | text experts | merge |", "| --- | --- | --- |"]
    lines += [f"| {n} | `{FAMILIES[n].text}` | {cell(said)} |" for n, said in seeing.items()]
    notes = [f"{number}. {sentence}" for sentence, number in sentences.items()]
    lines += ["", OF_SENTENCES]
    MAP.write_text(HEAD + "\n".join([*lines, "", "## Sentences", "", *notes]) + "\n")


def plain(sentence: str) -> str:
    """A sentence without the folders of this call, and without what only names the architecture."""
    said = sentence.replace("…/run.yaml: ", "").replace("…/", "")
    return re.sub(r"(?<=--gguf: a )\w+(?= model)", "…", re.sub(r"(?<=of the kind )[a-z0-9-]+(?=;)", "…", said))


def make_many(folder: Path, tensors: int) -> None:
    """A base and two experts of so many tensors, of a few hundred bytes each: a Llama of many layers, or a mixture."""
    import transformers
    from families import DECODER, MIXTURE, UNTIED

    small = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": len(toys.tokenizer())}
    if tensors < 1000:
        layers = (tensors - 3) // 9
        config = transformers.LlamaConfig(**{**DECODER, **UNTIED, **small, "intermediate_size": 8, "num_hidden_layers": layers})  # fmt: skip  # noqa: E501
        kind = transformers.LlamaForCausalLM
    else:
        more = {"num_experts": 136, "moe_intermediate_size": 8, "head_dim": 8, "num_hidden_layers": 48}
        config = transformers.Qwen3MoeConfig(**{**MIXTURE, **small, **more})
        kind = transformers.Qwen3MoeForCausalLM
    model = kind(config)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        toys.tokenizer().save_pretrained(folder / name)


def validate_seconds(folder: Path, tasks: Path, rounds: int = 5) -> list[float]:
    """Seconds of ``evolver validate``, each in a process of its own."""
    raw = toys.settings(folder, tasks, {})
    raw["experts"] = {n: str(folder / n) for n in ("a", "b")}
    raw["model"]["compute"] = "float32"
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return [timed([sys.executable, "-m", "evolver", "validate", str(folder / "run.yaml")]) for _ in range(rounds)]


def timed(command: Sequence[str]) -> float:
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return time.perf_counter() - began


def merge_memory(folder: Path) -> list[list[str]]:
    """Peak memory of merges of a mixture of experts, above that of the same command on a tiny one."""
    import transformers
    from families import MIXTURE

    rows, peaks = [], {}
    for name, width in (("tiny", 32), ("large", 2048)):
        config = transformers.MixtralConfig(
            **{**MIXTURE, "hidden_size": width, "intermediate_size": width, "num_local_experts": 4, "vocab_size": 300}
        )
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
        for number, which in enumerate(("base", "a", "b")):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.data += 0.01 * torch.randn(parameter.shape[-1])
            model.save_pretrained(folder / name / which)
        del model
        for method, given in (("linear", {}), ("ties", {"density": 0.5})):
            models = [{"model": str(folder / name / m), "parameters": {"weight": 0.5, **given}} for m in ("a", "b")]
            raw = {"merge_method": method, "models": models, "dtype": "bfloat16"}
            if method == "ties":
                raw["base_model"] = str(folder / name / "base")
            (folder / name / f"{method}.yml").write_text(yaml.safe_dump(raw))
            command = [sys.executable, "-m", "evolver", "merge", str(folder / name / f"{method}.yml"), str(folder / name / f"out-{method}")]  # fmt: skip  # noqa: E501
            peaks[name, method] = peak_mb(command)
        size = sum(f.stat().st_size for f in (folder / name / "base").glob("*.safetensors")) / 2**20
    largest = 2048 * 2048 * 2 / 2**20
    for method in ("linear", "ties"):
        above = peaks["large", method] - peaks["tiny", method]
        rows.append([method, f"{size:.0f}", f"{largest:.0f}", f"{above:.0f}", f"{above / largest:.1f}"])
    return rows


def counts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many families have each ability."""
    return {a: sum(row.get(a, "") is None for row in found.values()) for a in ABILITIES}


def kept(found: Found, trial: str | None) -> dict[str, Any]:
    """What was found, in the commit of this folder, and by the files of which commit (None: the same)."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": commit, "trial": trial or commit, "families": len(found), "abilities": counts(found)}


def said_before(before: Mapping[str, Any] | None) -> str:
    """Where the row of an earlier commit is from; without one, where its abilities can be read."""
    if before is None:
        return BEFORE_UNKNOWN
    said = BEFORE.format(**before)
    return said if any(before["abilities"].values()) else f"{said} {BEFORE_NOTHING}"


def figures(after: Found, before: Mapping[str, Any] | None) -> str:
    """The page of figures, in Markdown.

    Args:
        after: what was found now.
        before: what ``kept`` says of an earlier commit.
    """
    before_load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="models-") as place:
        home = Path(place)
        os.environ["EVOLVER_CACHE"] = str(home / "cache")
        toys.make_models(home / "toys")
        toys.make_tasks(home / "tasks", home / "toys")
        seconds = {}
        for count in (300, 20_000):
            make_many(home / f"{count}", count)
            seconds[count] = validate_seconds(home / f"{count}", home / "tasks")
        imports = [timed([sys.executable, "-c", "import torch, lm_eval.models.huggingface, transformers.modeling_utils"]) for _ in range(5)]  # fmt: skip  # noqa: E501
        memory = merge_memory(home / "mixture")
    rows = [["after", *map(str, counts(after).values())]]
    if before is not None:
        rows.insert(0, ["before", *map(str, before["abilities"].values())])
    times = [
        [name, f"{min(found):.1f}", f"{statistics.median(found):.1f}", goal]
        for name, found, goal in (
            ("`evolver validate`, 300 tensors", seconds[300], "2"),
            ("`evolver validate`, 20,019 tensors", seconds[20_000], "5"),
            ("importing torch, Transformers' model code and lm-eval, nothing else", imports, ""),
        )
    ]
    load = f"{before_load:.1f} before the calls and {os.getloadavg()[0]:.1f} after them"
    return PAGE.format(
        families=len(after), before=said_before(before), load=load,
        cores=os.cpu_count(), abilities=table(["", *ABILITIES], rows),
        seconds=table(["", "least, s", "median, s", "goal, s"], times),
        memory=table(["method", "model, MB", "largest tensor, MB", "peak, MB", "peak ÷ largest tensor"], memory),
    )  # fmt: skip


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BEFORE_UNKNOWN = "The abilities before this work are those that the text of issue 21 names."
BEFORE = """The row *before* was measured in commit {commit}, from which the work on issue 21 started, with {families}
families, by this script with `--tolerant --keep`. The script was copied there from commit {trial}, together with
`tests/families.py` and `tests/abilities.py`."""
BEFORE_NOTHING = """Its zeros need a word: every try mixes layouts, and the base
of every search is in the oldest one, so one layout that is refused fails the whole try. In that commit, mixed layouts
were refused in all families, nearly always with "lacks the tensor". Models that one release of Transformers saved were
merged and searched over then as well; this table does not count that."""
PAGE = """# What works with which models: figures

Measured by `make benchmark-models` (`tests/benchmarks/models.py --figures`).

## Families × abilities

So many of {families} families have each ability; [docs/models.md](../../docs/models.md) says which, and what each
ability means. {before}

{abilities}

## Checking a configuration

Wall time of whole commands, five calls of each, with a base and two experts and one task. The tensors hold a few
hundred bytes each, so this is what their number costs, not their size. Look at the load beside the times: on a shared
machine they are upper bounds, and their differences say more than they do themselves.

The load was {load}, on {cores} cores.

{seconds}

## Memory of merging a mixture of experts

Peak of the process's own memory (`RssAnon`; mapped files do not count), above that of the same command on a tiny
mixture. The models are of Mixtral's layout, one tensor for each expert, in bfloat16: a base and two fine-tunes.

{memory}
"""


def main() -> int:
    """Try all families and write the map; or measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these, and write nothing")
    parser.add_argument("--figures", action="store_true", help="also measure, and write results/benchmarks/models.md")
    parser.add_argument("--keep", type=Path, help="write how many families have each ability to this JSON file, too")
    parser.add_argument("--trial", help="with --keep, the commit from which this script was copied into this folder")
    parser.add_argument("--before", type=Path, default=KEPT, help="a file that --keep wrote in an earlier commit")
    parser.add_argument("--tolerant", action="store_true", help="count wrong answers as what does not work")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, wrong = try_all(given.families or list(FAMILIES), not given.tolerant)
    if given.keep:
        given.keep.write_text(json.dumps(kept(found, given.trial), indent=2) + "\n")
    for sentence in wrong:
        print(f"wrong: {sentence}", file=sys.stderr)
    if given.families or wrong or given.tolerant:
        return int(bool(wrong))
    write_map(found)
    if given.figures:
        FIGURES.write_text(figures(found, json.loads(given.before.read_text()) if given.before.exists() else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
