"""Repairs the image generator: DRaFT (Clark 2023, arXiv 2309.17400) follows the gradient of a detector of distorted images.

  python draft.py --bravo runs/bravo --reward runs/detector --data DIR                  through the last solver step (DRaFT-1)
  python draft.py --bravo runs/bravo --reward runs/detector --data DIR --lv 2           the same with less variance (DRaFT-LV)
  python draft.py --bravo runs/bravo --reward runs/detector --data DIR --steps 25 --k 25    through all of them (DRaFT)
  python sample.py --bravo runs/draft --lora-scale 0.5 --data DIR                       half way from the old model to the new

Only low-rank adapters learn; they start without effect. Stops when the reward on held-out patients no longer rises and goes back to
where it was highest. Leaves in --out: ckpt.pt (a run like any other, the adapters merged), log.csv, samples_*.png (before and after),
sweep.json and sweep.png (reward and diversity at LoRA scales 0 to 1, and which of them to accept). The same command resumes.
"""
from common import *

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    g = p.add_argument_group('what')
    g.add_argument('--bravo', required=True, metavar='RUN', help='image model to repair: run folder or checkpoint')
    g.add_argument('--reward', required=True, metavar='RUN', help='detector (classifier.py train) that selects; the one that reports must be another')
    g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='masks: of its training patients; held out: of its val patients')
    g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
    g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of masks without tumour')
    g = p.add_argument_group('gradient')
    g.add_argument('--k', type=number(int, 1), default=1, help='the last solver steps that it goes through; all of --steps: DRaFT in full')
    g.add_argument('--lv', type=number(int, 0), default=0, help='more denoisings of each image from the last solver time (DRaFT-LV)')
    g.add_argument('--sampler', choices=tuple(s for s in SAMPLERS if s not in ('adaptive', 'maisi')), help='none: dpm++ for RFlow, ddim for DDPM')
    g.add_argument('--steps', type=number(int, 1), help='solver steps; none: 25 for RFlow, 50 for DDPM')
    g.add_argument('--checkpoint', action=argparse.BooleanOptionalAction, help='keep no activations, compute them again (memory for time); none: for --k above 1')
    g.add_argument('--reward-augment', action=argparse.BooleanOptionalAction, default=True, help='flip and shift images before they are judged')
    g.add_argument('--penalty', type=number(float, 0), default=5.0, help='weight of the squared distance of the velocity to the old model\'s')
    g = p.add_argument_group('adapters and training')
    g.add_argument('--rank', type=number(int, 1, 1024), default=8, help='of each adapter')
    g.add_argument('--alpha', type=number(float, 0, open_low=True), help='adapters are added times alpha/rank; none: the rank')
    g.add_argument('--iters', type=number(int, 1), default=100, help='optimiser steps at most')
    g.add_argument('--batch-size', type=number(int, 1), default=8, help='images a step, over all processes')
    g.add_argument('--lr', type=number(float, 0, open_low=True), default=3e-4, help='learning rate')
    g.add_argument('--weight-decay', type=number(float, 0), default=0.01, help='of AdamW, on the adapters')
    g.add_argument('--clip', type=number(float, 0, open_low=True), default=1.0, help='gradient norm')
    g.add_argument('--held-out', type=number(int, 2), default=16, help='masks of val patients that judge the progress, and as many for the sweep')
    g.add_argument('--eval-every', type=number(int, 1), default=10, help='steps between looks at the held-out reward')
    g.add_argument('--patience', type=number(int, 1), default=3, help='stop after so many looks without a higher one')
    g.add_argument('--seeds', type=number(int, 2), default=4, help='images of each mask in the sweep')
    g = p.add_argument_group('run')
    g.add_argument('--out', default='runs/draft', metavar='DIR', help='run folder; the same command again resumes')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
    g.add_argument('--seed', type=number(int, 0), default=0)
    g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    g.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto', help='of the network; the reward is fp32')
    g.add_argument('--save-every', type=number(int, 1), default=10, help='steps between checkpoints')
    args = p.parse_args(argv)
    if args.lv and args.k > 1:
        fail(f'--lv {args.lv} --k {args.k}: DRaFT-LV goes through the last step only; leave --k away')
    for name in ('bravo', 'reward'):
        if not Path(getattr(args, name)).exists():
            fail(f'--{name} {getattr(args, name)}: no such run folder or checkpoint')
    for root in args.data:
        if not Path(root).is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
    if args.batch_size % int(os.environ.get('WORLD_SIZE', 1)):
        fail(f'--batch-size {args.batch_size}: must be a multiple of the processes, {os.environ["WORLD_SIZE"]}')
    check_out(args.out)
    args.script, args.alpha = 'draft', args.alpha or float(args.rank)
    args.checkpoint = args.k > 1 if args.checkpoint is None else args.checkpoint
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank adapters
# ---------------------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Weight W (O,I,...) -> W + scale alpha/r B A (Hu 2021, 2106.09685), A (r, I x kernel), B (O, r): of a convolution A is one of
    the same kernel with r outputs, B one of 1x1. A parametrisation: whatever reads .weight, in a forward or not, gets the sum."""

    def __init__(self, weight, rank, alpha, g):
        super().__init__()
        self.ratio, self.scale = alpha / rank, 1.0
        inputs = weight[0].numel()
        self.A = nn.Parameter(((2 * torch.rand(rank, inputs, generator=g) - 1) / math.sqrt(inputs)).to(weight.device))
        self.B = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))

    def forward(self, W):
        return torch.add(W, (self.B @ self.A).view(W.shape), alpha=self.scale * self.ratio) if self.scale else W


def add_lora(net, rank, alpha, seed=0):
    """Freezes a network and puts an adapter on the weight of every convolution and linear layer of it. Returns {name: LoRA}."""
    net.requires_grad_(False)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))}
    loras = {n: LoRA(m.weight, rank, alpha, generator(seed, 'lora', n)) for n, m in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, 'weight', loras[name])
    return loras


@contextlib.contextmanager
def scaled(loras, scale):
    """Inside, the adapters count that much: 0 is the network without them, bit for bit."""
    old = [lora.scale for lora in loras.values()]
    for lora in loras.values():
        lora.scale = scale
    try:
        yield
    finally:
        for lora, before in zip(loras.values(), old):
            lora.scale = before


@torch.no_grad()
def merge(base, loras, scale=1.0):
    """The state dict of the network without adapters (base) with them added."""
    with scaled(loras, scale):
        return {**base, **{f'{n}.weight': lora(base[f'{n}.weight'].to(lora.A.device)).cpu() for n, lora in loras.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# DRaFT
# ---------------------------------------------------------------------------------------------------------------------


def drafted(denoise, x, sampler, ts, process, k, lv=0, noise=None):
    """Images x_0 from the noise x whose gradient goes through the last k solver steps (Clark 2023, algorithm 1), one after the other.

    lv: after it lv more, each the same image noised again to the last solver time and denoised in one step. (dpm++ knows the step
    before: it starts again at first order where the gradient begins.) A generator, so that one graph at a time is in memory.
    """
    cut = len(ts) - 1 - k
    with torch.no_grad():
        x = sampler(denoise, x, ts[:cut + 1], process, noise)
    x = sampler(denoise, x, ts[cut:], process, noise)
    yield x
    for _ in range(lv):
        yield denoise(process.alpha(ts[-2]) * x.detach() + process.sigma(ts[-2]) * noise(), ts[-2])[0]


class Watched:
    """A denoise closure that, where gradients flow, also adds up how far the velocity is from that of the network without adapters.

    The velocity eps_hat - x0_hat is the output of RFlow; for DDPM it is -(1 + alpha/sigma) times the distance of x0_hat.
    """

    def __init__(self, denoise, loras, penalty=True, keep_no_activations=False):
        self.denoise, self.loras, self.penalty, self.again, self.drift = denoise, loras, penalty, keep_no_activations, []

    def both(self, x, t):
        x_0, eps = self.denoise(x, t)
        if not self.penalty:
            return x_0, eps, x.new_zeros(())
        with scaled(self.loras, 0.0):
            old_0, old_eps = self.denoise(x, t)
        return x_0, eps, ((eps - x_0) - (old_eps - old_0)).square().mean()

    def __call__(self, x, t):
        if not torch.is_grad_enabled():
            return self.denoise(x, t)
        x_0, eps, drift = checkpoint(self.both, x, t, use_reentrant=False) if self.again else self.both(x, t)
        self.drift.append(drift)
        return x_0, eps


def flip_and_shift(n, size, g):
    """Draws for augment(): left-right flip, shift by whole pixels of at most 5 %, no rotation and no scale, so that nothing blurs."""
    u, most = torch.full((n, 5), 0.5), round(0.05 * size)
    u[:, 2] = torch.rand(n, generator=g)
    u[:, 3:] += torch.randint(-most, most + 1, (n, 2), generator=g) / (0.1 * size)
    return u


def reward(detector, images, masks, u=None):
    """Minus the calibrated logit of "bad": (B,), in fp32. images (B,1,S,S) are bounded to [-1,1] as on disk, the gradient passes."""
    images = images + (images.clamp(-1, 1) - images).detach()
    return -detector_logits(detector, *(augment(images, masks, u) if u is not None else (images, masks)))[:, 0]


def pair_diversity(images):
    """Of S images of one mask, (S,1,H,W): mean over the pairs of 1 - MS-SSIM, and root mean square difference."""
    i, j = torch.triu_indices(len(images), len(images), 1)
    return float(1 - ms_ssim(images[i], images[j]).mean()), float((images[i] - images[j]).square().mean().sqrt())


def main(args):
    # run folder, models, data
    device, out = setup(args), Path(args.out)
    run, detector = load_run(args.bravo, device, args.dtype), load_detector(args.reward, device)
    if run.args.volume:
        fail(f'--bravo {args.bravo}: draws volumes, and a detector looks at slices; give a run without --volume')
    if run.args.size < 11:
        fail(f'--bravo {args.bravo}: draws {run.args.size} pixels; MS-SSIM, which says how various images are, needs 11')
    if run.args.script != 'bravo':
        fail(f'--bravo {run.path}: is a run of train_{run.args.script}.py')
    if run.args.neighbours:
        fail(f'--bravo {run.path}: was trained with --neighbours, which are drawn slice by slice; give a run without')
    if run.args.dual:
        fail(f'--bravo {run.path}: makes pairs (--dual), and a detector judges single images')
    if detector.part != 'train':
        fail(f'--reward {detector.path}: learned from {detector.part} patients, so it reports and must not select; give one of training patients')
    if max(abs(a - b) for a, b in zip(detector.box, run.box)) > 0.02:
        print0(f'note: the detector saw the brain box {detector.box}, the image model {run.box}; its verdict may not fit')
    name, steps, clip = default_solver(run.args, args.sampler, args.steps)
    ts, process, net, size = run.process.times(steps, own=True), run.process, run.net, run.args.size
    note_off_grid(name, ts, process)
    clip = clip and not process.space.about                                      # only pixels have bounds
    if run.args.sparse24 or getattr(run.args, 'prune_how', None) == 'weights':
        fail(f'--bravo {run.path}: has weights that are zero (--sparse24, --prune-how weights), which adapters would fill; repair the dense run it came from')
    if args.k > steps:
        fail(f'--k {args.k}: there are {steps} solver steps')
    state = open_run(args, 'draft')
    data = load_slices(args.data, size, ('bravo',), run.box, args.split, args.cache, run.args.labels, run.args.speck)
    rows, val = (data.rows(part, args.empty_slices, args.seed) for part in ('train', 'val'))
    if not len(rows) or not len(val):
        fail(f'--data {" ".join(args.data)}: {len(rows)} slices of training and {len(val)} of val patients; both are needed, see --split')
    if len(val) < 2 * args.held_out:
        print0(f'note: only {len(val)} slices of val patients: the sweep meets masks again that judged the progress (with other noise)')
    val = val[batch_rows(len(val), 2 * args.held_out, 0, args.seed)]

    # adapters, optimiser
    base = {k: v.cpu().clone() for k, v in net.state_dict().items()}
    loras = add_lora(net, args.rank, args.alpha, args.seed)
    params = {f'{n}.{m}': p for n, lora in loras.items() for m, p in lora.named_parameters()}
    opt = torch.optim.AdamW(params.values(), args.lr, weight_decay=args.weight_decay, fused=True)
    start, best, best_step, curve = 0, {k: p.detach().clone() for k, p in params.items()}, 0, []

    def put(values):
        with torch.no_grad():
            for k, p in params.items():
                p.copy_(values[k])

    if state:
        if state['args']['base'] != run.hash or state['args']['reward'] != detector.hash:
            fail(f'--out {out}: was started from another --bravo or --reward file; choose another --out')
        start, best, best_step, curve = state['step'], state['best'], state['best_step'], state['curve']
        put(state['lora']), opt.load_state_dict(state['opt'])
    told = f'DRaFT-LV with {args.lv}' if args.lv else 'DRaFT' if args.k == steps else f'DRaFT-{args.k}'
    print0(f'{out}: {told} through {name} with {steps} steps; {len(loras)} adapters of rank {args.rank}, '
           f'{sum(p.numel() for p in params.values()) / 1e6:.3f} M parameters beside {sum(v.numel() for v in base.values()) / 1e6:.3f} M frozen; '
           f'detector {detector.hash} of {detector.part} patients' + (f', going on from step {start}' if state else ''))

    def conditions(picked):
        """Masks (B,1,S,S) and a denoise closure for these slices."""
        mask = torch.tensor(data.masks[picked]).float().to(device)
        extra = torch.tensor([data.table[i]['level'] for i in picked])[:, None].to(device) if run.args.slice_level else None
        return mask, make_denoise(net, process, mask_condition(mask, run.args.p_uncond), request_tokens(mask, run.args), extra, args.dtype, clip)

    @torch.no_grad()
    def judged(picked, seeds, what):
        """Images (N,1,S,S) and rewards (N,) of slices, with noise that depends on nothing but the image's place in the list."""
        images, rewards = torch.zeros(len(picked), 1, size, size), torch.zeros(len(picked))
        parts = list(range(0, len(picked), args.batch_size))
        for k in parts[rank()::world()]:
            here = slice(k, k + args.batch_size)
            mask, denoise = conditions(picked[here])
            g = [generator(what, i, s) for i, s in zip(range(len(picked))[here], seeds[here])]
            noise = lambda: torch.stack([torch.randn(process.space.shape(size), generator=v) for v in g]).to(device)
            made = process.from_range(SAMPLERS[name](denoise, noise(), ts, process, noise))
            images[here], rewards[here] = made.clamp(-1, 1).cpu(), reward(detector, made, mask).cpu()
        for v in (images, rewards) if world() > 1 else ():
            v_ = v.to(device)
            dist.all_reduce(v_)
            v.copy_(v_)
        return images, rewards

    def train_step(step):
        """One optimiser step; all that is random is a function of (seed, step) and drawn for the whole batch. Reward, drift, gradient norm."""
        B, part, g = args.batch_size, args.batch_size // world(), generator(args.seed, 'draft', step)
        mine = slice(rank() * part, (rank() + 1) * part)
        mask, denoise = conditions(rows[batch_rows(len(rows), B, step, args.seed)][mine])
        noise = lambda: torch.randn(B, *process.space.shape(size), generator=g)[mine].to(device)
        watched, total, drifts = Watched(denoise, loras, args.penalty > 0, args.checkpoint), 0, 0
        for x_0 in drafted(watched, noise(), SAMPLERS[name], ts, process, args.k, args.lv, noise):
            u = flip_and_shift(B, size, g)[mine] if args.reward_augment else None
            value, drift = reward(detector, process.from_range(x_0), mask, u).mean(), torch.stack(watched.drift).mean()
            ((args.penalty * drift - value) / (1 + args.lv)).backward()
            total, drifts, watched.drift = total + value.detach() / (1 + args.lv), drifts + drift.detach() / (1 + args.lv), []
        if world() > 1:                                                              # not DDP: it allows one forward for one backward
            flat = torch.cat([p.grad.flatten() for p in params.values()] + [torch.stack([total, drifts])]) / world()
            dist.all_reduce(flat)
            for p, v in zip(params.values(), flat[:-2].split([p.numel() for p in params.values()])):
                p.grad.copy_(v.view(p.shape))
            total, drifts = flat[-2:]
        norm = nn.utils.clip_grad_norm_(params.values(), args.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return [float(total), float(drifts), float(norm)]

    def picture(path, images):
        """The same noise and masks before and after; brighter and darker where they differ."""
        zoom, masks = max(1, 128 // size), data.masks[val[:8]][:, 0]
        save_grid(path, [[outline(i, m, zoom=zoom) for i, m in zip(before[:8, 0].numpy(), masks)], list(before[:8, 0]), list(images[:8, 0]),
                         list(images[:8, 0] - before[:8, 0])], ['mask', 'before', 'after', 'difference'], zoom)

    seen = patients_seen(data, state, args.bravo)
    carried = {k: v for k, v in load_checkpoint(args.bravo).items() if k not in ('net', 'ema', 'opt', 'step', 'args', 'ema_updates')}

    def save(step, best):
        cpu = lambda values: {k: v.detach().cpu().clone() for k, v in values.items()}
        now, lora = cpu(params), cpu(best)
        put(best)
        ema = merge(base, loras)
        put(now)
        if rank() == 0:
            about = dict(base=run.hash, reward=detector.hash, draft=True, lora_rank=args.rank, lora_alpha=args.alpha)
            save_checkpoint(out, dict(carried, seen=seen, net=base, ema=ema, lora=now, best=lora, best_step=best_step, curve=curve, opt=opt.state_dict(),
                                      step=step, args={**plain(run.args), **about}, draft=plain(args)))

    # the loop
    held, seeds = val[:args.held_out], [0] * args.held_out
    with scaled(loras, 0.0):
        before, old = judged(held, seeds, 'held-out')
    if rank() == 0:
        atomic_write(out / 'args.json', json.dumps(plain(args), indent=1).encode())
        write_csv(out / 'split.csv', ['patient', 'part'], sorted({(r['patient'], part) for r, part in zip(data.table, data.part) if not r['synthetic']}))
        log = Log(out / 'log.csv', ['step', 'reward', 'drift', 'grad_norm', 's_per_step', 'held_out'], start)
    curve = curve or [[0, float(old.mean())]]
    print0(f'held-out reward {curve[0][1]:+.3f} before (minus the logit of bad; {float((old < 0).float().mean()):.0%} of {len(old)} images bad)')
    stop, clock, over = Stop(), time.perf_counter(), lambda: len([s for s, _ in curve if s > best_step]) >= args.patience
    bar = progress(range(start, args.iters if not over() else start), initial=start, total=args.iters)
    for step in bar:
        values = train_step(step)
        if not all(map(math.isfinite, values)):
            fail(f'reward {values[0]}, gradient {values[2]} at step {step}; stopped, the last checkpoint in {out} is intact. Try a lower --lr', 1)
        done, scores = step + 1, {}
        signum = stop.asked(device)
        final = done == args.iters
        if done % args.eval_every == 0 or final:
            images, now = judged(held, seeds, 'held-out')
            scores = dict(held_out=float(now.mean()))
            if scores['held_out'] > max(v for _, v in curve):
                best, best_step = {k: p.detach().clone() for k, p in params.items()}, done
            curve.append([done, scores['held_out']])
            final = final or over()
        if rank() == 0:
            bar.set_postfix(reward=f'{values[0]:+.3f}', held_out=f'{curve[-1][1]:+.3f}', refresh=False)
            log.add(step=done, reward=values[0], drift=values[1], grad_norm=values[2], s_per_step=time.perf_counter() - clock, **scores)
            if scores:
                picture(out / f'samples_{done:06d}.png', images)
        clock = time.perf_counter()
        if final or signum or done % args.save_every == 0:
            save(done, best)
        if signum and not final:
            bar.close()
            print0(f'{out}: stopped by signal {signum} and saved at step {done}; the same command goes on')
            raise SystemExit(128 + signum)
        if final:
            break
    bar.close(), stop.restore()
    if rank() == 0:
        plot(out / 'log.png', {'held out': tuple(zip(*curve)), '.step': log.curve('reward')}, str(out), 'step', 'reward')
    print0(f'{out}: held-out reward {curve[0][1]:+.3f} before, {max(v for _, v in curve):+.3f} at step {best_step}, which is kept; stopped at {curve[-1][0]}')
    put(best)
    sweep(args, out, loras, lambda picked, seeds: judged(picked, seeds, 'sweep'), val[args.held_out:])
    barrier()


def sweep(args, out, loras, judged, masks):
    """Reward and diversity at each LoRA scale, on masks and noise that chose nothing. Accepted: the reward rises, with a 95 % interval
    of the rise over masks above 0, and diversity (1 - MS-SSIM of images of one mask) keeps 95 % of what it was."""
    if (out / 'sweep.json').exists():
        return print0(f'{out}: complete; its sweep is in {out}/sweep.json')
    table, S = [], args.seeds
    for scale in SCALES:
        with scaled(loras, scale):
            images, rewards = judged(masks.repeat(S), list(range(S)) * len(masks))
        per_mask = rewards.view(-1, S).mean(1).double()
        first = per_mask if not table else first
        rise = per_mask - first
        half = 1.96 * float(rise.std()) / math.sqrt(len(rise))
        apart = np.mean([pair_diversity(v) for v in images.view(-1, S, *images.shape[1:])], 0)
        table.append(dict(scale=scale, reward=float(per_mask.mean()), rise=float(rise.mean()), low=float(rise.mean()) - half, high=float(rise.mean()) + half,
                          bad=float((rewards < 0).double().mean()), diversity=float(apart[0]), pixel_distance=float(apart[1])))
        table[-1]['accepted'] = table[-1]['low'] > 0 and table[-1]['diversity'] >= 0.95 * table[0]['diversity']
    if rank() == 0:
        print0(f'scale   reward   rise [95 %]                 bad   1 - MS-SSIM   pixels   ({len(masks)} masks x {S} images)')
        for r in table:
            print0(f'{r["scale"]:5.2f}  {r["reward"]:+7.3f}  {r["rise"]:+6.3f} [{r["low"]:+6.3f}, {r["high"]:+6.3f}]  {r["bad"]:6.1%}  {r["diversity"]:7.4f}'
                   f' ({r["diversity"] / table[0]["diversity"]:5.1%})  {r["pixel_distance"]:6.4f}  {"accepted" if r["accepted"] else ""}')
        good = [r for r in table if r['accepted']]
        pick = max(good, key=lambda r: r['reward'])['scale'] if good else 0.0
        atomic_write(out / 'sweep.json', json.dumps(dict(scales=table, accepted=[r['scale'] for r in good], use=pick), indent=1).encode())
        scales, unit = [r['scale'] for r in table], lambda k: [r[k] / abs(table[0][k]) for r in table]
        plot(out / 'sweep.png', {'reward': (scales, unit('reward')), '1 - MS-SSIM': (scales, unit('diversity'))}, str(out), 'LoRA scale', 'of the old model')
        print0(f'scale {pick:g} passes, which a fooled detector passes too: look at {out}/samples_*.png, then let the reporting detector and people judge: '
               f'python sample.py --bravo {out} --lora-scale {pick:g}' if good else
               'no scale is accepted: the reward did not rise beyond its interval, or diversity fell below 95 %; keep the old model')


if __name__ == '__main__':
    main(get_args())
