"""Products in 8 bits against the same written out: quantized by hand, multiplied in float32."""

import sys

import pytest
import torch
from test_train import clips, command, losses, run_here, torchrun, weights  # noqa: F401
from torch import Tensor, nn

from checkpoint import Checkpoint
from common.errors import UserError
from engine.fp8_training import train_in_fp8
from model import LTXVideo

DIM, CPU = 64, torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "attention_head_dim": DIM // 4, "num_layers": 4, "in_channels": 4}
    config |= {"out_channels": 4, "positional_embedding_theta": 1e4, "positional_embedding_max_pos": [4, 64, 64]}
    return LTXVideo(config).bfloat16()


def quantized(x: Tensor, dim: int) -> Tensor:
    """What e4m3 keeps of x: scaled by the largest power of two that takes no number along `dim` beyond 448."""
    x = x.float()
    scale = (448 / x.abs().amax(dim, keepdim=True)).log2().floor().exp2()
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("tokens", [48, 37])  # 37 is no multiple of 16
def test_the_three_products_are_those_of_quantized_operands(tokens, model):
    pytest.importorskip("torchao")
    layer = model.transformer_blocks[1].ff.net[0].proj
    w, bias = layer.weight.detach(), layer.bias.detach()
    train_in_fp8(model, CPU)
    layer = model.transformer_blocks[1].ff.net[0].proj
    # Rows and columns of very different size, as a scale for the whole tensor would not serve them.
    x = (torch.randn(tokens, DIM) * torch.logspace(-3, 3, tokens)[:, None]).bfloat16().requires_grad_()
    g = (torch.randn(tokens, 4 * DIM) * torch.logspace(-2, 2, 4 * DIM)).bfloat16()
    y = layer(x)
    y.backward(g)
    pairs = {
        "y": (y, quantized(x, 1) @ quantized(w, 1).T + bias.float(), x.float() @ w.float().T + bias.float()),
        "dx": (x.grad, quantized(g, 1) @ quantized(w, 0), g.float() @ w.float()),
        "dW": (layer.weight.grad, quantized(g, 0).T @ quantized(x, 0), g.float().T @ x.float()),
    }
    for name, (got, want, exact) in pairs.items():
        assert got.dtype == torch.bfloat16
        size = want.abs() + want.abs().mean(1, keepdim=True)  # sums that cancel keep the error of their terms
        assert ((got.float() - want).abs() <= 2**-7 * size).all(), name
        assert (want - exact).norm() > 0.01 * exact.norm(), name  # it is not the product of the operands themselves


def test_inner_blocks_large_layers_alone_and_under_their_names(model):
    pytest.importorskip("torchao")
    names = list(model.state_dict())
    train_in_fp8(model, CPU)
    assert list(model.state_dict()) == names
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    changed = {name for name, layer in linear.items() if type(layer) is not nn.Linear}
    layers = [f"{a}.{to}" for a in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += ["ff.net.0.proj", "ff.net.2"]
    assert changed == {f"transformer_blocks.{k}.{layer}" for k in (1, 2) for layer in layers}


def test_where_the_library_or_the_card_cannot_is_one_line(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"parallel\.fp8 needs torchao: pip install torchao"):
        train_in_fp8(model, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="NVIDIA A100 cannot multiply in 8 bits"):
        train_in_fp8(model, torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("mode, kind", [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "adamw-bf16")])
def test_it_trains_is_continued_and_exported(mode, kind, clips, tmp_path, monkeypatch):  # noqa: F811
    """On two processes; the second step after a restart. The loss is near the one in bf16, and not the same."""
    pytest.importorskip("torchao")
    options = {"parallel__mode": mode, "parallel__precision": "bf16", "optim__kind": kind, "faces__pack": '""'}
    run, plain = tmp_path / "fp8", tmp_path / "bf16"
    done = torchrun(2, command(clips, run, optim__steps=1, parallel__fp8="true", **options))
    assert "Warning" not in done.stderr and "torchao" not in done.stderr, done.stderr
    torchrun(2, command(clips, run, optim__steps=2, parallel__fp8="true", **options))
    torchrun(2, command(clips, plain, optim__steps=1, **options))
    (ours, _), (theirs,) = losses(run), losses(plain)
    assert ours == pytest.approx(theirs, rel=0.03) and ours != theirs
    saved = weights(run, 2)
    assert saved.keys() == weights(plain, 1).keys()
    out = tmp_path / "trained.safetensors"
    words = command(clips, run, optim__steps=2, parallel__fp8="true", **options)
    assert run_here([*words, "--export", str(out)], monkeypatch) == 0
    name = "transformer_blocks.1.ff.net.2.weight"
    exported = Checkpoint(out).read(f"model.diffusion_model.{name}")
    assert torch.equal(exported.bfloat16(), saved[f"model.{name}"].bfloat16())
