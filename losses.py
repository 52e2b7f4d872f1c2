"""The training loss: flow matching on the video, and identity losses on the faces of its clean estimate (Eq. 6, 9-12).

The velocity error is a mean over thousands of tokens. A face fills few of them, so the error alone says little about
identity. The paper therefore takes the one-step clean estimate, decodes some of its frames, and compares the faces in
them with the reference and with each other. At high noise that estimate is a blur without identity, hence w_aux(t).

    z_0, ε, t ─> add_noise ─> z_t ─> DiT (with text, reference) ─> v, the reference's tokens dropped
                               │                                   │
                               │                                   ├─> flow_loss(v, z_0, ε) ─────────────> L_flow ─┐
                               └───────> predict_x0(z_t, v, t) <───┘                                               │
                                                   │ clean estimate                                                ├─> L
                     VAE decode, detect, align, ArcFace ─> e_f, m_f ─┬─> temporal_identity_loss ─> L_tic ─┬─ w_aux ┘
                                                                     └─> identity_loss ──────────> L_id ──┘
    I_ref ─> detect, align, ArcFace ─> e_ref (no gradient) ──────────────────┘

The letters are those of model.py; F counts the frames of the window. Every loss is per sample, (B,). The paper uses ε
twice: for the noise, `eps` in add_noise and flow_loss, and for the small number that keeps a denominator above zero,
`eps` of the others. The paper gives it no value; 1e-6 is our choice. Everything is computed in float32 at least
(float64 stays float64), whatever the model ran in.
"""

import math

import torch
from torch import Tensor

from guidance import schedule_shift


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over(t: Tensor, x: Tensor) -> Tensor:
    """t, (B,) or (B, N), with trailing ones so that it broadcasts over x, (B, N, C) or (B, C, T, h, w)."""
    assert t.shape == x.shape[: t.ndim], f"t is {tuple(t.shape)}, expected the leading sizes of {tuple(x.shape)}"
    return _wide(t).reshape(t.shape + (1,) * (x.ndim - t.ndim))


# ---------------------------------------------------------------------------------------------------------------------
# flow matching


def add_noise(z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The rectified-flow interpolation z_t = (1 - t) z_0 + t ε; its velocity dz_t/dt is v = ε - z_0.

    z_0 (B, ...) clean latent, eps (same) standard normal noise, t (B,) in [0, 1] -> z_t (B, ...), float32 or wider.
    """
    assert z_0.shape == eps.shape, f"noise is {tuple(eps.shape)}, expected the latent's {tuple(z_0.shape)}"
    t = _over(t, z_0)  # (B, 1, ...)
    return (1 - t) * _wide(z_0) + t * _wide(eps)


def predict_x0(z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Eq. 6: the clean estimate ẑ_0 = z_t - t v̂. Exact when v̂ is the true velocity; z_t itself at t = 0.

    z_t, v (B, N, C) -> (B, N, C). t is (B,), or (B, N) where tokens carry their own level (clean reference: 0).
    """
    assert z_t.shape == v.shape, f"velocity is {tuple(v.shape)}, expected the latent's {tuple(z_t.shape)}"
    return _wide(z_t) - _over(t, z_t) * _wide(v)


def flow_loss(v: Tensor, z_0: Tensor, eps: Tensor) -> Tensor:
    """L_flow: mean squared error between v and ε - z_0. v, z_0, eps (B, N, C) -> (B,).

    The mean runs over all N video tokens and all C channels with equal weight. Faces get no extra weight.
    The reference is a condition, not a target: its tokens are dropped from v̂ before this function (Sec. 3.1), so
    the black bars of its letterbox are in no average either. The video itself is cut to size and has no bars.
    """
    assert v.shape == z_0.shape == eps.shape, (
        f"velocity {tuple(v.shape)}, latent {tuple(z_0.shape)} and noise {tuple(eps.shape)} differ: "
        "all three must hold the video's tokens, without the reference's"
    )
    error = _wide(v) - (_wide(eps) - _wide(z_0))  # (B, N, C)
    return error.square().flatten(1).mean(1)  # (B,)


# ---------------------------------------------------------------------------------------------------------------------
# identity


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis. A zero vector stays zero with gradient zero, where 0/0 is NaN."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x, 0) / torch.where(norm > 0, norm, 1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (_unit(a) * _unit(b)).sum(-1)


def _face_mean(x: Tensor, m: Tensor, eps: float) -> Tensor:
    """Σ_f m_f x_f / (Σ_f m_f + ε) over the frames, x (B, F, ...), m (B, F) bool -> (B, ...). The result is exactly 0
    for a sample without a face.

    By selection, not by multiplication: a frame without a face may hold anything, and 0 * NaN is NaN.
    """
    m = m.reshape(m.shape + (1,) * (x.ndim - m.ndim))
    return torch.where(m, x, 0).sum(1) / (m.sum(1, dtype=x.dtype) + eps)


def identity_loss(e: Tensor, e_ref: Tensor, valid: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 9: L_id = Σ_f m_f (1 - cos(e_f, e_ref)) / (Σ_f m_f + ε), each term in [0, 2].

    e (B, F, E)      embeddings of the decoded frames, with gradient; raw, not normalized
    e_ref (B, E)     of the unaugmented reference (from the cache), detached here as the paper says
    valid (B, F)     m_f: true if frame f has a face
    returns (B,)

    A sample without a valid face gives exactly 0 and a gradient of exactly 0, even where e holds NaN or inf. To leave
    out a sample, set m_f = 0 in all its frames. As in the paper, with n faces the mean is n / (n + ε) of the true one.
    """
    assert e_ref.shape == (e.shape[0], e.shape[2]), f"e_ref is {tuple(e_ref.shape)}, e is {tuple(e.shape)}"
    assert valid.shape == e.shape[:2], f"valid is {tuple(valid.shape)}, expected {tuple(e.shape[:2])}"
    m = valid.bool()
    # The selection comes before any arithmetic. Otherwise the backward pass multiplies 0 by NaN.
    e = torch.where(m[..., None], _wide(e), 0)  # (B, F, E)
    e_ref = torch.where(m[..., None], _wide(e_ref.detach())[:, None], 0)  # (B, F, E)
    return _face_mean(1 - _cosine(e, e_ref), m, eps)


def temporal_identity_loss(e: Tensor, valid: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 10: ē = Σ_f m_f e_f / (Σ_f m_f + ε), L_tic = Σ_f m_f (1 - cos(e_f, ē)) / (Σ_f m_f + ε).

    e (B, F, E), valid (B, F) as in `identity_loss` -> (B,). Exactly 0 without a face, and 0 up to rounding with one.

    The paper does not say whether ē averages raw or unit embeddings. We take raw ones, as the formula reads. Then
    embeddings of larger norm weigh more in ē, often those of clear faces. The gradient flows through ē too, so frames
    are drawn to each other and not to a fixed target.
    """
    assert valid.shape == e.shape[:2], f"valid is {tuple(valid.shape)}, expected {tuple(e.shape[:2])}"
    m = valid.bool()
    e = torch.where(m[..., None], _wide(e), 0)  # (B, F, E), before any arithmetic, as in identity_loss
    e_bar = _face_mean(e, m, eps)  # (B, E)
    return _face_mean(1 - _cosine(e, e_bar[:, None]), m, eps)


def aux_weight(t: Tensor, gamma: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Eq. 12: w_aux = (SNR / (SNR + 1))^γ, SNR = ((1 - t) / (t + ε))^2, t (B,) -> (B,).

    It falls from 1 at t = 0 to 0 at t = 1; with γ = 0 it is 1 everywhere.

    Computed as ((1-t)^2 / ((1-t)^2 + (t+ε)^2))^γ: numerator and denominator are multiplied by (t+ε)^2, so t = 0 is
    safe even with ε = 0. Larger γ confines the identity losses to lower noise.
    """
    t = _wide(t)
    signal, noise = (1 - t).square(), (t + eps).square()
    return (signal / (signal + noise)) ** gamma


def total_loss(
    l_flow: Tensor,
    l_id: Tensor,
    l_tic: Tensor,
    t: Tensor,
    lambda_id: float = 0.1,
    lambda_tic: float = 0.05,
    gamma: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Eq. 11: L = L_flow + w_aux(t) (λ_id L_id + λ_tic L_tic), L_flow, L_id, L_tic, t and the result are (B,).

    Per sample, because each has its own t; gamma and eps are those of w_aux. A sample whose decode was skipped has
    l_id = l_tic = 0.
    """
    for name, x in (("l_id", l_id), ("l_tic", l_tic), ("t", t)):  # a scalar or (B, 1) would broadcast silently
        assert x.shape == l_flow.shape, f"{name} is {tuple(x.shape)}, expected l_flow's {tuple(l_flow.shape)}"
    return l_flow + aux_weight(t, gamma, eps) * (lambda_id * l_id + lambda_tic * l_tic)


# ---------------------------------------------------------------------------------------------------------------------
# which noise levels to train on


def shifted_logit_normal(
    batch: int,
    tokens: int,
    generator: torch.Generator | None = None,
    uniform_share: float = 0.1,
    floor: float = 1e-3,
) -> Tensor:
    """Training noise levels t (batch,), float32 in [floor, 1] on the CPU, distributed as in the released LTX trainer.

    The paper does not say how it draws t. It fine-tunes LTX-2.3, so we take the trainer's distribution:
    1. u = sigmoid(μ + n), n ~ N(0, 1). A video of more tokens is more redundant and needs more noise, so μ grows with
       them, as in the sampler: guidance.schedule_shift. tokens = T h w of the video; the reference does not count.
    2. u is stretched linearly to s: its own 0.5 and 99.9 percentiles, sigmoid(μ + z_low) and sigmoid(μ + z_high),
       become 0 and 1. z_low and z_high are those percentiles of N(0, 1).
    3. A value s below `floor` becomes 2 floor - s. A value above 1 becomes 1.
    4. With probability `uniform_share` the draw is instead uniform on [floor, 1], so no level is ever starved.
    """
    mu = schedule_shift(tokens)
    low, high = torch.special.ndtri(torch.tensor([0.005, 0.999], dtype=torch.float64)).exp()
    # All three draws always happen, so the generator's state afterwards depends on `batch` alone. On the CPU, so that a
    # seed means the same on every machine.
    x = torch.randn(batch, generator=generator, dtype=torch.float64).exp()
    uniform = floor + (1 - floor) * torch.rand(batch, generator=generator, dtype=torch.float64)
    is_uniform = torch.rand(batch, generator=generator, dtype=torch.float64) < uniform_share
    # s = (sigmoid(μ+n) - sigmoid(μ+z_low)) / (sigmoid(μ+z_high) - sigmoid(μ+z_low)) with x = e^n, low = e^z_low,
    # high = e^z_high. For long videos all three sigmoids round to 1, and that form is 0/0. This one stays accurate.
    c = math.exp(-mu)
    s = (x - low) / (high - low) * (c + high) / (c + x)
    s = torch.where(s < floor, 2 * floor - s, s).clamp(max=1)
    return torch.where(is_uniform, uniform, s).float()
