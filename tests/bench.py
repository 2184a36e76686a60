"""Our networks beside their peers, same weights, inputs, precision and optimiser: the U-Net and MONAI's DiffusionModelUNet, the
Autoencoder and its AutoencoderKL, DiT and diffusers'.

    python tests/bench.py                                    (in an environment with tests/parity/requirements.txt; ten minutes)
    python tests/bench.py --shapes small --precisions fp32 --rounds 20
    python tests/bench.py --tokens --precisions fp32         (instead: what twice the tokens cost, attention beside Mamba; what fits)
    python tests/bench.py --lean                             (instead: pure bf16 beside autocast, pruned beside whole; on a GPU 2:4 beside dense too)

Prints the seconds of a training step and of a forward, the ratio peer / ours (median of the rounds, lowest and highest), the
peak memory, and the share of the measured matmul peak that a training step reaches (the peer's multiplications, for both). Each
arm lives in a process of its own, ours set up as our scripts are (common.keep_memory), the peer's as its users run it; on a GPU
both let cuDNN choose by trying. They take turns step by step, so that a busy machine slows both. "peer, memory kept" shows what
the CPU's allocator alone is worth.
"""
import argparse
import contextlib
import copy
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import (PRESETS, SIZES, Attention, Autoencoder, Mamba, Tokens, UNet, autocast, build_optimizer, has_bf16, keep_memory, load_maisi_vae,
                    load_monai, prune_channels, sparsify)
from sample import bake_sparse

NETS = {'full': PRESETS['full'], 'small': PRESETS['small'], 'autoencoder': dict(channels=(64, 128, 256), layers=1, norm_groups=32)}   # as --vae 4
TOKENS = {'DiT-S/4': dict(SIZES['S'], patch=4), 'DiT-B/4': dict(SIZES['B'], patch=4), 'one block of Mamba, patch 2': dict(SIZES['S'], patch=2, depth=1, mixer='mamba'),
          'one block of attention, patch 2': dict(SIZES['S'], patch=2, depth=1)}
SHAPES = {'128': ('full', 128, 2), '64': ('full', 64, 4), 'small': ('small', 64, 16), 'vae': ('autoencoder', 64, 4), 'dit': ('DiT-S/4', 64, 2)}
CUDA_SHAPES = {'128': ('full', 128, 16), '64': ('full', 64, 64), 'small': ('small', 64, 256), 'vae': ('autoencoder', 128, 16), '256': ('full', 256, 4),
               'dit': ('DiT-B/4', 128, 16), 'dit256': ('DiT-B/4', 256, 4)}


class Diffusers(torch.nn.Module):
    """diffusers' DiT behind our call. It always embeds a class. Equal functions for equal weights: tests/parity/test_dit.py"""

    def __init__(self, size, width, depth, heads, patch):
        super().__init__()
        self.net = DiTTransformer2DModel(heads, width // heads, 2, 1, depth, sample_size=size, patch_size=patch)

    def forward(self, x, t):
        return self.net(x, t, torch.zeros_like(t, dtype=torch.long)).sample


def build(arm, net, size, device):
    """The arm's network with the weights of seed 0, as train_bravo.py would run it (ours) or as the peer's users do."""
    torch.manual_seed(0)
    peer = arm.startswith('peer')
    if net in TOKENS:
        model = (Diffusers(size, **TOKENS[net]) if peer else Tokens(2, 1, **TOKENS[net])).to(device)
    elif net == 'autoencoder':
        p = NETS[net]
        model = AutoencoderKL(2, 1, 1, p['layers'], p['channels'], (False,) * 3, 4, p['norm_groups'], with_encoder_nonlocal_attn=False,
                              with_decoder_nonlocal_attn=False)
        if not peer:
            state, model = model.state_dict(), Autoencoder(1, 4, p['channels'], p['layers'], norm_groups=p['norm_groups'])
            model.load_state_dict(load_maisi_vae(state))
    else:
        p = NETS[net]
        model = DiffusionModelUNet(2, 2, 1, p['layers'], p['channels'], [bool(a) for a in p['attention']], p['norm_groups'],
                                   num_head_channels=[min(p['head_channels'], c) for c in p['channels']])
        if not peer:
            state, model = model.state_dict(), UNet(2, 1, p['channels'], p['attention'], p['layers'], p['head_channels'], norm_groups=p['norm_groups'])
            model.load_state_dict(load_monai(state))
    if 'pruned' in arm:
        prune_channels(model, torch.Tensor.abs, float(arm.split()[-1]))
    model = model.to(device) if peer or net in TOKENS else model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if 'compiled' in arm else model


def make_steps(arm, net, size, batch, device, dtype):
    """train() and forward() of one arm."""
    model, g, pure = build(arm, net, size, device), torch.Generator().manual_seed(1), 'pure' in arm
    x, eps, t = torch.randn(batch, 2, size, size, generator=g), torch.randn(batch, 1, size, size, generator=g), torch.rand(batch, generator=g)
    x, eps, t = x.to(device), eps.to(device), t.to(device) * (1000 if arm.startswith('peer') else 1)
    run = model
    if pure:
        model.bfloat16()
    if net == 'autoencoder':                                                   # the image again, from a drawn latent
        draw = () if arm.startswith('peer') else (torch.randn(batch, 4, size // 4, size // 4, device=device),)
        x, eps, run = x[:, :1], x[:, :1], lambda x, t: model(x, *draw)[0]
    kernel = (lambda: sdpa_kernel(SDPBackend.MATH)) if 'scores kept' in arm else contextlib.nullcontext
    opt = build_optimizer(model, argparse.Namespace(dtype='pure-bf16' if pure else dtype, lr=1e-5, weight_decay=0.01, seed=0, kahan=False, sparse24=False, prune=0))

    def train():
        with autocast(device, dtype), kernel():
            out = run(x, t)
        F.mse_loss(out.float(), eps).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward():
        with autocast(device, dtype), kernel():
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
    """Multiply-adds x 2 of the peer's forward and backward, counted by torch on one image."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):               # the CPU's fused attention is not counted
        make_steps('peer', net, size, 1, 'cpu', 'fp32')[0]()
    return batch * counter.get_total_flops()


def limit_memory(room, device):
    """From here on this process can take room MB more than it has; what asks for more fails."""
    if device == 'cuda':
        torch.cuda.set_per_process_memory_fraction(room * 2 ** 20 / torch.cuda.get_device_properties(0).total_memory)
    else:
        taken = 1024 * int(re.search(r'VmData:\s+(\d+)', Path('/proc/self/status').read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (int(taken + room * 2 ** 20), resource.RLIM_INFINITY))


def serve(arm, net, size, batch, device, dtype, room):
    """The process of an arm: answers 'train' and 'forward' with seconds, nan where they need more than room MB (None: no limit), 'memory' with
    the MB its steps took at their peak."""
    if arm.startswith('ours') or 'kept' in arm:
        keep_memory()
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = device == 'cuda'
    answers, sys.stdout = sys.stdout, sys.stderr                             # what the code under test prints is no answer
    steps = dict(zip(('train', 'forward'), make_steps(arm, net, size, batch, device, dtype)))
    high_water = lambda: float(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    before = high_water()
    if room:
        limit_memory(room, device)

    def seconds(step):
        try:
            return timed(step, device)
        except RuntimeError as e:
            if 'memory' not in str(e):
                raise
            return math.nan

    for line in sys.stdin:
        memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device == 'cuda' else high_water() - before
        print(seconds(steps[line.strip()]) if line.strip() in steps else memory, file=answers, flush=True)


def race(arms, net, size, batch, device, dtype, rounds, room=None):
    """Seconds {(arm, kind): [...]} of the arms, which take turns in processes of their own with room MB each, and the MB each took."""
    workers = {arm: subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--serve', json.dumps([arm, net, size, batch, device, dtype, room])],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for arm in arms}

    def ask(what, arms):
        for arm in arms:
            print(what, file=workers[arm].stdin, flush=True)
        return [float(workers[arm].stdout.readline()) for arm in arms]

    for kind in ('train', 'forward') * 2:                                         # to warm up, all at once: compiling takes minutes
        ask(kind, arms)
    times = {(arm, kind): [] for arm in arms for kind in ('train', 'forward')}
    for i in range(rounds):
        for kind in ('train', 'forward'):
            for arm in arms if i % 2 else arms[::-1]:                             # neither is always first
                times[arm, kind] += ask(kind, [arm])
    memory = dict(zip(arms, ask('memory', arms)))
    for worker in workers.values():
        worker.kill(), worker.wait()
    return times, memory


def ratio(a, b):
    r = [x / y for x, y in zip(a, b)]
    return f'{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})'


def table(arms, shape, args):
    """Prints the rows of one shape, in every precision asked for."""
    net, size, batch = shape
    flops = flops_of_step(net, size, batch)
    for dtype in args.precisions:
        peak = matmul_peak(args.device, dtype)
        times, memory = race(arms, net, size, batch, args.device, dtype, args.rounds)
        for arm in arms:
            train, forward = times[arm, 'train'], times[arm, 'forward']
            row = [f'{net} {size}² x {batch}', dtype, arm, f'{1e3 * statistics.median(train):.4g}', f'{batch / statistics.median(train):.4g}',
                   f'{1e3 * statistics.median(forward):.4g}', f'{memory[arm]:.0f}', '' if 'pruned' in arm else f'{flops / statistics.median(train) / peak:.0%}',
                   *(ratio(times[arms[0], kind], times[arm, kind]) for kind in ('train', 'forward'))]
            print('| ' + ' | '.join(row) + ' |', flush=True)


def sparse(device, times=30):
    """2:4 beside dense in bf16: DiT-B's linears at 16,384 tokens, then whole forwards, as sample.py bakes them."""

    def seconds(f):
        for _ in range(5):
            f()
        return statistics.median(timed(lambda: [f() for _ in range(times)], device) / times for _ in range(5))

    print('| 2:4 on sparse kernels | dense, us | sparse, us | dense / sparse | largest error / largest value |\n|---|---|---|---|---|')
    for name, (m, n) in {'qkv': (768, 2304), 'attention out': (768, 768), 'mlp 1': (768, 3072), 'mlp 2': (3072, 768)}.items():
        torch.manual_seed(0)
        net = sparsify(torch.nn.Sequential(torch.nn.Linear(m, n))).to(device)
        x, dense = torch.randn(16384, m, device=device, dtype=torch.bfloat16), torch.nn.Linear(m, n).to(device, torch.bfloat16)
        dense.load_state_dict({'weight': net[0].weight.detach(), 'bias': net[0].bias.detach()})
        with torch.no_grad(), autocast(device, 'bf16'):
            bake_sparse(net, device, 'bf16', always=True)
            a, b = seconds(lambda: dense(x)), seconds(lambda: net(x))
            error = ((net(x) - dense(x)).abs().max() / dense(x).abs().max()).item()
        print(f'| DiT-B {name}, 16384 x {m} x {n} | {1e6 * a:.0f} | {1e6 * b:.0f} | {a / b:.2f} | {error:.1e} |', flush=True)
    for name, size, batch in (('DiT-B/4', 128, 16), ('full', 128, 16)):
        dense, x, t = build('ours', name, size, device), torch.randn(batch, 2, size, size, device=device), torch.rand(batch, device=device)
        for p in dense.parameters():                                         # a network that starts at zero has no error to show
            p.data = p.data if p.any() else torch.randn_like(p) * 0.02
        net = sparsify(copy.deepcopy(dense))
        masked = {n: m.weight.detach() for n, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        for n, weight in masked.items():
            dense.get_submodule(n).weight.data.copy_(weight)
        with torch.no_grad(), autocast(device, 'bf16'):
            bake_sparse(net, device, 'bf16', always=True)
            a, b, x_, y_ = seconds(lambda: dense(x, t)), seconds(lambda: net(x, t)), net(x, t), dense(x, t)
        print(f'| {name} {size}² x {batch}, forward | {1e6 * a:.0f} | {1e6 * b:.0f} | {a / b:.2f} | {((x_ - y_).abs().max() / y_.abs().max()).item():.1e} |', flush=True)


def lean(args):
    """Training steps in pure bf16 beside autocast; a quarter and half of the channels gone; 2:4 where there are kernels."""
    cuda = args.device == 'cuda'
    arms = ['ours', 'ours, pure bf16', *(['ours compiled', 'ours compiled, pure bf16'] if cuda else [])]
    print(HEADER.replace('peer', 'the first'))
    for shape in (('full', 128, 16), ('DiT-B/4', 128, 16)) if cuda else (('small', 64, 16),):
        table(arms, shape, argparse.Namespace(**{**vars(args), 'precisions': ['bf16']}))
    for shape in (('full', 128, 16),) if cuda else (('small', 64, 16), ('full', 128, 2)):
        table(['ours', 'ours, pruned 0.25', 'ours, pruned 0.5'], shape, args)
        if cuda:
            table(['ours compiled', 'ours compiled, pruned 0.25', 'ours compiled, pruned 0.5'], shape, args)
    if cuda:
        sparse(args.device)


def tokens(args, dtype):
    """Forward and backward of one mixer with twice the tokens; what a block of either takes at 64² and 256²."""
    keep_memory()
    ms = lambda v: f'{1e3 * statistics.median(v):.0f} ms'
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
        print(f'one {name} layer of width 384, forward and backward: {told}; x 2 tokens costs x {ratio(seconds[name, 45], seconds[name, 32])} and '
              f'x {ratio(seconds[name, 64], seconds[name, 45])}, x 4 costs x {ratio(seconds[name, 64], seconds[name, 32])}', flush=True)
    for size in (64, 256):
        room = None                                                          # Mamba's peak, which attention then has to fit
        for mixer, arm in (('Mamba', 'ours'), ('attention', 'ours'), ('attention', 'ours, scores kept')):
            times, memory = race([arm], f'one block of {mixer}, patch 2', size, 1, args.device, dtype, 1, room)
            room = room or memory[arm]
            took = times[arm, 'train'][0]
            told = f'no training step in {room:.0f} MB' if math.isnan(took) else f'a training step {1e3 * took:.0f} ms, peak {memory[arm]:.0f} MB'
            print(f'one block of {mixer}{arm[4:]}, {size}² in patches of 2, {size * size // 4} tokens: {told}', flush=True)


HEADER = ('| shape | precision | arm | train step, ms | images / s | forward, ms | peak memory, MB | of matmul peak | train: peer / this | forward: peer / this |\n'
          + '|---' * 10 + '|')


def main(args):
    if args.serve:
        return serve(*json.loads(args.serve))
    cuda = args.device == 'cuda'
    shapes = CUDA_SHAPES if cuda else SHAPES
    arms = ['peer', 'ours', *(['peer compiled', 'ours compiled'] if cuda else ['peer, memory kept'])]
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads'
          + (f', {torch.cuda.get_device_name()}' if cuda else ', bf16 in hardware' if has_bf16('cpu') else ', bf16 emulated'))
    if args.lean:
        return lean(args)
    if args.tokens:
        return [tokens(args, dtype) for dtype in args.precisions]
    if {*(args.shapes or shapes)} - {*shapes}:
        sys.exit(f'--shapes {" ".join(args.shapes)}: {args.device} has {" ".join(shapes)}')
    print(HEADER)
    for shape in args.shapes or shapes:
        table(arms, shapes[shape], args)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--shapes', nargs='+', choices=tuple(CUDA_SHAPES), help='all of the device')
    p.add_argument('--precisions', nargs='+', choices=('bf16', 'fp32'), default=['bf16', 'fp32'])
    p.add_argument('--rounds', type=int, default=10)
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--tokens', action='store_true', help='what twice the tokens cost instead')
    p.add_argument('--lean', action='store_true', help='pure bf16, pruned channels and 2:4 instead')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    main(p.parse_args())
