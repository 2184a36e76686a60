"""Our U-Net beside MONAI's DiffusionModelUNet, our Autoencoder beside its AutoencoderKL: same weights, inputs, precision and optimiser.

    python tests/bench.py                                    (in an environment with tests/parity/requirements.txt; ten minutes)
    python tests/bench.py --shapes small --precisions fp32 --rounds 20
    python tests/bench.py --tokens --precisions fp32         (instead: DiT beside diffusers', and what twice the tokens cost)

Prints the seconds of a training step and of a forward, the ratio MONAI / ours (median of the rounds, lowest and highest), the
peak memory, and the share of the measured matmul peak that a training step reaches (MONAI's multiplications, for both). Each
arm lives in a process of its own, ours set up as our scripts are (common.keep_memory), MONAI's as its users run it. They take
turns step by step, so that a busy machine slows both. "monai, memory kept" shows what the allocator alone is worth.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

from common import PRESETS, SIZES, Attention, Autoencoder, Mamba, Tokens, UNet, autocast, has_bf16, keep_memory, load_maisi_vae, load_monai

NETS = {'full': PRESETS['full'], 'small': PRESETS['small'], 'autoencoder': dict(channels=(64, 128, 256), layers=1, norm_groups=32)}   # as --vae 4
SHAPES = {'128': ('full', 128, 2), '64': ('full', 64, 4), 'small': ('small', 64, 16), 'vae': ('autoencoder', 64, 4)}
CUDA_SHAPES = {'128': ('full', 128, 16), '64': ('full', 64, 64), 'small': ('small', 64, 256), 'vae': ('autoencoder', 128, 16)}
TOKENS = {'DiT-S/4': dict(SIZES['S'], patch=4), 'one block of Mamba, patch 2': dict(SIZES['S'], patch=2, depth=1, mixer='mamba')}


class Diffusers(torch.nn.Module):
    """diffusers' DiT behind our call. It always embeds a class."""

    def __init__(self, size, width, depth, heads, patch):
        super().__init__()
        from diffusers import DiTTransformer2DModel
        self.net = DiTTransformer2DModel(heads, width // heads, 2, 1, depth, sample_size=size, patch_size=patch)

    def forward(self, x, t):
        return self.net(x, t, torch.zeros_like(t, dtype=torch.long)).sample


def build(arm, net, size, device):
    """The arm's network with the weights of seed 0, as train_bravo.py would run it (ours) or as the peer's users do."""
    torch.manual_seed(0)
    if net in TOKENS:                                        # equal functions for equal weights: tests/parity/test_dit.py
        return (Tokens(2, 1, **TOKENS[net]) if arm == 'ours' else Diffusers(size, **TOKENS[net])).to(device)
    p = NETS[net]
    if net == 'autoencoder':
        theirs = AutoencoderKL(2, 1, 1, p['layers'], p['channels'], (False,) * 3, 4, p['norm_groups'], with_encoder_nonlocal_attn=False,
                               with_decoder_nonlocal_attn=False)
        ours = Autoencoder(1, 4, p['channels'], p['layers'], norm_groups=p['norm_groups'])
        ours.load_state_dict(load_maisi_vae(theirs.state_dict()))
        model = theirs.to(device) if arm.startswith('monai') else ours.to(device, memory_format=torch.channels_last)
        return torch.compile(model) if 'compiled' in arm else model
    theirs = DiffusionModelUNet(2, 2, 1, p['layers'], p['channels'], [bool(a) for a in p['attention']], p['norm_groups'],
                                num_head_channels=[min(p['head_channels'], c) for c in p['channels']])
    if arm.startswith('monai'):
        model = theirs.to(device)
    else:
        model = UNet(2, 1, p['channels'], p['attention'], p['layers'], p['head_channels'], norm_groups=p['norm_groups'])
        model.load_state_dict(load_monai(theirs.state_dict()))
        model = model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if 'compiled' in arm else model


def make_steps(arm, net, size, batch, device, dtype):
    """train() and forward() of one arm."""
    model, g = build(arm, net, size, device), torch.Generator().manual_seed(1)
    x, eps, t = torch.randn(batch, 2, size, size, generator=g), torch.randn(batch, 1, size, size, generator=g), torch.rand(batch, generator=g)
    x, eps, t = x.to(device), eps.to(device), t.to(device) * (1 if arm.startswith('ours') else 1000)
    run = model
    if net == 'autoencoder':                                                   # the image again, from a drawn latent
        draw = () if arm.startswith('monai') else (torch.randn(batch, 4, size // 4, size // 4, device=device),)
        x, eps, run = x[:, :1], x[:, :1], lambda x, t: model(x, *draw)[0]
    opt = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def train():
        with autocast(device, dtype):
            out = run(x, t)
        F.mse_loss(out.float(), eps).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward():
        with autocast(device, dtype):
            run(x, t)

    return train, forward


def timed(f, device):
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(device, dtype):
    """FLOP/s of the best of a few square matrix products in that precision."""
    n = 8192 if device == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if dtype == 'bf16' else torch.float32)
    return 2 * n ** 3 / min(timed(lambda: a @ a, device) for _ in range(6))


def flops_of_step(net, size, batch):
    """Multiply-adds x 2 of MONAI's forward and backward, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        make_steps('monai', net, size, batch, 'cpu', 'fp32')[0]()
    return counter.get_total_flops()


def serve(arm, net, size, batch, device, dtype):
    """The process of an arm: answers 'train' and 'forward' with seconds, 'memory' with the MB its steps took at their peak."""
    if arm.startswith('ours') or 'kept' in arm:
        keep_memory()
    steps = dict(zip(('train', 'forward'), make_steps(arm, net, size, batch, device, dtype)))
    high_water = lambda: float(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    before = high_water()
    for line in sys.stdin:
        memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device == 'cuda' else high_water() - before
        print(timed(steps[line.strip()], device) if line.strip() in steps else memory, flush=True)


def race(arms, net, size, batch, device, dtype, rounds):
    """Seconds {(arm, kind): [...]} of the arms, which take turns in processes of their own, and the MB each took."""
    workers = {arm: subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--serve', json.dumps([arm, net, size, batch, device, dtype])],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for arm in arms}

    def ask(arm, what):
        print(what, file=workers[arm].stdin, flush=True)
        return float(workers[arm].stdout.readline())

    times = {(arm, kind): [] for arm in arms for kind in ('train', 'forward')}
    for i in range(rounds + 2):
        for kind in ('train', 'forward'):
            for arm in arms if i % 2 else arms[::-1]:                             # neither is always first
                seconds = ask(arm, kind)
                if i >= 2:
                    times[arm, kind].append(seconds)
    memory = {arm: ask(arm, 'memory') for arm in arms}
    for worker in workers.values():
        worker.kill(), worker.wait()
    return times, memory


def ratio(a, b):
    r = [x / y for x, y in zip(a, b)]
    return f'{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})'


def tokens(args, dtype):
    """DiT beside diffusers'; forward and backward of one mixer with twice the tokens; one Mamba block where attention is too large."""
    keep_memory()
    ms = lambda v: f'{1e3 * statistics.median(v):.0f} ms'
    times, memory = race(['diffusers', 'ours'], 'DiT-S/4', 64, 2, args.device, dtype, args.rounds)
    for kind in ('train', 'forward'):
        a, b = times['diffusers', kind], times['ours', kind]
        print(f'DiT-S/4, 64² x 2, {dtype}, {kind}: diffusers {ms(a)}, ours {ms(b)}, diffusers / ours {ratio(a, b)}', flush=True)
    print(f'DiT-S/4 peak memory, MB: diffusers {memory["diffusers"]:.0f}, ours {memory["ours"]:.0f}')
    mixers = {'attention': Attention(384, 64).to(args.device), 'Mamba': Mamba(384, 6, 2).to(args.device)}
    seconds = {(name, side): [] for name in mixers for side in (32, 45, 64)}      # 1024, 2025, 4096 tokens

    def both(name, x, side):
        with autocast(args.device, dtype):
            out = mixers[name](x, *([(side, side)] if name == 'Mamba' else []))
        out.float().square().mean().backward()

    for i in range(args.rounds + 1):
        for name, side in seconds:
            x = torch.randn(1, side * side, 384, device=args.device)
            took = timed(lambda: both(name, x, side), args.device)
            if i:
                seconds[name, side].append(took)
    for name in mixers:
        told = ', '.join(f'{side * side} tokens {ms(seconds[name, side])}' for side in (32, 45, 64))
        print(f'one {name} layer of width 384, forward and backward: {told}; x 4 tokens costs x {ratio(seconds[name, 64], seconds[name, 32])}', flush=True)
    net = 'one block of Mamba, patch 2'
    times, memory = race(['ours'], net, 256, 1, args.device, dtype, 1)
    print(f'{net}, 256² x 1 = 16,384 tokens: a training step {ms(times["ours", "train"])}, peak {memory["ours"]:.0f} MB; the scores of one attention '
          f'layer, which its backward keeps on a CPU, would be {6 * 16384 ** 2 * (2 if dtype == "bf16" else 4) / 2 ** 20:.0f} MB')


def main(args):
    if args.serve:
        return serve(*json.loads(args.serve))
    cuda = args.device == 'cuda'
    shapes = CUDA_SHAPES if cuda else SHAPES
    arms = ['monai', 'ours', *(['monai compiled', 'ours compiled'] if cuda else ['monai, memory kept'])]
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads'
          + (f', {torch.cuda.get_device_name()}' if cuda else ', bf16 in hardware' if has_bf16('cpu') else ', bf16 emulated'))
    if args.tokens:
        return [tokens(args, dtype) for dtype in args.precisions]
    print('| shape | precision | arm | train step, ms | forward, ms | peak memory, MB | of matmul peak | train: MONAI / this | forward: MONAI / this |')
    print('|---|---|---|---|---|---|---|---|---|')
    for shape in args.shapes:
        net, size, batch = shapes[shape]
        flops = flops_of_step(net, size, batch)
        for dtype in args.precisions:
            peak = matmul_peak(args.device, dtype)
            times, memory = race(arms, net, size, batch, args.device, dtype, args.rounds)
            for arm in arms:
                train, forward = times[arm, 'train'], times[arm, 'forward']
                row = [f'{net} {size}² x {batch}', dtype, arm, f'{1e3 * statistics.median(train):.0f}', f'{1e3 * statistics.median(forward):.0f}',
                       f'{memory[arm]:.0f}', f'{flops / statistics.median(train) / peak:.0%}',
                       *(ratio(times['monai', kind], times[arm, kind]) for kind in ('train', 'forward'))]
                print('| ' + ' | '.join(row) + ' |', flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--shapes', nargs='+', choices=tuple(SHAPES), default=list(SHAPES))
    p.add_argument('--precisions', nargs='+', choices=('bf16', 'fp32'), default=['bf16', 'fp32'])
    p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--tokens', action='store_true', help='networks of tokens instead of the U-Net')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    main(p.parse_args())
