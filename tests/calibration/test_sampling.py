"""Text that a model says of itself: from its whole distribution, by seed, with prompts of many lengths."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.calibration import make_tokenizer
from helpers.tiny_models import llama
from theseus_transport.calibration.prompts import Prompt
from theseus_transport.calibration.sampling import BLANK, TEXTS, sample_texts
from theseus_transport.errors import InputRefused, NumericalError
from transformers import AutoTokenizer, GenerationConfig

BEGIN, END = 1, 2


class Numbers:
    """A tokenizer whose tokens are numbers; 1 begins a text and 2 ends it, and both are special."""

    bos_token_id, eos_token_id, special = BEGIN, END, (BEGIN, END)

    def __call__(self, text, add_special_tokens=True):
        ids = [int(word) for word in text.split()]
        return {"input_ids": [BEGIN, *ids, END] if add_special_tokens else ids}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in self.special))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama("source")


def without_end(model):
    """A model that never says 2."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer = Numbers()
    tokenizer.eos_token_id = None
    return tokenizer


def greedy(model, ids, count):
    """The likeliest tokens one by one, by passes over the whole text."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_tokens_are_drawn_from_the_whole_distribution_at_temperature_one(model) -> None:
    model.lm_head.weight.data *= 12  # few enough likely tokens to count them
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_k=3)  # to be left aside
    with torch.no_grad():
        logits = model(torch.tensor([[BEGIN]])).logits[0, -1]
    count = 4000
    tokenizer = without_end(model)
    tokenizer.special = ()
    said = sample_texts(model, tokenizer, tokens=2 * count, length=2, batch_size=500)
    found = Counter(int(text) for text in said)
    drawn = torch.tensor([found[i] / len(said) for i in range(len(logits))])

    def away(temperature: float) -> float:
        return float((drawn - (logits / temperature).softmax(0)).abs().sum() / 2)

    # half the sum of mean deviations sqrt(2 p / (pi n)), which is at most sqrt(k / (2 pi n)) = 0.11 for k = 300 tokens
    assert len(said) == count and away(1.0) < 0.11 < min(away(0.5), away(2.0))
    assert model.generation_config.top_k == 3, "what was the model's own is there again"


def test_prompts_of_many_lengths_go_on_as_each_would_alone(model) -> None:
    """Keys and values are cached and rows padded; logits so large that chance has no say."""
    model.lm_head.weight.data *= 1e5
    tokenizer = without_end(model)
    prompts = ["7", "11 12 13 14 15 16", "21 22 23"]
    said = sample_texts(model, tokenizer, tokens=1, prompts=prompts, length=16)
    for prompt in prompts:
        [text] = {text for text in said if text.startswith(prompt)}
        start = [BEGIN, *map(int, prompt.split())]
        # the padding of the longest of a batch leaves less room for the others
        [longest] = {1 + 1 + len(p.split()) for p in prompts if len(p.split()) == 6}
        expected = greedy(model, [*start, END], 16 - longest)
        assert text == tokenizer.decode(expected, True, False)


def test_the_same_seed_says_the_same_and_leaves_chance_as_it_was(model) -> None:
    model.train()
    before = torch.get_rng_state()
    first, again, other = (sample_texts(model, Numbers(), tokens=900, length=20, seed=s) for s in (3, 3, 4))
    assert first == again != other and len(set(first)) > len(first) // 2
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(str(BEGIN) not in text.split() and str(END) not in text.split() for text in first)


def test_as_many_tokens_as_asked_are_sampled(model) -> None:
    tokenizer = without_end(model)
    tokenizer.special = ()
    for tokens in (1, 100, 1000):
        said = sample_texts(model, tokenizer, tokens=tokens, length=8, batch_size=4)
        assert len(said) == 4 * -(-tokens // 32)
        assert all(len(text.split()) == 7 for text in said), "8 but for the first, which begins the text"


def test_all_prompts_are_used_in_turn(model) -> None:
    prompts = [str(i) for i in range(20, 40)]
    said = sample_texts(model, without_end(model), tokens=40 * 6, prompts=prompts, length=6, batch_size=8)
    assert {*Counter(text.split()[0] for text in said).values()} == {2}


def test_special_tokens_stay_only_where_a_chat_template_told_them(model) -> None:
    model.lm_head.weight.data *= 1e5
    after = greedy(model, [5, BEGIN, 6], 1)[-1]
    tokenizer = Numbers()
    tokenizer.eos_token_id = model.config.eos_token_id = after
    [chat] = {*sample_texts(model, tokenizer, tokens=1, prompts=[Prompt(f"5 {BEGIN} 6", told=True)], length=9)}
    assert chat == f"5 {BEGIN} 6 {after}", "up to the end of the turn"
    tokenizer = without_end(model)
    [text] = {*sample_texts(model, tokenizer, tokens=1, prompts=[f"5 {BEGIN} 6"], length=9)}
    assert text.startswith("5 6 ") and str(END) not in text.split()[:3]


def test_a_chat_ends_with_its_first_end(model) -> None:
    """Others of its batch go on, and it is padded meanwhile."""
    model.lm_head.weight.data[END] = model.lm_head.weight.data.abs().max(0).values * 4  # said now and then
    said = sample_texts(model, Numbers(), tokens=2000, prompts=[Prompt("5 6", told=True)], length=40)
    ended = [text.split() for text in said if str(END) in text.split()]
    assert len({len(words) for words in ended}) > 3
    assert all(words.count(str(END)) == 1 and words[-1] == str(END) for words in ended)


def test_what_is_said_can_be_read_by_a_real_tokenizer(model, tmp_path: Path) -> None:
    model.resize_token_embeddings(400, mean_resizing=False)
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, 330, begin=True))
    said = sample_texts(model, tokenizer, tokens=400, length=30, prompts=["The quick", "Äpfel und"])
    assert all(text.startswith(("The quick", "Äpfel und")) and "<s>" not in text for text in said)
    assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in said)


def test_prompts_without_room_are_left_out_or_refused(model, caplog) -> None:
    said = sample_texts(model, Numbers(), tokens=1, prompts=["7", "3 4 5 6 7 8"], length=5)
    assert {text.split()[0] for text in said} == {"7"} and "1 of 2 prompts have 5 tokens or more" in caplog.text
    with pytest.raises(InputRefused, match="each of 1 prompts has 5 tokens or more, or none; give shorter ones"):
        sample_texts(model, Numbers(), tokens=1, prompts=["3 4 5 6 7 8"], length=5)


def test_nothing_to_begin_with_is_refused(model) -> None:
    tokenizer = without_end(model)
    tokenizer.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(InputRefused, match="neither tokenizer nor config names a beginning-of-text token; give"):
        sample_texts(model, tokenizer, tokens=1)
    with pytest.raises(InputRefused, match="length is 1 and batch size 16, expected at least 2 and 1"):
        sample_texts(model, tokenizer, tokens=1, length=1)


def test_a_model_that_says_nothing_is_refused(model) -> None:
    tokenizer = Numbers()
    model.lm_head.weight.data *= 1e5
    tokenizer.eos_token_id = model.config.eos_token_id = greedy(model, [BEGIN], 1)[-1]
    with pytest.raises(InputRefused, match=f"ends {BLANK * TEXTS} texts before their first word; give --calibration"):
        sample_texts(model, tokenizer, tokens=1)


def test_logits_that_are_not_finite_are_told(model) -> None:
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="logits are not finite.*give --calibration a text"):
        sample_texts(model, Numbers(), tokens=1)
