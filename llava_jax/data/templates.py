"""Conversation templates of LLaVA and LLaVA-1.6: the styles that lay out their spans, and the table of their words."""

import dataclasses
from collections.abc import Sequence

from llava_jax.data.conversation import IMAGE_MARK, Span, Template, marked
from llava_jax.data.records import Turn
from llava_jax.errors import Refused, UserError


def dialogue(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """`SeparatorStyle.TWO` and `SINGLE`: `system USER: question ASSISTANT: answer</s>USER: ...`.

    Trained: answers, from the space before them, with what closes them.
    """
    spans = [Span(template.system + template.ends[0])]
    for turn in turns:
        speaker = turn.role == "assistant"
        role, end = template.roles[speaker], template.ends[speaker]
        if not turn.text:
            spans.append(Span(f"{role}:"))
        elif speaker:
            spans += [Span(f"{role}:"), Span(f" {turn.text}{end}", is_answer=True)]
        else:
            spans += marked(f"{role}: {turn.text}{end}")
    return spans


def paragraphs(template: Template, turns: Sequence[Turn]) -> list[Span]:
    r"""The training text of the `###` templates, which is not their prompt (`_add_speaker_and_signal`).

    `system\n\n### Human: question\n### Assistant: answer\n### `; trained: answers with the `###` that closes them.
    """
    spans = [Span(f"{template.system}\n\n###")]
    for turn in turns:
        if turn.role == "assistant":
            spans += [Span(f" {template.roles[1]}:"), Span(f" {turn.text}\n###", is_answer=bool(turn.text))]
        else:
            spans += marked(f" {template.roles[0]}: {turn.text}\n###")
    return [*spans, Span(" ")]


def instruct(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """`SeparatorStyle.LLAMA_2`: `[INST] question [/INST] answer </s><s>[INST] ...`; the tokenizer opens with BOS.

    `ends[0]` is what opens every question but the first, which holds the system's words. Trained: answers with `</s>`.
    """
    if turns and not turns[0].text:
        raise Refused("malformed", f"the first question of the {template.name} template must not be empty")
    spans = []
    for i, turn in enumerate(turns):
        if not turn.text:
            continue
        if turn.role == "assistant":
            spans.append(Span(f" {turn.text} {template.ends[1]}", is_answer=True))
            continue
        system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if i == 0 and template.system else ""
        spans += marked(f"{template.ends[0] if spans else ''}[INST] {system}{turn.text} [/INST]")
    return spans


def chatml(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """`SeparatorStyle.MPT`: `system<|im_end|><|im_start|>user\\nquestion<|im_end|>...`, without a line after the end.

    Trained: answers with `<|im_end|>`.
    """
    spans = [Span(template.system + template.ends[0])]
    for turn in turns:
        speaker = turn.role == "assistant"
        role, end = template.roles[speaker], template.ends[speaker]
        if not turn.text:
            spans.append(Span(role))
        elif speaker:
            spans += [Span(role), Span(turn.text + end, is_answer=True)]
        else:
            spans += marked(role + turn.text + end)
    return spans


def lines(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """`SeparatorStyle.PLAIN` as a prompt: every turn on a line; a picture alone is what its caption follows."""
    spans = []
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and turn.text:
            if i != len(turns) - 1:
                raise Refused(
                    "malformed", f"the plain template needs one question and one answer; got {len(turns)} turns"
                )
            spans.append(Span(turn.text + template.ends[1], is_answer=True))
        elif turn.text:
            is_picture = not turn.text.replace(IMAGE_MARK, "").strip()
            spans += marked(turn.text.strip() if is_picture else turn.text + template.ends[0])
    return spans


def caption(template: Template, turns: Sequence[Turn]) -> list[Span]:
    r"""`preprocess_plain`: `<image>caption\n`, whatever the user asked; trained: the caption and its newline."""
    if len(turns) != 2:
        raise Refused("malformed", f"the plain template needs one question and one answer; got {len(turns)} turns")
    question, answer = turns
    spans = marked(IMAGE_MARK * question.text.count(IMAGE_MARK))
    return spans if not answer.text else [*spans, Span(answer.text + template.ends[1], is_answer=True)]


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
_USER = "A chat between a curious user and an artificial intelligence assistant. "
_HUMAN = "A chat between a curious human and an artificial intelligence assistant. " + _POLITE.format(who="human")
_FORMAT = "The visual content will be provided with the following format: <Image>visual content</Image>."
_MMTAG = (
    f"{_USER}The assistant is able to understand the visual content that the user provides, "
    f"and assist the user with a variety of tasks using natural language.{_FORMAT}"
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SIMPLE = "Answer the questions about the visual content that the user provides."
_ORCA = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. "
    "Write out your reasoning step-by-step to be sure you get the right answers!"
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_ENERGY = (
    Turn("user", "What are the key differences between renewable and non-renewable energy sources?"),
    Turn(
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
        "are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)
_TAGGED = f"<Image>{IMAGE_MARK}</Image>"


def _vicuna(name: str, system: str, picture: str = IMAGE_MARK) -> Template:
    roles = ("USER", "ASSISTANT")
    return Template(name=name, system=system, roles=roles, ends=(" ", "</s>"), style=dialogue, picture=picture)


def _hashes(name: str, system: str, picture: str = IMAGE_MARK, examples: tuple[Turn, ...] = ()) -> Template:
    return Template(
        name=name,
        system=system,
        roles=("Human", "Assistant"),
        ends=("###", "###"),
        style=dialogue,
        lesson=paragraphs,
        examples=examples,
        picture=picture,
    )


def _instruct(name: str, system: str, opening: str = "<s>", picture: str = IMAGE_MARK) -> Template:
    roles = ("USER", "ASSISTANT")
    return Template(name=name, system=system, roles=roles, ends=(opening, "</s>"), style=instruct, picture=picture)


def _chatml(name: str, system: str, marks: str = "<|im_start|>{}\n", end: str = "<|im_end|>") -> Template:
    opening, *roles = (marks.format(role) for role in ("system", "user", "assistant"))
    return Template(name=name, system=opening + system, roles=(roles[0], roles[1]), ends=(end, end), style=chatml)


V1 = _vicuna("v1", _USER + _POLITE.format(who="user"))
MISTRAL = _instruct("mistral_instruct", "", "")
PLAIN = Template(name="plain", system="", roles=("", ""), ends=("\n", "\n"), style=lines, lesson=caption)

TEMPLATES = {
    template.name: template
    for template in (
        V1,
        PLAIN,
        dataclasses.replace(V1, name="vicuna_v1"),
        _vicuna("llava_v1", _HUMAN),
        _vicuna("v1_mmtag", _MMTAG, _TAGGED),
        _vicuna("llava_v1_mmtag", _MMTAG, _TAGGED),
        _hashes("v0", _HUMAN, examples=_ENERGY),
        _hashes("default", _HUMAN, examples=_ENERGY),
        _hashes("llava_v0", _HUMAN),
        _hashes("v0_mmtag", _MMTAG, _TAGGED),
        _hashes("llava_v0_mmtag", _MMTAG, _TAGGED),
        _instruct("llama_2", _LLAMA_2),
        _instruct("llava_llama_2", _VISION),
        _instruct("llava_llama_2_simple", _SIMPLE),
        _instruct("llava_llama_2_mmtag", _SIMPLE + _FORMAT, picture=_TAGGED),
        MISTRAL,
        dataclasses.replace(MISTRAL, name="llava_mistral_instruct"),
        _chatml("mpt", _MPT),
        _chatml("chatml_direct", "Answer the questions."),
        _chatml("mistral_direct", "Answer the questions."),
        _chatml("mistral_orca", _ORCA),
        _chatml("mistral_zephyr", "You are a helpful AI assistant.", "<|{}|>\n", "</s>"),
        dataclasses.replace(PLAIN, name="v0_plain"),
    )
}


def find_template(name: str) -> Template:
    """The template of that name; an unknown one is refused (the original falls back to v1 in silence)."""
    if name not in TEMPLATES:
        raise UserError(f"Unknown conversation template {name!r}; choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]
