"""Texts of other people as tokens: "<|im_end|>" in a problem is ten characters, not the end of a turn.

    reserved = reserved_tokens(tokenizer)                     # {0: "<eos>", ...}
    ids = encode_text("1+1=<eos>?", tokenizer, reserved)      # none of them is 0
    head, middle, tail = split_at_reserved(before, question, after, reserved)

Tokenizers turn such a text into its token wherever they meet it. A demonstration would then teach to end in
mid-sentence, and a problem could end its own turn and speak for the assistant.

To copy: this file. It needs nothing; it takes any tokenizer of transformers.
"""
import re

# The marks of thought stand in demonstrations by right, also where a tokenizer calls them special. Tokens
# that were added without being special, such as <tool_call>, are words like any other.
THOUGHT = ("<think>", "</think>")


def reserved_tokens(tokenizer):
    """id -> text of the special tokens, which no text may become. The token for unknown text is not among
    them."""
    reserved = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    added = tokenizer.added_tokens_decoder
    if callable(added):               # mistral-common's, which makes no special token of a text in any case
        added = {}
    for id, token in added.items():
        if token.special:             # also those without a name, such as <|reserved_special_token_7|>
            reserved[id] = token.content
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):     # GPT-2's is both
        reserved.pop(tokenizer.unk_token_id, None)
    return {id: text for id, text in reserved.items() if text not in THOUGHT}


def encode_text(text, tokenizer, reserved, add_special_tokens=False):
    """Token ids of a text, none of which is `reserved`, but for those that the tokenizer puts around any text
    if `add_special_tokens`. A text that spells none of them has the ids that the tokenizer gives it."""
    def encode(**how):
        found = tokenizer(text, add_special_tokens=add_special_tokens, return_special_tokens_mask=True, **how)
        return list(zip(found["input_ids"], found["special_tokens_mask"]))

    def is_spelled(pair):
        id, put_around = pair
        return id in reserved and not put_around

    pairs = encode()
    if not any(map(is_spelled, pairs)):
        return [id for id, _ in pairs]
    ids = []
    for pair in encode(split_special_tokens=True):
        if not is_spelled(pair):
            ids.append(pair[0])
            continue
        # Some vocabularies (SentencePiece's) hold "</s>" as a word, too: then letter by letter.
        for character in reserved[pair[0]]:
            ids += tokenizer(character, add_special_tokens=False)["input_ids"]
    return ids


def split_at_reserved(before, text, after, reserved):
    """-> (head, middle, tail), together before + text + after. The middle reaches from the last reserved
    token in `before` to the first in `after`: there a tokenizer cuts any text."""
    found = re.compile("|".join(map(re.escape, reserved.values())))
    start = max((match.end() for match in found.finditer(before)), default=0)
    first = found.search(after)
    end = first.start() if first else len(after)
    return before[:start], before[start:] + text + after[:end], after[end:]
