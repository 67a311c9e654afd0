"""What the engine promises about requests: they end, they say why, they give their slots back, and they fail alone."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from fusionrag.config import StoreConfig
from fusionrag.engine import MAX_FAILED_PASSES
from fusionrag.errors import ConfigError, PromptTooLong, QueueFull, StoreError
from fusionrag.sampling import SamplingParams
from fusionrag.store import MemoryStore, open_store


class TroubledStore(MemoryStore):
    """Breaks its promise for one digest: `get` raises."""

    def __init__(self, trouble):
        super().__init__()
        self.bad_digest, self.trouble = "", trouble

    def get(self, spec):
        if spec.digest == self.bad_digest:
            raise self.trouble
        return super().get(spec)


class NoStore(MemoryStore):
    def get(self, spec):
        raise AssertionError("nobody should look here")


@pytest.fixture
def corpus(bench):
    chunks = bench.chunks(23, 40, 17)
    bench.preprocess(chunks)
    return chunks


def text(events, request_id="r"):
    return "".join(e.text for e in events if e.request_id == request_id)


# --- how an answer ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_an_answer_of_max_tokens_ends_with_length(max_tokens, bench, corpus):
    events = bench.engine().generate(bench.request(bench.plan(corpus), sampling=SamplingParams(max_tokens=max_tokens)))
    assert [e.finish_reason for e in events] == [None] * (max_tokens - 1) + ["length"]
    assert events[-1].stats.completion_tokens == max_tokens


def test_an_answer_ends_with_stop_at_a_token_that_ends_answers(bench, make_bench, corpus):
    plan, sampling = bench.plan(corpus), SamplingParams(max_tokens=8, ignore_eos=True)
    tokens = bench.tokens(bench.engine().generate(bench.request(plan, sampling=sampling, method="full")))
    last = next(i for i in range(3, 8) if tokens[i] not in tokens[:i])
    bench = make_bench(eos_token_id=tokens[last])  # the same weights
    events = bench.engine().generate(bench.request(plan, method="full"))
    assert bench.tokens(events) == tokens[: last + 1]
    assert events[-1].finish_reason == "stop"
    assert text(events) == bench.model.tokenizer.decode(tokens[:last])
    ignoring = bench.engine().generate(bench.request(plan, sampling=sampling, method="full"))
    assert bench.tokens(ignoring) == tokens and ignoring[-1].finish_reason == "length"


def test_an_answer_ends_with_stop_before_a_stop_string(bench, corpus):
    plan = bench.plan(corpus)
    whole = text(bench.engine().generate(bench.request(plan, sampling=SamplingParams(max_tokens=30))))
    stop = whole[len(whole) // 2 :][:1]
    sampling = SamplingParams(max_tokens=30, stop=("no such text", stop))
    events = bench.engine().generate(bench.request(plan, sampling=sampling))
    assert text(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert events[-1].stats.completion_tokens < 30


def test_the_pieces_of_an_answer_are_the_text_of_its_tokens(bench, corpus):
    events = bench.engine().generate(bench.request(bench.plan(corpus), sampling=SamplingParams(max_tokens=40)))
    assert text(events) == bench.model.tokenizer.decode(bench.tokens(events), skip_special_tokens=True)


def test_what_looked_like_a_stop_string_is_sent_when_the_answer_ends_otherwise(bench, corpus):
    plan = bench.plan(corpus)
    whole = text(bench.engine().generate(bench.request(plan, sampling=SamplingParams(max_tokens=30))))
    sampling = SamplingParams(max_tokens=30, stop=(whole[-3:] + "never",))
    events = bench.engine().generate(bench.request(plan, sampling=sampling))
    assert text(events) == whole and events[-1].finish_reason == "length"


# --- what it says on the way ------------------------------------------------------------------------------------------


def test_stats_come_with_the_first_token_and_the_last_event(bench, corpus):
    events = bench.engine().generate(bench.request(bench.plan(corpus), recompute_ratio=0.3))
    assert [e.stats is not None for e in events] == [True, *[False] * 6, True]
    first, last = events[0].stats, events[-1].stats
    assert (first.completion_tokens, last.completion_tokens) == (1, 8)
    assert first.ttft_ms == last.ttft_ms > 0 and first.chunks == last.chunks


def test_the_phases_of_a_request_add_up_to_its_ttft(bench, corpus):
    request = bench.request(bench.plan(corpus), recompute_ratio=0.3, method="attention")
    stats = bench.engine().generate(request)[0].stats
    phases = vars(stats.phases)
    assert all(ms >= 0 for ms in phases.values())
    assert all(phases[name] > 0 for name in ("load_ms", "reposition_ms", "probe_ms", "select_ms", "recompute_ms"))
    assert sum(phases.values()) <= stats.ttft_ms + 1e-6


def test_retrieval_counts_into_ttft_and_not_into_queueing(bench, corpus):
    request = bench.request(bench.plan(corpus))
    early = replace(request, arrival=time.perf_counter() - 100.0, retrieve_ms=99_000.0)
    stats = bench.engine().generate(early)[0].stats
    assert stats.phases.retrieve_ms == 99_000.0
    assert 1_000 <= stats.phases.queue_ms < 50_000
    assert stats.ttft_ms >= 100_000


def test_ratio_1_never_looks_at_the_store(bench, corpus):
    engine = bench.engine(store=NoStore())
    events = engine.generate(bench.request(bench.plan(corpus), method="attention", recompute_ratio=1.0))
    stats = events[-1].stats
    assert stats.computed_tokens == stats.prompt_tokens == bench.plan(corpus).num_tokens
    assert stats.chunks == ()


def test_plain_text_never_looks_at_the_store(bench):
    events = bench.engine(store=NoStore()).generate(bench.request(bench.text_plan(range(40))))
    assert events[-1].stats.computed_tokens == 40


def test_the_load_counts_requests_and_slots(bench, corpus):
    engine = bench.engine(max_num_requests=1, arena_tokens=1000)
    requests = [bench.request(bench.plan(corpus), name) for name in ("one", "two")]
    for request in requests:
        engine.submit(request)
    engine.step()
    load = engine.load
    assert (load.num_running, load.num_waiting, load.arena_tokens) == (1, 1, 1000)
    assert load.arena_used_tokens == requests[0].plan.num_tokens + 8


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_refused_and_not_kept(bench, corpus):
    plan = bench.plan(corpus)
    for config, max_tokens, field in (
        ({"arena_tokens": plan.num_tokens + 7}, 8, "max_tokens"),
        ({"arena_tokens": plan.num_tokens}, 1, "messages"),
        ({"arena_tokens": 5000}, 1024, "max_tokens"),  # the model's own limit
    ):
        engine = bench.engine(**config)
        with pytest.raises(PromptTooLong, match=f"the prompt has {plan.num_tokens} tokens") as error:
            engine.submit(bench.request(plan, sampling=SamplingParams(max_tokens=max_tokens)))
        assert error.value.field == field
        assert not engine.has_work and engine.arena.num_free == engine.arena.num_slots


def test_a_prompt_that_just_fits_is_answered(bench, corpus):
    plan = bench.plan(corpus)
    events = bench.engine(arena_tokens=plan.num_tokens + 8).generate(bench.request(plan))
    assert len(bench.tokens(events)) == 8


def test_one_more_than_may_wait_is_refused_and_not_kept(bench, corpus):
    engine = bench.engine(max_num_requests=2, max_queue=1)
    requests = [bench.request(bench.plan(corpus), name) for name in "abcd"]
    for request in requests[:3]:
        engine.submit(request)
    with pytest.raises(QueueFull, match="max_queue"):
        engine.submit(requests[3])
    events = bench.run(engine, [])
    assert {e.request_id for e in events} == {"a", "b", "c"}
    engine.submit(requests[3])  # there is room again


# --- slots ------------------------------------------------------------------------------------------------------------


def test_requests_that_wait_for_slots_are_answered_in_order_of_arrival(bench, corpus):
    plan = bench.plan(corpus)
    engine = bench.engine(arena_tokens=2 * (plan.num_tokens + 8) + 10)
    small = bench.request(bench.plan([]), "small")  # would fit at once, but came last
    events = bench.run(engine, [*(bench.request(plan, name) for name in "abc"), small])
    first_tokens = [e.request_id for e in events if e.stats and e.stats.completion_tokens == 1]
    assert first_tokens == ["a", "b", "c", "small"]
    assert engine.arena.num_free == engine.arena.num_slots


def test_cancelling_frees_the_slots_at_every_step_of_a_requests_life(bench, corpus):
    """While it waits, while a missing chunk is computed, in the middle of recomputing, while it decodes, afterwards."""
    missing = bench.chunk("a passage that nobody has preprocessed")
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    request = bench.request(bench.plan([*corpus, missing]), "r", sampling, recompute_ratio=0.5)
    beside = bench.request(bench.text_plan(range(60, 70)), "beside", SamplingParams(max_tokens=30, ignore_eos=True))
    alone = bench.tokens(bench.engine().generate(beside), "beside")

    def cancel_after(num_steps):
        """Events of the cancelled request, and the engine once the other one is done."""
        engine = bench.engine(max_batch_tokens=16)
        engine.submit(beside)
        events = engine.step()
        engine.submit(request)
        events += [event for _ in range(num_steps) for event in engine.step()]
        engine.cancel("r")
        engine.cancel("r")  # an unknown id has no effect
        assert engine.load.arena_used_tokens == 10 + 30 and engine.load.num_running == 1
        late = bench.run(engine, [])
        assert bench.tokens(events + late, "beside") == alone
        assert "r" not in {e.request_id for e in late}
        assert engine.arena.num_free == engine.arena.num_slots
        return [e for e in events if e.request_id == "r"]

    lives = [cancel_after(num_steps) for num_steps in range(24)]
    assert [len(events) for events in lives] == sorted(len(events) for events in lives)
    num_silent = sum(not events for events in lives)
    assert num_silent == 3 + 4  # 15 rows a step: the missing chunk's 38 tokens, then 40 selected ones and the tail's 17
    assert lives[-1][-1].finish_reason == "length" and len(lives[-1]) == 8


def test_cancelling_a_request_that_waits_forgets_it(bench, corpus):
    engine = bench.engine(max_num_requests=1)
    for name in "ab":
        engine.submit(bench.request(bench.plan(corpus), name))
    engine.step()
    engine.cancel("b")
    assert (engine.load.num_running, engine.load.num_waiting) == (1, 0)
    assert {e.request_id for e in bench.run(engine, [])} == {"a"}
    assert engine.arena.num_free == engine.arena.num_slots


def test_cancelling_one_of_several_leaves_the_answers_of_the_others(bench, corpus):
    plans = {name: bench.plan(corpus[i:], name) for i, name in enumerate("abc")}
    alone = {name: bench.tokens(bench.engine().generate(bench.request(plan))) for name, plan in plans.items()}
    engine = bench.engine()
    for name, plan in plans.items():
        engine.submit(bench.request(plan, name))
    events = [event for _ in range(4) for event in engine.step()]
    engine.cancel("b")
    events += bench.run(engine, [])
    assert {name: bench.tokens(events, name) for name in "ac"} == {name: alone[name] for name in "ac"}
    assert bench.tokens(events, "b") == alone["b"][:4]
    assert engine.arena.num_free == engine.arena.num_slots


def test_a_prefill_gives_its_slots_back_even_when_it_fails(bench, corpus):
    engine = bench.engine()
    with pytest.raises(ConfigError, match="probe_layers: '7'"):
        engine.prefill(bench.request(bench.plan(corpus), probe_layers="7"))
    assert engine.arena.num_free == engine.arena.num_slots and not engine.has_work


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [StoreError("the disk is on fire"), RuntimeError("a bug")])
def test_a_store_that_raises_costs_one_request_one_error_event(trouble, make_bench, corpus):
    bench = make_bench(store=TroubledStore(trouble))
    bench.preprocess(corpus)
    bad = bench.chunks(12, seed=5)[0]
    bench.store.bad_digest = bench.spec(bad).digest
    good = [bench.request(bench.plan(corpus), name) for name in ("before", "after")]
    alone = bench.tokens(bench.engine().generate(good[0]), "before")
    engine = bench.engine()
    events = bench.run(engine, [good[0], bench.request(bench.plan([bad]), "bad"), good[1]])
    (failure,) = [e for e in events if e.request_id == "bad"]
    assert (failure.finish_reason, failure.error, failure.token_id, failure.text) == ("error", trouble, None, "")
    assert bench.tokens(events, "before") == bench.tokens(events, "after") == alone
    assert engine.arena.num_free == engine.arena.num_slots
    with pytest.raises(type(trouble), match=str(trouble)):
        engine.generate(bench.request(bench.plan([bad])))


@pytest.mark.parametrize("is_filled", [True, False])
def test_a_selector_that_fails_costs_its_request_alone(is_filled, bench, corpus):
    """Whether it fails on admission or after missing chunks have been computed."""
    chunks = corpus if is_filled else [*corpus, bench.chunk("a passage that nobody has preprocessed")]
    engine = bench.engine(max_batch_tokens=64)
    bad = bench.request(bench.plan(chunks), "bad", probe_layers="0-3")
    events = bench.run(engine, [bench.request(bench.plan(corpus), "good"), bad])
    (failure,) = [e for e in events if e.request_id == "bad"]
    assert failure.finish_reason == "error" and "probe_layers: '0-3'" in str(failure.error)
    assert len(bench.tokens(events, "good")) == 8
    assert engine.arena.num_free == engine.arena.num_slots


def test_a_pass_that_fails_costs_the_requests_of_that_pass_and_not_the_engine(bench, corpus):
    engine = bench.engine()
    expected = bench.tokens(bench.engine().generate(bench.request(bench.plan(corpus))))
    no_such_token = bench.request(bench.text_plan([10**6]), "bad")
    events = bench.run(engine, [no_such_token])
    assert [(e.request_id, e.finish_reason) for e in events] == [("bad", "error")]
    assert isinstance(events[0].error, IndexError)
    assert engine.arena.num_free == engine.arena.num_slots
    assert bench.tokens(engine.generate(bench.request(bench.plan(corpus)))) == expected


def test_passes_that_keep_failing_are_raised(bench, corpus):
    """Then it is the device that is broken, not a request. A pass that succeeds forgives those before it."""
    engine = bench.engine()
    bad = bench.request(bench.text_plan([10**6]), "bad")
    for _ in range(2):
        assert [e.finish_reason for e in bench.run(engine, [bad, bad])] == ["error", "error"]
        engine.generate(bench.request(bench.plan(corpus)))
    for _ in range(MAX_FAILED_PASSES - 1):
        assert bench.run(engine, [bad])[0].finish_reason == "error"
    with pytest.raises(IndexError):
        bench.run(engine, [bad])


def test_a_bad_object_on_disk_costs_time_and_no_request(make_bench, tmp_path):
    """The disk store sets it aside; the chunk is computed in place."""
    bench = make_bench(store=open_store(tmp_path, StoreConfig(host_tier_bytes=0)))
    chunks = bench.chunks(23, 40)
    bench.preprocess(chunks)
    plan = bench.plan(chunks)
    for path in tmp_path.rglob(f"*{bench.spec(chunks[1]).digest}*"):
        path.write_bytes(b"not what it was")
    stats = bench.engine().generate(bench.request(plan))[-1].stats
    assert [r.source.value for r in stats.chunks] == ["disk", "computed"]
    torch.testing.assert_close(bench.prefill(plan).logits, bench.full(plan), rtol=0, atol=1e-4)
