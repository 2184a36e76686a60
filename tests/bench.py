"""Our U-Net beside MONAI's DiffusionModelUNet, our Autoencoder beside its AutoencoderKL: same weights, inputs, precision and optimiser.

    python tests/bench.py                                    (in an environment with tests/parity/requirements.txt; ten minutes)
    python tests/bench.py --shapes small --precisions fp32 --rounds 20

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

from common import PRESETS, Autoencoder, UNet, autocast, has_bf16, keep_memory, load_maisi_vae, load_monai

NETS = {'full': PRESETS['full'], 'small': PRESETS['small'], 'autoencoder': dict(channels=(64, 128, 256), layers=1, norm_groups=32)}   # as --vae 4
SHAPES = {'128': ('full', 128, 2), '64': ('full', 64, 4), 'small': ('small', 64, 16), 'vae': ('autoencoder', 64, 4)}
CUDA_SHAPES = {'128': ('full', 128, 16), '64': ('full', 64, 64), 'small': ('small', 64, 256), 'vae': ('autoencoder', 128, 16)}


def build(arm, net, device, dtype):
    """The arm's network with the weights of seed 0, as train_bravo.py would run it (ours) or as MONAI's users do."""
    p = NETS[net]
    torch.manual_seed(0)
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
    model, g = build(arm, net, device, dtype), torch.Generator().manual_seed(1)
    x, eps, t = torch.randn(batch, 2, size, size, generator=g), torch.randn(batch, 1, size, size, generator=g), torch.rand(batch, generator=g)
    x, eps, t = x.to(device), eps.to(device), t.to(device) * (1000 if arm.startswith('monai') else 1)
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


def main(args):
    if args.serve:
        return serve(*json.loads(args.serve))
    cuda = args.device == 'cuda'
    shapes = CUDA_SHAPES if cuda else SHAPES
    arms = ['monai', 'ours', *(['monai compiled', 'ours compiled'] if cuda else ['monai, memory kept'])]
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads'
          + (f', {torch.cuda.get_device_name()}' if cuda else ', bf16 in hardware' if has_bf16('cpu') else ', bf16 emulated'))
    print('| shape | precision | arm | train step, ms | forward, ms | peak memory, MB | of matmul peak | train: MONAI / this | forward: MONAI / this |')
    print('|---|---|---|---|---|---|---|---|---|')
    for shape in args.shapes:
        net, size, batch = shapes[shape]
        flops = flops_of_step(net, size, batch)
        for dtype in args.precisions:
            peak = matmul_peak(args.device, dtype)
            workers = {arm: subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--serve', json.dumps([arm, net, size, batch, args.device, dtype])],
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for arm in arms}

            def ask(arm, what):
                print(what, file=workers[arm].stdin, flush=True)
                return float(workers[arm].stdout.readline())

            times = {(arm, kind): [] for arm in arms for kind in ('train', 'forward')}
            for i in range(args.rounds + 2):
                for kind in ('train', 'forward'):
                    for arm in arms if i % 2 else arms[::-1]:                     # neither is always first
                        seconds = ask(arm, kind)
                        if i >= 2:
                            times[arm, kind].append(seconds)
            for arm in arms:
                train, forward = times[arm, 'train'], times[arm, 'forward']
                row = [f'{net} {size}² x {batch}', dtype, arm, f'{1e3 * statistics.median(train):.0f}', f'{1e3 * statistics.median(forward):.0f}',
                       f'{ask(arm, "memory"):.0f}', f'{flops / statistics.median(train) / peak:.0%}']
                for kind in ('train', 'forward'):
                    r = [a / b for a, b in zip(times['monai', kind], times[arm, kind])]
                    row.append(f'{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})')
                print('| ' + ' | '.join(row) + ' |', flush=True)
            for worker in workers.values():
                worker.kill(), worker.wait()


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--shapes', nargs='+', choices=tuple(SHAPES), default=list(SHAPES))
    p.add_argument('--precisions', nargs='+', choices=('bf16', 'fp32'), default=['bf16', 'fp32'])
    p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    main(p.parse_args())
