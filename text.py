"""Prompt to context: Gemma 3 hidden states, one projection, and a small transformer called the connector.

LTX-2.3 reads a prompt through all layers of Gemma 3 12B, not only through the last one:

        prompt -> Gemma 3 -> 49 hidden states (S, 3840): the embeddings and 48 layers, the last normed
          | each token of each hidden state divided by its root mean square
          | linear over the 49 x 3840 numbers of a token
        features (S, D), D = 4096, which a cache keeps
          | tokens moved to the front of 1024 slots, learned registers in the free slots
          | 8 blocks of self-attention and feed-forward
        context (1024, D)

The linear layer over all 188,160 numbers is a sum of 49 linear layers, one for each hidden state. So a hidden state is
projected as soon as Gemma returns it, and the stack of all 49 never exists.

Letters: B batch, S slots of the context, D width of the DiT.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import Checkpoint, open_checkpoint
from common.errors import UserError
from common.gemma import GEMMA, MAX_TOKENS, load_gemma
from model import Attention, FeedForward, rms_norm
from rope import rope_cos_sin

PROJECTION = "text_embedding_projection.video_aggregate_embed."


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each with a residual. There is no modulation, because text has no timestep."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(rms_norm(x), rotary=rotary)
        return x + self.ff(rms_norm(x))


class Connector(nn.Module):
    """Features of S slots, padding among them, to a context of S slots. No slot of it is masked."""

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
        """Features (B, S, D) -> context (B, S, D). The mask (B, S) is true for tokens, false for padding anywhere."""
        slots = mask.shape[1]
        order = torch.argsort(~mask, dim=1, stable=True)  # (B, S), the tokens first and in their order
        x = torch.take_along_dim(features, order.unsqueeze(-1), dim=1)  # (B, S, D)
        slot = torch.arange(slots, device=mask.device)
        registers = self.learnable_registers[slot % len(self.learnable_registers)]  # (S, D)
        free = slot >= mask.sum(dim=1, keepdim=True)  # (B, S)
        x = torch.where(free.unsqueeze(-1), registers, x)

        # Start and end of each interval are slot j, so its middle is j too.
        positions = slot.float().expand(1, 1, -1).unsqueeze(-1).expand(-1, -1, -1, 2)  # (1, 1, S, 2)
        rotary = rope_cos_sin(positions, self.dim, self.heads, self.theta, self.max_pos)
        rotary = tuple(table.to(x.dtype) for table in rotary)
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)
        return rms_norm(x)


class TextConnector(nn.Module):
    """The checkpoint's part of the text path: the projection of Gemma's hidden states, and the connector."""

    PREFIXES = {"projection.": PROJECTION, "connector.": "model.diffusion_model.video_embeddings_connector."}

    def __init__(self, config: dict[str, Any], layers: int):
        """`layers` is the number of hidden states: Gemma's layers and the embeddings."""
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
        """The module on the meta device. The number of hidden states follows from the projection's width."""
        config = checkpoint.config["transformer"]
        weight = checkpoint.tensors.get(PROJECTION + "weight")
        if weight is None or len(weight["shape"]) != 2:
            raise UserError(f"{checkpoint.path}: tensor {PROJECTION}weight is missing, or is not a matrix")
        with torch.device("meta"):
            return cls(config, weight["shape"][1] // config["caption_channels"])

    def project_layer(self, x: Tensor, layer: int) -> Tensor:
        """The part of the features that one hidden state (B, S, hidden) adds: (B, S, D), float32, without the bias."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * math.sqrt(self.connector.dim / self.hidden)
        weight = self.projection.weight[:, layer :: self.layers]  # (D, hidden): in the file the layer runs fastest
        return F.linear(x.to(weight.dtype), weight).float()

    def project(self, hidden: Tensor) -> Tensor:
        """All hidden states (B, S, hidden, layers) -> features (B, S, D)"""
        features = sum(self.project_layer(hidden[..., layer], layer) for layer in range(self.layers))
        return (features + self.projection.bias.float()).to(self.projection.weight.dtype)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, S, hidden, layers), mask (B, S) nonzero for tokens -> context (B, S, D)"""
        return self.connector(self.project(hidden), mask.bool())


class TextEncoder:
    """Gemma 3 and the connector: `encode(["prompt", ...])` returns the context of the DiT's text attention."""

    def __init__(self, tokenizer: Any, gemma: nn.Module, connector: TextConnector):
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
        return cls(*load_gemma(gemma, device, dtype, (connector.hidden, connector.layers - 1)), connector)

    def cut(self, prompt: str) -> tuple[int, str] | None:
        """None if the prompt fits; otherwise the number of tokens cut off and the last words before the cut."""
        prompt = prompt.strip()
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        beyond = len(tokens["input_ids"]) - self.max_tokens
        if beyond <= 0:
            return None
        _, end = tokens["offset_mapping"][self.max_tokens - 1]  # characters of the last token that is kept
        return beyond, " ".join(prompt[:end].split()[-5:])

    def unknown_words(self, prompt: str) -> list[str]:
        """Words outside the tokenizer's vocabulary: the tiny model, trained on whole words, knows nothing of them.

        Empty for Gemma's own tokenizer. It has a token for every byte, and Gemma was trained on words in pieces.
        """
        if "<0x00>" in self.tokenizer.get_vocab():
            return []
        shorter = {"truncation": True, "max_length": self.max_tokens}  # `cut` reports the rest
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, **shorter)
        spans = [(*span, number) for span, number in zip(tokens["offset_mapping"], tokens["input_ids"])]
        words = {}  # in order and once each
        for word in re.finditer(r"\w+", prompt[: max(end for _, end, _ in spans)]):
            parts = [number for begin, end, number in spans if begin < word.end() and end > word.start()]
            known = len(parts) == 1 and parts[0] != self.tokenizer.unk_token_id
            words[word.group()] = known and words.get(word.group(), True)
        return [word for word, known in words.items() if not known]

    @torch.no_grad()
    def features(self, prompts: list[str]) -> list[Tensor]:
        """For each prompt the input of the connector, (tokens, D). Other prompts change it by rounding only."""
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

        # Hidden state k is the input of layer k; the last one is the output of the final norm.
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
        """Prompts to context (B, max_tokens, D). The empty prompt gives the unconditional context."""
        features, mask = pad_features(self.features(prompts), self.max_tokens)
        return self.connector.connector(features, mask)


def pad_features(features: list[Tensor], slots: int) -> tuple[Tensor, Tensor]:
    """Features (tokens, D) of several prompts -> one batch (B, slots, D), zeros last, and its mask (B, slots)"""
    padded = torch.stack([F.pad(row, (0, 0, 0, slots - len(row))) for row in features])
    counts = torch.tensor([len(row) for row in features], device=padded.device)
    return padded, torch.arange(slots, device=padded.device) < counts[:, None]
