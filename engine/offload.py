"""The DiT's blocks on a card that cannot hold them: weights stay in host memory, two blocks at a time are on the card.

        host    block 0 | 1 | 2 | 3 | ... | 47              page-locked, so that copies run beside the computation
                        |   |
        card    [ 2: running ] [ 3: being copied ]          two copies of a block, filled in turn

A block of the released model is 0.55 GB in bf16 and a card over PCIe gets some 25 GB/s, so a copy takes about as long
as a block of the paper's video runs on a card of 150 TFLOP/s. Slower cards lose nothing, faster ones wait.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn


def tensors(block: nn.Module) -> list[Tensor]:
    return [tensor.data for tensor in (*block.parameters(), *block.buffers())]


class StreamedBlocks(nn.ModuleList):
    """Iterates over all blocks of a model like a ModuleList of them, and holds two on the device."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        super().__init__(deepcopy(blocks[0]).requires_grad_(False).to(device) for _ in range(min(2, len(blocks))))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host = []
        for block in blocks:
            for tensor in (*block.parameters(), *block.buffers()) if self.stream else ():
                tensor.data = tensor.data.pin_memory()  # one at a time: the model is in memory once
            self.host.append(tensors(block))
        self.device_tensors = [tensors(block) for block in self.children()]

    def fetch(self, k: int) -> None:
        """Begin to copy block k over the block that ran last but one before it."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))  # for that block to have run
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for here, there in zip(self.device_tensors[k % 2], self.host[k]):
                here.copy_(there, non_blocking=True)

    def __iter__(self) -> Iterator[nn.Module]:
        self.fetch(0)
        for k in range(len(self.host)):
            if self.stream:
                torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)  # for block k to have come
            if k + 1 < len(self.host):
                self.fetch(k + 1)
            yield self[k % 2]


def offload(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a DiT in host memory to `device`, all but its blocks, which are streamed from now on. Not for training."""
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    model.to(device)
    model.transformer_blocks = StreamedBlocks(blocks, device)
    return model
