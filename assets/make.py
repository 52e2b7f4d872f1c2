"""Make the embedded default: a tiny checkpoint in the LTX-2.3 layout, a tiny Gemma 3, and an example face.

    python assets/make.py

The weights are random and say so in the checkpoint's metadata. Sizes are what differs from configs/ltx-2.3.json.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoint import write_modules  # noqa: E402
from model import LTXVideo  # noqa: E402
from text import TextConnector  # noqa: E402
from vae import VideoVAE  # noqa: E402

HIDDEN, LAYERS, TOKENS = 64, 4, 64  # the tiny Gemma: width, depth, longest prompt

TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "in_channels": 16,
    "out_channels": 16,
    "cross_attention_dim": 128,
    "caption_channels": HIDDEN,
    "positional_embedding_max_pos": [4, 128, 128],  # seconds, pixels, pixels: twice the default video and a margin
    "connector_num_attention_heads": 4,
    "connector_attention_head_dim": 32,
    "connector_num_layers": 2,
    "connector_positional_embedding_max_pos": [256],
    "connector_num_learnable_registers": 16,
}
# One cell is 4 frames of 8x8 pixels: patches of 4, then space once and time twice by 2.
ENCODER = [
    ["res_x", {"num_layers": 1}],
    ["compress_space_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}],
    ["compress_time_res", {"multiplier": 1}],
    ["compress_time_res", {"multiplier": 2}],
    ["res_x", {"num_layers": 1}],
]
VAE = {
    "latent_channels": 16,
    "encoder_base_channels": 16,
    "decoder_base_channels": 16,
    "encoder_blocks": ENCODER,
    "decoder_blocks": [[kind.removesuffix("_res"), options] for kind, options in ENCODER],
}
DEFAULTS = {"height": 64, "width": 64, "frames": 17, "fps": 12.0, "steps": 30}

PROMPTS = [
    "A young woman with red hair turns her head to the left and smiles in front of a blue wall.",
    "An old man with a grey beard and glasses looks up, then nods slowly. The background is green.",
    "A person with short black hair walks across the frame, blinking, in warm light from the right.",
    "Close portrait of a bald man tilting his head; soft light, plain yellow background, calm face.",
]


def make_checkpoint(path: Path) -> None:
    """Random modules of the sizes above, in the released layout."""
    config = json.loads((HERE.parent / "configs" / "ltx-2.3.json").read_text())
    config["transformer"] |= TRANSFORMER
    config["vae"] |= VAE
    modules = [
        LTXVideo(config["transformer"]),
        TextConnector(config["transformer"], LAYERS + 1),
        VideoVAE(config["vae"]),
    ]
    for module in modules:
        for name, parameter in module.named_parameters():
            if name.endswith(("scale_shift_table", "learnable_registers")):
                nn.init.normal_(parameter, std=0.5)
    write_modules(path, modules, config, {"weights": "random", "defaults": DEFAULTS})


def make_gemma(folder: Path) -> None:
    """A Gemma 3 language model and a tokenizer of its kind, both of a few hundred entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Gemma3TextConfig, Gemma3TextModel, GemmaTokenizer

    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    letters = [chr(c) for c in range(33, 127)]
    tokenizer.train_from_iterator([*PROMPTS, " ".join(letters)], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    GemmaTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS).save_pretrained(folder)

    config = Gemma3TextConfig(
        vocab_size=len(learned["vocab"]),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
        query_pre_attn_scalar=16,
        max_position_embeddings=TOKENS,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )
    Gemma3TextModel(config).to(torch.bfloat16).save_pretrained(folder)


def make_face(path: Path, size: int = 512) -> None:
    """A drawn portrait, so that no photograph and no licence is needed."""
    image = Image.new("RGB", (2 * size, 2 * size), "#c9d6df")
    draw = ImageDraw.Draw(image)
    u = 2 * size / 100  # drawn twice as large on a 100 x 100 grid, then reduced

    def ellipse(x: float, y: float, rx: float, ry: float, color: str) -> None:
        draw.ellipse([(x - rx) * u, (y - ry) * u, (x + rx) * u, (y + ry) * u], fill=color)

    ellipse(50, 46, 31, 36, "#5a3022")  # hair behind
    ellipse(50, 112, 42, 32, "#31576f")  # shoulders
    draw.rounded_rectangle([42 * u, 70 * u, 58 * u, 92 * u], 6 * u, fill="#d79f7d")
    for x in (25, 75):
        ellipse(x, 52, 4, 6.5, "#dba683")
    ellipse(50, 50, 24.5, 31, "#e8b794")
    draw.chord([24 * u, 14 * u, 76 * u, 56 * u], 180, 360, fill="#5a3022")  # fringe
    ellipse(50, 40, 22, 8, "#e8b794")
    for x in (40.5, 59.5):
        ellipse(x, 48, 5.2, 3.2, "white")
        ellipse(x, 48, 2.6, 2.9, "#3f7d58")
        ellipse(x, 48, 1.2, 1.3, "#101010")
        draw.arc([(x - 6) * u, 39 * u, (x + 6) * u, 47 * u], 200, 340, fill="#4a2619", width=int(1.3 * u))
    draw.line([(50 * u, 49 * u), (47.5 * u, 59 * u), (51 * u, 60 * u)], fill="#c08a69", width=int(0.9 * u))
    draw.chord([41 * u, 60 * u, 59 * u, 73 * u], 10, 170, fill="#b3474a")
    ellipse(62.5, 61, 0.9, 0.9, "#7a4a33")  # a mole
    image.resize((size, size), Image.Resampling.LANCZOS).save(path, optimize=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    make_checkpoint(HERE / "tiny.safetensors")
    make_gemma(HERE / "gemma")
    make_face(HERE / "face.png")
    for made in sorted(HERE.rglob("*")):
        if made.is_file():
            print(f"{made.relative_to(HERE.parent)}  {made.stat().st_size:,} bytes")
