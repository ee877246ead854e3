"""What is found out from gradients, example by example: Fisher information and importance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from evolver.errors import BadInput
from evolver.evaluation.collectors import SampledItems, collector
from evolver.evaluation.examples import Example, GradientTerm
from evolver.evaluation.live import LiveModel
from evolver.evaluation.losses import differentiable

# Adds one gradient of a parameter to its total, in place: (total, parameter, gradient, weight), flat, of equal shapes.
Add = Callable[[Tensor, Tensor, Tensor, float], object]


@collector("fisher", gradients=True)
def fisher_information(live: LiveModel, items: SampledItems) -> Iterator[tuple[str, Tensor]]:
    """The diagonal of the Fisher information of every floating parameter (Matena and Raffel 2022, section 3.1).

    E_x E_{y~p(y|x)}[(∂ log p(y|x)/∂θ)²], squared example by example, float32, in the shape of the tensor. Of a
    classifier the expectation is the sum over all labels; where a model answers at many places, as language models do
    for every next token, one answer is drawn (see ``ManyLabels``).
    """
    yield from _per_example(
        live, items.examples(), lambda e, logits, seed: e.answer.expected(logits, seed), _add_square
    )


@collector("fisher_empirical", gradients=True, observed=True)
def fisher_empirical(live: LiveModel, items: SampledItems) -> Iterator[tuple[str, Tensor]]:
    """The same with the observed answers y instead of those that the model expects: E_x[(∂ log p(y|x)/∂θ)²]."""
    yield from _per_example(live, items.examples(), lambda e, logits, _: e.answer.empirical(logits), _add_square)


@collector("importance", gradients=True, observed=True)
def importance(live: LiveModel, items: SampledItems) -> Iterator[tuple[str, Tensor]]:
    """E_x |θ · ∂L/∂θ| of every floating parameter, L being -log p of the observed answer (SNIP, Lee et al. 2019)."""
    yield from _per_example(live, items.examples(), lambda e, logits, _: e.answer.empirical(logits), _add_size)


def _add_square(total: Tensor, _: Tensor, gradient: Tensor, weight: float) -> None:
    total.addcmul_(gradient, gradient, value=weight)


def _add_size(total: Tensor, parameter: Tensor, gradient: Tensor, weight: float) -> None:
    total.add_((parameter * gradient).abs_(), alpha=weight)


def _per_example(
    live: LiveModel, examples: Iterable[Example], terms: Callable[[Example, Tensor, int], list[GradientTerm]], add: Add
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The mean over the examples of what is added for each of their terms, by the tensors' names in the checkpoint.

    Raises FloatingPointError where outputs or gradients are not finite, and BadInput where no example has an answer
    that the model knows.
    """
    with _with_sparse_gradients(live) as parameters, torch.inference_mode(False), torch.enable_grad():
        totals = {n: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for n, p in parameters.items()}
        answered = 0
        for number, example in enumerate(examples):
            if example.head is not None:
                live.use(example.head)
            logits = live.module(**example.inputs).logits
            if not logits.isfinite().all():
                raise FloatingPointError("the model's outputs are not finite")
            found = terms(example, logits, number)
            answered += bool(found)
            _add_terms(found, parameters, totals, add)
    if not answered:
        raise BadInput("statistics: no item has an answer that the model knows; choose other tasks.")
    for name, (parameter, part) in live.parameters().items():
        if parameter in totals:
            total = totals[parameter] if part is None else part.within(totals[parameter])
            if not total.isfinite().all():
                raise FloatingPointError(f"the gradients of {name} are not finite")
            yield name, (total / answered).cpu().contiguous()


def _add_terms(
    found: Sequence[GradientTerm], parameters: dict[str, nn.Parameter], totals: dict[str, Tensor], add: Add
) -> None:
    """Add the gradients of one example's terms to the totals. Of an embedding, only the rows that were read have
    some.
    """
    for left, (weight, scalar) in enumerate(reversed(found), 1 - len(found)):
        gradients = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=left < 0, allow_unused=True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is None:
                    continue
                if not gradient.is_sparse:
                    add(totals[name], parameter, gradient.float(), weight)
                    continue
                gradient = gradient.coalesce()
                rows = gradient.indices()[0]
                few = totals[name][rows]
                add(few, parameter[rows], gradient.values().float(), weight)
                totals[name][rows] = few


@contextlib.contextmanager
def _with_sparse_gradients(live: LiveModel) -> Iterator[dict[str, nn.Parameter]]:
    """The floating parameters of the model by their names in it, of which gradients can be taken inside the context.

    Raises BadInput for a model whose weights are no floating numbers.
    """
    named = dict(live.module.named_parameters(remove_duplicate=False))
    wanted = {parameter for parameter, _ in live.parameters().values() if parameter in named}
    for name in sorted(wanted):
        if not named[name].is_floating_point():
            raise BadInput(
                f"model.base: {name} of {live.folder} is quantised ({named[name].dtype}), so it has no gradient; "
                "choose a merge method without statistics of gradients, or dequantise the model first."
            )
    parameters = {n: named[n] for n in named if n in wanted}
    embeddings = [m for m in live.module.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    with differentiable(live, list(parameters)):
        for module in embeddings:
            module.sparse = True
        try:
            yield parameters
        finally:
            for module in embeddings:
                module.sparse = False
