"""When an answer ends at a keyword, token by token, as the original's chats decide it."""

from collections.abc import Sequence

from llava_jax.data.tokenizer import Tokenizer


class Keywords:
    """`KeywordsStoppingCriteria` of the original (`llava/mm_utils.py`), for one answer.

    It ends where its last tokens are a keyword's, or where a keyword is in the text of the last few tokens, as many
    as the longest keyword has. What lies further back is not looked at again.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Tokenizer):
        self.keywords = tuple(keywords)
        self.tokenizer = tokenizer
        self.ids = [tokenizer.encode(keyword).ids.tolist() for keyword in keywords]
        self.width = max((len(ids) for ids in self.ids), default=0)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens generated so far end the answer."""
        if any(list(tokens[-len(ids) :]) == ids for ids in self.ids if ids):
            return True
        text = self.tokenizer.decode(tokens[-self.width :]) if self.width else ""
        return any(keyword in text for keyword in self.keywords)

    def before(self, tokens: Sequence[int]) -> list[int]:
        """The tokens without those of the keyword that ends them."""
        kept = list(tokens)
        for ids in self.ids:
            if ids and kept[-len(ids) :] == ids:
                return kept[: -len(ids)]
        text = self.tokenizer.decode(kept)
        ends = [text.find(keyword) for keyword in self.keywords if keyword in text]
        # A token may hold the last letters of the answer and the first of the keyword: it stays.
        while ends and kept and self.tokenizer.decode(kept[:-1]).startswith(text[: min(ends)]):
            kept.pop()
        return kept
