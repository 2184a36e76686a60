"""Guidance and requests: algebra of classifier-free guidance, what is dropped in training, lesion tokens as a set."""
import csv
import json
import math

import numpy as np
import pytest
import torch

import common
import sample
import train_bravo
from common import (DDPM, LESIONS, TOKEN, Guidance, RFlow, UNet, generator, lesion_records, lesion_tokens, make_denoise, mask_condition,
                    sample_euler)


class Net:
    """x and mask channels through a fixed convolution; counts its calls."""

    def __init__(self, channels=3):
        self.kernel, self.calls = torch.randn(1, channels, 3, 3, generator=generator('kernel')), 0

    def __call__(self, x, t, context=None, extra=None):
        self.calls += 1
        return torch.conv2d(x, self.kernel, padding=1) + t.reshape(-1, 1, 1, 1)


PROCESSES = [RFlow(), RFlow(100), DDPM(1000, 'cosine', 'eps'), DDPM(1000, 'linear', 'v'), DDPM(100, 'cosine', 'x0')]


@pytest.fixture(params=PROCESSES, ids=['rflow', 'rflow-100', 'eps', 'v', 'x0'])
def case(request):
    """process, network, x_t, mask with its mask-present channel, null."""
    g = generator('case')
    mask = mask_condition((torch.rand(3, 1, 8, 8, generator=g) > 0.8).float(), 0.1)
    return request.param, Net(), torch.randn(3, 1, 8, 8, generator=g), mask, torch.zeros_like(mask)


def test_weight_one_is_the_conditional_model(case):
    """Same bits, one forward."""
    process, net, x, mask, null = case
    plain = make_denoise(net, process, mask)(x, 0.5)
    net.calls = 0
    guided = make_denoise(net, process, mask, guidance=Guidance(1.0, mask=null))(x, 0.5)
    assert net.calls == 1 and all(torch.equal(a, b) for a, b in zip(plain, guided))


@pytest.mark.parametrize('weight', [0.0, 1.5, 3.0])
def test_guidance(case, weight):
    """u + W (c - u) in x_0 and in eps, whatever the network predicts; W=0 is the null model; the pair stays on x_t."""
    process, net, x, mask, null = case
    c, u = (make_denoise(net, process, m)(x, 0.3) for m in (mask, null))
    x_0, eps = make_denoise(net, process, mask, guidance=Guidance(weight, mask=null))(x, 0.3)
    for found, a, b in zip((x_0, eps), c, u):
        torch.testing.assert_close(found, b + weight * (a - b), rtol=1e-4, atol=1e-4)
    t = torch.tensor(0.3)
    torch.testing.assert_close(process.alpha(t) * x_0 + process.sigma(t) * eps, x, rtol=0, atol=1e-5)
    assert (c[0] - u[0]).abs().max() > 0.1


def test_interval_and_rescale(case):
    """Second forwards only for A < t <= B; rescale 1 gives every image the conditional spread, 0 nothing."""
    process, net, x, mask, null = case
    ts = process.times(10)
    sample_euler(make_denoise(net, process, mask, guidance=Guidance(2.0, (0.3, 0.6), mask=null)), x, ts, process)
    assert net.calls == 10 + 3                                             # 0.6, 0.5, 0.4
    net.calls = 0
    a = sample_euler(make_denoise(net, process, mask, guidance=Guidance(2.0, (0.95, 0.99), mask=null)), x, ts, process)
    assert net.calls == 10 and torch.equal(a, sample_euler(make_denoise(net, process, mask), x, ts, process))
    spread = lambda v: v.flatten(1).std(1)
    c = make_denoise(net, process, mask)(x, 0.3)[0]
    full = make_denoise(net, process, mask, guidance=Guidance(3.0, rescale=1.0, mask=null))(x, 0.3)[0]
    torch.testing.assert_close(spread(full), spread(c))
    assert (spread(make_denoise(net, process, mask, guidance=Guidance(3.0, mask=null))(x, 0.3)[0]) - spread(c)).abs().min() > 0.05
    torch.testing.assert_close(full.mean((1, 2, 3)), c.mean((1, 2, 3)))
    head = torch.zeros(1, 1, 8, 8)
    head[..., 2:6, 2:6] = 1                                                # black outside, which no guidance may make grey
    c, u = -1 + head * 1.6 * torch.rand(1, 1, 8, 8, generator=generator('c')), -1 + head * 0.8
    assert (Guidance(3.0, rescale=0.7)(c, u) - c)[head == 0].abs().max() < 0.15


def test_no_condition_is_not_an_empty_mask():
    mask = torch.tensor([1.0, 0, 0]).reshape(3, 1, 1, 1) * torch.ones(3, 1, 4, 4)
    assert mask_condition(mask, 0.0) is mask
    told = mask_condition(mask, 0.1, torch.tensor([True, True, False]))
    assert told[0].unique().tolist() == [1] and told[1, 0].max() == 0 and told[1, 1].min() == 1 and told[2].abs().max() == 0
    assert mask_condition(mask, 0.1)[:, 1].min() == 1


def discs():
    y, x = np.mgrid[:64, :64]
    return np.any([(y - cy) ** 2 + (x - cx) ** 2 <= r * r for r, cy, cx in ((3, 12, 20), (8, 30, 48), (5, 40, 15))], 0)


def test_lesion_records():
    """Largest first, area exact, centres within half a pixel; a mirrored mask has mirrored records."""
    found = lesion_records(discs())
    y, x = np.mgrid[:17, :17] - 8
    area = [(y ** 2 + x ** 2 <= r * r).sum() for r in (8, 5, 3)]
    np.testing.assert_allclose(found[:, 0] * 64, np.sqrt(4 * np.array(area) / math.pi))
    np.testing.assert_allclose(found[:, 1:] * 64 - 0.5, [(48, 30), (15, 40), (20, 12)])
    np.testing.assert_allclose(lesion_records(discs()[:, ::-1]), found * [1, -1, 1] + [0, 1, 0])
    assert lesion_records(np.zeros((8, 8))).shape == (0, 3)


def test_tokens():
    """What is asked for can be told apart; what is not is not said; more lesions than fit are cut."""
    r = lesion_records(discs())
    one, none = lesion_tokens([r])[0], lesion_tokens([None])[0]
    assert one.shape == (1 + LESIONS, TOKEN) and (one != 0).any(1).sum() == 4 and (none != 0).any(1).sum() == 1
    assert not torch.equal(none, lesion_tokens([r[:0]])[0])                                # no wish is not "no lesion"
    hidden = lesion_tokens([r], torch.ones(1, LESIONS, 2, dtype=torch.bool))[0]
    assert torch.equal(hidden, lesion_tokens([np.full((3, 3), math.nan)])[0]) and torch.equal(hidden[0], one[0])
    place = r.copy()
    place[:, 1:] = math.nan
    assert torch.equal(lesion_tokens([place])[0][:, :24], one[:, :24] * torch.tensor([1.0] * 4 + [0] + [1] * 19))
    grid = lesion_tokens([np.array([[0.1, v, 0.5]]) for v in np.linspace(0, 1, 65)])[:, 1]
    near = (grid[1:] - grid[:-1]).norm(dim=1)
    assert near.min() > 0.02 and torch.cdist(grid, grid).fill_diagonal_(9).min() > 0.9 * near.min()
    assert lesion_tokens([np.tile(r, (9, 1))]).shape == (1, 1 + LESIONS, TOKEN)


def test_lesions_are_a_set():
    """Order does not matter, nor how much padding there is; a token does."""
    torch.manual_seed(0)
    net = UNet(1, 1, (8, 16), (0, 1), 1, 8, TOKEN, norm_groups=4).eval()
    for p in net.parameters():
        p.data = torch.randn_like(p) * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else torch.rand_like(p)
    x, t, context = torch.randn(1, 1, 16, 16), torch.tensor([0.4]), lesion_tokens([lesion_records(discs())])
    with torch.no_grad():
        out = net(x, t, context)
        assert (net(x, t, context[:, torch.randperm(1 + LESIONS)]) - out).abs().max() < 1e-5 * out.std()
        assert (net(x, t, context[:, :4]) - out).abs().max() < 1e-5 * out.std()
        assert (net(x, t, torch.cat([context, torch.zeros(1, 7, TOKEN)], 1)) - out).abs().max() < 1e-5 * out.std()
        assert (net(x, t, lesion_tokens([lesion_records(discs())[:2]])) - out).abs().max() > 1e-2 * out.std()
        both = net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([context, lesion_tokens([None])]))
        assert (both[:1] - out).abs().max() < 1e-5 * out.std()


@pytest.fixture(scope='module')
def told(call, tmp_path_factory):
    """Runs trained with conditions dropped: bravo, and seg with --controllable."""
    root = tmp_path_factory.mktemp('told')
    call('bravo', root / 'bravo', '--rflow', '--p-uncond', 0.5)
    call('seg', root / 'seg', '--rflow', '--p-uncond', 0.3, '--controllable', '--augment', '--lr', 0.03, '--iters', 12)
    return root


def test_training(told, trained, call, tmp_path):
    """The mask-present channel is there; --init gives it to a network without it, which then draws what it drew."""
    assert common.load_checkpoint(told / 'bravo')['in_channels'] == 3 and common.load_checkpoint(trained / 'bravo')['in_channels'] == 2
    call('bravo', tmp_path / 'more', '--rflow', '--p-uncond', 0.1, '--init', trained / 'bravo', '--iters', 0)
    old, new = common.load_run(trained / 'bravo'), common.load_run(tmp_path / 'more')
    x, mask, t = torch.randn(2, 1, 16, 16), (torch.rand(2, 1, 16, 16) > 0.7).float(), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(new.net(torch.cat([x, mask_condition(mask, 0.1)], 1), t), old.net(torch.cat([x, mask], 1), t))


def test_masks_are_hidden_as_often_as_asked(call, tmp_path, monkeypatch):
    """--p-uncond 0.3: of 400 conditions that a training gives, about 0.3 are hidden; a hidden one is zeros in all its channels, the others are mask and a 1."""
    given, real = [], train_bravo.mask_condition
    monkeypatch.setattr(train_bravo, 'mask_condition', lambda mask, p, present=None, near=None: given.append(
        (mask, present, real(mask, p, present, near))) or given[-1][2])
    call('bravo', tmp_path / 'run', '--rflow', '--p-uncond', 0.3, '--iters', 100)
    mask, present, shown = (torch.cat(v) for v in zip(*[g for g in given if g[1] is not None]))
    assert len(mask) == 400 and abs(0.7 - present.float().mean()) < 0.07                           # three standard deviations
    assert not shown[~present].any() and torch.equal(shown[present][:, :1], mask[present]) and bool((shown[present][:, 1] == 1).all())


def test_what_is_not_asked_is_left_open(told):
    """--count 3 --size 8: three lesions, one of 8 mm, sizes and places of the others unknown; three places and one size too."""
    run = common.load_run(told / 'seg')
    asked = lambda *f: sample.read_requests(sample.get_args(['--seg', str(told / 'seg'), *map(str, f)]), run)[0]
    one, side = asked('--count', 3, '--size', 8), run.args.size * sum(run.spacing) / 2
    assert one.shape == (3, 3) and one[0, 0] == 8 / side and np.isnan(one).sum() == 8
    placed = asked('--count', 3, '--size', 8, '--location', '0.6,0.4', '0.1,0.2', '0.5,0.5')
    assert np.allclose(placed[:, 1:], [[0.6, 0.4], [0.1, 0.2], [0.5, 0.5]]) and np.isnan(placed[1:, 0]).all()
    tokens, known = lesion_tokens([one]).shape, lesion_tokens([placed])
    assert tokens == known.shape and not torch.equal(lesion_tokens([one]), known)


def test_sampling_what_was_asked_for(told, call, tmp_path):
    """Requests reach the network: other requests, other masks; the same ones by flags and by file, the same masks."""
    request = tmp_path / 'requests.csv'
    request.write_text('count,size,x,y\n2,8;5,0.6;0.3,0.4;0.5\n0,,,\n')
    draw = lambda name, *flags: call('sample', tmp_path / name, '--seg', told / 'seg', '--weights', 'raw', '--seg-steps', 2, '--n', 4, *flags)
    masks = lambda out: np.stack([common.read_nifti(f / 'seg.nii.gz')[0] for f in sorted(out.glob('syn_*'))])
    by_file = masks(draw('file', '--requests', request))
    by_flag = masks(draw('flag', '--count', 2, '--size', '8,5', '--location', '0.6,0.4', '0.3,0.5'))
    draw('flag', '--count', 2, '--size', '8,5', '--location', '0.6,0.4', '0.3,0.5')                      # the same command goes on
    assert (by_file[::2] == by_flag[::2]).all() and (by_file[1::2] != by_flag[1::2]).any()
    assert (masks(draw('free')) != by_flag).any() and (masks(draw('cfg', '--count', 2, '--seg-cfg', 4)) != masks(draw('no', '--count', 2))).any()
    rows = list(csv.DictReader(open(tmp_path / 'file' / 'manifest.csv')))
    assert [r['condition'].split(' request ')[1] for r in rows] == ['0: 2 lesions', '1: 0 lesions'] * 2
    assert json.loads((tmp_path / 'file' / 'sample.json').read_text())['pixels'] == 16


def test_guided_images(told, call, phantom, tmp_path):
    images = lambda out: np.stack([common.read_nifti(f / 'bravo.nii.gz')[0] for f in sorted(out.glob('syn_*'))])
    draw = lambda name, *flags: images(call('sample', tmp_path / name, '--bravo', told / 'bravo', '--data', phantom, '--steps', 3, '--n', 3, *flags))
    plain = draw('plain')
    assert (draw('one', '--cfg', 1) == plain).all() and (draw('three', '--cfg', 3) != plain).any()
    assert (draw('never', '--cfg', 3, '--cfg-interval', 0.9, 0.95) == plain).all()
    assert (draw('rescaled', '--cfg', 3, '--cfg-rescale', 0.7) != draw('again', '--cfg', 3)).any()


REFUSED = [
    ('--seg {trained}/seg --count 3', '--count seg --controllable'),
    ('--seg {told}/seg --count 11', "--count '11' at most 10"),
    ('--seg {told}/seg --size 8', '--size --count None'),
    ('--seg {told}/seg --count 1 --size 8,5', '--size --count 1'),
    ('--seg {told}/seg --count 2 --location 0.5', '--location x,y'),
    ('--seg {told}/seg --count 2 --location 0.5,1.5', "'1.5' at most 1"),
    ('--seg {told}/seg --requests none.csv', '--requests none.csv count,size,x,y'),
    ('--seg {told}/seg --requests {files}/columns.csv', 'columns.csv count,size,x,y'),
    ('--seg {told}/seg --requests {files}/many.csv', 'many.csv line 3 sizes'),
    ('--seg {told}/seg --requests {files}/outside.csv', 'outside.csv line 2'),
    ('--seg {told}/seg --count 2 --requests {files}/many.csv', '--requests --count one'),
    ('--bravo {told}/bravo --data {phantom} --count 3', '--count --seg'),
    ('--bravo {trained}/bravo --data {phantom} --cfg 2', '--cfg bravo --p-uncond'),
    ('--seg {told}/seg --cfg 2', '--cfg 2 --bravo'),
    ('--bravo {told}/bravo --data {phantom} --cfg -1', "--cfg '-1' at least 0"),
    ('--bravo {told}/bravo --data {phantom} --cfg-rescale 0.5', '--cfg-rescale --cfg'),
    ('--bravo {told}/bravo --data {phantom} --cfg 2 --cfg-interval 0.5 0.5', '--cfg-interval 0.5 rising'),
]


@pytest.mark.parametrize('flags, words', REFUSED, ids=[f for f, _ in REFUSED])
def test_refused(call, told, trained, phantom, tmp_path, capsys, flags, words):
    (tmp_path / 'columns.csv').write_text('number,size\n1,2\n')
    (tmp_path / 'many.csv').write_text('count,size,x,y\n1,8,0.5,0.5\n1,8;5,,\n')
    (tmp_path / 'outside.csv').write_text('count,size,x,y\n1,8,0.5,1.5\n')
    with pytest.raises(SystemExit) as e:
        call('sample', tmp_path / 'out', *flags.format(told=told, trained=trained, phantom=phantom, files=tmp_path).split())
    line = [l for l in capsys.readouterr().err.splitlines() if l]
    assert e.value.code == 2 and len(line) == 1 and all(w in line[0] for w in words.split()), line


def test_dropping_nothing_is_refused(call, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        call('seg', tmp_path / 'seg', '--rflow', '--p-uncond', 0.1)
    assert e.value.code == 2 and '--controllable' in capsys.readouterr().err
