"""The DiT's blocks on a card that cannot hold them: weights stay in host memory, two blocks at a time are on the card.

        host    block 0 | 1 | 2 | 3 | ... | 47              page-locked, so that copies run beside the computation
                        |   |
        card    [ 2: running ] [ 3: being copied ]          two copies of a block, filled in turn

A block of the released model is 0.55 GB in bf16 and a card over PCIe gets about 25 GB/s, so a copy takes about as long
as a block of the paper's video runs on a card of 150 TFLOP/s. Slower cards lose nothing, faster ones wait.
A checkpoint in fp8 leaves some blocks in bf16: then there are two copies of each kind.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn


def tensors(block: nn.Module) -> list[Tensor]:
    return [tensor.data for tensor in (*block.parameters(), *block.buffers())]


class StreamedBlocks(nn.ModuleList):
    """Iterates over all blocks of a model like a ModuleList of them, and holds two of each kind on the device."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        super().__init__()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host, self.slots, slots = [], [], {}  # slots: the index of a block's copy on the device
        for k, block in enumerate(blocks):
            key = str(block), k % 2  # the words of a module name its layers, sizes and stored formats
            if key not in slots:
                slots[key] = len(self)
                self.append(deepcopy(block).requires_grad_(False).to(device))
            self.slots.append(slots[key])
            for tensor in (*block.parameters(), *block.buffers()) if self.stream else ():
                tensor.data = tensor.data.pin_memory()  # one at a time: the model is in memory once
            self.host.append(tensors(block))
        self.device_tensors = [tensors(block) for block in self.children()]

    def fetch(self, k: int) -> None:
        """Begin to copy block k into its slot, where no block after k - 2 has run."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))  # until block k - 2 is done
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for on_device, on_host in zip(self.device_tensors[self.slots[k]], self.host[k]):
                on_device.copy_(on_host, non_blocking=True)

    def __iter__(self) -> Iterator[nn.Module]:
        self.fetch(0)
        for k in range(len(self.host)):
            if self.stream:
                torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)  # until block k is copied
            if k + 1 < len(self.host):
                self.fetch(k + 1)
            yield self[self.slots[k]]


def offload(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a DiT in host memory to `device`, without its blocks, which are streamed from there on. Not for training."""
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    model.to(device)
    model.transformer_blocks = StreamedBlocks(blocks, device)
    return model
