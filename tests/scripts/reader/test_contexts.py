"""Contexts as retrieval would bring them; nothing of an evaluation file among them; the server's own prompt."""

from __future__ import annotations

from itertools import combinations
from random import Random

import torch

from fusionrag.config import PromptConfig
from fusionrag.prompt import PromptBuilder, Turn
from fusionrag.types import PromptChunk
from scripts.evaluation.datasets import Example
from scripts.evaluation.datasets import Passage as Shown
from scripts.reader.branches import Branch, Tree
from scripts.reader.comparisons import date_key
from scripts.reader.config import ContextConfig
from scripts.reader.contexts import Composer, Context, as_plain
from scripts.reader.corpus import nearest
from scripts.reader.drills import COMPARISON, STEP
from scripts.reader.encoding import Encoder
from scripts.reader.holdout import Holdout, exclude, set_aside
from scripts.reader.passages import HumanQuestion, Passage, Question
from scripts.reader.scoring import answer_all, by_type, predicted


def contexts(corpus, number=60, **changes):
    composer, rng = Composer(corpus, ContextConfig(**{"plain_share": 0.0, **changes})), Random(0)
    return [composer.compose(rng) for _ in range(number)]


def test_every_answer_can_be_read_in_its_context(corpus):
    for context in contexts(corpus):
        text = " ".join(f"{p.title} {p.text}" for p in context.passages)
        for question in context.questions:
            assert question.answer in ("yes", "no") or question.answer in text, question


def test_no_two_passages_with_facts_share_a_name(corpus):
    for context in contexts(corpus):
        names = [p.name for p in context.passages if p.facts]
        assert len(names) == len(set(names))


def test_every_kind_of_question_is_asked_and_no_more_than_allowed(corpus):
    found = contexts(corpus, max_questions=9)
    assert {q.kind for c in found for q in c.questions} == {
        "human",
        "bridge",
        "comparison",
        "sameness",
        "single",
        "sentence",
    }
    assert max(len(c.questions) for c in found) == 9


def test_the_same_random_state_gives_the_same_context(corpus):
    assert contexts(corpus, 5) == contexts(corpus, 5)


def test_without_counterfactual_copies_passages_are_those_of_the_corpus(corpus):
    texts = {p.text for p in corpus.passages}
    assert all(p.text in texts for c in contexts(corpus, counterfactual_share=0.0, year_share=0.0) for p in c.passages)
    assert any(
        p.text not in texts for c in contexts(corpus, counterfactual_share=1.0, year_share=0.0) for p in c.passages
    )


def test_at_a_year_share_of_one_nothing_is_learned_of_who_was_first(corpus):
    """How often one was born before another hardly depends on who they are: only the spans of their lives are kept."""
    births = {p.name: date_key(p.facts["birth"])[0] for p in corpus.passages if "birth" in p.facts}
    kept = []
    for context in contexts(corpus, 400):
        seen = [(births[p.name], date_key(p.facts["birth"])[0]) for p in context.passages if p.name in births]
        kept += [(a[0] < b[0]) == (a[1] < b[1]) for a, b in combinations(seen, 2) if a[1] != b[1]]
    assert len(kept) > 1000 and abs(sum(kept) / len(kept) - 0.5) < 0.1


def test_contexts_are_drills_at_first_and_fewer_later(corpus):
    composer, rng = Composer(corpus, ContextConfig(first_drill_share=1.0, drill_share=0.0, drill_tokens=100)), Random(0)
    at_first, later = ([composer.context(rng, before) for _ in range(30)] for before in (0, 100))
    assert sum({q.kind for q in c.questions} <= {STEP, COMPARISON} for c in at_first) > 20
    assert not any(q.kind in (STEP, COMPARISON) for c in later for q in c.questions)


def test_plain_contexts_are_lower_case_and_untitled_and_still_hold_the_answers():
    plain = as_plain(Context((Passage("Kell", "Kell is a port (since 1871)."),), (Question("Where?", "Kell", "x"),)))
    assert plain.passages[0] == Passage("", "kell . kell is a port ( since 1871 ) .")
    assert plain.questions[0].answer == "kell"


def test_context_and_branch_are_the_prompt_that_the_server_sends(tokenizer):
    prompts, encoder = PromptBuilder(tokenizer, PromptConfig()), Encoder(tokenizer)
    shown = [("Kell", "Kell is a port."), ("", "untitled")]
    tree = encoder.tree(Context(tuple(Passage(*p) for p in shown), (Question("Where is Kell?", "a port", "x"),)))
    chunks = [PromptChunk(str(i), tuple(prompts.encode(*p))) for i, p in enumerate(shown)]
    plan = prompts.plan(chunks, [Turn("user", "Where is Kell?")])
    sent = tuple(i for segment in plan.segments for i in segment.token_ids)
    assert tree.context_ids + tree.branches[0].question_ids == sent
    assert tree.branches[0].answer_ids == (*tokenizer("a port")["input_ids"], tokenizer.eos_token_id)


def test_answers_end_as_turns_of_the_chat_do_whatever_the_tokenizer_calls_its_end(make_tokenizer):
    """transformers 5.17 calls the beginning of a turn the end, and a reader learned never to stop."""
    confused = make_tokenizer()
    confused.eos_token = "<|begin|>"
    assert Encoder(confused).answer_ids("port")[-1] == confused.convert_tokens_to_ids("<|end|>")


def test_neighbours_are_ranked_by_the_words_they_share():
    texts = ["red boats sail north", "red boats sail south", "green hills", "green hills and boats"]
    found = nearest(texts, 2)
    assert found[0, 0] == 1 and found[1, 0] == 0 and found[2, 0] == 3
    assert all(i not in found[i] for i in range(4))


RUN = "The quay at Sennet was built by Ada Winter in 1871 for the herring boats of the northern towns."


def test_what_an_evaluation_file_asks_about_is_dropped_and_counted():
    example = Example(
        "1", "Who built the quay?", ("Ada Winter",), (Shown("Quay", RUN), Shown("Far", "Far away.")), "", (0,)
    )
    kept = Passage("Harbour", "The harbour of Lum has a mill, a weir, and a museum of clocks beside the river.")
    passages = [Passage("Copy", "Note: " + RUN), Passage("Quay (pier)", "Some other text about a pier."), kept]
    human = [
        HumanQuestion("who built the quay", ("x",), (kept,)),
        HumanQuestion("What was built in 1871?", ("a quay",), (Passage("Pier", RUN),)),
        HumanQuestion("What is in Lum?", ("a mill",), (kept,)),
    ]
    left, asked, dropped = exclude(passages, human, Holdout([example]))
    assert left == [kept] and asked == human[2:]
    assert (dropped.passages, dropped.human_questions) == (2, 2)


def test_what_is_set_aside_is_apart_and_always_the_same(passages, human):
    training, validation = set_aside(passages, human, 0.5)
    assert set_aside(passages, human, 0.5) == (training, validation)
    assert sorted(p.title for part in (training, validation) for p in part[0]) == sorted(p.title for p in passages)
    assert not {p.name for p in training[0]} & {p.name for p in validation[0]}
    assert 0 < len(validation[0]) < len(passages)
    assert set_aside(passages, human, 0.0)[1] == ([], [])


def test_answers_are_predicted_where_the_model_would_say_them(make_config, make_hf, tokenizer):
    """What the model itself answers counts as predicted, another answer does not."""
    model = make_hf(make_config("llama", max_position_embeddings=4096), "sdpa")
    passage, encoder = Passage("Kell", "Kell is a port on the north coast."), Encoder(tokenizer)
    prompt = encoder.context_ids([(passage.title, passage.text)]) + encoder.question_ids("Where is Kell?")
    with torch.no_grad():
        said = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    found = []
    for first in (said, (said + 1) % 256):
        tree = Tree(prompt[:50], (Branch(prompt[50:], (first,)),))
        found.append(predicted(model, tree))
    assert found == [[True], [False]]


def test_batched_answers_equal_those_one_by_one(make_config, make_hf, tokenizer):
    model = make_hf(make_config("llama", max_position_embeddings=4096), "sdpa")
    examples = [
        Example(str(n), f"What is {n}?", ("x",), (Shown("T", "word " * n),), f"real_comp_{n}") for n in (3, 40, 11)
    ]
    together = answer_all(model, tokenizer, examples)
    apart = [answer_all(model, tokenizer, [e])[0] for e in examples]
    assert [a.answer for a in together] == [a.answer for a in apart]
    assert by_type(together)["real_comp"][0] == 3
