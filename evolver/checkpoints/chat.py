"""Chat templates: how a conversation is written down for a model, and which tokens end an answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evolver.checkpoints.weights import read_json, vocabulary_in
from evolver.errors import BadInput, cause_of, nearest, refuse_special
from evolver.storage.paths import expand

CHAT_FILE, TOKENIZER_SETTINGS, GENERATION_FILE = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)
# An older file for the same keys as those of SPECIAL, which some folders still have.
SPECIAL_FILE = "special_tokens_map.json"
# Keys of tokenizer_config.json that templates use, or that tell where a text ends.
SPECIAL = ("bos_token", "eos_token", "pad_token")
# Keys that generation_config.json and config.json share.
SPECIAL_IDS = tuple(f"{key}_id" for key in SPECIAL)
EXPERT = "expert "


@dataclass(frozen=True)
class NamedTemplate:
    """A format that is simple enough to be written down from its description.

    Attributes:
        text: Jinja.
        end: the token that ends each turn; None: the tokenizer's own last token of texts.
    """

    text: str
    end: str | None = None


NAMED = {
    "chatml": NamedTemplate(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": NamedTemplate(
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": NamedTemplate(
        "{{ bos_token }}{% set system = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set system.text = message['content'] ~ '\n\n' %}"
        "{% elif message['role'] == 'user' %}[INST] {{ system.text }}{{ message['content'] }} [/INST]"
        "{% set system.text = '' %}{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": NamedTemplate(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


@dataclass(frozen=True)
class Chat:
    """A template with the tokens that end an answer, for a model whose own files say otherwise or nothing.

    Attributes:
        origin: whose template it is, for messages, such as ``the expert maths``.
        template: Jinja.
        generation: the content of ``generation_config.json``.
        special: first and last token of a text and the padding, by their keys in ``tokenizer_config.json``.
    """

    origin: str
    template: str
    generation: Mapping[str, Any]
    special: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """80 bits of the SHA-256 of everything but the origin, and but what decides about no answer."""
        generation = {k: v for k, v in self.generation.items() if k != "transformers_version"}
        form = json.dumps([self.template, generation, dict(self.special)], sort_keys=True)
        return hashlib.sha256(form.encode()).hexdigest()[:20]

    def write(self, folder: Path) -> None:
        """Change the files of a model in ``folder`` so that it has this template and these tokens."""
        (folder / CHAT_FILE).write_text(self.template)
        settings = _json(folder / TOKENIZER_SETTINGS, "model.chat_template")
        if settings.pop("chat_template", None) is not None:
            (folder / TOKENIZER_SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False))
        for name in (TOKENIZER_SETTINGS, SPECIAL_FILE):
            update_json(folder / name, self.special)
        (folder / GENERATION_FILE).write_text(json.dumps(self.generation, indent=2))
        if "eos_token_id" in self.generation:
            update_json(folder / "config.json", {"eos_token_id": self.generation["eos_token_id"]})


@dataclass(frozen=True)
class Wanted:
    """What a run asks for, and the models that can give it.

    Attributes:
        setting: ``model.chat_template`` of the configuration.
        base: folder of the base.
        experts: folders of the experts by name.
        needed: whether prompts are put into the template.
        read_ids: gives the merged model's tokens; None where the base has no fast tokenizer. A large vocabulary takes a
            second to read, and most runs need no template.
    """

    setting: str
    base: Path
    experts: Mapping[str, Path]
    needed: bool
    read_ids: Callable[[], Mapping[str, int] | None] = lambda: None

    @cached_property
    def templates(self) -> dict[str, str]:
        """The templates of the experts that have one, by their names."""
        found = {name: template_of(folder, f"experts.{name}") for name, folder in self.experts.items()}
        return {name: text for name, text in found.items() if text is not None}

    @cached_property
    def ids(self) -> Mapping[str, int] | None:
        return self.read_ids()


def resolve(wanted: Wanted) -> tuple[Chat | None, list[str]]:
    """The template that merged models get instead of the base's, or None for the base's own files as they are; and what
    the user should know about it.

    Raises BadInput that names ``model.chat_template``.
    """
    setting = wanted.setting
    if setting == "base":
        return None, []
    if setting == "auto":
        return _shared(wanted)
    if setting.startswith(EXPERT):
        name = setting.removeprefix(EXPERT).strip()
        having = wanted.templates
        if name not in having:
            remedy = (
                f"name one that has, such as expert {next(iter(having))}" if having else "write auto, or another one"
            )
            raise BadInput(
                f"model.chat_template: the expert {name} ({wanted.experts[name]}) has no chat template; {remedy}."
            )
        return _of_expert(name, wanted), []
    if setting in NAMED:
        return _of_base(f"the format {setting}", NAMED[setting], wanted)
    return _of_base(setting, NamedTemplate(_read(setting)), wanted)


def template(wanted: str, models: Sequence[Path], place: str) -> str | None:
    """The text of a template: ``auto`` is the one that most of the models have, the earliest of equals; a name; or
    the template itself, which has a ``{``.

    Raises BadInput that names ``place``.
    """
    if wanted == "auto":
        found = Counter(t for t in map(template_of, models) if t is not None)
        return found.most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    if wanted not in NAMED:
        raise BadInput(f"{place}: {wanted!r} is not usable; write auto, {', '.join(NAMED)}, or a Jinja template.")
    return NAMED[wanted].text


def template_of(model: Path, key: str = "chat_template") -> str | None:
    """The chat template in a model's folder; where it has several, the default one.

    Raises BadInput that names ``key`` for a file of the folder that cannot be read.
    """
    if (model / CHAT_FILE).exists():
        try:
            return (model / CHAT_FILE).read_text()
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{key}: {model / CHAT_FILE} cannot be read ({cause_of(error)}); copy the model again."
            ) from error
    found = _json(model / TOKENIZER_SETTINGS, key).get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _shared(wanted: Wanted) -> tuple[Chat | None, list[str]]:
    """The template of ``auto``: the base's own, else the only one that experts have."""
    if template_of(wanted.base, "model.base") is not None:
        return None, []
    having = wanted.templates
    first = {text: name for name, text in reversed(having.items())}
    if len(first) > 1:
        names = sorted(first.values(), key=list(having).index)
        says = f"the base has no chat template, and those of the experts {' and '.join(names)} differ"
        if wanted.needed:
            raise BadInput(f"model.chat_template: {says}; write expert {names[0]}, or another one.")
        return None, [f"{says}, so merged models get none; write model.chat_template: expert {names[0]} to choose one"]
    if not first:
        return None, []
    chat = _of_expert(next(iter(having)), wanted)
    said = f"the base has no chat template, so merged models get the template and the stop tokens of {chat.origin}"
    others = [name for name in having if _of_expert(name, wanted).digest != chat.digest]
    if others:
        said += f"; {', '.join(others)} has the same template with other stop tokens or settings of generation"
    return chat, [said]


def _of_expert(name: str, wanted: Wanted) -> Chat:
    """Template, special tokens and settings of generation of an expert, with the merged model's numbers of tokens."""
    folder, key = wanted.experts[name], f"experts.{name}"
    own, settings = vocabulary_in(folder, key), _json(folder / TOKENIZER_SETTINGS, key)
    special = {k: t for k in SPECIAL if (t := _content(settings.get(k))) is not None}
    if wanted.ids is not None:
        special = {k: t for k, t in special.items() if t in wanted.ids}
    generation = _generation(folder, key)
    if own is not None and wanted.ids is not None:
        tokens = {number: token for token, number in own.items()}
        generation = {k: _moved(v, tokens, wanted.ids) if k in SPECIAL_IDS else v for k, v in generation.items()}
    if not generation:  # an adapter has no such settings
        generation = _ending(_generation(wanted.base, "model.base"), special.get("eos_token"), wanted.ids)
    return Chat(f"the expert {name}", wanted.templates[name], generation, special)


def _of_base(origin: str, named: NamedTemplate, wanted: Wanted) -> tuple[Chat, list[str]]:
    """A template that no model brought, on the base's own tokens."""
    chat = Chat(origin, named.text, _ending(_generation(wanted.base, "model.base"), named.end, wanted.ids))
    if named.end is None or wanted.ids is None or named.end in wanted.ids:
        return chat, []
    warning = (
        f"the tokenizer has no token {named.end}, which ends each turn in {origin}, so it is cut into several tokens "
        "and ends no answer; choose a template that fits the models"
    )
    return chat, [warning]


def _ending(generation: Mapping[str, Any], end: str | None, ids: Mapping[str, int] | None) -> dict[str, Any]:
    """Settings of generation where one more token ends an answer."""
    number = (ids or {}).get(end or "")
    if number is None:
        return dict(generation)
    known = generation.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    return {**generation, "eos_token_id": ends if number in ends else [*ends, number]}


def _generation(folder: Path, key: str) -> dict[str, Any]:
    """A model's settings of generation, from the file of that name or else from its configuration."""
    found = _json(folder / GENERATION_FILE, key)
    if not found:
        config = _json(folder / "config.json", key)
        found = {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}
    found.pop("_from_model_config", None)  # it would let Transformers take the stop tokens from config.json again
    return found


def _moved(value: Any, tokens: Mapping[int, str], ids: Mapping[str, int]) -> Any:
    """Numbers of tokens as another vocabulary has them; what has no token there is left out of a list."""
    if isinstance(value, list):
        return [ids[tokens[v]] for v in value if tokens.get(v) in ids]
    return ids.get(tokens.get(value, ""), value)


def _read(setting: str) -> str:
    """The template in a file.

    Raises BadInput where there is none.
    """
    file = Path(expand(setting))
    try:
        refuse_special(file)
        return file.read_text()
    except FileNotFoundError:
        words = ("auto", "base", "expert", *NAMED)
        raise BadInput(
            f"model.chat_template: {setting!r} is no file, and no word that is known; {nearest(setting, words)}"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model.chat_template: {setting[:100]} cannot be read ({cause_of(error)}); give a file with a Jinja "
            "template."
        ) from error


def _content(token: Any) -> str | None:
    """The text of a special token, which files write as it is or with its properties."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _json(file: Path, key: str) -> dict[str, Any]:
    return read_json(file, key) if file.exists() else {}


def update_json(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of a JSON file of a model, where there is one."""
    if file.exists():
        file.write_text(json.dumps({**_json(file, "model"), **values}, indent=2, ensure_ascii=False))
