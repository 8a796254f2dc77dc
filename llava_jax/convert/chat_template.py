"""Conversation templates of checkpoints: recognised by hash or by the original's config, never run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_jax.convert.fields import Fields, read_object

# What transformers' chat templates of our templates look like; written into exports, known again by their hash.
# `message.content` is a text, or a list of parts as transformers' processors take it.
_PARTS = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
V1 = (
    _PARTS + "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{{ ' ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + said(message['content']) + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + said(message['content']) + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHAT_TEMPLATES = {"v1": V1}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


KNOWN_HASHES = {_hash(text): name for name, text in CHAT_TEMPLATES.items()} | {
    # chat_template.json of llava-1.5-{7b,13b}-hf and llava-v1.6-vicuna-{7b,13b}-hf, and of llava-v1.6-mistral-7b-hf.
    # They leave out the system message and the spaces that these models were trained with; the templates have them.
    "6fef09c05345e88b9f85e80bcb3491003332050750586568bdf91cfa81965d0c": "v1",
    "ac1751256d0e7c19dcbac63d0feebee11bf81b86015276d08ee8b1f9ba0a42bc": "mistral_instruct",
}


def find_chat_template(folder: Path) -> str | None:
    """The template whose chat template a Hugging Face folder carries; None if it is none that is known."""
    texts: list[Any] = []
    if (folder / "chat_template.jinja").is_file():
        texts.append((folder / "chat_template.jinja").read_text(errors="replace"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            texts.append(read_object(folder / name).get("chat_template"))
    known = {KNOWN_HASHES[_hash(text)] for text in texts if isinstance(text, str) and _hash(text) in KNOWN_HASHES}
    return known.pop() if len(known) == 1 else None


def template_of_original(config: Fields) -> str | None:
    """The template that a published LLaVA with this config was trained with; None where the config leaves it open.

    Source: the choice of `eval/run_llava.py` of the original, made here from fields instead of the folder's name.
    """
    if config.values.get("tune_mm_mlp_adapter"):
        return "plain"
    if "mistral" in str(config.values.get("model_type")):
        return "mistral_instruct"
    # Nous-Hermes-2-Yi-34B has Yi's vocabulary.
    if config.values.get("vocab_size") == 64_000:
        return "chatml_direct"
    # Projectors with a hidden layer began with LLaVA-1.5; before it, v0, v1 and llama_2 had the same config.
    return "v1" if str(config.values.get("mm_projector_type")).startswith("mlp") else None


def chat_template_json(template: str | None) -> str | None:
    """`chat_template.json` for transformers, if the template has one."""
    text = None if template is None else CHAT_TEMPLATES.get(template)
    return None if text is None else json.dumps({"chat_template": text}, indent=2) + "\n"
