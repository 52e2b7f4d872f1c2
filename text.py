"""Prompt to context: Gemma 3 hidden states, one projection, and a small transformer called the connector.

LTX-2.3 reads a prompt through every layer of Gemma 3 12B at once, not only through the last:

        prompt -> Gemma 3 -> 49 hidden states of 3840       (embeddings and 48 layers)
                    each token, each layer divided by its root mean square
                    all 49 x 3840 numbers of a token -> linear -> 4096       "features", what a cache keeps
        features, moved to the front of 1024 slots; the free slots hold learned registers
                 -> 8 blocks of self-attention and feed-forward -> context (1024, 4096)

The linear layer over all 188,160 numbers is a sum of one linear layer per hidden state. So each hidden state is
reduced when Gemma produces it, and the stack of all of them never exists.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from checkpoint import Checkpoint, open_checkpoint
from common.errors import UserError
from model import Attention, FeedForward, rms
from rope import rope_cos_sin

GEMMA = "google/gemma-3-12b-it-qat-q4_0-unquantized"
MAX_TOKENS = 1024  # a prompt's slots; a tokenizer that is made for fewer (the tiny one) says so itself
PROJECTION = "text_embedding_projection.video_aggregate_embed."


class ConnectorBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(rms(x), rotary=rotary)
        return x + self.ff(rms(x))


class Connector(nn.Module):
    """Registers and blocks: features of any number of tokens to a context of fixed length without a mask."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.heads = config["connector_num_attention_heads"]
        self.dim = self.heads * config["connector_attention_head_dim"]
        self.theta = config["positional_embedding_theta"]
        self.max_pos = config["connector_positional_embedding_max_pos"]
        self.learnable_registers = nn.Parameter(torch.zeros(config["connector_num_learnable_registers"], self.dim))
        self.transformer_1d_blocks = nn.ModuleList(
            [ConnectorBlock(self.dim, self.heads) for _ in range(config["connector_num_layers"])]
        )

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, S, D), mask (B, S) true where a token is, on either side -> context (B, S, D)"""
        slots = mask.shape[1]
        order = torch.argsort(~mask, dim=1, stable=True)  # tokens to the front, in their order
        x = torch.take_along_dim(features, order.unsqueeze(-1), dim=1)
        slot = torch.arange(slots, device=mask.device)
        registers = self.learnable_registers[slot % len(self.learnable_registers)]  # (S, D)
        free = slot >= mask.sum(dim=1, keepdim=True)  # (B, S)
        x = torch.where(free.unsqueeze(-1), registers, x)

        positions = slot.float().expand(1, 1, -1).unsqueeze(-1).expand(-1, -1, -1, 2)  # slot j sits at j: no middle
        rotary = rope_cos_sin(positions, self.dim, self.heads, self.theta, self.max_pos)
        rotary = tuple(table.to(x.dtype) for table in rotary)
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)
        return rms(x)


class TextConnector(nn.Module):
    """The checkpoint's share of the text path: projection of hidden states, and the connector."""

    PREFIXES = {"projection.": PROJECTION, "connector.": "model.diffusion_model.video_embeddings_connector."}

    def __init__(self, config: dict[str, Any], layers: int):
        super().__init__()
        self.hidden, self.layers = config["caption_channels"], layers
        self.connector = Connector(config)
        self.projection = nn.Linear(self.hidden * layers, self.connector.dim)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "TextConnector":
        checkpoint = open_checkpoint(path)
        return checkpoint.load(cls.for_checkpoint(checkpoint), cls.PREFIXES, device, dtype)

    @classmethod
    def for_checkpoint(cls, checkpoint: Checkpoint) -> "TextConnector":
        """The module on the meta device. The config does not say how many hidden states there are; the
        projection's width does."""
        config = checkpoint.config["transformer"]
        weight = checkpoint.tensors.get(PROJECTION + "weight")
        if weight is None or len(weight["shape"]) != 2:
            raise UserError(f"{checkpoint.path}: tensor {PROJECTION}weight is missing, or is no matrix")
        with torch.device("meta"):
            return cls(config, weight["shape"][1] // config["caption_channels"])

    def project_layer(self, x: Tensor, layer: int) -> Tensor:
        """One hidden state's share of the features: x (B, S, hidden) -> (B, S, D), float32, without the bias."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * math.sqrt(self.connector.dim / self.hidden)
        weight = self.projection.weight[:, layer :: self.layers]  # the layer index runs fastest in the released layout
        return F.linear(x.to(weight.dtype), weight).float()

    def project(self, hidden: Tensor) -> Tensor:
        """All hidden states at once: (B, S, hidden, layers) -> features (B, S, D)"""
        features = sum(self.project_layer(hidden[..., layer], layer) for layer in range(self.layers))
        return (features + self.projection.bias.float()).to(self.projection.weight.dtype)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden (B, S, hidden, layers), mask (B, S) nonzero where a token is -> context (B, S, D)"""
        return self.connector(self.project(hidden), mask.bool())


class TextEncoder:
    """Gemma 3 and the connector: `encode(["prompt", ...])` gives the context that the DiT attends to."""

    def __init__(self, tokenizer: Any, gemma: nn.Module, connector: TextConnector):
        found = (gemma.config.hidden_size, gemma.config.num_hidden_layers + 1)
        if found != (connector.hidden, connector.layers):
            raise UserError(
                f"this Gemma has {found[1] - 1} layers of width {found[0]} and the checkpoint was trained with "
                f"{connector.layers - 1} of {connector.hidden}: give --gemma the one that belongs to it "
                f"({GEMMA} for LTX-2.3)"
            )
        if tokenizer("")["input_ids"] != [tokenizer.bos_token_id]:
            raise UserError(
                f"this Gemma's tokenizer does not begin a prompt with <bos>, which LTX-2.3 was trained with: set "
                f"add_bos_token to true in its tokenizer_config.json, or take {GEMMA}"
            )
        self.tokenizer, self.gemma, self.connector = tokenizer, gemma, connector
        self.max_tokens = min(MAX_TOKENS, tokenizer.model_max_length)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        gemma: str | Path = GEMMA,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        """`gemma` is a folder or the name of a hub repository; see `load_gemma`."""
        connector = TextConnector.from_checkpoint(path, device, dtype)
        return cls(*load_gemma(gemma, device, dtype), connector)

    @torch.no_grad()
    def features(self, prompts: list[str]) -> list[Tensor]:
        """Per prompt what the connector starts from, without padding: (tokens, D). Independent of the batch."""
        batch = self.tokenizer(
            [prompt.strip() for prompt in prompts],
            padding=True,
            padding_side="left",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.connector.projection.weight.device)
        total: Tensor | int = 0

        def add(layer: int, hidden: Tensor) -> None:
            nonlocal total
            total = total + self.connector.project_layer(hidden, layer)

        # Hidden state k is what layer k receives; the last one is what the final norm returns.
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs, layer=layer: add(layer, inputs[0]))
            for layer, block in enumerate(self.gemma.layers)
        ]
        last = len(self.gemma.layers)
        hooks.append(self.gemma.norm.register_forward_hook(lambda _, __, output: add(last, output)))
        try:
            self.gemma(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        projection = self.connector.projection
        features = (total + projection.bias.float()).to(projection.weight.dtype)  # (B, S, D)
        return [row[mask.bool()] for row, mask in zip(features, batch["attention_mask"])]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts to context (B, max_tokens, D). The empty prompt is the unconditional context."""
        features, mask = pad_features(self.features(prompts), self.max_tokens)
        return self.connector.connector(features, mask)


def pad_features(features: list[Tensor], slots: int) -> tuple[Tensor, Tensor]:
    """Features of several prompts (tokens, D) as one batch (B, slots, D), zeros behind, and its mask (B, slots)."""
    padded = torch.stack([F.pad(row, (0, 0, 0, slots - len(row))) for row in features])
    counts = torch.tensor([len(row) for row in features], device=padded.device)
    return padded, torch.arange(slots, device=padded.device) < counts[:, None]


def load_gemma(name: str | Path, device: str | torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Tokenizer and language model of a Gemma 3 folder or hub repository; its vision tower is dropped.

    Only safetensors are read and no code of the repository is run. Raises UserError where the weights are missing or
    their licence has not been accepted.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} holds no Gemma model: it has no config.json. Give --gemma the folder of {GEMMA}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModel.from_pretrained(
            name, dtype=dtype, device_map={"": device}, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise UserError(f"the weights in {name} are damaged ({error}): download them again") from None
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load Gemma from {name} ({first}). Its weights need a licence: accept it on "
            f"https://huggingface.co/{GEMMA}, then run `hf auth login` and `hf download {GEMMA}`"
        ) from None
    if missing := sorted(loading["missing_keys"]):  # transformers would make them up
        raise UserError(f"the Gemma in {name} lacks {len(missing)} tensors ({missing[0]}, ...): download it again")
    language_model = getattr(model, "language_model", model)
    return tokenizer, language_model.eval().requires_grad_(False)
