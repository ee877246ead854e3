"""The section ``model`` of a configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section

# Kinds of models that are scored on texts which they go on with.
LANGUAGE_KINDS = ("causal-lm", "seq2seq")
# Kinds of models with a head that is made for their labels.
CLASSIFIER_KINDS = ("classifier", "token-classifier", "image-classifier")
# The words of model.chat_template that name a format of conversations.
CHAT_FORMATS = ("chatml", "llama3", "mistral", "alpaca")
# Short forms of model.align.
AlignmentWord = Literal["none", "auto", "mlp", "heads", "both", "all"]


class TokenEntry(Section):
    """Which row a token has in models that lack it; with ``force``, in all."""

    source: Any = Field(
        None,
        description="a model, or a mapping as in a mergekit file: {kind: zero}, or {kind: model_token, model, token or "
        "token_id}; default: the base, else the mean of the models that have the token",
    )
    force: bool = Field(False, description="give all models this row, also those that have one of their own")


class TokenizerSettings(Section):
    """Where the tokens come from."""

    source: str = Field(
        "union", description="union: the tokens of all models. base: those of the base. expert NAME: those of an expert"
    )
    tokens: dict[str, TokenEntry] = Field(
        default_factory=dict, description="mapping from tokens to which row of the embedding they get"
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        description="the number of rows of the embedding is made a multiple of this by rows that are the mean of the "
        "others",
    )


class AlignmentSettings(Section):
    """Whether and how the hidden units of experts are brought into the order of the base's before they are merged."""

    parts: Literal["mlp", "heads", "both", "all"] = Field(
        "both",
        description="what is ordered. mlp: the hidden units of MLPs. heads: attention heads, and the dimensions of "
        "their values. both: mlp and heads. all: also the features of the stream that all layers read and add to",
    )
    when: Literal["different", "always"] = Field(
        "different",
        description="different: only experts of another ancestry than the base's, whose MLP rows have a mean cosine "
        "below 0.5 with the base's. always: every expert",
    )
    method: Literal["matching", "transport", "semantic"] = Field(
        "matching",
        description="matching: the order in which all weights are most alike (Git Re-Basin). transport: of hidden "
        "units of MLPs, optimal transport between their incoming weights (OTFusion); heads are matched. semantic: the "
        "stream is turned so that its features mean the same tokens (a reading of SeMe); all else is matched",
    )
    regularisation: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="of transport: 0 moves whole units; more mixes units, in units of the largest distance between two "
        "of them (0.06 is the best of Transformer-OT)",
    )
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="of transport: the distance of two units")
    masses: Literal["uniform", "norms"] = Field(
        "uniform", description="of transport that mixes: whether units count alike or in proportion to their norms"
    )

    @property
    def wrong(self) -> str | None:
        """What does not go together in it and what to write instead, if there is something."""
        if self.method == "semantic" and self.parts != "all":
            return "method: semantic is about the stream; write parts: all"
        if self.method != "transport" and self.regularisation > 0:
            return f"regularisation: {self.method} moves whole units; write method: transport, or leave it out"
        if self.regularisation == 0 and self.masses != "uniform":
            return "masses: whole units count alike; write a regularisation above 0, or masses: uniform"
        return None


def alignment_of(word: str, stream: bool = True) -> AlignmentSettings | None:
    """What a word means; None: nothing is aligned.

    Args:
        stream: whether auto may also order the stream, which parts that are kept outside of the model read.
    """
    if word == "auto":
        return AlignmentSettings(parts="all" if stream else "both")
    return None if word == "none" else AlignmentSettings.model_validate({"parts": word, "when": "always"})


class ModelSettings(Section):
    """The base model, from which all experts were fine-tuned, and how models are evaluated and stored."""

    base: str = Field(
        description="the base: its Hugging Face folder, a GGUF file, or a hub id; with an adapter in it: MODEL+ADAPTER"
    )
    kind: Literal["causal-lm", "seq2seq", "classifier", "token-classifier", "image-classifier"] = Field(
        "causal-lm",
        description="the kind of model that base and experts are evaluated as. classifier: labels of texts or pairs of "
        "texts. token-classifier: a tag for each word",
    )
    heads: Literal["merged", "apart", "union"] = Field(
        "merged",
        description="classification heads. merged: heads are merged like any other tensors. apart: "
        "heads are not merged, and each task is scored with the head of one expert. union: heads are merged row by "
        "row, matched by label, so that the model knows the labels of all experts",
    )
    tokenizer: str | TokenizerSettings = Field(
        "union",
        description="tokens of merged models, where the experts' tokens differ from the base's: union, base or expert "
        "NAME, or a mapping with source, tokens and pad_to_multiple_of. union: the tokens of all models. Rows of the "
        "embedding are matched by token; base and experts are scored with their own tokens",
    )
    chat_template: str = Field(
        "auto",
        min_length=1,
        description="chat template of merged models, with its stop tokens and settings of generation. auto: the "
        "base's or, if it has none, the only one that the experts have. base: the base's, if it has one. expert NAME: "
        f"that expert's. A file with a Jinja template, or one of {', '.join(CHAT_FORMATS)}: this template, with the "
        "base's settings",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype that merged weights are rounded to and stored in; auto: the dtype of the base"
    )
    compute: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="dtype of forward passes; auto: the dtype of the weights or float32. Evolver times both where the "
        "workers run, when a run starts, and uses the faster one for the whole run",
    )

    align: str | AlignmentSettings = Field(
        "none",
        description="experts with their hidden units in the order of the base's: none, auto, mlp, heads, both, all, or "
        "a mapping with parts, when, method, regularisation, metric and masses (see alignment.md). auto: all (both, "
        "where heads are not merged) of experts of another ancestry than the base's, as measured. mlp, heads, both, "
        "all: these parts of every expert",
    )
    strict: bool = Field(
        False,
        description="refuse what is a warning otherwise: an adapter that names another base, and a model whose weights "
        "have nothing to do with the base's",
    )

    @property
    def alignment(self) -> AlignmentSettings | None:
        """``align`` in its long form; None: no expert is aligned."""
        return alignment_of(self.align, self.heads == "merged") if isinstance(self.align, str) else self.align

    @property
    def tokens(self) -> TokenizerSettings:
        """``tokenizer`` in its long form."""
        return TokenizerSettings(source=self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer
