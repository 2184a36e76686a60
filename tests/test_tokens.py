"""Networks of tokens: DiT, Mamba and MMDiT. Identities at the start, counts, scans against recurrences, and runs of each.

The same functions as diffusers' on the same weights: tests/parity/test_dit.py.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import analysis
import common
import draft
import evaluate
import sample
import train_bravo
from common import (LESIONS, SIZES, TOKEN, Attention, Block, JointBlock, Mamba, MMDiT, Tokens, attention, cross_merge, cross_scan, generator,
                    lesion_tokens, load_checkpoint, load_run, mask_condition, patchify, positions, ssd, unpatchify)

NETS = ['dit', 'mamba', 'mmdit']


def make(name, in_channels=3, dims=2, **kw):
    """A small network of each kind: one noisy channel, then a mask; with three channels, mask-present."""
    kw = dict(patch=4, width=24, depth=2, heads=2, dims=dims, **kw)
    torch.manual_seed(0)
    if name == 'mmdit':
        return MMDiT(in_channels, 1, **kw, present=in_channels == 3)
    return Tokens(in_channels, 1, **kw, mixer={'dit': 'attention', 'mamba': 'mamba'}[name])


def scramble(net, seed=0):
    """Random weights everywhere, also where training starts at zero; the scan's own constants stay."""
    g = generator('scramble', seed)
    for name, p in net.named_parameters():
        if not name.endswith(('A_log', 'dt_bias')):
            p.data = (torch.randn(p.shape, generator=g) * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.5 + torch.rand(p.shape, generator=g)).to(p)
    return net


def inputs(net, batch=2, extra=2, side=8):
    g = generator('inputs')
    x = torch.randn(batch, net.in_channels, *(side,) * net.dims, generator=g)
    x[:, 1:] = (x[:, 1:] > 0).float()
    x[:, -1:] = torch.tensor([1.0, 0])[:batch].reshape(-1, *(1,) * (net.dims + 1))                 # mask-present: yes, no
    context = torch.randn(batch, 4, net.context_dim, generator=g) if net.context_dim else None
    return x, torch.tensor([0.2, 0.9])[:batch], context, torch.randn(batch, extra, generator=g)


@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('name', NETS)
def test_network(name, dims):
    """Zero at the start; sees every input; no image depends on its batch; channels_last and bf16 change what they may."""
    net = make(name, dims=dims, context_dim=5, extra_dim=2)
    x, t, context, extra = inputs(net)
    assert net(x, t, context, extra).abs().max() == 0
    scramble(net).requires_grad_(False)
    y = net(x, t, context, extra)
    near = 1e-5 * float(y.abs().max())
    assert y.shape == (2, 1, *(8,) * dims) and y.std() > 0.1
    torch.testing.assert_close(net(x[1:], t[1:], context[1:], extra[1:]), y[1:], rtol=0, atol=near)
    mask = torch.cat([x[:, :1], 1 - x[:, 1:2], x[:, 2:]], 1)
    for other in (net(x, t + 0.05, context, extra), net(x, t, context * 2, extra), net(x, t, context, extra * 2), net(mask, t, context, extra)):
        assert (other[0] - y[0]).abs().max() > 1e-3
    torch.testing.assert_close(net(x, t, context.flip(1), extra), y, rtol=0, atol=near)            # a set
    padded = torch.cat([context, torch.zeros(2, 3, 5)], 1)
    torch.testing.assert_close(net(x, t, padded, extra), y, rtol=0, atol=near)
    if name == 'mmdit':                                                                            # the second image has no mask: what is there is not read
        torch.testing.assert_close(net(mask, t, context, extra)[1], y[1], rtol=0, atol=near)
    with torch.autocast('cpu', torch.bfloat16):
        assert (net(x, t, context, extra).float() - y).norm() < 0.03 * y.norm()
    if dims == 2:
        last = net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last), t, context, extra), y, rtol=0, atol=near)


@pytest.mark.parametrize('name', NETS)
def test_blocks_are_the_identity_at_the_start(name):
    """Of both streams; and every parameter gets a gradient once the gates are open."""
    net = make(name, context_dim=5)
    c, h, y, context = torch.randn(2, 24), torch.randn(2, 4, 24), torch.randn(2, 3, 24), torch.randn(2, 3, 5)
    for block in net.blocks:
        out = block(h, y, block.modulation(c)) if name == 'mmdit' else [block(h, block.modulation(c), context, *([(2, 2)] if name == 'mamba' else []))]
        assert all(torch.equal(a, b) for a, b in zip(out, (h, y)))
    x, t, context, _ = inputs(scramble(net))
    net(x, t, context).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


COUNTS = {'S': {2: 32963360, 4: 32945024, 8: 33148160}, 'B': {2: 130512416, 4: 130475648, 8: 130881536},
          'L': {2: 458102816, 4: 458053760, 8: 458594816}, 'XL': {2: 675129632, 4: 675074432, 8: 675683072}}


@pytest.mark.parametrize('size', COUNTS)
def test_counts_of_dit(size, monkeypatch):
    """Published DiT on 32 x 32 x 4, out 8, its fixed positions counted. It also embeds 1,001 classes, which ours lacks: added here."""
    monkeypatch.setattr(common, 'xavier', lambda net: None)                                        # no numbers on the meta device
    for patch, wanted in COUNTS[size].items():
        with torch.device('meta'):
            net = Tokens(4, 8, patch=patch, **SIZES[size])
        places = positions((32 // patch,) * 2, net.width)
        assert sum(p.numel() for p in net.parameters()) + places.numel() + 1001 * net.width == wanted


@pytest.mark.parametrize('depth, wanted', [(24, 2_008_857_600), (38, 8_017_073_408)])
def test_counts_of_mmdit(depth, wanted, monkeypatch):
    """The joint blocks of SD3 at width 64 depth, the last with a second stream that ends at its keys and values."""
    with torch.device('meta'):
        blocks = [JointBlock(64 * depth, depth, last=i == depth - 1) for i in range(depth)]
    assert sum(p.numel() for b in blocks for p in b.parameters()) == wanted


@pytest.mark.parametrize('dims', [2, 3])
def test_patches(dims):
    """There and back is the same; a linear layer on patches is a strided convolution, token by token in reading order."""
    g = generator('patches', dims)
    x, w = torch.randn(2, 3, *(6, 4, 8)[:dims], generator=g), torch.randn(5, 3, *(2,) * dims, generator=g)
    tokens, grid = patchify(x, 2), tuple(s // 2 for s in x.shape[2:])
    assert torch.equal(unpatchify(tokens, 2, grid), x)
    conv = (F.conv2d, F.conv3d)[dims - 2](x, w, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens @ w.movedim(1, -1).flatten(1).T, conv, rtol=0, atol=1e-5)


@pytest.mark.parametrize('grid, width', [((3, 5), 16), ((3, 5), 18), ((2, 3, 4), 24), ((2, 3, 4), 32)])
def test_positions(grid, width):
    """Each axis has its own numbers, last axis first; what does not divide stays zero; no two places are the same."""
    found, half = positions(grid, width), width // (2 * len(grid))
    for token, at in enumerate(torch.cartesian_prod(*map(torch.arange, grid))):
        wanted = [f(float(i) * 10000 ** (-k / half)) for i in at.flip(0) for f in (math.sin, math.cos) for k in range(half)]
        torch.testing.assert_close(found[token], torch.tensor(wanted + [0.0] * (width - len(wanted))), rtol=0, atol=1e-6)
    assert torch.cdist(found, found).fill_diagonal_(9).min() > 0.1


@pytest.mark.parametrize('name', NETS)
def test_requests_are_a_set(name):
    """Lesion tokens in any order, with any padding; another lesion is another answer."""
    net = scramble(make(name, in_channels=1, context_dim=TOKEN)).requires_grad_(False)
    lesions = torch.rand(3, 3, generator=generator('lesions')).numpy()
    x, t, context = torch.randn(1, 1, 8, 8), torch.tensor([0.4]), lesion_tokens([lesions])
    out = net(x, t, context)
    for same in (context[:, torch.randperm(1 + LESIONS)], context[:, :4], torch.cat([context, torch.zeros(1, 7, TOKEN)], 1)):
        assert (net(x, t, same) - out).abs().max() < 1e-5 * out.std()
    for other in (lesion_tokens([lesions[:2]]), lesion_tokens([None])):
        assert (net(x, t, other) - out).abs().max() > 1e-2 * out.std()


def test_mask_tokens_know_their_place():
    """MMDiT's second stream is a set: without a position a mask in another corner would be the same mask."""
    net, (x, t) = scramble(make('mmdit', in_channels=2)).requires_grad_(False), (torch.randn(1, 1, 8, 8), torch.tensor([0.4]))
    masks = [torch.zeros(1, 1, 8, 8) for _ in range(2)]
    masks[0][..., :4, :4], masks[1][..., 4:, 4:] = 1, 1
    a, b = (net(torch.cat([x, m], 1), t) for m in masks)
    assert (a - b).abs().max() > 1e-2 * a.std()


def test_one_stream_alone_is_dit():
    """With no token in the second stream, MMDiT's block is DiT's: with queries and keys normalised, and with the norms off."""
    block, g = scramble(JointBlock(24, 2)), generator('alone')
    x, c = torch.randn(2, 7, 24, generator=g), torch.randn(2, 24, generator=g)
    normed = block.image(x, block.image.modulation(c))
    plain = Block(24, Attention(24, 12), 2)
    plain.load_state_dict({k: v for k, v in block.image.state_dict().items() if 'norm' not in k})
    for wanted in (normed, plain(x, plain.modulation(c))):
        torch.testing.assert_close(block(x, x[:, :0], block.modulation(c))[0], wanted, rtol=0, atol=1e-5)
        for name in ('norm_q', 'norm_k'):
            setattr(block.image.mixer, name, nn.Identity()), setattr(block.context.mixer, name, nn.Identity())
    assert (normed - wanted).abs().max() > 1e-2


def test_queries_and_keys_are_normalised():
    """Their root mean square is the scale, whatever the size of the tokens, so no logit exceeds sqrt(d) times the scales."""
    layer = Attention(32, 8, qk_norm=True)
    assert torch.equal(layer.norm_q.weight, torch.ones(8))                                         # not left to chance
    layer.norm_q.weight.data.fill_(1.7), layer.norm_k.weight.data.fill_(0.6)
    q, k, v = layer.project(100 * torch.randn(2, 5, 32, generator=generator('qk')))
    for a, scale in ((q, 1.7), (k, 0.6)):
        torch.testing.assert_close(a.square().mean(-1).sqrt(), torch.full((2, 4, 5), scale), rtol=1e-5, atol=0)
    assert (q @ k.mT / 8 ** 0.5).abs().max() <= 8 ** 0.5 * 1.7 * 0.6 * 1.00001


# -- selective scans --------------------------------------------------------------------------------------------------


def recurrence(x, a, b, c):
    """h_t = exp(a_t) h_(t-1) + b_t x_t^T; y_t = c_t h_t, one token after the other. x (B,L,H,P), a (B,L,H), b, c (B,L,S)."""
    h, out = x.new_zeros(len(x), x.shape[2], b.shape[-1], x.shape[-1]), []
    for t in range(x.shape[1]):
        h = a[:, t].exp()[..., None, None] * h + torch.einsum('bs,bhp->bhsp', b[:, t], x[:, t])
        out.append(torch.einsum('bs,bhsp->bhp', c[:, t], h))
    return torch.stack(out, 1)


def scan_inputs(length, heads=3, dtype=torch.float64, decay=1.0):
    g = generator('scan', length)
    x, b, c = (torch.randn(2, length, *s, generator=g, dtype=dtype) for s in ((heads, 4), (5,), (5,)))
    return x, -decay * torch.rand(2, length, heads, generator=g, dtype=dtype), b, c


@pytest.mark.parametrize('length, chunk', [(1, 32), (7, 32), (32, 8), (33, 8), (65, 32)])
@pytest.mark.parametrize('decay', [0.01, 1.0, 30.0])
def test_scan(length, chunk, decay):
    """Chunks give what the recurrence gives, and the same gradients of all four inputs."""
    seen = []
    for f in (recurrence, lambda *v: ssd(*v, chunk)):
        v = [a.requires_grad_() for a in scan_inputs(length, decay=decay)]
        y = f(*v)
        y.backward(torch.randn(y.shape, generator=generator('g'), dtype=y.dtype))
        seen.append([y.detach(), *(a.grad for a in v)])
    for found, wanted in zip(*seen):
        assert (found - wanted).abs().max() < 1e-10 * max(1, float(wanted.abs().max()))


def test_scan_sees_nothing_ahead():
    """What comes out at token i depends on the tokens up to it and on no later one, across chunks too."""
    x, a, b, c = scan_inputs(20)
    x.requires_grad_()
    y = ssd(x, a, b, c, 8)
    for i in (0, 7, 8, 13, 19):
        slope, = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)
        assert (slope[:, i + 1:] == 0).all() and (slope[:, :i + 1] != 0).all()


def test_scan_forgets_without_overflow():
    """In fp32, with decays that no inverse could undo (exp of 32,000), and with none at all."""
    x, a, b, c = scan_inputs(64, dtype=torch.float32)
    for decay in (torch.full_like(a, -1000.0), torch.zeros_like(a), torch.where(torch.rand(a.shape, generator=generator('mix')) < 0.5, -1000.0, -0.01)):
        found, wanted = ssd(x, decay, b, c), recurrence(x.double(), decay.double(), b.double(), c.double())
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_mamba_1_is_a_case_of_it():
    """Gu 2023: A (D,S) decays every channel and state by itself, dt (B,L,D), b and c (B,L,S), B by Euler. Heads of one channel and one state."""
    g = generator('mamba-1')
    B, L, D, S = 2, 19, 3, 4
    u, dt, b, c = (torch.randn(B, L, n, generator=g, dtype=torch.float64) for n in (D, D, S, S))
    dt, A, h, wanted = F.softplus(dt), -torch.exp(torch.randn(D, S, generator=g, dtype=torch.float64)), 0, []
    for t in range(L):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
        wanted.append((h * c[:, t, None]).sum(-1))
    x = (dt * u)[..., None] * (b * 1)[:, :, None]                                                  # (B, L, D, S): what enters each state
    one = torch.ones(B, L, 1, dtype=torch.float64)
    states = ssd(x.flatten(2)[..., None], (dt[..., None] * A).flatten(2), one, one, chunk=8).view(B, L, D, S)
    assert ((states * c[:, :, None]).sum(-1) - torch.stack(wanted, 1)).abs().max() < 1e-10


@pytest.mark.parametrize('grid', [(3, 4), (4, 3), (2, 3, 4)])
def test_orders(grid):
    """Every direction reads each token once; in 2D rows, columns and both backwards; merged, each token has come back from all."""
    n, k = math.prod(grid), 2 * len(grid)
    index = torch.arange(n)[None, None, :, None].expand(1, k, n, 1)
    orders = cross_scan(index, grid)[0, :, :, 0]
    assert (orders.sort(1).values == torch.arange(n)).all() and len({tuple(o.tolist()) for o in orders}) == k
    assert torch.equal(orders[0], torch.arange(n)) and torch.equal(orders[k // 2:], orders[:k // 2].flip(1))
    if len(grid) == 2:
        assert torch.equal(orders[1], torch.arange(n).view(grid).T.flatten())
    else:                                                                                          # each axis is the fastest in one of them
        assert {int(o[1] - o[0]) for o in orders[:3]} == {1, grid[2], grid[1] * grid[2]}
    x = torch.randn(2, k, n, 5, generator=generator('merge'), dtype=torch.float64)
    torch.testing.assert_close(cross_merge(cross_scan(x, grid), grid), x.sum(1), rtol=0, atol=1e-13)
    same = x[:, :1].expand(-1, k, -1, -1)
    torch.testing.assert_close(cross_merge(cross_scan(same, grid), grid), k * x[:, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize('grid', [(3, 4), (2, 3, 2)])
def test_mamba(grid):
    """The whole mixer in fp64 against one written token by token; and its output anywhere depends on every token."""
    n, dims, heads = math.prod(grid), len(grid), 2
    torch.manual_seed(0)
    layer = scramble(Mamba(8, heads, dims, state=3)).double()
    x = torch.randn(1, n, 8, generator=generator('mamba'), dtype=torch.float64, requires_grad=True)
    u, z = (x @ layer.project.weight.T).chunk(2, -1)
    u = F.silu(layer.conv(u.mT.reshape(1, 16, *grid))).flatten(2).mT
    total = u * layer.D.repeat_interleave(8)
    orders = cross_scan(torch.arange(n)[None, None, :, None].expand(1, 2 * dims, n, 1), grid)[0, :, :, 0].tolist()
    for k, order in enumerate(orders):
        dt, b, c = (u @ layer.select.weight.view(2 * dims, 8, 16)[k].T).split((heads, 3, 3), -1)
        dt, A = F.softplus(dt + layer.dt_bias[k]), -layer.A_log[k].exp()
        v = [w[:, order] for w in (u.unflatten(-1, (heads, 8)) * dt[..., None], dt * A, b, c)]
        total = total + recurrence(*v).flatten(-2)[:, torch.tensor(order).argsort()]
    y = total * F.silu(z)
    wanted = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight) @ layer.out.weight.T
    found = layer(x, grid)
    assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-10
    for token in range(n):
        seen = torch.autograd.grad(found[0, token].sum(), x, retain_graph=True)[0][0].abs().amax(1)
        assert (seen > 1e-12).all()


def test_scan_starts_in_range():
    """dt in [0.001, 0.1] and A in [-16, -1] after the network's own start; in bf16 they stay fp32, so that little is forgotten a step."""
    net = make('mamba')
    for block in net.blocks:
        dt, A = F.softplus(block.mixer.dt_bias), block.mixer.A_log.exp()
        assert 0.00099 < dt.min() and dt.max() < 0.101 and 1 <= A.min() and A.max() <= 16 and dt.std() > 0.01 and A.std() > 2
    x, seen = torch.randn(1, 4, 24), []
    with pytest.MonkeyPatch.context() as patch, torch.autocast('cpu', torch.bfloat16):
        patch.setattr(common, 'ssd', lambda *v: seen.extend(a.dtype for a in v) or v[0])
        net.blocks[0].mixer(x, (2, 2))
    assert set(seen) == {torch.float32}


def test_cost_in_tokens():
    """Twice the tokens: twice the multiplications of a scan, four times those of attention's scores."""
    def flops(f, *v):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            f(*v)
        return counter.get_total_flops()

    layer = Mamba(16, 2, 2)
    assert flops(layer, torch.randn(1, 512, 16), (16, 32)) == 2 * flops(layer, torch.randn(1, 256, 16), (16, 16))
    assert flops(attention, *torch.randn(3, 1, 2, 512, 8)) == 4 * flops(attention, *torch.randn(3, 1, 2, 256, 8))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('model', NETS)
def test_runs(call, tmp_path, model):
    """Each trains, with conditions left out at times, as mask and as image model, loads again and draws with guidance."""
    flags = ['--model', model, '--rflow', '--p-uncond', '0.5', '--lr', '0.01', '--depth', '1', '--slice-level']
    call('seg', tmp_path / 'seg', *flags, '--controllable', '--heads', '4')
    call('bravo', tmp_path / 'bravo', *flags, '--patch', '2', '--width', '24')
    run = load_run(tmp_path / 'bravo')
    assert run.step == 4 and type(run.net) is (MMDiT if model == 'mmdit' else Tokens) and run.net.patch == 2 and run.net.width == 24
    out = call('sample', tmp_path / 'set', '--seg', tmp_path / 'seg', '--bravo', tmp_path / 'bravo', '--n', 2, '--count', 1, '--steps', 2,
               '--seg-steps', 2, '--cfg', 2, '--seg-cfg', 2)
    assert len(list(out.glob('syn_*/bravo.nii.gz'))) == 2


@pytest.mark.parametrize('model', ['unet', 'mmdit'])
def test_an_image_model_is_told_of_its_lesions(call, phantom, cache, detector, tmp_path, monkeypatch, model):
    """train_bravo.py --controllable: the tokens say what the mask holds, or with the mask nothing; in MMDiT they follow its patches. Drawn with
    the null's tokens, or with half the weight on them (guidance), the images are others; pairs, reflow and attention know them too."""
    given, tokens = [], train_bravo.request_tokens
    with monkeypatch.context() as patch:
        patch.setattr(train_bravo, 'request_tokens', lambda mask, args, present=None: given.append((mask, present, tokens(mask, args, present))) or given[-1][2])
        run = call('bravo', tmp_path / 'run', '--model', model, '--rflow', '--p-uncond', 0.3, '--controllable', '--lr', 0.03, '--iters', 12)
    masks, present, told = (torch.cat(v) for v in zip(*[v for v in given if v[1] is not None]))
    assert len(masks) == 48 and 0 < present.sum() < 48 and torch.equal(told[~present], lesion_tokens([None]).expand((~present).sum(), -1, -1))
    for mask, t in zip(masks[present], told[present]):
        assert torch.equal(t, lesion_tokens([common.lesion_records(mask[0].numpy() > 0)])[0])
    net = load_run(run).net
    assert net.context_dim == TOKEN and (model == 'unet' or net.embed_mask is not None and net.embed_context is not None and net.null is not None)

    images = lambda out: np.stack([common.read_nifti(f / 'bravo.nii.gz')[0] for f in sorted(out.glob('syn_*'))])
    draw = lambda name, *flags: call('sample', tmp_path / name, '--bravo', run, '--data', phantom, '--weights', 'raw', '--steps', 2, '--n', 3, *flags)
    plain = images(draw('plain'))
    assert (images(draw('guided', '--cfg', 3)) != plain).any()
    with monkeypatch.context() as patch:
        patch.setattr(sample, 'request_tokens', lambda mask, args: lesion_tokens([None] * len(mask)))
        assert (images(draw('untold')) != plain).any()
    real = common.load_slices([phantom], 16, ('bravo',), load_run(run).box, cache=cache)
    where = np.flatnonzero([r['tumour'] > 0 for r in real.table])[:3]
    again = lambda: evaluate.redraw(load_run(run, weights='raw'), real.images[where], real.masks[where], [0.5] * 3, 1.0, 0, 'cpu')
    drawn, seen = again(), []
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, 'request_tokens', lambda mask, args: lesion_tokens([None] * len(mask)))
        assert (again() != drawn).any()
        patch.setattr(draft, 'request_tokens', lambda mask, args: seen.append(tokens(mask, args)) or seen[-1])
        call('draft', tmp_path / 'draft', '--bravo', run, '--reward', detector(), '--iters', 1)
    assert seen and all(t.shape[1:] == (1 + LESIONS, TOKEN) for t in seen)
    pairs = draw('pairs', '--pairs')
    call('bravo', tmp_path / 'reflow', '--model', model, '--rflow', '--p-uncond', 0.3, '--controllable', '--reflow', pairs, '--init', run, '--iters', 1)
    analysis.main(analysis.get_args([str(v) for v in ('attention', run, '--data', phantom, '--cache', cache, '--n', 4, '--times', '.5', '--device', 'cpu',
                                                      '--out', tmp_path / 'attention')]))
    assert {r['to'] for r in common.read_csv(tmp_path / 'attention/attention.csv')} == {'image', 'requests', *(['mask'] if model == 'mmdit' else [])}


@pytest.mark.parametrize('model', NETS)
def test_mask_present_joins_a_run_without_it(call, tmp_path, model):
    """--init of a run without --p-uncond: the images whose mask is present are those of the old network."""
    old = call('bravo', tmp_path / 'old', '--model', model, '--rflow', '--lr', 0.01)
    new = call('bravo', tmp_path / 'new', '--model', model, '--rflow', '--p-uncond', 0.1, '--init', old, '--iters', 0)
    a, b = load_run(old).net, load_run(new).net
    x, mask, t = torch.randn(2, 1, 16, 16), (torch.rand(2, 1, 16, 16) > 0.8).float(), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        wanted = a(torch.cat([x, mask], 1), t)
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(b(torch.cat([x, mask_condition(mask, 0.1)], 1), t), wanted, rtol=0, atol=1e-6)


def test_resume(call, tmp_path):
    """4 steps are 2 and, after a restart, 2 more: the same bits, scan included."""
    flags = ['--model', 'mamba', '--rflow', '--save-every', 2, '--keep-every', 2]
    whole, parts = call('bravo', tmp_path / 'whole', *flags), tmp_path / 'parts'
    parts.mkdir()
    (whole / 'ckpt_2.pt').rename(parts / 'ckpt.pt')
    call('bravo', parts, *flags)
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    assert b['step'] == 4 and all(torch.equal(a[k][n], b[k][n]) for k in ('net', 'ema') for n in a[k])


def test_runs_from_before_go_on(call, trained, tmp_path):
    """A run whose flags know no --model is a U-Net's: it loads, and goes on."""
    state = load_checkpoint(trained / 'bravo')
    for name in ('model', 'model_size', 'patch', 'width', 'depth', 'heads'):
        state['args'].pop(name)
    (tmp_path / 'old').mkdir()
    torch.save(state, tmp_path / 'old/ckpt.pt')
    assert type(load_run(tmp_path / 'old').net) is common.UNet
    call('bravo', tmp_path / 'old', '--rflow', '--lr', 0.01)
