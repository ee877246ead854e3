"""Which chat template a merged model gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evolver.checkpoints.weights import read_json
from evolver.errors import BadInput

CHAT_FILE = "chat_template.jinja"
# The two formats that are simple enough to be written down from their descriptions.
NAMED = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def template(wanted: str, models: Sequence[Path], place: str) -> str | None:
    """The text of a template: ``auto`` is the one that most of the models have, the earliest of equals; a name; or
    the template itself, which has a ``{``.

    Raises BadInput that names ``place``.
    """
    if wanted == "auto":
        found = Counter(t for t in map(_of, models) if t is not None)
        return found.most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    if wanted not in NAMED:
        raise BadInput(f"{place}: {wanted!r} is not usable; write auto, {', '.join(NAMED)}, or a Jinja template.")
    return NAMED[wanted]


def _of(model: Path) -> str | None:
    if (model / CHAT_FILE).exists():
        return (model / CHAT_FILE).read_text()
    config = model / "tokenizer_config.json"
    found = read_json(config, "chat_template").get("chat_template") if config.exists() else None
    return found if isinstance(found, str) else None
