"""The tiny text path: a Gemma 3 of a few hundred words, the projection of its hidden states, and the connector.

The DiT learns to follow a caption sooner if the context already separates motions and colors. So all three parts are
trained together to name the facts of a caption of the drawn world, and Gemma also to predict the next word:

    caption ──> Gemma ──┬─> hidden states ──> projection ──> connector ──> context ──> mean ──> motions, colors, ...
                        └─> next word

The readout behind the mean is discarded. The rest is saved in the released layout: a Gemma folder for transformers, and
a checkpoint's projection and connector.

    python -m toy.text --gemma runs/toy/gemma --out runs/toy/text.safetensors
"""

import argparse
import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import write_modules
from common.errors import ROOT, SEED, Parser, one_line_errors, whole
from common.outputs import refuse_folders
from text import TextConnector, pad_features
from toy.descend import descend
from toy.traits import COLORS, STYLES
from toy.world import BACKGROUNDS, BEHIND, MOVES, PERSON, SPLITS, TEMPLATES, caption, draw_scene

HIDDEN, LAYERS, TOKENS = 64, 4, 48  # Gemma's width and depth; the longest caption has about 40 tokens
# Differences of the tiny checkpoint from configs/ltx-2.3.json
TRANSFORMER = {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 8}
TRANSFORMER |= {"in_channels": 48, "out_channels": 48, "cross_attention_dim": 256, "caption_channels": HIDDEN}
# The largest positions in seconds, pixels, pixels: twice the default video and a margin
TRANSFORMER |= {"positional_embedding_max_pos": [4, 128, 128], "connector_positional_embedding_max_pos": [64]}
TRANSFORMER |= {"connector_num_attention_heads": 8, "connector_attention_head_dim": 32, "connector_num_layers": 1}
TRANSFORMER |= {"connector_num_learnable_registers": 16}


def narrow(heads: int) -> dict[str, Any]:
    """TRANSFORMER with fewer heads in DiT and connector, of the same 32 channels each."""
    widths = {"num_attention_heads": heads, "connector_num_attention_heads": heads, "cross_attention_dim": 32 * heads}
    return TRANSFORMER | widths


GEMMA = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA |= {"max_position_embeddings": TOKENS, "sliding_window": 32}
GEMMA |= {"layer_types": [*["sliding_attention"] * 3, "full_attention"]}
JOINED = ("", "and", "then")
SLOTS = {  # facts of a caption -> number of possible answers
    "first": len(MOVES),
    "second": len(MOVES) + 1,  # or nothing
    "joined": len(JOINED),
    "color": len(COLORS),
    "other color": len(COLORS) + 1,  # of a gradient or of shapes; the last one: plain
    "background": len(BACKGROUNDS),
    "shirt": len(COLORS) + 1,  # or not named
}


def sentences(count: int, seed: int, split: str = "train") -> tuple[list[str], Tensor]:
    """Captions and their facts, in the order of SLOTS: (count, 7)."""
    texts, answers = [], []
    for k in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), k))
        scene = draw_scene(rng, 2, split=split)
        texts.append(caption(scene, rng, split))
        moves = [list(MOVES).index(motion) for motion in scene.motions] + [len(MOVES)]
        color, other = (list(COLORS).index(name) for name in (scene.color, scene.second))
        other = len(COLORS) if scene.background == "plain" else other
        background = list(BACKGROUNDS).index(scene.background)
        shirt = list(COLORS).index(scene.shirt) if f"{scene.shirt} shirt" in texts[-1] else len(COLORS)
        answers.append([*moves[:2], JOINED.index(scene.joined), color, other, background, shirt])
    return texts, torch.tensor(answers)


def make_tokenizer() -> Any:
    """A tokenizer of Gemma's kind. Each word of the captions is one token; other words are spelled."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    captions = [caption(draw_scene(np.random.default_rng(k), 2), np.random.default_rng(k)) for k in range(3000)]
    words = [*PERSON, *(text for move in MOVES.values() for text in move.says), *chain(*BEHIND.values())]
    words += [*COLORS, *STYLES, *chain(*TEMPLATES.values())]
    letters = " ".join(chr(c) for c in range(33, 127))
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator([*captions, *(word + " " for word in words), letters], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS, add_bos_token=True)


class Reader(nn.Module):
    """Gemma, connector, and the readout that is discarded."""

    def __init__(self, tokenizer: Any, config: dict[str, Any]):
        from transformers import Gemma3TextConfig, Gemma3TextModel

        super().__init__()
        self.tokenizer = tokenizer
        self.gemma = Gemma3TextModel(Gemma3TextConfig(vocab_size=len(tokenizer), **GEMMA))
        self.connector = TextConnector(config, LAYERS + 1)
        nn.init.normal_(self.connector.connector.learnable_registers, std=0.5)
        self.readout = nn.Linear(self.connector.connector.dim, sum(SLOTS.values()))

    def forward(self, texts: list[str]) -> tuple[list[Tensor], Tensor]:
        """The readout's logits for each of SLOTS, (B, answers) each, and the mean loss of the next word."""
        device = self.readout.weight.device
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        out = self.gemma(input_ids=ids, attention_mask=batch["attention_mask"], output_hidden_states=True)
        features = self.connector.project(torch.stack(out.hidden_states, -1))  # of (B, S, hidden, layers)
        features, slots = pad_features([row[keep] for row, keep in zip(features, mask)], TOKENS)
        context = self.connector.connector(features, slots)  # (B, TOKENS, D)
        logits = self.readout(context.mean(1)).split(list(SLOTS.values()), -1)
        words = F.linear(out.last_hidden_state[:, :-1], self.gemma.embed_tokens.weight)  # (B, S-1, vocabulary)
        next_word = F.cross_entropy(words.transpose(1, 2), ids[:, 1:], reduction="none")
        return logits, next_word[mask[:, 1:]].mean()


def train(config: dict[str, Any], steps: int, batch: int, seed: int, device: str) -> Reader:
    torch.manual_seed(seed)
    reader = Reader(make_tokenizer(), config).to(device)
    texts, answers = sentences(20_000, seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        picks = torch.randint(len(texts), (batch,), generator=generator)
        logits, next_word = reader([texts[k] for k in picks])
        truth = answers[picks].to(device)
        return sum(F.cross_entropy(part, truth[:, k]) for k, part in enumerate(logits)) + 0.2 * next_word

    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, (0.9, 0.98), weight_decay=0.01)
    for _ in descend("text", optimizer, loss, steps):
        pass
    return reader.eval()


@torch.no_grad()
def measure(reader: Reader, count: int = 500) -> dict[str, float]:
    """Share of right answers for each fact, on sentence forms and on pairs of motion and color of the test split."""
    texts, answers = sentences(count, 1, "test")
    parts = [reader(texts[k : k + 100])[0] for k in range(0, count, 100)]
    guesses = [torch.cat(logits).argmax(-1).cpu() for logits in zip(*parts)]  # of each fact (count,)
    return {slot: (answers[:, k] == guesses[k]).float().mean().item() for k, slot in enumerate(SLOTS)}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy/text.safetensors", help="projection and connector (%(default)s)")
    parser.add_argument("--gemma", default="runs/toy/gemma", help="folder of the tiny Gemma (%(default)s)")
    parser.add_argument("--heads", type=whole(), default=8, help="of the connector; its width is 32 for each (8)")
    parser.add_argument("--steps", type=whole(), default=2500)
    parser.add_argument("--batch", type=whole(), default=128)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    refuse_folders(options.out)
    out, gemma, since = Path(options.out), Path(options.gemma), time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    ltx = json.loads((ROOT / "configs" / "ltx-2.3.json").read_text())
    ltx["transformer"] |= narrow(options.heads)
    reader = train(ltx["transformer"], options.steps, options.batch, options.seed, options.device)
    for slot, share in measure(reader).items():
        print(f"{slot:12} right in {share:.1%} of unseen captions")
    reader.cpu().tokenizer.save_pretrained(gemma)
    reader.gemma.to(torch.bfloat16).save_pretrained(gemma)
    write_modules(out, [reader.connector], ltx, {})
    print(f"wrote {gemma} and {out} after {time.monotonic() - since:.0f} s on {options.device}")


if __name__ == "__main__":
    with one_line_errors():
        main()
