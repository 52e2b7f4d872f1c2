"""The tiny text path: words are tokens, sentences say what they say, and training writes what transformers loads."""

import json
import re

import pytest

from checkpoint import write_modules
from text import TextEncoder
from toy import text as toy_text
from toy.make import HERE, assemble
from toy.traits import COLORS
from toy.vae import CONFIG
from toy.world import MOVES
from vae import VideoVAE


@pytest.fixture(scope="module")
def tokenizer():
    return toy_text.make_tokenizer()


def test_captions_are_a_token_a_word(tokenizer):
    texts, _ = toy_text.sentences(500, 3, "test")
    counts = [(len(tokenizer(text)["input_ids"]) - 1) / len(text.split()) for text in texts]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) <= toy_text.TOKENS
    assert sum(counts) / len(counts) < 1.1
    assert tokenizer.decode(tokenizer("Zebra, 1!")["input_ids"], skip_special_tokens=True) == "Zebra, 1!"  # spelled


def test_answers_are_what_the_sentences_say():
    texts, answers = toy_text.sentences(300, 4)
    moves, colors = list(MOVES), list(COLORS)
    for text, answer in zip(texts, answers.tolist()):
        first, second, joined, color, other, _, shirt = answer
        said = [moves[m] for m in (first, second) if m < len(moves)]
        assert all(any(words in text for words in MOVES[m].says) for m in said), text
        assert (joined > 0) == (len(said) == 2)
        assert (", then" in text) == (toy_text.JOINED[joined] == "then")
        named = set(re.findall("|".join(colors), text))
        assert {colors[k] for k in (color, other) if k < len(colors)} <= named, text
        assert re.findall(r"(\w+) shirt", text) == colors[shirt : shirt + 1], text


@pytest.mark.slow
def test_a_few_steps_learn_and_are_loaded(tmp_path, in_process):
    out, gemma = tmp_path / "text.safetensors", tmp_path / "gemma"
    code, printed, error = in_process(
        toy_text.main, "toy_text.py", "--out", out, "--gemma", gemma, "--steps", "200", "--batch", "48"
    )
    assert code == 0, error
    shares = dict(re.findall(r"(\w[\w ]*?) +right in ([\d.]+)%", printed))
    assert float(shares["color"]) > 30  # of twelve
    ltx = json.loads((HERE / "configs" / "ltx-2.3.json").read_text())
    write_modules(tmp_path / "vae", [VideoVAE(ltx["vae"] | CONFIG)], ltx, {})
    assemble(tmp_path / "vae", out, tmp_path / "start.safetensors")
    context = TextEncoder.from_checkpoint(tmp_path / "start.safetensors", gemma).encode(
        ["Someone nods against a red wall.", ""]
    )
    assert context.shape == (2, toy_text.TOKENS, 256) and context.isfinite().all()
