"""Any candidate of a run as files to take along: a Hugging Face folder, a LoRA adapter, or a delta against the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.export import export
from evolver.history import History, read_history
from evolver.merging.lora_out import write_delta, write_lora
from evolver.records import Candidate, Recipe, Result
from evolver.run import Prepared, prepare_run, score_again, texts
from evolver.storage import Storage, whole_folder
from evolver.worker import build_materialiser

Warn = Callable[[str], None]


def find(history: History, wanted: str | None) -> tuple[Candidate, Result]:
    """A candidate of the search by its number or the beginning of its recipe's id; default: the best one.

    Raises BadInput where there is none, or several.
    """
    if wanted is None:
        if history.best is None:
            raise BadInput("evolver export: the run has no candidate with a score yet; go on with it first.")
        return history.best
    searched = history.stages["search"]
    numbered = [(c, r) for c, r in searched if wanted == str(c.number)]
    found = numbered or [(c, r) for c, r in searched if c.recipe.id.startswith(wanted)]
    if len({c.recipe.id for c, _ in found}) != 1:
        many = "several candidates of this run go" if found else "no candidate of this run goes"
        raise BadInput(f"--candidate: {many} by {wanted!r}; give a number, or more of a recipe's id.")
    return max(found, key=lambda pair: len(pair[1].items))


def deliver(run: Storage, out: Path, wanted: str | None, say: Warn) -> None:
    """Write a candidate as a Hugging Face folder, and check it: loaded anew, it has to give the ledger's answers.

    Raises BadInput for a run whose models or data are not there any more.
    """
    history = read_history(run)
    candidate, result = find(history, wanted)
    prepared = prepare_run(run)
    outcome = history.outcome()
    best = history.best is not None and candidate.recipe.id == history.best[0].recipe.id
    more = texts(prepared, outcome) if outcome and best else {}
    export(candidate.recipe, build_materialiser(prepared.plan, prepared.opened), out, more)
    agreement = score_again(prepared, out, result.items, default_device())
    say(f"{out}: loaded anew, it gives the ledger's answers on {agreement['equal']} of {agreement['items']} dev items")


def deliver_delta(run: Storage, out: Path, wanted: str | None, say: Warn) -> None:
    """Write a candidate as its difference to the base, tensor by tensor in float32, in one safetensors file.

    Tensors without a difference are left out.
    """
    recipe, prepared = _chosen(run, wanted)
    base = prepared.config.model.base
    with whole_folder(out) as folder:
        count = write_delta(
            _of_base(prepared), _stream(prepared, recipe), folder, {"base_model": base, "recipe": recipe.id}
        )  # fmt: skip
    say(f"{out}: {count} tensors that differ from those of {base}")


def deliver_lora(
    run: Storage, out: Path, wanted: str | None, rank: int | None, energy: float | None, say: Warn
) -> None:  # fmt: skip
    """Write a candidate as a LoRA adapter of the base, of a rank, or of the ranks that keep a share of the difference.

    Raises BadInput where both or none are given, or no adapter can hold the model.
    """
    if (rank is None) == (energy is None):
        raise BadInput("--lora, --energy: give a rank, or the share of the difference to keep, not both.")
    recipe, prepared = _chosen(run, wanted)
    tied = bool(prepared.opened.base.config.get("tie_word_embeddings"))
    model, base = _stream(prepared, recipe), prepared.config.model.base
    with whole_folder(out) as folder:
        made = write_lora(_of_base(prepared), model, folder, base, tied, rank, energy)
    beside = f", {made.whole} tensors whole" if made.whole else ""
    say(f"{out}: rank {made.rank}{beside}; holds {100 * made.share:.1f} % of the squared difference to the base")


def _chosen(run: Storage, wanted: str | None) -> tuple[Recipe, Prepared]:
    return find(read_history(run), wanted)[0].recipe, prepare_run(run)


def _of_base(prepared: Prepared) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in _stream(prepared, prepared.base)}


def _stream(prepared: Prepared, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return build_materialiser(prepared.plan, prepared.opened).stream(recipe)
