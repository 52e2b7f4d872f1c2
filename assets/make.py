"""Make the embedded default: a tiny checkpoint in the LTX-2.3 layout, a tiny Gemma 3, an example face, and four clips
to train on. The face models in assets/faces are made by toy_faces.py.

    python assets/make.py

The weights are random and say so in the checkpoint's metadata. Sizes are what differs from configs/ltx-2.3.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoint import write_modules  # noqa: E402
from media import write_video  # noqa: E402
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
    GemmaTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS, add_bos_token=True).save_pretrained(
        folder
    )

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


def draw_face(size: int, look: dict[str, str], turn: float = 0.0, smile: float = 0.5, x: float = 0.0) -> Image.Image:
    """A drawn portrait, free of anyone's rights: the head turned by `turn` in [-1, 1] and moved by `x` percent."""
    over = 4 if size < 256 else 2  # drawn larger on a 100 x 100 grid, then reduced
    image = Image.new("RGB", (over * size, over * size), look["background"])
    draw = ImageDraw.Draw(image)
    u = over * size / 100

    def box(cx: float, cy: float, rx: float, ry: float) -> list[float]:
        return [(cx + x - rx) * u, (cy - ry) * u, (cx + x + rx) * u, (cy + ry) * u]

    def ellipse(cx: float, cy: float, rx: float, ry: float, color: str) -> None:
        draw.ellipse(box(cx, cy, rx, ry), fill=color)

    shift = 6 * turn  # features slide across the head when it turns
    ellipse(50 - shift / 2, 46, 31, 36, look["hair"])
    ellipse(50 - x, 112, 42, 32, look["shirt"])
    draw.rounded_rectangle(box(50, 81, 8, 11), 6 * u, fill=look["shade"])
    for side in (-1, 1):
        ellipse(50 + 25 * side - shift / 2, 52, 4, 6.5, look["shade"])
    ellipse(50, 50, 24.5, 31, look["skin"])
    draw.chord(box(50, 35, 26, 21), 180, 360, fill=look["hair"])
    ellipse(50 + shift / 2, 40, 22, 8, look["skin"])
    for side in (-1, 1):
        eye = 50 + 9.5 * side + shift
        ellipse(eye, 48, 5.2, 3.2, "white")
        ellipse(eye + shift / 4, 48, 2.6, 2.9, look["eyes"])
        ellipse(eye + shift / 4, 48, 1.2, 1.3, "#101010")
        draw.arc(box(eye, 43, 6, 4), 200, 340, fill=look["hair"], width=round(1.3 * u))
    nose = [(50 + shift, 49), (47.5 + 1.6 * shift, 59), (51 + shift, 60)]
    draw.line([((px + x) * u, py * u) for px, py in nose], fill=look["shade"], width=round(0.9 * u))
    draw.chord(box(50 + shift, 66.5, 9, 3 + 5 * smile), 10, 170, fill="#b3474a")
    ellipse(62.5 + shift, 61, 0.9, 0.9, "#7a4a33")  # a mole
    return image.resize((size, size), Image.Resampling.LANCZOS)


LOOKS = [
    {
        "skin": "#e8b794",
        "shade": "#d79f7d",
        "hair": "#5a3022",
        "eyes": "#3f7d58",
        "shirt": "#31576f",
        "background": "#c9d6df",
    },
    {
        "skin": "#c98d62",
        "shade": "#a8704a",
        "hair": "#1f1a1a",
        "eyes": "#5a3a22",
        "shirt": "#6d7f3a",
        "background": "#5f9ea0",
    },
    {
        "skin": "#f0c9ac",
        "shade": "#d9a98c",
        "hair": "#c8a04a",
        "eyes": "#4a7fb5",
        "shirt": "#7a3b4f",
        "background": "#8fa3c8",
    },
    {
        "skin": "#d9a27e",
        "shade": "#b8805d",
        "hair": "#8f8f93",
        "eyes": "#6b6b52",
        "shirt": "#2f2f3a",
        "background": "#a7c4a0",
    },
]
CLIPS = [  # caption, and (turn, smile, x) at the start and at the end of the clip
    ("A woman with brown hair turns her head to the right.", (-0.8, 0.4, 0), (0.8, 0.4, 0)),
    ("A man with black hair begins to smile in front of a teal wall.", (0.1, 0.0, 0), (0.1, 1.0, 0)),
    ("A blond woman moves to the right before a light blue background.", (0, 0.5, -14), (0, 0.5, 14)),
    ("A grey-haired man turns to the left and stops smiling.", (0.8, 1.0, 0), (-0.8, 0.1, 0)),
]


def make_clips(folder: Path, frames: int = 17, size: int = 64) -> None:
    """Four short clips and a photo of each face, to try training on, and the same as cases to sample and to score."""
    folder.mkdir(exist_ok=True)
    lines, cases = ["video,caption,reference"], []
    for k, (look, (caption, start, end)) in enumerate(zip(LOOKS, CLIPS)):
        way = np.linspace(start, end, frames)
        clip = np.stack([np.asarray(draw_face(size, look, turn, smile, x)) for turn, smile, x in way])
        write_video(folder / f"{k}.mp4", clip, DEFAULTS["fps"])
        draw_face(128, look | {"background": "#9fb2cc"}).save(folder / f"{k}.png", optimize=True)
        lines.append(f'{k}.mp4,"{caption}",{k}.png')
        cases.append(json.dumps({"id": str(k), "reference": f"{k}.png", "prompt": caption, "seed": k}))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    (folder / "cases.jsonl").write_text("\n".join(cases) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    make_checkpoint(HERE / "tiny.safetensors")
    make_gemma(HERE / "gemma")
    draw_face(512, LOOKS[0]).save(HERE / "face.png", optimize=True)
    make_clips(HERE / "clips")
    for made in sorted(HERE.rglob("*")):
        if made.is_file():
            print(f"{made.relative_to(HERE.parent)}  {made.stat().st_size:,} bytes")
