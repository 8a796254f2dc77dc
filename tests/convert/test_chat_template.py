"""Chat templates of exports: transformers renders with them what we render ourselves."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers

from llava_jax.convert.chat_template import chat_template, chat_template_json, find_chat_template
from llava_jax.data.conversation import IMAGE_MARK
from llava_jax.data.records import Turn
from llava_jax.data.templates import TEMPLATES, find_template

EXPORTED = [name for name in TEMPLATES if "mmtag" not in name]
PICTURE, TWO = {"type": "image"}, [{"type": "image"}, {"type": "image"}]
CONVERSATIONS: dict[str, list[Any]] = {
    "a picture": [[PICTURE, "What is this?"]],
    "a picture last": [["  What is this?\n", PICTURE]],
    "a picture alone": [[PICTURE]],
    "two pictures": [[*TWO, " Compare. "]],
    "no picture": ["Hi 'there' \"you\" {{ 1 }} \\n"],
    "turns": [[PICTURE, "What?"], "A cat.", "Why?", "It\nis </s> so.", "[INST] ok? ###"],
    "a picture later": ["Hi.", "Hello.", [PICTURE, "And this?"]],
}


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(data / "tokenizer")


def ours(name: str, said: list[Any], *, is_framed: bool) -> str:
    template = find_template(name).framed() if is_framed else find_template(name)
    turns = []
    for number, content in enumerate(said):
        text = content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))
        pictures = 0 if isinstance(content, str) else content.count(PICTURE)
        turns.append(Turn(("user", "assistant")[number % 2], f"{IMAGE_MARK}\n" * pictures + text))
    return "".join(span.text for span in template.render(template.arrange(turns), opened=True))


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_renders_what_we_render(tokenizer: Any, name: str):
    for is_framed in (False, True):
        text = chat_template(find_template(name).framed() if is_framed else find_template(name))
        assert text is not None
        for label, said in CONVERSATIONS.items():
            if "plain" in name and len(said) > 1:
                continue
            messages = []
            for number, content in enumerate(said):
                parts = content
                if not isinstance(content, str):
                    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
                messages.append({"role": ("user", "assistant")[number % 2], "content": parts})
            settings = {"chat_template": text, "tokenize": False, "add_generation_prompt": True}
            found = tokenizer.apply_chat_template(messages, **settings)
            assert found == ours(name, said, is_framed=is_framed), label


def test_a_system_message_takes_the_place_of_the_templates_or_is_refused(tokenizer: Any):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    def render(name: str) -> str:
        settings = {"chat_template": chat_template(find_template(name)), "tokenize": False}
        return tokenizer.apply_chat_template(messages, **settings)

    assert render("v1") == "Be brief. USER: Hi "
    assert render("llava_llama_2") == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert render("chatml_direct") == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|>"
    with pytest.raises(jinja2.TemplateError, match="no system message"):
        render("mistral_instruct")


@pytest.mark.parametrize("name", ["v1", "v0", "mistral_instruct", "chatml_direct", "llava_llama_2", "plain"])
@pytest.mark.parametrize("is_framed", [False, True])
def test_a_written_template_is_known_again(tmp_path: Path, name: str, is_framed: bool):
    (tmp_path / "chat_template.json").write_text(chat_template_json(name, is_framed=is_framed) or "")
    assert find_chat_template(tmp_path) == (name, is_framed)


def test_tagged_pictures_have_no_chat_template(tmp_path: Path):
    assert chat_template_json("v0_mmtag", is_framed=False) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert find_chat_template(tmp_path) == (None, False)
