"""One run on many processes: joining, the model whole or in shards, figures of all ranks, signals.

        ddp     every rank holds weights, gradients and moments (16 bytes a parameter) and exchanges gradients
        fsdp    every rank holds 1/n of them; the weights of a block are gathered in bf16 before it runs
        hsdp    fsdp within a group, the groups as replicas of each other: `parallel.replicas`

Both come with PyTorch and run under torchrun, on one node or many; on CPUs too, over gloo.

What a block keeps for its backward pass, in vectors of the model's width per token (it computes the rest again):

        all          1      its input
        products    14      the outputs of matrix products and attention as well; norms, modulation, gates run again
        none        40      everything
"""

import logging
import os
import signal
import warnings
import zlib
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from checkpoint import Checkpoint, file_name
from common.device import own_place
from common.errors import UserError
from config import Config, Parallel
from engine.fp8 import load_fp8
from engine.fp8_training import train_in_fp8
from engine.lora import new_lora
from engine.plan import USABLE, whole_blocks
from model import LTXVideo

ATEN = torch.ops.aten
PRODUCTS = [ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN._scaled_mm.default]
PRODUCTS += [
    getattr(ATEN, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]
KEEP_INPUTS = partial(checkpoint, use_reentrant=False)
KEEP_PRODUCTS = partial(KEEP_INPUTS, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS))


def join_processes() -> torch.device:
    """Join torchrun's ranks, or be a group of one without it. Returns this rank's device. UserError: no GPU for it."""
    gpu, local = torch.cuda.is_available(), own_place().local_rank
    if gpu and local >= (gpus := torch.cuda.device_count()):
        raise UserError(f"torchrun started process number {local + 1} here, for {gpus} GPU(s): --nproc-per-node={gpus}")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    how = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if gpu else {"backend": "gloo"}
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not alone and not os.environ.get(name)]:
        raise UserError(f"environment: RANK is set and {missing[0]} is not: use torchrun, or unset RANK")
    # Ranks wait for rank 0 where it alone loads Gemma or draws samples. A rank that dies ends all, by torchrun.
    dist.init_process_group(**how, **alone, timeout=timedelta(hours=2))
    return device


def report(text: str) -> None:
    """Print a line, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def usable_memory(device: torch.device) -> float:
    """Bytes that a run may plan with; of a CPU 0, for which nothing is chosen to fit."""
    return USABLE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0.0


def build_model(config: Config, source: Checkpoint, device: torch.device, recompute: str | int) -> nn.Module:
    """The DiT in float32, whole on every rank (DDP) or in shards that no rank ever puts together (FSDP2). For the
    optimizer "adamw-bf16" it is in bf16. With adapters (lora.rank above 0) it is whole, frozen, and in the precision of
    the computation or in fp8; the adapters are float32. `recompute` is not "auto": Plan.recompute chooses."""
    run, lora, seed = config.parallel, config.lora, config.run.seed
    in_bf16 = config.optim.kind == "adamw-bf16" or (lora.rank and run.precision == "bf16")
    held = torch.bfloat16 if in_bf16 else torch.float32
    with torch.device("meta"):
        model = LTXVideo(source.config["transformer"]).to(held)
    set_recompute(model, recompute)
    if run.fp8:
        train_in_fp8(model, device)
    if run.compile:
        logging.getLogger("torch._higher_order_ops.wrap").setLevel("ERROR")  # warns of KEEP_PRODUCTS
        # A graph for each size of clips, with and without reference, mask, gradient, recomputation. Beyond the limit
        # blocks would run uncompiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
        model.compile_blocks()
    if run.mode == "fsdp":
        shard(model, run, device)
    if lora.fp8 and lora.rank:
        load_fp8(model, source, device, held)
    else:
        fill(model, source, device, seed if config.model.scratch else None)
    model.train()
    if lora.rank:
        new_lora(model, lora.rank, lora.alpha or lora.rank, lora.targets, lora.dropout, seed)
    if run.mode == "fsdp":
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: LTXVideo, run: Parallel, device: torch.device) -> None:
    world, replicas = dist.get_world_size(), run.replicas
    if world % replicas:
        raise UserError(f"parallel.replicas = {replicas} does not divide {world} ranks")
    shape, names = ((replicas, world // replicas), ("replica", "shard")) if replicas > 1 else ((world,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Inputs stay as they are: positions and timesteps must not be rounded to bf16.
    low = torch.bfloat16 if run.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # The velocity is a view of a matrix product, which matters only to code that would change it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)


@torch.no_grad()
def fill(model: LTXVideo, source: Checkpoint, device: torch.device, seed: int | None) -> None:
    """Read the weights of a model on the meta device, or draw them from a seed. One whole tensor at a time is in
    memory, and each rank keeps its shard of it."""
    model.to_empty(device=device)
    for own, parameter in model.named_parameters():
        name = file_name(own, LTXVideo.PREFIXES)
        if problem := source.misfit(name, parameter):
            raise UserError(f"{source.path}: {problem}")
        whole = source.read(name, device, parameter.dtype) if seed is None else first_weight(own, parameter.shape, seed)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None).to_local()
            parameter = parameter.to_local()
        parameter.copy_(whole)


def first_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A weight of an untrained LTXVideo, the same wherever and in whatever order it is drawn. Linear layers follow
    Glorot's rule, norms are 1. Biases, tables, and the layers behind modulation, head gates and output start at zero,
    so each block starts as the identity and the velocity as 0."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    zeros = ("bias", "table", "to_gate_logits.weight", "single.linear.weight")
    if name.endswith(zeros) or name == "proj_out.weight":
        return torch.zeros(shape)
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    generator = torch.Generator("cpu").manual_seed(int(state))  # only the lower 32 bits of a seed count
    return torch.randn(shape, generator=generator) * (2 / sum(shape)) ** 0.5


def set_recompute(model: LTXVideo, how: str | int) -> None:
    """`how`: "all", "products", "none", or the number of blocks under "all" where the others are under "products". They
    are the first ones: the backward pass comes to them when the others have freed what they kept."""
    whole = whole_blocks(how, len(model.transformer_blocks))
    for k, block in enumerate(model.transformer_blocks):
        block.recompute = None if how == "none" else KEEP_INPUTS if k < whole else KEEP_PRODUCTS


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP still holds together after a forward pass without a backward pass. The optimizer
    changes the shards, and a checkpoint saves them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_rows(rows: Tensor, stop_reason: str) -> tuple[Tensor, bool]:
    """Per-sample figures of all ranks, on the CPU, and whether any rank has a reason to stop."""
    flagged = torch.cat([rows, torch.full_like(rows[:1], float(bool(stop_reason)))])
    everyone = [torch.empty_like(flagged) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flagged)
    table = torch.stack(everyone).cpu()
    return table[:, :-1].flatten(0, 1), bool(table[:, -1, 0].any())


class StopSignal:
    """SIGTERM and SIGINT request a stop after the step; a second SIGINT does not wait."""

    def __init__(self) -> None:
        self.signal = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
