"""Rows of language models: texts cut into chunks, prompts with completions, conversations.

`EncodedPart.targets` holds at each position what a causal model is to predict there: the token
after it, or `IGNORED`. So a batch needs no shift, whatever of a row is learned.

Prompts are tokenised in training as they are in generation. A completion is tokenised together with
its prompt where that leaves the prompt's tokens as they are, and else apart: the prompt `5` and the
completion `+5` would otherwise share a token, which no prompt ends with.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from dsdistill.harness.errors import UserError, first_line
from kd.data.text.corpus import Message, TextPart, check_messages, excerpt
from kd.data.text.tokenization import ROWS_PER_CALL, EncodedPart
from kd.models.language.tokenizer import SAMPLE
from kd.models.token_inputs import IGNORED

PROMPT_TOKENS = 32  # of a plain text, where it has to have a prompt
ASSISTANT = "assistant"  # role of the turns that are learned
BLOCK = 1 << 17  # characters of a long text that are tokenised at once, which bounds the memory
BLOCKS_PER_CALL = 16
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no character
SAMPLE_CHARACTERS = 10_000  # of each text, on which it is tried whether a tokenizer loses nothing
# Template of conversations for a tokenizer that brings none: `User: Hi`, `Assistant: Hello</s>`,
# one turn on a line. It begins and ends with the tokenizer's special tokens, where it has them.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
Prompt = str | Sequence[Message]  # a text, or the turns of a conversation before the answer


@dataclass(frozen=True)
class Segment:
    """A piece of a row.

    Attributes:
        text: The piece.
        is_target: Whether its tokens are targets.
    """

    text: str
    is_target: bool


def encode(
    part: TextPart,
    tokenizer: Any,
    max_length: int,
    *,
    complete: Bool[np.ndarray, " n"] | None = None,
) -> EncodedPart:
    """Encode texts, prompts with completions, or conversations, with a target for each position.

    Of a completion all tokens are targets, and an end-of-sequence token after it; of a conversation
    those of the assistant's turns, up to the first end-of-sequence token of each. Rows are cut at
    their end; those of which nothing is learned are left out.

    Args:
        part: One column of texts, as for `encode_texts`; two, of prompts and completions; or one
            of conversations, each a list of messages with `role` and `content`.
        tokenizer: Tokenizer of the model; for conversations with a chat template.
        max_length: Largest number of tokens of a row.
        complete: Whether each completion, or the last turn of each conversation, is complete. One
            that is not is learned without an end; None: all are.

    Raises:
        UserError: If a conversation does not fit the template, or nothing is learned of any row.
    """
    if len(part.texts) == 1 and (not len(part) or isinstance(part.texts[0][0], str)):
        return encode_texts(part.texts[0], tokenizer, max_length)
    ends = np.ones(len(part), bool) if complete is None else complete
    if len(part.texts) == 2:
        pairs = zip(*part.texts, strict=True)
        rows = ([Segment(prompt, False), Segment(answer, True)] for prompt, answer in pairs)
        first = _token(tokenizer.bos_token_id)
        last = _token(tokenizer.eos_token_id)
    else:
        rows = (
            segments(messages, tokenizer, complete=bool(end))
            for messages, end in zip(part.texts[0], ends, strict=True)
        )
        first = last = []  # the template has them
    ids, targets = [], []
    truncated = 0
    for (tokens, flags), end in zip(_segment_tokens(rows, tokenizer), ends, strict=True):
        closing = last if end and tokens[-1:] != last else []
        row = np.array([*first, *tokens, *closing], np.int32)
        flags = np.array([*(False for _ in first), *flags, *(True for _ in closing)], bool)
        truncated += len(row) > max_length
        row, flags = row[:max_length], flags[:max_length]
        ids.append(row)
        targets.append(np.append(np.where(flags, row, IGNORED)[1:], IGNORED))
    return replace(_join(ids, targets, max_length), truncated=truncated)


def encode_texts(
    texts: Sequence[str], tokenizer: Any, max_length: int, *, causal: bool = True
) -> EncodedPart:
    """Encode texts, long ones as several rows, so that nothing of them is lost.

    transformers' run_clm and run_mlm join all texts into one stream before they cut it, and drop
    its rest; here a row never holds two texts, since the attention would cross them. A text that
    is a whole file, such as a book, is cut as by run_clm.

    For a causal model each row begins with the beginning-of-sequence token and each text ends with
    the end-of-sequence token, where the tokenizer has them. Without the first, a row begins with
    the last token of the row before it, so that only the first token of a text is predicted
    nowhere. For other models each row has the special tokens of a text.

    Args:
        texts: The texts.
        tokenizer: Tokenizer of the model.
        max_length: Largest number of tokens of a row, special tokens included.
        causal: Whether the next token is predicted; else there are no targets.

    Returns:
        The rows. `text_bytes` is the number of UTF-8 bytes that the targets of a causal model
        spell; None where the tokenizer gives texts back changed.

    Raises:
        UserError: If `max_length` has no room beside special tokens, or no text has any token.
    """
    before, after = _frame(tokenizer, causal=causal)
    end = _token(tokenizer.eos_token_id) if causal else []
    overlap = int(causal and not before)
    room = max_length - len(before) - len(after) - overlap
    if room < 1:
        raise UserError(
            f"--max-length must be more than the {max_length - room} tokens that a row has beside "
            f"those that are learned, got {max_length}"
        )
    ids: list[np.ndarray] = []
    size = left_out = 0
    for text, content in zip(texts, _text_tokens(texts, tokenizer), strict=True):
        whole = np.concatenate([content, np.array(end if len(content) else [], np.int32)])
        starts = range(0, len(whole) - overlap, room)
        ids += [np.concatenate([before, whole[i : i + room + overlap], after]) for i in starts]
        left_out += not starts
        unpredicted = _spelled_bytes(int(content[0]), tokenizer) if overlap and len(content) else 0
        size += len(text.encode("utf-8", "surrogatepass")) - unpredicted
    if texts and not ids:
        raise UserError(f"none of {len(texts)} texts has anything to learn")
    targets = [np.append(row[1:], IGNORED) for row in ids] if causal else None
    exact = causal and _is_lossless(texts, tokenizer)
    return replace(
        _join(ids, targets, max_length), left_out=left_out, text_bytes=size if exact else None
    )


def prompt_ids(prompt: Prompt, tokenizer: Any) -> Int[np.ndarray, " l"]:
    """Token ids of a prompt, as `encode` begins a row with it.

    Args:
        prompt: A text, or the messages of a conversation before the assistant's next turn.
        tokenizer: Tokenizer of the model; for conversations with a chat template.

    Raises:
        UserError: If a conversation does not fit the template.
    """
    if isinstance(prompt, str):
        ids = next(_tokens([prompt], tokenizer))
        return np.array([*_token(tokenizer.bos_token_id), *ids], np.int32)
    text = _render(prompt, tokenizer, prompt, add_generation_prompt=True)
    return np.array(next(_tokens([text], tokenizer)), np.int32)


def prompt_length(length: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """Number of tokens of a plain text that are its prompt: half of it at most.

    Args:
        length: Number of tokens of the text.
        prompt_tokens: Largest number.
    """
    return max(1, min(prompt_tokens, length // 2))


def add_chat_template(tokenizer: Any) -> str | None:
    """Give a tokenizer without chat template `PLAIN_TEMPLATE`, which is then saved with it.

    Args:
        tokenizer: Changed in place.

    Returns:
        A line for the user; None if the tokenizer has a template.
    """
    if tokenizer.chat_template is not None:
        return None
    tokenizer.chat_template = PLAIN_TEMPLATE
    return (
        "the tokenizer has no chat template: each turn is a line that begins with its role, as "
        "User: and Assistant:"
    )


def segments(
    messages: Sequence[Message], tokenizer: Any, *, complete: bool = True
) -> list[Segment]:
    """Divide a conversation, as the chat template writes it, into what is learned and what not.

    An assistant's turn begins where the template with a generation prompt ends, and ends with the
    first end-of-sequence token: what stands after it is not generated.

    Args:
        messages: The turns; each has a `role` and a `content`.
        tokenizer: Tokenizer with a chat template.
        complete: Whether the last turn is complete; of one that is not only its text is learned,
            and not the end that the template writes after it.

    Raises:
        UserError: If a turn has no role or text, no turn is the assistant's, or the template does
            not fit.
    """
    check_messages(messages)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError(f"a conversation needs a turn of the assistant, got {excerpt(messages)}")
    whole = _render(messages, tokenizer, messages)
    pieces, position = [], 0
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        begin = _render(messages[:i], tokenizer, messages, add_generation_prompt=True)
        start, stop = len(begin), _turn_end(messages, i, whole, len(begin), tokenizer)
        if not whole.startswith(begin) or start < position or stop is None:
            raise UserError(
                f"the chat template writes a turn of {excerpt(messages)} otherwise once others "
                "follow: which tokens are the assistant's cannot be told"
            )
        if not complete and i == len(messages) - 1:
            text = message["content"].strip()
            place = whole.rfind(text, start, stop) if text else -1
            stop = start if place < 0 else place + len(text)
        pieces += [Segment(whole[position:start], False), Segment(whole[start:stop], True)]
        position = stop
    return [*pieces, Segment(whole[position:], False)]


def _turn_end(
    messages: Sequence[Message], number: int, whole: str, start: int, tokenizer: Any
) -> int | None:
    """Where the assistant's turn with this number ends; None if that cannot be told."""
    through = _render(messages[: number + 1], tokenizer, messages)
    # Some templates write reasoning into the last turn only, which then is no beginning of all.
    is_prefix = whole.startswith(through)
    limit = len(through) if is_prefix else len(whole)
    mark = tokenizer.eos_token
    place = whole.find(mark, start, limit) if mark else -1
    if place >= 0:
        return place + len(mark)
    return limit if is_prefix else None


def _render(messages: Sequence[Message], tokenizer: Any, conversation: Any, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # a template may raise anything, as for roles that do not alternate
        raise UserError(
            f"the chat template does not take {excerpt(conversation)}: {first_line(error)}"
        ) from error


def _segment_tokens(
    rows: Iterable[list[Segment]], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of each row, and whether each is learned."""
    pending: list[list[Segment]] = []
    for row in rows:
        pending.append(row)
        if len(pending) == ROWS_PER_CALL:
            yield from _tokens_of_rows(pending, tokenizer)
            pending = []
    yield from _tokens_of_rows(pending, tokenizer)


def _tokens_of_rows(
    rows: list[list[Segment]], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool]]]:
    beginnings = [
        "".join(piece.text for piece in row[: i + 1]) for row in rows for i in range(len(row))
    ]
    encoded = _tokens(beginnings, tokenizer)
    for row in rows:
        ids: list[int] = []
        flags: list[bool] = []
        for piece in row:
            through = next(encoded)
            if through[: len(ids)] == ids and (len(through) > len(ids) or not piece.text):
                more = through[len(ids) :]
            else:
                more = next(_tokens([piece.text], tokenizer))
            ids = ids + more
            flags += [piece.is_target] * len(more)
        yield ids, flags


def _text_tokens(texts: Sequence[str], tokenizer: Any) -> Iterator[Int[np.ndarray, " l"]]:
    """Tokens of each text; one of more than `BLOCK` characters is divided between its lines."""
    for is_long, group in groupby(texts, key=lambda text: len(text) > BLOCK):
        if not is_long:
            yield from (np.array(ids, np.int32) for ids in _tokens(list(group), tokenizer))
            continue
        for text in group:
            pieces = _tokens(_blocks(text), tokenizer, BLOCKS_PER_CALL)
            yield np.concatenate([np.array(ids, np.int32) for ids in pieces])


def _blocks(text: str) -> list[str]:
    """A text in pieces that begin with a line, and not with white space, where they can."""
    blocks, start = [], 0
    for line in re.finditer(r"(?<=\n)(?=\S)", text):
        if line.start() - start >= BLOCK:
            blocks.append(text[start : line.start()])
            start = line.start()
    return [*blocks, text[start:]]


def _tokens(
    texts: Sequence[str], tokenizer: Any, rows_per_call: int = ROWS_PER_CALL
) -> Iterator[list[int]]:
    for start in range(0, len(texts), rows_per_call):
        rows = list(texts[start : start + rows_per_call])
        yield from tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"]


def _frame(tokenizer: Any, *, causal: bool) -> tuple[list[int], list[int]]:
    """Special tokens before and after the tokens of a row."""
    if causal:
        return _token(tokenizer.bos_token_id), []
    content = next(_tokens(["a"], tokenizer))
    whole = tokenizer("a", verbose=False)["input_ids"]
    if not content:
        return [], whole
    place = next(i for i in range(len(whole)) if whole[i : i + len(content)] == content)
    return whole[:place], whole[place + len(content) :]


def _spelled_bytes(token: int, tokenizer: Any) -> int:
    """Number of UTF-8 bytes that a token spells, which may be a part of a character alone."""
    text, name = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if REPLACEMENT not in text:
        return len(text.encode())
    # `<0xE2>` is a byte; other names of tokens of bytes have a character for each.
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", name) else len(name)


def _token(number: int | None) -> list[int]:
    return [] if number is None else [number]


def _is_lossless(texts: Sequence[str], tokenizer: Any) -> bool:
    """Whether the tokenizer gives back a sample of texts unchanged."""
    sample = [text[:SAMPLE_CHARACTERS] for text in texts[:SAMPLE]]
    options = {"clean_up_tokenization_spaces": False}
    return all(
        tokenizer.decode(ids, **options) == text
        for ids, text in zip(_tokens(sample, tokenizer), sample, strict=True)
    )


def _join(ids: list[np.ndarray], targets: list[np.ndarray] | None, max_length: int) -> EncodedPart:
    """The rows one after the other, without those that have no target.

    Raises:
        UserError: If there are rows, and none has a target.
    """
    count = len(ids)
    if targets is not None:
        places = [i for i, row in enumerate(targets) if (row != IGNORED).any()]
        if ids and not places:
            raise UserError(
                f"no row has anything to learn within {max_length} tokens: raise --max-length"
            )
        ids, targets = [ids[i] for i in places], [targets[i] for i in places]
    return EncodedPart(
        _flat(ids),
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
        targets=None if targets is None else _flat(targets),
        left_out=count - len(ids),
    )


def _flat(rows: list[np.ndarray]) -> Int[np.ndarray, " N"]:
    return np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
