"""A tokenizer as keys of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evolver.checkpoints.gguf.keys import INSTEAD, OPTION
from evolver.errors import BadInput

SPACE = "▁"  # how SentencePiece writes one
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _cut(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# What llama.cpp calls a way to cut a text into the pieces in which byte pairs are merged: the normalizer, the cuts, and
# whether a piece that is a token stays whole whatever the merges say. A file gives the name only, so a tokenizer gets
# one if it is defined in exactly this way. Any other is refused: under a wrong name ("default" is one of many) the file
# would load, and number texts otherwise than the model was trained on. NFC is the name's only loss: llama.cpp does not
# normalize, so a text that is not in that form has other numbers there.
FAMILIES: dict[str, tuple[str | None, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [BYTES | {"use_regex": True}], False),
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False),
    "llama-bpe": (
        None,
        [_cut(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES],
        True,
    ),
    "qwen2": (
        "NFC",
        [_cut(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES],
        False,
    ),
}  # fmt: skip


def add_words(writer: Any, folder: Path, rows: int, config: Any) -> None:
    """Add the tokenizer in ``folder`` to a file, with a token for each of the embedding's rows.

    Raises BadInput for a tokenizer that such a file cannot hold.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise BadInput(f"{OPTION}: {folder} has no fast tokenizer (tokenizer.json); save one there, and export again.")
    words = AutoTokenizer.from_pretrained(folder)
    raw = json.loads(words.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise BadInput(f"{OPTION}: the tokenizer of {folder} is a {raw['model']['type']} and not BPE; {INSTEAD}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in raw["model"]["merges"]]
    known = {i: t for t, i in words.get_vocab().items() if i < rows}
    tokens = [known.get(i, f"[PAD{i}]") for i in range(rows)]
    if raw["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_space_prefix(raw, folder))
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_family(raw, folder))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(_types(tokens, known, raw, words.unk_token))
    _add_special_tokens(writer, words, rows, config)
    _add_ends(writer, words, folder)
    _add_template(writer, words.chat_template)


def _family(raw: Mapping[str, Any], folder: Path) -> str:
    normalizer = [n["type"] for n in _parts(raw["normalizer"], "normalizers")]
    cuts = [{k: v for k, v in p.items() if k != "trim_offsets"} for p in _parts(raw["pre_tokenizer"], "pretokenizers")]
    whole = raw["model"].get("ignore_merges", False)
    for name, definition in FAMILIES.items():
        if definition == (normalizer[0] if normalizer else None, cuts, whole) and len(normalizer) < 2:
            return name
    raise BadInput(
        f"{OPTION}: the tokenizer of {folder} splits texts in another way than {', '.join(FAMILIES)}, and a GGUF file "
        f"can only name one of these; {INSTEAD}"
    )


def _has_space_prefix(raw: Mapping[str, Any], folder: Path) -> bool:
    """Whether a space is put before a text. llama.cpp does so before any, like SentencePiece and its normalizer here;
    Metaspace leaves out texts that begin with one, which are the only ones that have other numbers there.
    """
    normalizer = _parts(raw["normalizer"], "normalizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if raw["pre_tokenizer"] is None and normalizer in ([{"type": "Prepend", "prepend": SPACE}, replace], [replace]):
        return len(normalizer) == 2
    cuts = raw["pre_tokenizer"] or {}
    if not normalizer and {k: cuts.get(k) for k in ("type", "replacement", "split")} == {
        "type": "Metaspace", "replacement": SPACE, "split": False,
    }:  # fmt: skip
        return bool(cuts["prepend_scheme"] != "never")
    raise BadInput(f"{OPTION}: the tokenizer of {folder} treats spaces unlike SentencePiece; {INSTEAD}")


def _parts(step: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A step of the tokenizer as a list of plain ones."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [dict(step)]


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores that put merges in their order: llama.cpp joins the neighbours that make the token of the highest."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _types(tokens: Sequence[str], known: Mapping[int, str], raw: Mapping[str, Any], unknown: str | None) -> list[int]:
    """What each token is: plain, special, looked for in texts as a whole, or none at all; in SentencePiece's, a byte,
    or what stands for the unknown.
    """
    from gguf import TokenType

    pieces = bool(raw["model"].get("byte_fallback"))
    special = {t["content"]: t["special"] for t in raw["added_tokens"]}
    bytes_ = {f"<0x{b:02X}>" for b in range(256)} if pieces else set()

    def kind(number: int, token: str) -> int:
        if number not in known:
            return int(TokenType.UNUSED)
        if token in special:
            own = TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
            return int(TokenType.UNKNOWN if pieces and token == unknown else own)
        return int(TokenType.BYTE if token in bytes_ else TokenType.NORMAL)

    return [kind(number, token) for number, token in enumerate(tokens)]


def _add_special_tokens(writer: Any, words: Any, rows: int, config: Any) -> None:
    """Those that the tokenizer names, or else the model: llama.cpp has numbers of its own for any that is missing."""
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        number = getattr(words, f"{name}_token_id", None)
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < rows:
            getattr(writer, f"add_{name}_token_id")(number)


def _add_ends(writer: Any, words: Any, folder: Path) -> None:
    """Whether a text gets a first and a last token, as seen from one."""
    bos, eos = [words.bos_token_id], [words.eos_token_id]
    bare, whole = words("a", add_special_tokens=False).input_ids, words("a").input_ids
    front, back = whole[:1] == bos != bare[:1], whole[-1:] == eos != bare[-1:]
    if whole != bos * front + bare + eos * back:
        raise BadInput(
            f"{OPTION}: the tokenizer of {folder} puts other tokens around a text than bos and eos; {INSTEAD}"
        )
    writer.add_add_bos_token(front)
    writer.add_add_eos_token(back)


def _add_template(writer: Any, template: str | Mapping[str, str] | None) -> None:
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
