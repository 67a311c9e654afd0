"""From passages and a conversation to a prompt plan: segments of token ids, cut at the token level.

    [prefix][chunk]…[chunk][tail]

The prefix is fixed per collection (beginning of text, chat header, a short instruction), so that stored KV stays valid;
everything a caller says – system message, earlier turns, the question – goes into the tail, which is always computed.

Invariants: a prompt's ids are the concatenation of its segments' ids (I2); text from documents and callers can never
become a special token: special tokens come from the chat template alone (a plain prompt is the caller's own template).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from fusionrag.config import PromptConfig
from fusionrag.errors import ConfigError, RequestError
from fusionrag.model import tokenizer_fingerprint
from fusionrag.types import PromptChunk, PromptPlan, Segment, SegmentKind

# Some chat templates print today's date: Llama 3 is given `date_string`, Mistral Small asks `strftime_now`. A fixed
# date keeps prefix and stored KV valid tomorrow. Functions cannot be given to a template, but a macro hides one.
TEMPLATE_DATE = "26 Jul 2024"
_FIXED_DATE = "{% macro strftime_now(format) %}" + TEMPLATE_DATE + "{% endmacro %}"
Offsets: TypeAlias = tuple[tuple[int, int], ...]
_MARK = "\ue000{}\ue001"  # private-use characters: no template or tokenizer gives them a meaning
_CHUNKS = _MARK.format("chunks")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class PromptBuilder:
    """Spells prefix, chunks and tails for one tokenizer and one `PromptConfig`. Thread-safe once built."""

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self._tokenizer, self._config, self._lock = tokenizer, config, threading.Lock()
        specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        pattern = "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True))
        self._specials = re.compile(f"({pattern})") if pattern else None
        self._prefix_text, _ = self._render((Turn("user", "?"),))
        self.prefix_ids: tuple[int, ...] = tuple(self._encode(self._prefix_text, {})[0])

    @cached_property  # spelling out a tokenizer takes a tenth of a second
    def fingerprint(self) -> str:
        """Changes whenever a chunk's ids could change; a collection keeps it (see index.types.ChunkEncoder)."""
        templates = f"{self._config.chunk_template!r}|{self._config.untitled_chunk_template!r}"
        return f"{tokenizer_fingerprint(self._tokenizer)[:32]}|{templates}"

    @cached_property
    def end_of_turn_id(self) -> int:
        """The special token that the chat template puts behind an answer; the tokenizer's own end if it puts none."""
        mark, turn = _MARK.format(1), Turn("user", "?")
        _, tail = self._render((turn, Turn("assistant", "!"), turn))
        behind = self._specials.match(tail.partition(mark)[2].lstrip()) if self._specials else None
        token_id = self._tokenizer.convert_tokens_to_ids(behind[0]) if behind else self._tokenizer.eos_token_id
        if token_id is None:
            raise ConfigError("model", "neither the chat template nor the tokenizer says how an answer ends")
        return int(token_id)

    def encode(self, title: str, text: str) -> list[int]:
        """Token ids of a whole passage, template included. Text that looks like a special token stays text."""
        template = self._config.chunk_template if title else self._config.untitled_chunk_template
        return self._plain_ids(template.format(title=title, text=text))[0]

    def text_offsets(self, title: str, text: str) -> Offsets:
        """For each id of `encode(title, text)`, the characters [begin, end) of `text` it stands for; (0, 0): none."""
        template = self._config.chunk_template if title else self._config.untitled_chunk_template
        start = len(template.partition("{text}")[0].format(title=title))
        _, offsets = self._plain_ids(template.format(title=title, text=text))
        clipped = [(min(max(a - start, 0), len(text)), min(max(b - start, 0), len(text))) for a, b in offsets]
        return tuple((a, b) if a < b else (0, 0) for a, b in clipped)

    def plan(self, chunks: Sequence[PromptChunk], turns: Sequence[Turn]) -> PromptPlan:
        """The prompt that answers the last turn, which must be the user's, from `chunks` in the order given."""
        if not turns or turns[-1].role != "user":
            raise RequestError("the last message must have role 'user'", "messages")
        prefix, tail = self._render(turns)
        if prefix != self._prefix_text:
            raise ConfigError("instruction", "the chat template changes the prefix with the conversation")
        contents = {str(i): turn.content for i, turn in enumerate(turns)}
        ids, (begin, end) = self._encode(tail, contents, locate=str(len(turns) - 1))
        segments, at = [Segment(SegmentKind.PREFIX, 0, self.prefix_ids)], len(self.prefix_ids)
        for chunk in chunks:
            segments.append(Segment(SegmentKind.CHUNK, at, chunk.token_ids, chunk))
            at += len(chunk.token_ids)
        segments.append(Segment(SegmentKind.TAIL, at, tuple(ids)))
        return PromptPlan(tuple(segments), question=(at + begin, at + end))

    def plain_plan(self, text: str) -> PromptPlan:
        """A prompt that is just text (`/v1/completions`): nothing is reused, the tokenizer's own BOS is kept."""
        with self._lock:
            ids = tuple(self._tokenizer(text, split_special_tokens=False)["input_ids"])
        if not ids:
            raise RequestError("the prompt is empty", "prompt")
        return PromptPlan(
            (Segment(SegmentKind.PREFIX, 0, ()), Segment(SegmentKind.TAIL, 0, ids)), question=(0, len(ids))
        )

    def _render(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """(prefix, tail) text of the chat template, with marks in place of what the callers wrote."""
        c, messages = self._config, [{"role": "system", "content": self._config.instruction}]
        systems = [_MARK.format(i) + "\n" for i, t in enumerate(turns) if t.role == "system"]
        head = c.passages_header + _CHUNKS + "".join(systems)
        for i, turn in enumerate(turns):
            if turn.role == "user":
                asked = c.question_template.format(question=_MARK.format(i))
                messages.append({"role": "user", "content": head + asked})
                head = ""
            elif turn.role == "assistant" and not head:
                messages.append({"role": "assistant", "content": _MARK.format(i)})
        text = self._apply_template(messages)
        prefix, mark, tail = text.partition(_CHUNKS)
        if not mark:
            raise ConfigError("model", "the chat template drops the user's message")
        return prefix, tail

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:  # a base model: plain text, the instruction first
            bos = tokenizer.bos_token or ""
            return bos + "\n\n".join(m["content"] for m in messages) + "\n"
        render = {
            "chat_template": _FIXED_DATE + tokenizer.get_chat_template(),
            "tokenize": False,
            "add_generation_prompt": True,
            "date_string": TEMPLATE_DATE,
        }
        try:
            return str(tokenizer.apply_chat_template(messages, **render))
        except Exception:  # templates without a system role raise their own jinja error
            merged = [{"role": "user", "content": f"{messages[0]['content']}\n{messages[1]['content']}"}]
            return str(tokenizer.apply_chat_template(merged + messages[2:], **render))

    def _encode(
        self, marked: str, contents: dict[str, str], locate: str | None = None
    ) -> tuple[list[int], tuple[int, int]]:
        """Ids of a marked text, and the token range [begin, end) of the content named `locate`.

        Split at the template's special tokens first – as tokenizers themselves do – so that what stands between them
        is tokenised in one piece, and only then are the callers' words put in.
        """
        ids: list[int] = []
        found = (0, 0)
        pieces = self._specials.split(marked) if self._specials else [marked]
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                text, where = _fill(piece, contents, locate)
                plain, offsets = self._plain_ids(text)
                if where is not None:
                    inside = [n for n, (a, b) in enumerate(offsets) if b > where[0] and a < where[1]]
                    first, last = (inside[0], inside[-1] + 1) if inside else (0, len(plain))
                    found = (len(ids) + first, len(ids) + last)
                ids += plain
        return ids, found if found != (0, 0) else (0, len(ids))

    def _plain_ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with self._lock:  # the tokenizer keeps `split_special_tokens` as state between calls
            encoded = self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _fill(piece: str, contents: dict[str, str], locate: str | None) -> tuple[str, tuple[int, int] | None]:
    """Puts the contents in place of their marks; also the character range of the content named `locate`."""
    out, where = "", None
    for i, part in enumerate(re.split("\ue000(.*?)\ue001", piece)):
        text = contents[part] if i % 2 else part
        if i % 2 and part == locate:
            where = (len(out), len(out) + len(text))
        out += text
    return out, where
