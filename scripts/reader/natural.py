"""Questions as people ask them, turned by rules from the sentences of a passage: when, who, where, what, how many.

Knows nothing about facts. Invariant: the answer stands verbatim in the passage and not in the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from scripts.reader.passages import Passage, Question
from scripts.reader.patterns import DATE, FULL_NAME, NAME, PLACE, YEAR, tidy

MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 7, 45
MAX_ANSWER_WORDS, MAX_QUESTION_WORDS = 8, 24

_SENTENCE_END = re.compile(r"(?<=[a-z\d)\"][.!?]) (?=[A-Z\"])")
_PRONOUN = re.compile(r"^(?:It|He|She|They)\b")
_POSSESSIVE = re.compile(r"^(?:Its|His|Her|Their)\b")
_SUBJECT = r"(?P<subject>(?:[Tt]he )?[^,;:()]{3,50}?)"
_ACTED = r"(?:[a-z]+ed|wrote|sang|won|built|led|made|held|became|began|took|gave)"
_WHEN = re.compile(
    rf"^{_SUBJECT} (?P<be>was|were) (?P<rest>[^,;:()]{{3,60}}?),? (?:in|on) (?P<answer>{DATE}|(?:[A-Z][a-z]+ )?{YEAR})"
)
_BY = re.compile(
    rf"^{_SUBJECT} (?P<be>was|were|is) (?P<rest>(?:[a-z]+ ){{0,2}}[a-z]+(?:ed|ten|ung|wn|un|lt|ade))"
    rf" by (?P<answer>{FULL_NAME})"
)
_WHERE = re.compile(
    rf"^{_SUBJECT} (?P<be>was|were|is|are) (?P<rest>(?:[a-z]+ ){{0,3}}[a-z]+ed)"
    rf" (?:in|at|near) (?:the )?(?P<answer>{PLACE})"
)
_IS_THE = re.compile(rf"^(?P<answer>{NAME}) (?P<be>is|was) (?P<rest>the [^,;:()]{{12,80}})")
_IS_A = re.compile(r"^(?P<subject>[A-Z][^,;:()]{2,40}?) (?P<be>is|are|was|were) (?P<answer>an? [^,;:().]{8,60})")
_DID = re.compile(rf"^(?P<answer>{FULL_NAME}) (?P<rest>{_ACTED} [^;:()]{{8,90}})")
_CALLED = re.compile(
    rf"^{_SUBJECT} (?P<be>is|are|was|were) (?P<rest>(?:(?:also|commonly|often|better|originally|formerly) )?"
    rf"(?:known as|called|named)) (?:the )?(?P<answer>\"[^\"]+\"|{NAME})"
)
_COUNT = re.compile(
    r"(?<![\w.,$£€])(?P<answer>\d{1,3}(?:,\d{3})*|two|three|four|five|six|seven|eight|nine|ten|twelve)"
    r" (?P<noun>[a-z]+s)\b"
)
_SPAN = re.compile(
    rf"(?<= )(?P<word>in|on|at|by|with|from|for|to|as|named|called|(?<=[a-z] )of)"
    rf" (?P<answer>{DATE}|{YEAR}|{NAME})(?! ?[–-])"
)
_OF_PEOPLE = ("by", "with", "named")
_OF_PLACES = ("in", "at", "near", "from")


def ask_sentence(passage: Passage, rng: Random) -> Question | None:
    """A question about a random sentence of the passage; None if no rule fits it."""
    sentences = [s for s in sentences_of(passage) if MIN_SENTENCE_WORDS <= len(s.split()) <= MAX_SENTENCE_WORDS]
    picked = rng.sample(sentences, min(3, len(sentences)))
    for rules in (rng.sample(RULES, len(RULES)), LAST_RULES):
        for sentence in picked:
            for rule in rules:
                asked = rule(sentence, passage, rng)
                if asked and _is_sound(*asked, passage):
                    return _spelled(*asked, rng)
    return None


def _spelled(text: str, answer: str, rng: Random) -> Question:
    text = f"{text[0].upper()}{text[1:]}?"
    if rng.random() < 0.3:  # as people type
        text = text[0] + text[1:].lower()
    return Question(text, answer, "sentence")


def sentences_of(passage: Passage) -> list[str]:
    """Sentences without their full stops, a pronoun at the start replaced by what the passage is about."""
    found = []
    for sentence in _SENTENCE_END.split(passage.text):
        spelled = _PRONOUN.sub(lambda _: passage.name, sentence.strip())
        found.append(_POSSESSIVE.sub(lambda _: f"{passage.name}'s", spelled).rstrip(".!? "))
    return found


def _is_sound(text: str, answer: str, passage: Passage) -> bool:
    words = len(answer.split())
    return (
        0 < words <= MAX_ANSWER_WORDS
        and (len(answer) > 2 or answer.isdigit())
        and 3 < len(text.split()) <= MAX_QUESTION_WORDS
        and answer in passage.text
        and answer.lower() not in text.lower()
    )


def _when(sentence: str, _: Passage, rng: Random) -> tuple[str, str] | None:
    match = _WHEN.match(sentence)
    if not match:
        return None
    word = rng.choice(("When", "When", "In what year")) if re.fullmatch(YEAR, match["answer"]) else "When"
    return f"{word} {match['be']} {_lower_the(match['subject'])} {match['rest']}", match["answer"]


def _by(sentence: str, _: Passage, rng: Random) -> tuple[str, str] | None:
    match = _BY.match(sentence)
    if not match:
        return None
    subject, answer = _lower_the(match["subject"]), tidy(match["answer"])
    if " " not in match["rest"] and match["be"] == "was" and rng.random() < 0.6:
        return f"Who {match['rest']} {subject}", answer
    return f"Who {match['be']} {subject} {match['rest']} by", answer


def _where(sentence: str, _: Passage, __: Random) -> tuple[str, str] | None:
    match = _WHERE.match(sentence)
    if not match or re.search(YEAR, match["answer"]):
        return None
    return f"Where {match['be']} {_lower_the(match['subject'])} {match['rest']}", tidy(match["answer"])


def _is_the(sentence: str, passage: Passage, __: Random) -> tuple[str, str] | None:
    match = _IS_THE.match(sentence)
    if not match:
        return None
    word = "Who" if passage.kind == "person" and match["answer"] in passage.text[:60] else "What"
    return f"{word} {match['be']} {_clause(match['rest'])}", match["answer"]


def _is_a(sentence: str, passage: Passage, __: Random) -> tuple[str, str] | None:
    match = _IS_A.match(sentence)
    if not match or passage.kind == "person":
        return None
    return f"What {match['be']} {_lower_the(match['subject'])}", _clause(match["answer"])


def _did(sentence: str, passage: Passage, __: Random) -> tuple[str, str] | None:
    match = _DID.match(sentence)
    if not match or match["answer"].startswith(("The ", "In ", "On ", "At ")) or match["answer"] == passage.name:
        return None
    return f"Who {_clause(match['rest'])}", match["answer"]


def _called(sentence: str, _: Passage, __: Random) -> tuple[str, str] | None:
    match = _CALLED.match(sentence)
    if not match:
        return None
    return f"What {match['be']} {_lower_the(match['subject'])} {match['rest']}", tidy(match["answer"])


def _how_many(sentence: str, _: Passage, rng: Random) -> tuple[str, str] | None:
    match = _COUNT.search(sentence)
    if not match:
        return None
    return _in_place(sentence, match.start(), match.end(), f"how many {match['noun']}", rng), match["answer"]


def _in_situ(sentence: str, _: Passage, rng: Random) -> tuple[str, str] | None:
    """'It was shot in Prague by …' → 'X was shot in what place by …?'"""
    matches = [m for m in _SPAN.finditer(sentence) if tidy(m["answer"]) == m["answer"]]
    if not matches:
        return None
    match = rng.choice(matches)
    answer, word = match["answer"], match["word"]
    if re.fullmatch(YEAR, answer):
        what = "what year"
    elif re.fullmatch(DATE, answer):
        what = "what date"
    elif word in _OF_PEOPLE and " " in answer:
        what = "whom" if word in ("by", "with") else "who"
    else:
        what = rng.choice(("what place", "which place", "where")) if word in _OF_PLACES else "what"
    return _in_place(sentence, match.start("answer"), match.end("answer"), what, rng), answer


def _in_place(sentence: str, start: int, end: int, what: str, rng: Random) -> str:
    """The sentence with `what` in place of [start, end), cut to the words around it."""
    before, after = sentence[:start], sentence[end:]
    if re.search(r"[(\"]", before) or not 2 < len(before.split()) <= MAX_QUESTION_WORDS - 4:
        return ""
    kept = re.split(r"[;:(\"]|, ", after)[0].split()[: rng.choice((0, 0, 6, 10))]
    return " ".join([*before.split(), what, *kept]).strip(" ,;:.")


RULES: tuple[Callable[[str, Passage, Random], tuple[str, str] | None], ...] = (
    _when,
    _by,
    _where,
    _is_the,
    _is_a,
    _did,
    _called,
    _how_many,
)
LAST_RULES = (_in_situ,)  # it fits almost every sentence, and reads worst


def _lower_the(subject: str) -> str:
    return "the " + subject[4:] if subject.startswith("The ") else subject


def _clause(text: str) -> str:
    """The words up to where the next clause begins."""
    return re.split(r",? (?:and|which|who|that|but|where|when|while|because)\b|, ", text)[0].strip(" ,;:.")
