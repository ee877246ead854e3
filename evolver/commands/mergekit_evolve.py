"""The command ``evolver mergekit-evolve``: a search as a file of mergekit-evolve and its options say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster import options
from evolver.commands import mergekit_options as mk
from evolver.errors import BadInput

# What mergekit-evolve calls a project where the user names none.
PROJECT = "mergekit-evolve"


def mergekit_evolve(
    config: Annotated[Path, typer.Argument(help="a YAML file of mergekit-evolve")],
    storage_path: Annotated[str | None, typer.Option(help=options.RESULTS)] = None,
    max_fevals: Annotated[int | None, typer.Option(min=1, help="number of candidates; default: 100")] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds that the search may take; default: no limit")] = None,
    sigma0: Annotated[float | None, typer.Option(help="initial step size of CMA-ES; default: 1/6")] = None,
    force_population_size: Annotated[int | None, typer.Option(min=2, help="population of CMA-ES")] = None,
    random_seed: Annotated[int | None, typer.Option(help="seed of all random draws; default: 0")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="largest number of rows in a forward pass")] = None,
    task_search_path: Annotated[list[str] | None, typer.Option(help="folder with lm-eval task files")] = None,
    vllm: Annotated[bool, typer.Option(help="score candidates with vLLM")] = False,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="number of workers, each with a GPU")] = None,
    use_wandb: Annotated[bool, typer.Option("--wandb/--no-wandb", help="send results to Weights & Biases")] = False,
    wandb_project: Annotated[str | None, typer.Option(help="project there; default: mergekit-evolve")] = None,
    wandb_entity: Annotated[str | None, typer.Option(help="user or team there")] = None,
    load_in_8bit: Annotated[bool, typer.Option(help="score candidates as they are in int8")] = False,
    load_in_4bit: Annotated[bool, typer.Option(help="score candidates as they are in q4_0")] = False,
    convert: Annotated[
        Path | None, typer.Option(help="write the configuration to this new file instead of running it")
    ] = None,
    strategy: Annotated[
        Literal["pool", "buffered", "serial"] | None, typer.Option("--strategy", "-s", help=mk.IN_MERGEKIT, hidden=True)
    ] = None,
    in_memory: mk.NoEffect = False, merge_cuda: mk.NoEffect = True, reshard: mk.NoEffect = True,
    save_final_model: mk.NoEffect = True, i_understand_the_depths_of_the_evils_i_am_unleashing: mk.NoEffect = False,
    trust_remote_code: mk.Refused = False, allow_crimes: mk.Refused = False,
) -> None:  # fmt: skip
    """Search as a file of mergekit-evolve says, by CMA-ES. All options of mergekit-evolve are taken.

    `evolver run` takes such a file, too. With --convert it writes the configuration that the file stands for.
    """
    del strategy, in_memory, merge_cuda, reshard, save_final_model, i_understand_the_depths_of_the_evils_i_am_unleashing
    mk.refuse_options({"--trust-remote-code": trust_remote_code, "--allow-crimes": allow_crimes})
    if len(task_search_path or []) > 1:
        raise BadInput("--task-search-path: lm-eval task files are read from one folder; put them into one.")
    if load_in_8bit and load_in_4bit:
        raise BadInput("--load-in-8bit, --load-in-4bit: models are scored in one of the two; give one option.")
    rounding = "int8" if load_in_8bit else "q4_0" if load_in_4bit else None
    wandb = {"project": wandb_project or PROJECT, "entity": wandb_entity}
    sections = {
        "seed": random_seed,
        "budget": _given(candidates=max_fevals, minutes=None if timeout is None else timeout / 60),
        "evaluation": _given(
            batch_size=batch_size, include_path=next(iter(task_search_path or []), None),
            backend="vllm" if vllm else None, quantise=rounding,
        ),
        "pool": _given(num_workers=num_gpus),
        "loggers": {"wandb": _given(**wandb)} if use_wandb else {},
    }  # fmt: skip
    raw = _configuration(config, sections, _given(population=force_population_size), sigma0)
    raise typer.Exit(_written(raw, convert) if convert else _run(raw, config, storage_path))


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _configuration(
    file: Path, sections: Mapping[str, Any], search: Mapping[str, Any], step: float | None
) -> dict[str, Any]:  # fmt: skip
    """The configuration that the file stands for, with what the options say; options hold against the file.

    Raises BadInput for a file of another kind.
    """
    from evolver.config import Config
    from evolver.config.mergekit_evolve import EVALUATIONS, STEP, adopted, is_evolve_file
    from evolver.config.reading import config_at
    from evolver.config.recipes import parsed_recipe

    text = parsed_recipe(config_at(file).text, str(file))
    if not is_evolve_file(text.documents[0]):
        raise BadInput(f"{file}: this is no file of mergekit-evolve, which has genome and tasks; call `evolver run`.")
    ours = {key: value for key, value in text.documents[0].items() if key in Config.model_fields}
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        ours |= {key: {**ours[key], **value} if both else value} if value not in (None, {}) else {}
    if isinstance(ours.get("budget"), dict):
        ours["budget"] = {"candidates": EVALUATIONS, **ours["budget"]}
    found = adopted(text, ours)
    for note in found.notes:
        typer.echo(f"warning: {note}", err=True)
    own = found.raw["search"]
    own |= {**search} | ({} if step is None else {"sigma": own.get("sigma", STEP) * step / STEP})
    return found.raw


def _written(raw: Mapping[str, Any], target: Path) -> int:
    """Write the configuration to a new file, and return the exit status."""
    import yaml

    from evolver.storage import check_target, new_file

    check_target(target, "file", None)
    with new_file(target, None) as file:
        file.write_text(yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True))
    typer.echo(f"wrote {target}")
    return 0


def _run(raw: Mapping[str, Any], file: Path, results: str | None) -> int:
    """Run the configuration, and return the exit status."""
    import yaml

    from evolver.config.reading import ConfigText
    from evolver.driver.early import refuse_early

    given = ConfigText(yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True), str(file))
    refuse_early(given)
    from cluster.job import drive, results_at  # it brings torch
    from evolver.driver.card import FOUND_FILE

    status = drive(given, results, None)
    run = results_at(results).folder(raw["run"])
    if status == 0 and run.exists("best"):
        typer.echo(f"{run.location}/best: the model that mergekit-evolve calls final_model")
        if run.folder("best").exists(FOUND_FILE):
            typer.echo(f"{run.location}/best/{FOUND_FILE}: the file that it calls best_config.yaml")
    return status
