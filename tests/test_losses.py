"""losses.py against the paper's equations, each written out once more in a few lines of numpy (float64)."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

import losses

B, N, C, F, E = 5, 7, 3, 6, 8
T_BOTH_ENDS = torch.tensor([0.0, 0.137, 0.5, 0.981, 1.0], dtype=torch.float64)  # (B,)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, want: np.ndarray, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape, (got.shape, want.shape)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# flow matching


@pytest.mark.parametrize("shape", [(B, N, C), (B, C, 2, 3, 4)])
def test_add_noise(shape):
    z_0, eps, t = randn(*shape), randn(*shape, seed=1), T_BOTH_ENDS
    want = np.stack([(1 - s) * a + s * b for s, a, b in zip(t.numpy(), z_0.numpy(), eps.numpy())])
    z_t = losses.add_noise(z_0, eps, t)
    close(z_t, want)
    assert torch.equal(z_t[0], z_0[0]) and torch.equal(z_t[-1], eps[-1])  # t = 0 and t = 1


def test_eq6_per_sample_and_per_token():
    z_t, v = randn(B, N, C), randn(B, N, C, seed=1)
    want = np.stack([z - s * u for s, z, u in zip(T_BOTH_ENDS.numpy(), z_t.numpy(), v.numpy())])
    close(losses.predict_x0(z_t, v, T_BOTH_ENDS), want)
    t = torch.rand(B, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t[:, -2:] = 0  # clean tokens are returned as they are
    z_0 = losses.predict_x0(z_t, v, t)
    close(z_0, z_t.numpy() - t.numpy()[:, :, None] * v.numpy())
    assert torch.equal(z_0[:, -2:], z_t[:, -2:])


def test_eq6_recovers_the_clean_latent_from_the_true_velocity():
    z_0, eps = randn(64, N, C), randn(64, N, C, seed=1)
    t = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t[0], t[1] = 0, 1
    close(losses.predict_x0(losses.add_noise(z_0, eps, t), eps - z_0, t), z_0.numpy(), 1e-14)


def test_flow_loss_is_the_mean_over_all_tokens_and_channels():
    v, z_0, eps = (randn(B, N, C, seed=s) for s in range(3))
    want = ((v.numpy() - (eps.numpy() - z_0.numpy())) ** 2).mean(axis=(1, 2))
    close(losses.flow_loss(v, z_0, eps), want)
    assert torch.equal(losses.flow_loss(eps - z_0, z_0, eps), torch.zeros(B, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# identity: Eq. 9 and 10


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def eq9(e: np.ndarray, e_ref: np.ndarray, m: np.ndarray, eps: float = 1e-6) -> float:
    """One sample, frame by frame: e (F, E), e_ref (E,), m (F,)."""
    return sum(1 - cosine(e[f], e_ref) for f in range(len(e)) if m[f]) / (m.sum() + eps)


def eq10(e: np.ndarray, _e_ref: np.ndarray, m: np.ndarray, eps: float = 1e-6) -> float:
    e_bar = sum((e[f] for f in range(len(e)) if m[f]), np.zeros(e.shape[1])) / (m.sum() + eps)
    return sum(1 - cosine(e[f], e_bar) for f in range(len(e)) if m[f]) / (m.sum() + eps)


def faces(garbage: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e (B, F, E) of unequal lengths, e_ref (B, E), valid (B, F): none, one, all, and two mixed samples."""
    lengths = torch.linspace(0.5, 30, F, dtype=torch.float64)
    e, e_ref = randn(B, F, E) * lengths[:, None], 20 * randn(B, E, seed=1)
    valid = torch.zeros(B, F, dtype=torch.bool)
    valid[1, 2] = True
    valid[2] = True
    valid[3, ::2] = True
    valid[4, 1:] = True
    e[~valid] = garbage
    return e, e_ref, valid


IDENTITY = {  # both losses as functions of (e, e_ref, valid), and their equation
    "eq9": (losses.identity_loss, eq9),
    "eq10": (lambda e, e_ref, valid, **options: losses.temporal_identity_loss(e, valid, **options), eq10),
}


@pytest.mark.parametrize("garbage", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", IDENTITY)
def test_identity_losses_follow_the_paper(name, garbage):
    loss, equation = IDENTITY[name]
    e, e_ref, valid = faces(garbage)
    samples = [(e[i].numpy(), e_ref[i].numpy(), valid[i].numpy()) for i in range(B)]
    want = np.array([equation(*sample) for sample in samples])
    got = loss(e, e_ref, valid)
    close(got, want)
    close(loss(e, e_ref, valid, eps=0.5), np.array([equation(*sample, eps=0.5) for sample in samples]))
    assert got[0] == 0  # no face: exactly, not to within ε
    assert (want[2:] > 0.1).all()  # and the others are worth comparing
    close(loss(e, e_ref, valid.float()), want)  # m_f as 0.0 / 1.0


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("garbage", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", IDENTITY)
def test_frames_without_a_face_get_a_gradient_of_exactly_zero(name, garbage):
    """Under anomaly detection, which people switch on to find a NaN: no step of backward may hold one."""
    loss, _ = IDENTITY[name]
    e, e_ref, valid = faces(garbage)
    e_ref[0] = garbage  # a sample whose reference has no face either
    e.requires_grad_()
    with torch.autograd.detect_anomaly():
        out = loss(e, e_ref, valid)
        out.sum().backward()
    assert out[0] == 0 and out.isfinite().all()
    assert (e.grad[~valid] == 0).all()
    assert e.grad.isfinite().all() and (e.grad[2:][valid[2:]].norm(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("name", IDENTITY)
def test_gradients_agree_with_finite_differences(name):
    """Through both arguments of the cosine in Eq. 10: a detached ē would fail here."""
    loss, _ = IDENTITY[name]
    e, e_ref, valid = faces()
    e = randn(B, F, E, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, e_ref, valid), (e,), atol=1e-7, rtol=1e-6)


def test_gradients_of_the_flow_part_agree_with_finite_differences():
    v, z_0, eps = (randn(B, N, C, seed=s) for s in range(3))
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.flow_loss(x, z_0, eps), (v,))
    assert torch.autograd.gradcheck(lambda x: losses.predict_x0(z_0, x, T_BOTH_ENDS), (v,))


def test_the_reference_embedding_is_detached():
    e, e_ref, valid = faces()
    e.requires_grad_(), e_ref.requires_grad_()
    losses.identity_loss(e, e_ref, valid).sum().backward()
    assert e_ref.grad is None and e.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IDENTITY)
def test_zero_embeddings_have_no_direction_and_no_gradient(name, dtype):
    loss, _ = IDENTITY[name]
    e, e_ref, _ = faces()
    e[1, 2], e[2], e_ref[3] = 0, 0, 0  # one frame, all frames, the reference
    e = e.to(dtype).requires_grad_()
    out = loss(e, e_ref.to(dtype), torch.ones(B, F))
    out.sum().backward()
    assert out.isfinite().all() and out[2].item() == pytest.approx(1, abs=1e-5)  # cos = 0 in every frame
    assert (e.grad[2] == 0).all()
    if name == "eq9":  # in Eq. 10 a zero embedding still moves ē
        assert (e.grad[1, 2] == 0).all() and (e.grad[3] == 0).all()
    assert e.grad.isfinite().all() and e.grad.abs().max() < 100  # nor the 1e12 of a norm clamped at 1e-12


def test_identity_losses_at_their_extremes():
    e_ref = randn(2, E)
    same = e_ref[:, None].expand(2, F, E) * torch.linspace(0.1, 9, F, dtype=torch.float64)[:, None]
    all_valid = torch.ones(2, F)
    close(losses.identity_loss(same, e_ref, all_valid), np.zeros(2))
    close(losses.identity_loss(-same, e_ref, all_valid), np.full(2, 2 * F / (F + 1e-6)))
    close(losses.temporal_identity_loss(-same, all_valid), np.zeros(2))


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 11 and 12


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_eq12(gamma):
    t = torch.cat([T_BOTH_ENDS, torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    snr = ((1 - t.numpy()) / (t.numpy() + 1e-6)) ** 2
    close(losses.aux_weight(t, gamma), (snr / (snr + 1)) ** gamma)
    close(losses.aux_weight(t.float(), gamma), (snr / (snr + 1)) ** gamma, 1e-6)
    close(losses.aux_weight(t, gamma, eps=0.3), ((s := ((1 - t.numpy()) / (t.numpy() + 0.3)) ** 2) / (s + 1)) ** gamma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-6, 1e-30])  # the second: an SNR of 1e60, inf in float32
def test_eq12_is_exact_at_both_ends(dtype, eps):
    w = losses.aux_weight(torch.tensor([0.0, 1.0], dtype=dtype), eps=eps)
    assert w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert w[0] == pytest.approx(1, abs=1e-11) and w[1] == 0


def test_eq12_falls_with_noise():
    w = losses.aux_weight(torch.linspace(0, 1, 1001))
    assert (w[1:] < w[:-1]).all() and w[500] == pytest.approx(0.5, abs=1e-5)


def test_eq11():
    l_flow, l_id, l_tic = (randn(B, seed=s).abs() for s in range(3))
    snr = ((1 - T_BOTH_ENDS.numpy()) / (T_BOTH_ENDS.numpy() + 1e-6)) ** 2
    w = snr / (snr + 1)
    want = l_flow.numpy() + w * (0.1 * l_id.numpy() + 0.05 * l_tic.numpy())
    close(losses.total_loss(l_flow, l_id, l_tic, T_BOTH_ENDS), want)
    want = l_flow.numpy() + w**2 * (0.7 * l_id.numpy() + 0.3 * l_tic.numpy())
    close(losses.total_loss(l_flow, l_id, l_tic, T_BOTH_ENDS, lambda_id=0.7, lambda_tic=0.3, gamma=2.0), want)
    assert losses.total_loss(l_flow, l_id, l_tic, T_BOTH_ENDS)[-1] == l_flow[-1]  # t = 1: flow alone


# ---------------------------------------------------------------------------------------------------------------------
# precision and shapes


def test_bf16_is_computed_in_float32():
    """The same bf16 numbers in float64 give the same losses to float32's precision, a thousand times bf16's."""
    x = [randn(B, N, C, seed=s, dtype=torch.bfloat16) for s in range(3)]
    e, e_ref, valid = faces()
    faces_bf16 = (e.bfloat16(), e_ref.bfloat16(), valid)
    t = T_BOTH_ENDS.bfloat16()
    cases = [
        (losses.add_noise, (x[0], x[1], t)),
        (losses.predict_x0, (x[0], x[1], t)),
        (losses.flow_loss, tuple(x)),
        *((loss, faces_bf16) for loss, _ in IDENTITY.values()),
        (losses.aux_weight, (t,)),
    ]
    for function, arguments in cases:
        got = function(*arguments)
        want = function(*(a if a.dtype == torch.bool else a.double() for a in arguments))
        assert got.dtype == torch.float32 and want.dtype == torch.float64
        close(got, want.numpy(), 2e-6)


def test_autocast_does_not_lower_the_precision():
    e, e_ref, valid = faces()
    e, e_ref = e.float(), e_ref.float()
    for loss, _ in IDENTITY.values():
        want = loss(e, e_ref, valid)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(e, e_ref, valid), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.add_noise(randn(B, N, C), randn(1, N, C), T_BOTH_ENDS),
        lambda: losses.add_noise(randn(B, N, C), randn(B, N, C), T_BOTH_ENDS[:1]),
        lambda: losses.predict_x0(randn(B, N, C), randn(B, 1, C), T_BOTH_ENDS),
        lambda: losses.predict_x0(randn(B, N, C), randn(B, N, C), torch.rand(B, 1)),
        lambda: losses.flow_loss(randn(B, N, C), randn(B, N, C), randn(1, N, C)),
        lambda: losses.flow_loss(randn(B, N + 1, C), randn(B, N, C), randn(B, N, C)),
        lambda: losses.identity_loss(randn(B, F, E), randn(1, E), torch.ones(B, F)),
        lambda: losses.identity_loss(randn(B, F, E), randn(B, E), torch.ones(B, 1)),
        lambda: losses.temporal_identity_loss(randn(B, F, E), torch.ones(B)),
        lambda: losses.total_loss(randn(B), randn(B), randn(1), T_BOTH_ENDS),
    ],
)
def test_shapes_that_would_broadcast_silently_are_refused(call):
    with pytest.raises(AssertionError, match=r"expected|differ|is \("):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# training timesteps

DRAWS = 1_000_000
TOKENS = [24, 1024, 4096, 6240, 93060]  # the tiny world, both anchors, 480x832x121, a minute of video


def draw(tokens: int, seed: int = 0, n: int = DRAWS, **options) -> np.ndarray:
    t = losses.shifted_logit_normal(n, tokens, torch.Generator().manual_seed(seed), **options)
    assert t.shape == (n,) and t.dtype == torch.float32
    return t.double().numpy()


def cdf(x: np.ndarray, tokens: int) -> np.ndarray:
    """P(t <= x) for 1e-3 <= x < 1, in 1 - sigmoid(y) = sigmoid(-y): it keeps its digits where sigmoid rounds to 1."""
    normal = NormalDist()
    mu = np.polyval(np.polyfit([1024, 4096], [0.95, 2.05], 1), tokens)
    q_low, q_high = (1 / (1 + np.exp(mu + normal.inv_cdf(p))) for p in (0.005, 0.999))

    def stretched(s: float) -> float:
        q = q_high + (1 - s) * (q_low - q_high)  # 1 - u
        return normal.cdf(np.log1p(-q) - np.log(q) - mu) if q < 1 else 0.0

    mirrored = [stretched(s) - stretched(2e-3 - s) for s in x]  # what lies below 1e-3 is reached from 2e-3 - s
    return 0.9 * np.array(mirrored) + 0.1 * (x - 1e-3) / (1 - 1e-3)


@pytest.mark.parametrize("tokens", TOKENS)
def test_timesteps_follow_the_analytic_distribution(tokens):
    t = np.sort(draw(tokens))
    x = np.concatenate([np.geomspace(1e-3, 0.1, 200), np.linspace(0.1, 1, 2000, endpoint=False)])
    gap = np.abs(np.searchsorted(t, x, side="right") / DRAWS - cdf(x, tokens)).max()
    assert gap < 1.95 / np.sqrt(DRAWS)  # Kolmogorov-Smirnov at 0.1%


@pytest.mark.parametrize("tokens", TOKENS)
def test_timesteps_stay_within_bounds(tokens):
    t = draw(tokens)
    assert t.min() >= 1e-3 and t.max() == 1


def test_a_tenth_of_the_timesteps_is_uniform():
    mixed, pure, uniform = draw(4096), draw(4096, uniform_share=0.0), draw(4096, uniform_share=1.0)
    assert np.mean(mixed != pure) == pytest.approx(0.1, abs=1e-3)
    assert np.array_equal(mixed[mixed != pure], uniform[mixed != pure])
    x = np.linspace(1e-3, 1, 1000)
    gap = np.abs(np.searchsorted(np.sort(uniform), x, side="right") / DRAWS - (x - 1e-3) / (1 - 1e-3)).max()
    assert gap < 1.95 / np.sqrt(DRAWS)


def test_more_tokens_mean_more_noise():
    """Draw by draw, where mirroring at 1e-3 can turn the order of two small neighbours."""
    samples = [draw(n) for n in TOKENS]
    for fewer, more in pairwise(samples):
        assert (more >= fewer - 1e-3).all() and more.mean() > fewer.mean() + 0.01


def test_timesteps_are_reproducible():
    assert np.array_equal(draw(2048, n=100), draw(2048, n=100))
    assert not np.array_equal(draw(2048, n=100), draw(2048, n=100, seed=1))
    ours, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    losses.shifted_logit_normal(100, 24, ours)
    losses.shifted_logit_normal(100, 6240, other)
    assert torch.equal(ours.get_state(), other.get_state())  # consumes as much whatever it draws
    state = torch.get_rng_state()
    draw(2048, n=100)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global generator alone
