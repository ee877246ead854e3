"""Configurations in mergekit's own words, with models by name: every method, and thirty random ones."""

from __future__ import annotations

import random
from typing import Any

Case = dict[str, Any]
# mergekit reads these from a set, whose order depends on hashing: more than two models make its sums unordered.
UNORDERED = {"multislerp", "sce", "ram", "ramplus_tl"}
ONE = {"nearswap", "arcee_fusion"}
SPARSE = {"ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"}


def case(name: str, method: str, models: list[str], base: str | None = "base", each: Any = None, **given: Any) -> Case:
    """One configuration; ``each`` are parameters of the models, by name or one list of mappings."""
    entries = [{"model": m} | ({"parameters": p} if p else {}) for m, p in zip(models, each or [{}] * 9, strict=False)]
    out = {"merge_method": method, "models": entries, "dtype": "float32", "out_dtype": "float32"}
    out |= {"base_model": base} if base else {}
    return {"name": name, "config": out | ({"parameters": given} if given else {})}


def weights(*numbers: Any) -> list[dict[str, Any]]:
    return [{"weight": n} for n in numbers]


THREE = ["e1", "e2", "e3"]
W3 = weights(0.5, 0.3, 0.4)


def fixed() -> list[Case]:
    """Every method with its defaults and with settings of its own."""
    out = [
        case("linear", "linear", THREE, None, W3),
        case("linear raw", "linear", THREE, None, W3, normalize=False),
        case("task_arithmetic", "task_arithmetic", THREE, each=W3),
        case("task_arithmetic lambda", "task_arithmetic", THREE, each=W3, normalize=True, **{"lambda": 0.7}),
        case("ties", "ties", THREE, each=W3),
        case("ties 0.3", "ties", THREE, each=W3, density=0.3),
        case("ties raw", "ties", THREE, each=W3, density=0.5, normalize=False, **{"lambda": 1.3}),
        case("ties rescaled", "ties", THREE, each=W3, density=0.5, rescale=True),
        case("ties each", "ties", THREE, each=[w | {"density": d} for w, d in zip(W3, (0.2, 0.5, 1.0), strict=True)]),
        case("ties negative", "ties", THREE, each=weights(0.5, -0.3, 0.4), density=0.5),
        case("dare_linear 1", "dare_linear", THREE, each=W3, density=1.0),
        case("dare_ties 1", "dare_ties", THREE, each=W3, density=1.0, normalize=True),
        case("della 1", "della", THREE, each=W3, density=1.0),
        case("della_linear 1", "della_linear", THREE, each=W3, density=1.0),
        case("breadcrumbs 1", "breadcrumbs", THREE, each=W3),
        case("breadcrumbs", "breadcrumbs", THREE, each=W3, density=0.7, gamma=0.05),
        case("breadcrumbs full", "breadcrumbs", THREE, each=W3, density=0.98, gamma=0.05),
        case("breadcrumbs rescaled", "breadcrumbs", THREE, each=W3, density=0.5, gamma=0.05, rescale=True),
        case("breadcrumbs_ties", "breadcrumbs_ties", THREE, each=W3, density=0.6, gamma=0.02),
        case("breadcrumbs_ties normal", "breadcrumbs_ties", THREE, each=W3, density=0.6, gamma=0.02, normalize=True),
        case("slerp", "slerp", ["base", "e1"], t=0.3),
        case("slerp gradient", "slerp", ["base", "e1"], t=[0.0, 0.5, 1.0]),
        case("slerp filters", "slerp", ["base", "e1"], t=[{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]),
        case("nuslerp", "nuslerp", ["e1", "e2"], None, weights(0.6, 0.2)),
        case("nuslerp deltas", "nuslerp", ["e1", "e2"], each=weights(0.6, 0.2)),
        case("nuslerp rows", "nuslerp", ["e1", "e2"], each=weights(0.6, 0.2), nuslerp_flatten=False, nuslerp_row_wise=True),
        case("nuslerp columns", "nuslerp", ["e1", "e2"], each=weights(0.6, 0.2), nuslerp_flatten=False),
        case("multislerp", "multislerp", ["e1", "e2"], None, weights(0.6, 0.3)),
        case("multislerp deltas", "multislerp", ["e1", "e2"], each=weights(0.6, 0.3)),
        case("multislerp raw", "multislerp", ["e1", "e2"], None, weights(0.6, 0.3), normalize_weights=False),
        case("karcher", "karcher", THREE, None),
        case("karcher few", "karcher", ["e1", "e2"], None, max_iter=2, tol=1e-9),
        case("model_stock", "model_stock", THREE),
        case("model_stock rows", "model_stock", THREE, filter_wise=True),
        case("sce", "sce", ["e1", "e2"]),
        case("sce 0.3", "sce", ["e1", "e2"], select_topk=0.3),
        case("ram", "ram", ["e1", "e2"], epsilon=0.005),
        case("ramplus_tl", "ramplus_tl", ["e1", "e2"], epsilon=0.01, r=0.5, alpha=0.7),
        case("ramplus_tl clipped", "ramplus_tl", ["e1", "e2"], epsilon=0.005, r=0.5, alpha=0.2),
        case("nearswap", "nearswap", ["base", "e1"], t=0.004),
        case("arcee_fusion", "arcee_fusion", ["base", "e1"]),
        case("passthrough", "passthrough", ["e1"], None),
        case("passthrough scale", "passthrough", ["e1"], None, [{"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}]),
        case("gradients", "task_arithmetic", THREE, each=weights([0.0, 1.0], [1.0, 0.2, 0.5], 0.3)),
        case("filters", "ties", THREE, each=weights([{"filter": "self_attn", "value": 0.9}, {"value": 0.1}], 0.3, 0.4), density=0.5),
    ]  # fmt: skip
    stack = {"merge_method": "passthrough", "dtype": "float32", "out_dtype": "float32", "slices": [
        {"sources": [{"model": "e1", "layer_range": [0, 3]}]},
        {"sources": [{"model": "e2", "layer_range": [1, 4]}]},
    ]}  # fmt: skip
    blend = {"merge_method": "linear", "dtype": "float32", "out_dtype": "float32", "slices": [
        {"sources": [{"model": m, "layer_range": [0, 2], "parameters": {"weight": [0.2, 0.8]}} for m in ("e1", "e2")]},
        {"sources": [{"model": m, "layer_range": [2, 4], "parameters": {"weight": w}} for m, w in (("e1", 1), ("e3", 2))]},
    ]}  # fmt: skip
    # mergekit rounds these formulas in float32 at every step; in float64 it says what they mean.
    wide = [c for c in out if c["config"]["merge_method"] in ("multislerp", "karcher")]
    out += [
        {"name": f"{c['name']} 64", "config": c["config"] | dict.fromkeys(("dtype", "out_dtype"), "float64")}
        for c in wide
    ]
    return [*out, {"name": "stack", "config": stack}, {"name": "blend", "config": blend}, *by_place(), *ignored()]


def ignored() -> list[Case]:
    """Parameters that a method does not use, or that change nothing, as files in the wild have them."""
    two = weights(0.6, 0.4)
    return [
        case("ignored slerp", "slerp", ["base", "e1"], each=two, t=0.35),
        case("ignored sce", "sce", ["e1", "e2"], each=two, select_topk=0.5, density=0.3),
        case("ignored ram", "ram", ["e1", "e2"], each=two, epsilon=0.005),
        case("ignored ramplus_tl", "ramplus_tl", ["e1", "e2"], each=two, epsilon=0.005, r=0.05, alpha=1.0),
        case("ignored model_stock", "model_stock", ["e1", "e2"], each=two),
        case("ignored model_stock rows", "model_stock", ["e1", "e2"], each=two, filter_wise=True),
        case("ignored arcee_fusion", "arcee_fusion", ["base", "e1"], each=two, t=0.5),
        case("ignored nearswap", "nearswap", ["base", "e1"], each=two, t=0.004),
        case("ignored karcher", "karcher", ["e1", "e2"], each=two, max_iter=5, tol=1e-5),
        case("ignored linear", "linear", ["e1", "e2"], None, two, density=0.5, int8_mask=True),
        case("ignored passthrough", "passthrough", ["e1"], None, [{"scale": 0.5, "weight": 0.3}]),
        case("eps of multislerp", "multislerp", ["e1", "e2"], None, two, eps=1e-8),
        case("nuslerp of weights that cancel", "nuslerp", ["e1", "e2"], each=weights(-1.0, 1.0)),
    ]


def sliced(name: str, method: str, *parts: Any, base: str | None = None, **given: Any) -> Case:
    """A configuration of slices; a part is its sources, (model, first layer, end, parameters), and its parameters."""
    slices = []
    for sources, parameters in parts:
        entries = [{"model": m, "layer_range": [a, b], "parameters": p} for m, a, b, p in sources]
        slices.append({"sources": entries, "parameters": parameters})
    out = {"merge_method": method, "slices": slices, "dtype": "float32", "out_dtype": "float32", "parameters": given}
    return {"name": name, "config": out | ({"base_model": base} if base else {})}


def by_place() -> list[Case]:
    """Settings of every form in every place, and what counts where the nearest one says nothing about a tensor."""

    def only(part: str, value: Any) -> list[dict[str, Any]]:
        return [{"filter": part, "value": value}]

    first = ([("e1", 0, 2, {"weight": [0.1, 0.9]}), ("e2", 0, 2, {"weight": only("layers.1.", 0.7)})], {"weight": 0.4})
    # The layers 1 and 2 become 2 and 3 of the model.
    second = (
        [("e1", 1, 3, {"weight": [*only("layers.1.", 0.9), *only("layers.3.", 5.0)]}), ("e3", 2, 4, {"weight": only("mlp", [0.2, 0.6])})],
        {"weight": [*only("self_attn", 0.3), {"value": [0.5, 0.6]}]},
    )  # fmt: skip
    pair = [("base", 1, 3, {}), ("e4", 1, 3, {})]
    own_base = sliced("place base of a slice", "slerp", ([("base", 0, 2, {}), ("e4", 0, 2, {})], {}), ([("e2", 2, 4, {}), ("e1", 2, 4, {})], {}), base="base", t=0.3)  # fmt: skip
    own_base["config"]["slices"][1]["base_model"] = "e1"
    modules = {"default": {"models": [{"model": m, "parameters": {"weight": only("mlp", 0.7)}} for m in THREE], "parameters": {"weight": only("self_attn", 0.2), "density": only("mlp", 0.3)}}}  # fmt: skip
    return [
        sliced("place slices", "linear", first, second, weight=9.0),
        sliced("place slices last", "linear", second, first, weight=9.0),
        sliced("place by output", "slerp", ([("base", 0, 2, {}), ("e4", 0, 2, {})], {"t": 0.2}), (pair, {"t": only("layers.3.", 0.9)}), base="base", t=[0.3, 0.5]),
        sliced("place one layer", "slerp", ([("base", 0, 1, {}), ("e4", 0, 1, {})], {}), (pair, {"t": only("layers.1.", 0.9)}), base="base", t=[0.3, 0.5]),
        sliced("place task vectors", "ties", ([("base", 1, 3, {}), ("e1", 1, 3, {"weight": [0.2, 0.8]}), ("e2", 0, 2, {"density": only("layers.0.", 0.2)})], {"density": only("mlp", 0.4)}), base="base", weight=0.5, density=0.9, normalize=[True, False]),
        case("place falls through", "ties", THREE, each=weights(only("mlp", 0.9), [*only("q_proj", 0.5), *only("layers.2.", [0.1, 0.7])], 0.4), weight=[*only("self_attn", 0.3), {"value": [0.2, 0.6]}], density=only("mlp", [0.2, 0.4])),
        case("place one condition", "task_arithmetic", THREE, each=weights({"filter": "mlp", "value": 0.9}, [], 0.4), weight={"value": 0.2}, **{"lambda": [*only("lm_head", 0.5), *only("norm", 2.0)]}),
        case("place flags", "ties", THREE, each=W3, density=0.5, normalize=[True, True, False], rescale=only("mlp", True)),
        case("place counts", "karcher", THREE, None, max_iter=[1, 4]),
        case("place stars", "linear", THREE, None, weights([*only("*", 0.3), *only("mlp", 0.9)], 0.2, 0.1)),
        case("place base too", "linear", THREE, "base", weight=[1.0, 2.0]),
        case("place base too, weighed", "linear", [*THREE, "base"], "base", weights(0.4, 0.3, 0.2, 0.6)),
        case("place karcher of base too", "karcher", ["e1", "e2"], "base"),
        {"name": "place module", "config": {"merge_method": "ties", "base_model": "base", "dtype": "float32", "out_dtype": "float32", "modules": modules, "parameters": {"weight": 0.4, "density": 0.6}}},
        own_base,
    ]  # fmt: skip


def drawn(count: int = 30) -> list[Case]:
    """Random methods with random settings."""
    rng = random.Random(20)
    return [_draw(rng, f"random {i}") for i in range(count)]


def _draw(rng: random.Random, name: str) -> Case:
    def number(low: float, high: float) -> float:
        return round(rng.uniform(low, high), 3)

    def value(low: float, high: float) -> Any:
        kind = rng.randrange(4)
        if kind == 0:
            return [number(low, high) for _ in range(rng.randint(2, 4))]
        if kind == 1:
            return [{"filter": rng.choice(["mlp", "self_attn", "norm"]), "value": number(low, high)}, {"value": number(low, high)}]  # fmt: skip
        return number(low, high)

    method = rng.choice(["linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "slerp", "nuslerp", "model_stock", "sce", "ram", "nearswap"])  # fmt: skip
    if method == "slerp":
        return case(name, method, ["base", "e4"], t=value(0.05, 0.95))
    if method == "nearswap":
        return case(name, method, ["base", "e4"], t=value(0.001, 0.02))
    if method == "model_stock":
        return case(name, method, rng.sample(["e1", "e2", "e3", "e4", "e5"], rng.randint(2, 4)))
    if method in UNORDERED:
        setting = {"select_topk": number(0.1, 0.9)} if method == "sce" else {"epsilon": number(0.001, 0.01)}
        return case(name, method, rng.sample(["e1", "e2", "e3", "e4", "e5"], 2), **setting)
    models = rng.sample(["e1", "e2", "e3", "e4", "e5"], 2 if method == "nuslerp" else rng.randint(2, 5))
    given: dict[str, Any] = {}
    if method in SPARSE:
        given = {"density": 1.0 if method == "dare_ties" else value(0.1, 0.95), "lambda": value(0.3, 1.5)}
        given |= {"normalize": rng.random() < 0.5, "rescale": rng.random() < 0.5}
    if method.startswith("breadcrumbs"):
        given["gamma"] = number(0.02, 0.1)
    return case(name, method, models, None if method == "linear" else "base", [{"weight": value(0.1, 1.0)} for _ in models], **given)  # fmt: skip


def cases() -> list[Case]:
    return fixed() + drawn()


def located(config: Any, places: dict[str, str]) -> Any:
    """The configuration with folders instead of names."""
    if isinstance(config, dict):
        return {k: places.get(v, v) if k in ("model", "base_model") else located(v, places) for k, v in config.items()}
    return [located(v, places) for v in config] if isinstance(config, list) else config
