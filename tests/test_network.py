"""The two hand-written backwards of the CPU against autograd on the plain formulas. The U-Net itself: tests/parity/test_monai.py."""
import pytest
import torch
import torch.nn.functional as F

from common import CPUAttention, GroupNorm, UNet, attention, generator


def gradients(f, inputs, g):
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = f(*inputs)
    out.backward(g.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def gap(found, wanted):
    """Largest distance of the pairs, relative to the wanted tensor's norm."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize('dtype, limit', [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.01)], ids=str)
@pytest.mark.parametrize('n, m', [(9, 9), (1100, 1100), (2100, 2100), (5, 3), (2049, 2)])
def test_attention(n, m, dtype, limit):
    """softmax(q k^T / sqrt(d)) v and its three gradients, ours and whatever attention() takes; more queries than one block, and keys of another number."""
    g = generator('attention')
    q, k, v, w = (torch.randn(2, 3, size, 8, generator=g, dtype=torch.float64).to(dtype) for size in (n, m, m, n))
    plain = lambda q, k, v: (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
    wanted = gradients(plain, [x.double() for x in (q, k, v)], w)
    for f in (attention, lambda q, k, v: CPUAttention.apply(q * q.shape[-1] ** -0.5, k, v)):
        assert gap(gradients(f, (q, k, v), w), wanted) < limit


@pytest.mark.parametrize('dtype, limit', [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 0.01)], ids=str)
@pytest.mark.parametrize('shape, groups', [((3, 12, 6, 4), 4), ((2, 24, 16, 16), 8), ((1, 8, 5, 7), 8), ((2, 6, 4, 4), 1)], ids=str)
@pytest.mark.parametrize('silu', [False, True], ids=['norm', 'silu'])
def test_group_norm(shape, groups, silu, dtype, limit):
    """Group norm in channels_last, without and with SiLU: result and gradients of input, weight and bias; SiLU's input is not kept."""
    g = generator('norm')
    x = (3 * torch.randn(shape, generator=g, dtype=torch.float64) + 2).to(dtype).to(memory_format=torch.channels_last)
    weight, bias, w = (torch.randn(s, generator=g, dtype=torch.float64) for s in (shape[1], shape[1], shape))
    norm = GroupNorm(groups, shape[1], eps=1e-6)

    def ours(x, weight, bias):
        return torch.func.functional_call(norm, dict(weight=weight, bias=bias), (x, silu))

    plain = lambda x, *a: (F.silu if silu else lambda y: y)(F.group_norm(x, groups, *a, 1e-6))
    kept = []
    own = torch.float64 if dtype == torch.float64 else torch.float32                       # under autocast weights stay fp32
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        found = gradients(ours, (x, weight.to(own), bias.to(own)), w)
    assert sum(kept) == x.numel() + 2 * shape[1] + 2 * shape[0] * groups                   # input, weight and bias, means and deviations
    assert type(ours(x.requires_grad_(), weight.to(own), bias.to(own)).grad_fn).__name__ == 'CPUGroupNormBackward'
    assert gap(found, gradients(plain, [v.detach().double() for v in (x, weight, bias)], w)) < limit


@pytest.mark.parametrize('dtype, limit', [('fp32', 1e-5), ('bf16', 0.03)])
def test_layout_changes_nothing(dtype, limit):
    """The same network and input in both memory formats: outputs and gradients agree, under autocast too."""
    torch.manual_seed(0)
    net = UNet(2, 1, (8, 16), (0, 1), head_channels=8, norm_groups=4)
    for p in net.parameters():
        p.data = torch.randn_like(p) * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else torch.rand_like(p)
    x, g, t = torch.randn(2, 2, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([0.2, 0.9])
    seen = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = net.to(memory_format=layout).requires_grad_()
        net.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bf16'):
            out = net(x, t)
        (out.float() * g).sum().backward()
        seen.append([out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])])
    assert gap(*seen) < limit
