"""What a teacher writes for the prompts of a corpus, as texts to train a student on.

    DIR/<SHA-256 of the key>/key.json           the key, which the texts depend on, as text
                             00012.json         the rows of a shard, with their checksum

Texts fit any tokenizer, so the student's may be another one. A killed run goes on with the first
shard that is not there; a shard that does not match its checksum is reported and written anew.

Source: Kim and Rush (2016), arXiv:1606.07947, section 3.2: the student is trained on the output of
the teacher's beam search, with five beams.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from dsdistill.harness import files
from dsdistill.harness.checksums import json_digest
from dsdistill.harness.errors import UserError, one_line
from dsdistill.harness.runs import progress
from kd.data import teacher_cache
from kd.data.batching import derive_seed
from kd.data.text import causal_rows, generation
from kd.data.text.causal_rows import ASSISTANT, PROMPT_TOKENS, Prompt
from kd.data.text.corpus import Message, TextPart, check_messages
from kd.data.text.generation import Continuations, Decoding
from kd.models.language import tokenizer as tokenizers
from kd.models.language.language_model import LanguageModel
from kd.parallel.engine import Engine

FORMAT_VERSION = 1  # part of the key: raise it when the same texts would be stored differently
SHARD = 256  # rows of a shard, which a kill costs at most
BEAMS = Decoding(max_new_tokens=128, beams=5)


@dataclass(frozen=True, eq=False)
class TeacherTexts:
    """Prompts with a teacher's completions.

    Attributes:
        part: Prompts and completions, or conversations whose last turn is the teacher's.
        complete: Whether the teacher ended each completion; for `causal_rows.encode`.
    """

    part: TextPart
    complete: Bool[np.ndarray, " n"]

    @property
    def described(self) -> str:
        """The number of completions in words, and the share that did not end."""
        line = f"the teacher wrote {len(self.complete)} completions"
        if self.complete.all():
            return line
        share = 1 - self.complete.mean()
        return f"{line}; {share:.1%} did not end before the largest number of tokens"


def write(
    part: TextPart,
    teacher: LanguageModel,
    tokenizer: Any,
    folder: Path,
    on: Engine,
    *,
    decoding: Decoding = BEAMS,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 512,
    prompt_tokens: int = PROMPT_TOKENS,
) -> TeacherTexts:
    """Let a teacher complete all prompts of a part, or read what it wrote before.

    Args:
        part: Prompts with completions, or conversations, whose last answers are replaced or, after
            a turn of the user, added; or plain texts: of each chunk of `max_length` tokens the
            first `prompt_tokens` are a prompt; one that spells no whole character is left out
            where no token begins a text.
        teacher: Causal model, on the device of the engine.
        tokenizer: The teacher's tokenizer; one without chat template gets the plain one.
        folder: Folder of the texts of any number of teachers and corpora; created.
        on: The processes, which share the shards.
        decoding: How the teacher writes.
        seed: Seed of its samples.
        batch_size: Number of prompts in a batch.
        max_length: Largest number of tokens of a student's row, beyond which the teacher does not
            write.
        prompt_tokens: As for `causal_rows.prompt_length`.

    Raises:
        UserError: As `generation.generate`; if the folder cannot be used.
    """
    causal_rows.add_chat_template(tokenizer)
    prompts = _prompts(part, tokenizer, max_length, prompt_tokens)
    is_plain = len(part.texts) == 1 and len(part) and isinstance(part.texts[0][0], str)
    room = max_length
    if is_plain:
        room -= causal_rows.prompt_length(max_length, prompt_tokens)
    decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))
    key = {
        "format": FORMAT_VERSION,
        "prompts": json_digest(prompts),
        "teacher": teacher_cache.fingerprint(teacher),
        "architecture": teacher_cache.architecture(teacher),
        "tokenizer": json_digest(tokenizers.describe(tokenizer)),
        "decoding": asdict(decoding),
        "seed": seed,
        "batch_size": batch_size,
        "shard": SHARD,
    }
    starts = range(0, len(prompts), SHARD)
    try:
        inner = folder / json_digest(key)
        inner.mkdir(parents=True, exist_ok=True)
        files.write_json(inner / "key.json", key)
        with progress.bar(len(prompts), "prompts") as show:
            for number in range(on.process_index, len(starts), on.num_processes):
                start = starts[number]
                rows = prompts[start : start + SHARD]
                if _read(inner, number, len(rows)) is None:
                    continuations = generation.generate(
                        teacher,
                        tokenizer,
                        rows,
                        decoding,
                        seed=derive_seed(seed, number),
                        batch_size=batch_size,
                        device=on.device,
                        tick=lambda done, before=start: show(before + done),
                    )
                    _write(inner, number, continuations)
                show(start + len(rows))
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({error}): choose another folder") from error
    on.wait_for_everyone()
    shards = (_read(inner, i, len(prompts[x : x + SHARD])) for i, x in enumerate(starts))
    pairs = [pair for shard in shards for pair in shard or ()]
    if len(pairs) != len(prompts):
        raise UserError(f"{inner} was changed while it was written: remove it, and start again")
    return _with_answers(prompts, pairs)


def _prompts(part: TextPart, tokenizer: Any, max_length: int, prompt_tokens: int) -> list[Prompt]:
    """What the teacher continues in each row."""
    if len(part.texts) == 2 or not len(part):
        return list(part.texts[0])
    if not isinstance(part.texts[0][0], str):
        return [_before_answer(messages) for messages in part.texts[0]]
    chunks = causal_rows.encode_texts(part.texts[0], tokenizer, max_length)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    begins = [
        chunks.ids[start : start + causal_rows.prompt_length(stop - start, prompt_tokens)].tolist()
        for start, stop in pairwise(chunks.offsets.tolist())
    ]
    # A chunk, or its beginning, may end within a character of several bytes.
    texts = [tokenizer.decode(ids, **options).strip(causal_rows.REPLACEMENT) for ids in begins]
    # Nothing can be written after nothing, where no token begins a text.
    return texts if tokenizer.bos_token_id is not None else list(filter(None, texts))


def _before_answer(messages: Sequence[Message]) -> list[Message]:
    """The turns of a conversation without an answer at its end."""
    check_messages(messages)
    return list(messages[:-1] if messages[-1]["role"] == ASSISTANT else messages)


def _with_answers(prompts: Sequence[Prompt], pairs: Sequence[Sequence[Any]]) -> TeacherTexts:
    answers = [text for text, _ in pairs]
    complete = np.array([end for _, end in pairs], bool)
    if all(isinstance(prompt, str) for prompt in prompts):
        return TeacherTexts(TextPart((list(prompts), answers)), complete)
    # Templates bring the white space around an answer, which the teacher has written too.
    conversations = [
        [*messages, {"role": ASSISTANT, "content": answer.strip()}]
        for messages, answer in zip(prompts, answers, strict=True)
    ]
    return TeacherTexts(TextPart((conversations,)), complete)


def _write(folder: Path, number: int, continuations: Continuations) -> None:
    rows = [
        list(pair)
        for pair in zip(continuations.texts, continuations.complete.tolist(), strict=True)
    ]
    files.write_json(_shard(folder, number), {"rows": rows, "sha256": json_digest(rows)})


def _read(folder: Path, number: int, count: int) -> list[list[Any]] | None:
    """The rows of a shard; None if it is not there, or damaged, which is said."""
    path = _shard(folder, number)
    if not path.exists():
        return None
    try:
        stored = files.read_json(path)
        if stored["sha256"] == json_digest(stored["rows"]) and len(stored["rows"]) == count:
            return stored["rows"]
        why = "it does not match its checksum"
    except (UserError, LookupError, TypeError) as error:
        why = one_line(error)
    progress.say(f"teacher's texts: {path} is not used ({why}): written anew")
    return None


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"
