"""Matrix products of training in 8 bits, by torchao: weights, gradients and moments stay as they are.

        y = x W^T    dx = g W    dW = g^T x        each operand as scale * Q, a scale for each row or column in a sum

Q is float8 e4m3, and the scales are powers of two, taken from the operands on the fly. H100, H200 and H20 multiply such
numbers twice as fast as bf16; the sum is in float32, the result in bf16. The first and the last block stay in bf16, as
do layers narrower than the model (gates), attention itself, and everything outside the blocks.
"""

import logging
from dataclasses import replace

import torch
from torch import nn

from common.errors import UserError
from model import LTXVideo


def train_in_fp8(model: LTXVideo, device: torch.device) -> None:
    """Make the large linear layers of a DiT's inner blocks multiply in 8 bits, under their old names. UserError where
    torchao is missing or the GPU cannot. A CPU gives the same numbers, slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"{torch.cuda.get_device_name(device)} cannot multiply in 8 bits: set parallel.fp8 = false")
    logging.disable(logging.WARNING)  # from torchao: kernels of its own that do not load and are not needed
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("parallel.fp8 needs torchao: pip install torchao") from None
    finally:
        logging.disable(logging.NOTSET)

    def large(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and min(layer.weight.shape) >= model.dim

    # dW sums over tokens, and their number need not be a multiple of 16, as the kernel wants it: zeros fill it up.
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)
    for block in model.transformer_blocks[1:-1]:
        convert_to_float8_training(block, module_filter_fn=large, config=config)
