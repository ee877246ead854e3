"""The export of any candidate of a run: a Hugging Face folder, a LoRA adapter, a delta against the base, or
one GGUF file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolver.checkpoints.adapted import model_below
from evolver.checkpoints.gguf import seal as gguf_seal
from evolver.checkpoints.gguf import writer as gguf_out
from evolver.checkpoints.gguf.keys import OPTION
from evolver.checkpoints.gguf.reader import EXACT_TYPES
from evolver.checkpoints.lora_out import is_tied, is_transposed, write_delta, write_lora
from evolver.driver.card import companion_files, companion_files_of
from evolver.driver.check import score_again
from evolver.driver.prepare import Prepared, materialiser_of, materials_of, prepare_run
from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.merging.companions import TOKENIZER
from evolver.merging.export import beside_of, export, merged_config, write_heads
from evolver.merging.materialise import Materialiser
from evolver.records import Candidate, Result
from evolver.records.depth import layer_origins
from evolver.records.recipe import Recipe
from evolver.report.text import as_served
from evolver.runs.history import History, read_history
from evolver.storage import Storage, check_export, check_target, exported_folder, new_file
from evolver.storage.references import parts_of

Warn = Callable[[str], None]


def find(history: History, wanted: str | None) -> tuple[Candidate, Result]:
    """A candidate of the search by its number or the beginning of its recipe's id; default: the recommended one.

    Raises BadInput where there is none, or several.
    """
    if wanted is None:
        if history.recommended is None:
            raise BadInput(
                "evolver export: no candidate of the run has a score yet; continue the run first (evolver resume)."
            )
        return history.recommended
    searched = history.stages["search"]
    numbered = [(c, r) for c, r in searched if wanted == str(c.number)]
    found = numbered or [(c, r) for c, r in searched if c.recipe.id.startswith(wanted)]
    if len({c.recipe.id for c, _ in found}) != 1:
        many = "several candidates of this run match" if found else "no candidate of this run matches"
        raise BadInput(
            f"--candidate: {many} {wanted!r}; give the number of a candidate, or more characters of its recipe's id."
        )
    return max(found, key=lambda pair: len(pair[1].items))


def deliver(run: Storage, out: Path, wanted: str | None, say: Warn, force: bool = False) -> None:
    """Write a candidate as a Hugging Face folder, load it again, and check that it gives the answers in the ledger.

    Args:
        force: take the place of an earlier export.

    Raises BadInput if the run's models or data are not there any more, or if something else is at ``out``.
    """
    check_export(out, force)
    history = read_history(run)
    candidate, result = find(history, wanted)
    prepared = prepare_run(run)
    outcome = history.outcome()
    best = outcome is not None and candidate.recipe.id == outcome.recommended.recipe.id
    more = (
        companion_files(prepared, outcome)
        if outcome and best
        else companion_files_of(prepared, history.about, candidate, result)
    )
    beside = beside_of(prepared.opened.base)
    for sentence in beside.warnings:
        say(f"warning: {sentence}")
    materialiser, companions = materials_of(prepared, candidate.recipe)
    with exported_folder(out, force) as folder:
        export(candidate.recipe, materialiser, folder, more, companions=companions)
        beside.copy_to(folder)
        write_heads(folder, prepared.opened.placed_heads)
    agreement = score_again(prepared, out, result.items, default_device(), order=result.order)
    say(
        f"{out}: the model was loaded again and gives the answers in the ledger on {agreement['equal']} of "
        f"{agreement['items']} dev items"
    )
    if served := as_served(prepared.config.evaluation):
        say(f"{out}: {served} The weights in this folder are not quantised; quantise them before you deploy them.")


def deliver_delta(run: Storage, out: Path, wanted: str | None, say: Warn, force: bool = False) -> None:
    """Write a candidate as its difference to the base, tensor by tensor in float32, in one safetensors file.

    Tensors without a difference are left out.
    """
    check_export(out, force)
    recipe, prepared = _chosen(run, wanted)
    base = prepared.config.model.base
    with exported_folder(out, force) as folder:
        count = write_delta(
            _of_base(prepared), _stream(prepared, recipe), folder, {"base_model": base, "recipe": recipe.id}
        )  # fmt: skip
    say(f"{out}: {count} tensors that differ from those of {base}")


def deliver_lora(
    run: Storage, out: Path, wanted: str | None, rank: int | None, energy: float | None, say: Warn,
    force: bool = False,
) -> None:  # fmt: skip
    """Write a candidate as a LoRA adapter of the base, of a rank, or of the ranks that keep a share of the difference.

    Raises BadInput where both or none are given, or no adapter can hold the model.
    """
    if (rank is None) == (energy is None):
        raise BadInput("--lora, --energy: give a rank, or the share of the difference to keep, not both.")
    check_export(out, force)
    recipe, prepared = _chosen(run, wanted)
    config = prepared.opened.base.config
    tied, transposed = is_tied(config), is_transposed(config)
    model, base = _stream(prepared, recipe), parts_of(prepared.config.model.base)[0]
    with exported_folder(out, force) as folder:
        made = write_lora(_of_carrier(prepared), model, folder, base, tied, rank, energy, transposed)
    say(f"{out}: {made.said}")


def deliver_gguf(
    run: Storage, out: Path, wanted: str | None, kind: str, say: Warn, force: bool = False
) -> None:  # fmt: skip
    """Write a candidate as one GGUF file of a type such as ``q8_0``.

    Before it gets its name, every tensor of it is read anew, and what Transformers makes of it is asked for the
    ledger's answers, of which a narrow type may cost some.

    Raises BadInput for what such a file cannot hold, and where it cannot be written.
    """
    kind = kind.lower()
    gguf_out.check_type(kind, out)
    replaced = gguf_seal.is_sealed if force else None
    check_target(out, "file", replaced)
    candidate, result = find(read_history(run), wanted)
    prepared = prepare_run(run)
    if prepared.config.model.kind != "causal-lm":
        raise BadInput(
            f"{OPTION}: only models of the kind causal-lm can be written as GGUF, and this run merges models of the "
            f"kind {prepared.config.model.kind}; leave the option out."
        )
    materialiser, companions = materials_of(prepared, candidate.recipe)
    with (
        companions.shown() as beside,
        new_file(out, replaced) as file,
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch,
    ):
        model = _model(prepared, candidate.recipe, materialiser, beside)
        written = gguf_out.write_gguf(model, kind, file)
        gguf_out.verify(file, written)
        exact = prepared.config.evaluation.quantise is not None
        folder = _read_back(model, file, Path(scratch) / "model", beside, exact)
        agreement = score_again(prepared, folder, result.items, default_device(), quantised=True, order=result.order)
        gguf_seal.seal(file)
    say(
        f"{out}: {len(written.digests)} tensors as {kind}, each read back and compared; loaded by Transformers, the "
        f"model gives the answers in the ledger on {agreement['equal']} of {agreement['items']} dev items"
    )
    if (served := as_served(prepared.config.evaluation)) and kind != prepared.config.evaluation.quantise:
        say(f"{out}: {served} This file is {kind}, so its scores may be others.")
    for note in written.notes:
        say(f"{out}: {note}")


def _model(prepared: Prepared, recipe: Recipe, materialiser: Materialiser, beside: Path) -> gguf_out.FileContent:
    infos = {name: materialiser.info(recipe, name) for name in materialiser.names(recipe)}
    return gguf_out.FileContent(
        merged_config(recipe, materialiser), infos, materialiser.stream(recipe), beside,
        prepared.config.run, f"merged by evolver, recipe {recipe.id}",
    )  # fmt: skip


def _read_back(model: gguf_out.FileContent, file: Path, folder: Path, beside: Path, exact: bool) -> Path:
    """What Transformers makes of a file, with the run's tokenizer (``beside``): it knows the ways of cutting texts that
    files name in part only. The weights are in the run's dtype or, if ``exact``, in float32.
    """
    own = next(info.dtype for info in model.infos.values() if info.dtype.is_floating_point)
    dtype = EXACT_TYPES["F32"] if exact else own
    gguf_out.read_back(file, folder, dtype)
    for name in TOKENIZER:
        if (beside / name).exists():
            shutil.copyfile(beside / name, folder / name)
    return folder


def _chosen(run: Storage, wanted: str | None) -> tuple[Recipe, Prepared]:
    """A candidate, to be written as its difference to the base.

    Raises BadInput where their tokens or their layers differ, too.
    """
    recipe, prepared = find(read_history(run), wanted)[0].recipe, prepare_run(run)
    if prepared.opened.companions.tokens is not None:
        raise BadInput(
            "--lora, --energy, --delta: the merged models of this run have other tokens than the base, and the "
            "difference to it has no place for them; export the whole model."
        )
    depth = prepared.opened.base.layers
    if [origin.base for origin in layer_origins(recipe, depth)] != list(range(depth)):
        raise BadInput(
            "--lora, --energy, --delta: this model has other layers than the base, or has them in another order, so it "
            "is no difference to the base; export the whole model."
        )
    return recipe, prepared


def _of_base(prepared: Prepared) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in _stream(prepared, prepared.base)}


def _of_carrier(prepared: Prepared) -> dict[str, Any]:
    """The model that PEFT can put an adapter onto: the base, without an adapter that it has itself."""
    tensors, below = _of_base(prepared), model_below(prepared.opened.base)
    if below is prepared.opened.base:
        return tensors
    return {n: below.tensor(n).to(t.dtype) if n in below.headers else t for n, t in tensors.items()}


def _stream(prepared: Prepared, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    return materialiser_of(prepared).stream(recipe)
