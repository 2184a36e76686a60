"""What only a GPU can show. Skipped where there is none; on a CUDA machine: python -m pytest -q tests/test_cuda.py"""
import pytest
import torch

import common
import sample
import train_bravo
from common import RFlow, UNet, attention, make_denoise, sample_euler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = UNet(2, 1, (32, 64), (0, 1), head_channels=32, norm_groups=8)
    for p in net.parameters():
        p.data = torch.randn_like(p) * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else torch.rand_like(p)
    return net


@pytest.mark.parametrize('dtype, limit', [('fp32', 5e-3), ('bf16', 5e-2)])                  # fp32: TF32 products
def test_same_network_as_on_the_cpu(net, dtype, limit):
    """Output and gradients of the CPU in fp32, within the precision asked for."""
    x, g, t = torch.randn(4, 2, 32, 32), torch.randn(4, 1, 32, 32), torch.linspace(0.1, 1, 4)
    seen = []
    for device, precision in (('cpu', 'fp32'), ('cuda', dtype)):
        net = net.to(device, memory_format=torch.channels_last)
        net.zero_grad()
        with common.autocast(device, precision):
            out = net(x.to(device), t.to(device)).float()
        (out * g.to(device)).sum().backward()
        seen.append([out.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()])])
    for a, b in zip(*seen):
        assert (a - b).norm() < limit * a.norm()


def test_attention_is_the_fused_kernel():
    q, k, v = (torch.randn(2, 4, 100, 32) for _ in range(3))
    torch.testing.assert_close(attention(q.cuda(), k.cuda(), v.cuda()).cpu(), attention(q, k, v), rtol=1e-3, atol=1e-3)


def test_images_from_the_same_noise_agree(net):
    """Ten Euler steps on the CPU and on the GPU."""
    x, mask, process = torch.randn(2, 1, 32, 32), torch.zeros(2, 1, 32, 32), RFlow()
    ends = []
    for device in ('cpu', 'cuda'):
        net = net.to(device)
        with torch.no_grad():
            ends.append(sample_euler(make_denoise(net, process, mask.to(device)), x.to(device), process.times(10), process).cpu())
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


@pytest.mark.parametrize('strided', [False, True])
def test_sparse_kernels_give_the_masked_product(strided, capsys):
    """Linears of --sparse24 through the card's 2:4 kernels against the same weights as dense ones, also on tokens that are strided as
    a U-Net's are; shapes that do not fit stay dense."""
    net = common.sparsify(torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 40))).cuda()
    x = torch.randn(2, 128, 64).cuda().transpose(1, 2) if strided else torch.randn(64, 128).cuda()
    with torch.no_grad(), common.autocast(torch.device('cuda'), 'bf16'):
        dense = net(x)
        sample.bake_sparse(net, 'cuda', 'bf16', always=True)
        assert (net(x) - dense).norm() < 0.01 * dense.norm()
    assert '1 of 2 sparse layers' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [['--dtype', 'bf16'], ['--dtype', 'fp32'], ['--compile']], ids=' '.join)
def test_train_resume_sample(phantom, tmp_path, flags):
    """4 steps = 2 + resume + 2 up to the GPU's own scatter, a finite loss, and a set from the result."""
    flags = ['--preset', 'tiny', '--rflow', '--data', str(phantom), '--cache', str(tmp_path / 'c'), '--device', 'cuda', '--save-every', '2', *flags]
    weights = []
    for name in ('whole', 'parts'):
        out = str(tmp_path / name)
        args = train_bravo.get_args([*flags, '--iters', '4', '--keep-every', '2', '--out', out])
        train_bravo.main(args)
        if name == 'parts':
            (tmp_path / name / 'ckpt_2.pt').replace(tmp_path / name / 'ckpt.pt')
            train_bravo.main(train_bravo.get_args([*flags, '--iters', '4', '--keep-every', '2', '--out', out]))
        weights.append(torch.cat([v.flatten() for v in common.load_checkpoint(out)['net'].values()]))
    assert weights[0].isfinite().all() and (weights[0] - weights[1]).abs().max() < 1e-2
    sample.main(sample.get_args(['--data', str(phantom), '--cache', str(tmp_path / 'c'), '--bravo', out, '--n', '4', '--steps', '3', '--device', 'cuda',
                                 '--out', str(tmp_path / 'set')]))
    assert len(list((tmp_path / 'set').glob('syn_*'))) == 4


@pytest.mark.parametrize('flags', [['--prune-by', 'magnitude'], ['--prune-by', 'taylor'], ['--prune-how', 'weights']], ids=' '.join)
def test_pruned_run_goes_on(phantom, tmp_path, flags):
    """A run loses a quarter of its channels, or a third of its weights, on the card, and trains on with what is left."""
    every = ['--preset', 'tiny', '--rflow', '--data', str(phantom), '--cache', str(tmp_path / 'c'), '--device', 'cuda', '--iters', '2']
    train_bravo.main(train_bravo.get_args([*every, '--out', str(tmp_path / 'dense')]))
    train_bravo.main(train_bravo.get_args([*every, '--out', str(tmp_path / 'cut'), '--init', str(tmp_path / 'dense'), '--prune', '0.3', *flags]))
    assert common.load_run(tmp_path / 'cut').net


def test_no_host_sync_in_a_step(net):
    """A forward, loss and backward wait for the GPU nowhere."""
    net, process = net.cuda(), RFlow(100)
    x, eps, mask, t = torch.randn(2, 1, 32, 32).cuda(), torch.randn(2, 1, 32, 32).cuda(), torch.zeros(2, 1, 32, 32).cuda(), torch.rand(2).cuda()
    process.loss(net, x, eps, t, mask)[0].mean().backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        process.loss(net, x, eps, t, mask)[0].mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
