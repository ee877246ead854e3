"""Semantic alignment: what two models' features of the stream say about the tokens of one vocabulary (SeMe).

A head (tokens, width) says which logits a state of the stream has. Its pseudo-inverse S (width, tokens) has a column
for each token: the state that says this token alone, its semantic basis (Gu et al. 2025, SeMe, arXiv 2505.20144).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from evolver.checkpoints.weights import TensorInfo
from evolver.errors import BadInput

# The tensors with a row for each token that may be a head, the first that a model has; the embedding of a model without
# a head, or with a tied one, stands for it.
TOKEN_HEADS = (re.compile(r"(^|\.)lm_head\.weight$"), re.compile(r"(embed_tokens|word_embeddings)\.weight$"))
# A map that is nearer to the identity is rounding.
SAME_WITHIN = 1e-6
# Rows of a head that are float64 at a time.
HEAD_ROWS = 1 << 13


def token_head(headers: Mapping[str, TensorInfo], place: str) -> str:
    """The name of the tensor that says what states mean.

    Raises BadInput that names ``place`` where there is none, or where it has fewer tokens than features, of which some
    would have no meaning then.
    """
    for pattern in TOKEN_HEADS:
        for name in filter(pattern.search, headers):
            tokens, width = headers[name].shape
            if tokens < width:
                raise BadInput(
                    f"{place}: the {tokens} tokens of {name} cannot tell {width} features of the stream apart; write "
                    "method: matching."
                )
            return name
    raise BadInput(
        f"{place}: the model has no tensor with a row for each token, so its features have no meaning that could be "
        "compared; write method: matching."
    )


def semantic_map(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Which of our features their features are: a transport (theirs, ours), as ``put_in_order`` takes it.

    The paper's formulas of the transformation could not be verified; this is a reading. With the semantic bases S₀ of
    the model that stays and S of the other one, the map P = S₀Sᵀ(SSᵀ)⁻¹ takes their bases nearest to ours; it is H₀⁺H
    with the heads H₀ and H. Its polar factor, the nearest map that keeps lengths, turns their stream: what is written
    into the stream and what reads from it are changed alike.

    Args:
        ours, theirs: heads (tokens, width), with the same token in each row.

    Returns None where the map is the identity, as it is of equal heads.
    """
    width = ours.shape[1]
    gram, cross = torch.zeros((2, width, width), dtype=torch.float64)
    for a, b in zip(ours.split(HEAD_ROWS), theirs.split(HEAD_ROWS), strict=True):
        wide = a.double()
        gram += wide.T @ wide
        cross += wide.T @ b.double()
    left, _, right = torch.linalg.svd(torch.linalg.pinv(gram, hermitian=True) @ cross)
    turn = (left @ right).T.contiguous()
    return None if float((turn - torch.eye(width, dtype=torch.float64)).abs().max()) < SAME_WITHIN else turn.float()
