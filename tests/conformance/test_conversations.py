"""Conversations: ids, labels, prompts and templates as the original recorded them."""

from tests.conformance.report import Case, not_built, reads

COMPANIONS = ("conversations/inputs.json", "conversations/tokenizers/*/*")


@reads("conversations/conversations_llava.jsonl", "conversations/conversations_next.jsonl")
def test_conversation(case: Case):
    not_built("the templates")
