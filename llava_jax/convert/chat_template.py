"""Conversation templates as transformers' chat templates, and those of checkpoints: recognised by hash, never run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_jax.convert.fields import Fields, read_object
from llava_jax.data.conversation import IMAGE_MARK, Template
from llava_jax.data.templates import TEMPLATES, chatml, dialogue, find_template, instruct, lines

# What a message says: a text as it stands, or parts as transformers' processors take them, where pictures come first
# (`Template.arrange`). A system message takes the place of the template's own.
_SAID = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set pictures = content | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- set words = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{{ (PICTURE + '\\n' + words.strip()).strip() if pictures == 1 else (PICTURE + '\\n') * pictures + words }}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- set asked = messages[0]['role'] == 'system' -%}"
    "{%- set system = said(messages[0]['content']) if asked else SYSTEM -%}"
    "{%- set messages = messages[1:] if asked else messages -%}"
)
_LOOP = (
    "{%- for message in messages -%}{%- set text = said(message['content']) -%}{%- if message['role'] == 'user' -%}"
    "{{ <user> }}{%- elif message['role'] == 'assistant' -%}{{ <assistant> }}{%- else -%}"
    "{{ raise_exception('Only user and assistant take turns.') }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ <opened> }}{%- endif -%}"
)
_NO_SYSTEM = "{%- if asked -%}{{ raise_exception('This model knows no system message.') }}{%- endif -%}"


def chat_template(template: Template) -> str | None:
    """The Jinja text that gives a template's prompts; None if its style has none that is exact."""
    if template.picture.startswith("<Image>"):
        # Tagged pictures come in an exchange of their own, or not, as the question marks them.
        return None
    system, (asked, answered), (stop, end) = template.system, template.roles, template.ends
    before, opened = "", "''"
    if template.style is dialogue:
        shown = "".join(span.text for span in template.style(template, template.examples))
        before = f"{{{{ system + {_text(shown.removeprefix(system))} }}}}"
        turns = f"{_text(f'{asked}: ')} + text + {_text(stop)}", f"{_text(f'{answered}: ')} + text + {_text(end)}"
        opened = _text(f"{answered}:")
    elif template.style is instruct:
        question = f"({_text(stop)} if not loop.first else '') + '[INST] ' + text + ' [/INST]'"
        if system:
            first = r"('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first else '')"
            question = question.replace("+ text", f"+ {first} + text")
        turns = question, f"' ' + text + {_text(f' {end}')}"
    elif template.style is chatml:
        opening = asked.replace("user", "system")
        before, system = f"{{{{ {_text(opening)} + system + {_text(stop)} }}}}", system.removeprefix(opening)
        turns = f"{_text(asked)} + text + {_text(stop)}", f"{_text(answered)} + text + {_text(end)}"
        opened = _text(answered)
    elif template.style is lines:
        alone = f"text.strip() if not text.replace({_text(IMAGE_MARK)}, '').strip()"
        turns = f"{alone} else text + {_text(stop)}", f"text + {_text(end)}"
    else:
        return None
    loop = _LOOP.replace("<user>", turns[0]).replace("<assistant>", turns[1]).replace("<opened>", opened)
    head = _SAID.replace("PICTURE", _text(template.picture)).replace("SYSTEM", _text(system))
    return head + (before if system else _NO_SYSTEM + before) + loop


def _text(text: str) -> str:
    """A literal of Jinja."""
    return json.dumps(text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _known_hashes() -> dict[str, tuple[str, bool]]:
    """Our chat templates by hash: the first template of that text, and whether its pictures are framed."""
    known: dict[str, tuple[str, bool]] = {}
    for name, template in TEMPLATES.items():
        for is_framed in (False, True):
            text = chat_template(template.framed() if is_framed else template)
            if text is not None:
                known.setdefault(_hash(text), (name, is_framed))
    return known


KNOWN_HASHES = _known_hashes() | {
    # chat_template.json of llava-1.5-{7b,13b}-hf and llava-v1.6-vicuna-{7b,13b}-hf, and of llava-v1.6-mistral-7b-hf.
    # They leave out the system message and the spaces that these models were trained with; the templates have them.
    "6fef09c05345e88b9f85e80bcb3491003332050750586568bdf91cfa81965d0c": ("v1", False),
    "ac1751256d0e7c19dcbac63d0feebee11bf81b86015276d08ee8b1f9ba0a42bc": ("mistral_instruct", False),
}


def find_chat_template(folder: Path) -> tuple[str | None, bool]:
    """The template whose chat template a Hugging Face folder carries, None if it is none that is known, and whether
    its pictures are framed.
    """
    texts: list[Any] = []
    if (folder / "chat_template.jinja").is_file():
        texts.append((folder / "chat_template.jinja").read_text(errors="replace"))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            texts.append(read_object(folder / name).get("chat_template"))
    known = {KNOWN_HASHES[_hash(text)] for text in texts if isinstance(text, str) and _hash(text) in KNOWN_HASHES}
    return known.pop() if len(known) == 1 else (None, False)


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


def chat_template_json(template: str | None, *, is_framed: bool) -> str | None:
    """`chat_template.json` for transformers, if the template has one; `is_framed` as `mm_use_im_start_end`."""
    if template is None:
        return None
    known = find_template(template)
    text = chat_template(known.framed() if is_framed else known)
    return None if text is None else json.dumps({"chat_template": text}, indent=2) + "\n"
