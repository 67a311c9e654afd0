"""The loop learns, follows its schedule, and the command does the whole of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scripts.reader.adapter import add_adapter, save_adapter
from scripts.reader.branches import Branch, Rows, Tree, pack
from scripts.reader.config import ContextConfig
from scripts.reader.contexts import Composer, Context
from scripts.reader.encoding import Encoder
from scripts.reader.passages import Passage, Question
from scripts.reader.scoring import predicted
from scripts.reader.stream import RowStream, rows_by_kind
from scripts.reader.training import Trainer, plot_loss
from scripts.train_reader import check_end, main


@pytest.fixture
def stream(corpus, tokenizer, small):
    return RowStream(Composer(corpus, ContextConfig(plain_share=0.0)), Encoder(tokenizer), small)


def copying_rows(num_rows: int) -> Iterator[Rows]:
    """Without end: contexts that name a byte after a mark, and a question for it."""
    rng = Random(0)

    def trees() -> Iterator[Tree]:
        while True:
            context = [rng.randrange(60) for _ in range(20)]
            yield Tree((*context, 61, answer := rng.randrange(60)), (Branch((61,), (answer, 257)),))

    return pack(trees(), num_rows, row_tokens=128)


def test_loss_falls(make_peft, small, tmp_path):
    config = replace(small, learning_rate=3e-2, max_steps=80)
    history = Trainer(make_peft(), config).train(copying_rows(1), tmp_path / "log.jsonl")
    before, _ = Trainer(make_peft(), small).loss(next(copying_rows(1)))
    assert history[-1].loss < 0.8 * float(before.detach())
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [20, 40, 60, 80]
    plot_loss(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_parts_of_a_step_add_up(make_peft, small):
    progress = Trainer(make_peft(), replace(small, rows=2, micro_rows=1, max_steps=1)).train(copying_rows(1))
    assert len(progress) == 1 and progress[0].gradient_norm > 0


def test_kinds_whose_contexts_are_longer_than_a_row_are_not_looked_at(tokenizer, small):
    short, long = (Passage("Kell", "Kell is a port. " * n) for n in (1, 99))
    asked = [Context((p,), (Question("Where?", "a port", kind),)) for p, kind in ((short, "short"), (long, "long"))]
    assert list(rows_by_kind(asked, Encoder(tokenizer), replace(small, row_tokens=1024))) == ["short"]


def test_the_schedule_ends_when_the_time_is_over(make_peft, small):
    assert Trainer(make_peft(), replace(small, max_seconds=1e-9)).train(copying_rows(1)) == []


def test_a_seed_gives_the_same_rows_again(stream):
    once, again = (list(islice(iter(stream), 2)) for _ in range(2))
    assert all((a.ids == b.ids).all() for a, b in zip(once, again, strict=True))


def test_answers_count_as_predicted_where_every_token_is(make_peft, small):
    """Packed and looked at with the training's own pass, they are those that scoring finds one by one."""
    model, context = make_peft(), tuple(range(40))
    lm, trainer = model.get_base_model().eval(), Trainer(model, small)
    with torch.no_grad():
        said = int(lm(input_ids=torch.tensor([(*context, 61)])).logits[0, -1].argmax())
        then = int(lm(input_ids=torch.tensor([(*context, 61, said)])).logits[0, -1].argmax())
    answers = ((said,), (said, then), (said, then + 1), (said + 1,), (said + 1, then))
    trees = [Tree(context, tuple(Branch((61,), answer) for answer in answers))] * 2
    expected = [True, True, False, False, False]
    assert predicted(lm, trees[0]) == expected
    assert trainer.predicted(list(pack(trees, 1, 128))) == pytest.approx(100 * sum(expected) / len(expected))


def test_a_model_that_stops_at_another_token_is_refused(make_hf, make_config, tokenizer):
    end_id = Encoder(tokenizer).end_id
    for stops in (end_id, [end_id, 3]):
        check_end(end_id, make_hf(make_config("llama", eos_token_id=stops), "sdpa").generation_config)
    for stops in (end_id - 1, [3, 4], None):
        with pytest.raises(ValueError, match="generation stops at"):
            check_end(end_id, make_hf(make_config("llama", eos_token_id=stops), "sdpa").generation_config)


def test_the_command_trains_scores_and_leaves_out_what_is_evaluated(tmp_path, files, tiny_model, small, capsys):
    out = tmp_path / "out"
    flags = (
        "--rank 2 --max-steps 1 --rows 1 --micro-rows 1 --row-tokens 4096 --num-workers 0 --human-per-context 1 "
        "--validation-share 0.4 --validation-contexts 1"
    )
    paths = ["--base", tiny_model, "--passages", files["passages"], "--human", files["human"]]
    earlier = tmp_path / "earlier.safetensors"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    save_adapter(add_adapter(base, small), earlier, small.scale)
    main(
        [
            *map(str, paths),
            "--evaluate",
            str(files["evaluation"]),
            "--out",
            str(out),
            "--compare",
            str(earlier),
            *flags.split(),
        ]
    )
    printed = capsys.readouterr().out
    assert "16 passages (1 dropped)" in printed and "new minus" in printed and "held out" in printed
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert {name.rpartition("/")[2] for name in scores} == {"earlier.safetensors", "adapter.safetensors"}
    assert scores[str(earlier)]["evaluation"]["groups"]["all"][0] == 1
    assert load_file(out / "adapter.safetensors")["0.q.A"].shape[0] == 2
