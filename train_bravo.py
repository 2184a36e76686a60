"""Trains the image generator: a T1 BRAVO slice that fits a tumour mask.

  python train_bravo.py --rflow --steps 100                         the built-in phantom, minutes on two cores
  python train_bravo.py --rflow --data DIR --out runs/mine          your patients (one folder each: bravo.nii.gz, seg.nii.gz)
  python train_bravo.py --rflow --data DIR --perceptual 0.01 --perceptual-weights vgg16.pth

The network sees the noisy image and the mask as two channels. Beside train_seg.py this file has the mask channel and the
perceptual loss; the rest is the same, line by line. Leaves in --out: ckpt.pt, log.csv, loss_by_t.csv, samples_*.png.
"""
from common import *


def get_args(argv=None):
    p = train_parser(__doc__.split('\n')[0], 'runs/bravo')
    g = p.add_argument_group('image loss')
    g.add_argument('--perceptual', type=number(float, 0), default=0.0, help='weight of the VGG16 distance at low noise; 0: off')
    g.add_argument('--perceptual-weights', metavar='FILE', help='VGG16 weights; none: torchvision\'s are fetched')
    g.add_argument('--lpips-weights', metavar='FILE', help='LPIPS linear heads; none: layers unweighted')
    g.add_argument('--fft', type=number(float, 0), default=0.0, help='weight of the focal frequency loss at low noise; 0: off')
    g.add_argument('--fft-log', type=number(float, 0), default=0.0, help='weight of the log-magnitude spectrum loss at low noise; 0: off')
    g = p.add_argument_group('reflow')
    g.add_argument('--reflow', metavar='DIR', help='train on the pairs of noise and image in DIR (sample.py --pairs) instead of patients')
    g.add_argument('--distill', action='store_true', help='with --reflow: only at t=1, for images in one step')
    args = finish_args(p.parse_args(argv))
    if args.reflow and not (args.rflow and args.init):
        fail('--reflow: straightens a trained flow; add --rflow and --init RUN, the run that made the pairs')
    if args.reflow and args.progressive:
        fail('--reflow and --progressive: pairs have one size; leave --progressive away')
    if args.reflow and (args.augment or not sorted(Path(args.reflow).glob('pairs_*.npz'))):
        fail(f'--reflow {args.reflow}: expected a folder of sample.py --pairs, and no --augment (it would part an image from its noise)')
    if args.distill and not args.reflow:
        fail('--distill: learns one step from pairs; add --reflow DIR')
    if (args.perceptual_weights or args.lpips_weights) and not args.perceptual:
        fail('--perceptual-weights and --lpips-weights do nothing without --perceptual W; 0.01 is a start')
    for name in ('perceptual_weights', 'lpips_weights'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: no such file')
    args.script, args.controllable = 'bravo', False
    return args


def perceptual_loss(vgg, x0_hat, x_0, t, process):
    """Sum over the batch of the VGG16 distance between x0_hat and x_0, where it means something: SNR > 1.

    With more noise x0_hat is the mean of many brains, which must be blurred; a distance that punishes blur would pull it
    away from the mean and bias the sampler (Zhang 2018 for the distance; Lee 2024, arXiv 2405.20320 for its place).
    """
    clear = (process.log_snr(t) > 0).nonzero().flatten().to(x_0.device)           # t is on the CPU: no wait for the GPU
    if not len(clear):
        return x_0.new_zeros(())
    return vgg.distance(process.from_range(x0_hat[clear]), process.from_range(x_0[clear])).sum()


def fft_loss(x0_hat, x_0, t, process, focal=1.0, log=0.0):
    """Sum over the batch of two distances between the spectra of x0_hat and x_0 (B,C,H,W), where SNR > 1, in fp32.

    focal: mean of w |F - F_0|^2, w = |F - F_0| over its largest in the image, no gradient (Jiang 2021, 2012.12821, eq. 8 with alpha 1).
    log: mean | log|F| - log|F_0| | without the mean intensity. Neither has E[x_0|x_t] as its minimum: small weights, low noise.
    """
    clear = (process.log_snr(t) > 0).nonzero().flatten().to(x_0.device)
    if not len(clear):
        return x_0.new_zeros(())
    with torch.autocast(x_0.device.type, enabled=False):                          # no FFT in bf16
        F_hat, F_0 = (torch.fft.fft2(v[clear].float(), norm='ortho') for v in (x0_hat, x_0))
        apart = (F_hat - F_0).abs()
        w = (apart / apart.amax((-2, -1), keepdim=True).clamp(min=1e-12)).detach()
        ratio = (torch.log(F_hat.abs() + 1e-3) - torch.log(F_0.abs() + 1e-3)).abs().flatten(2)[..., 1:]
        return focal * (w * apart.square()).flatten(1).mean(1).sum() + log * ratio.flatten(1).mean(1).sum()


def read_pairs(directory, size, split):
    """The shards of sample.py --pairs in one: noise, image (N,1,S,S), mask (N,1,S,S), level (N,). Fails when a mask's patient may not train."""
    shards = [np.load(f) for f in sorted(Path(directory).glob('pairs_*.npz'))]
    pairs = {k: np.concatenate([s[k] for s in shards]) for k in ('noise', 'image', 'mask', 'level', 'source')}
    if pairs['image'].shape[-1] != size:
        fail(f'--reflow {directory}: holds images of {pairs["image"].shape[-1]} pixels; --size is {size}')
    split_patients([dict(name=s, source=s, synthetic=True, folder=f'{directory}') for s in sorted({*pairs['source'].tolist()})], split)
    return argparse.Namespace(**{k: torch.from_numpy(v) for k, v in pairs.items() if k != 'source'})


@torch.no_grad()
def straightness(net, process, pairs, args, device, n=64, steps=25):
    """Mean over a pixel of the integral of |(noise - image) - dx/dt|^2 along the model's own paths; 0 when they are straight (Liu 2022, eq. 8)."""
    mask = mask_condition(pairs.mask[:n].float().to(device), args.p_uncond)
    extra = pairs.level[:n, None].float().to(device) if args.slice_level else None
    start, slopes = pairs.noise[:n].to(device), []
    end = sample_euler(make_denoise(net, process, mask, None, extra, args.dtype), start, process.times(min(steps, args.steps or steps)), process,
                       None, lambda i, t, x_t, x_0: slopes.append((x_t - x_0) / t))
    return float(torch.stack([(start - end - v).square().mean() for v in slopes]).mean())


def main(args):
    # run folder, data
    device, out = setup(args), Path(args.out)
    state = None if args.dry_run else open_run(args)
    print0(f'{out}: preset {args.preset}, {args.device}, {args.dtype}' + (f', going on from step {state["step"]}' if state else ''))
    roots = args.data or [phantom_root(args.cache)]
    sizes = args.progressive or (args.size,)                                 # data has the last one: what the run is for
    sets = {s: load_slices(roots, s, ('bravo',), state and state['box'], args.split, args.cache, args.labels, args.speck) for s in sizes}
    data = sets[args.size]
    rows, val = data.rows('train', args.empty_slices, args.seed), data.rows('val', args.empty_slices, args.seed)
    pairs = read_pairs(args.reflow, args.size, args.split) if args.reflow else None
    rows = np.arange(len(pairs.image)) if pairs else rows
    if not len(rows):
        fail(f'--data {" ".join(map(str, roots))}: no slice of a training patient; see --split')
    level = torch.tensor([r['level'] for r in data.table])
    print0(f'training on {len(rows)} {"pairs" if pairs else "slices"}, held out {len(val)}')

    def batch(picked, size=args.size):
        """Images in [-1,1] (B,1,S,S), masks in {0,1} (B,1,S,S), slice level (B,1) or None, on the CPU."""
        extra = level[picked][:, None] if args.slice_level else None
        return torch.tensor(sets[size].images[picked]), torch.tensor(sets[size].masks[picked]).float(), extra

    # network, process, optimiser
    torch.manual_seed(seed_of(args.seed, 'weights') % 2 ** 32)
    net = build_net(args, in_channels=2 + (args.p_uncond > 0), out_channels=1, extra_dim=int(args.slice_level))
    if args.init and not state:
        load_init(net, args)
    process = build_process(args)
    if args.prune and not state:                                             # of the network from --init; the training goes on with what is left
        x_0, mask, extra = batch(rows[:64])
        prune(net, process, args, process.to_range(x_0), mask_condition(mask, args.p_uncond), None, extra)
    if state:
        fit_pruned(net, state['net'])
        net.load_state_dict(state['net'])
    ema = EMA(net, args.ema_decay)
    net = net.to(device, torch.bfloat16 if args.dtype == 'pure-bf16' else None, memory_format=torch.channels_last)   # convolutions are faster with it
    ema.net.to(device, memory_format=torch.channels_last)
    opt = build_optimizer(net, args)
    vgg = VGG16(args.perceptual_weights, args.lpips_weights).to(device) if args.perceptual else None
    losses, curriculum, start = LossByT(device), Curriculum(args), 0
    if state:
        ema.net.load_state_dict(state['ema']), opt.load_state_dict(state['opt'])
        start, ema.updates, curriculum.state = state['step'], state['ema_updates'], state['curriculum']
        losses.sums.copy_(state['loss_by_t'] * (rank() == 0))
    model = torch.compile(net) if args.compile else net
    if world() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    print0(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {"RFlow" if args.rflow else "DDPM " + args.target}'
           f'{f", {args.steps} times" if args.steps else ", continuous time"}, batch {args.batch_size}')

    def pair_batch(picked, size):
        """The same of pairs, whose images are in the process's range already."""
        return pairs.image[picked], pairs.mask[picked].float(), pairs.level[picked].float()[:, None] if args.slice_level else None

    def train_step(step, lr):
        """One optimiser step. All that is random is a function of (seed, step) and drawn for the whole batch, of which each
        process takes its part: so resuming and the number of processes change nothing. Returns loss, gradient norm."""
        B, part = args.batch_size, args.batch_size // world() // args.accumulate
        size = sizes[stage_of(step, args)[0]]
        picked = rows[batch_rows(len(rows), B, step, args.seed)]
        g = generator(args.seed, 'step', step)
        t, u = process.draw_t(B, g, curriculum.window, size / sizes[0]), torch.rand(B, 5, generator=g)
        present = torch.rand(B, generator=g) >= args.p_uncond                # whose condition the network is told
        noise = torch.randn(B, 1, size, size, generator=generator(args.seed, 'noise', step, device=device), device=device)
        if pairs:
            noise, t = pairs.noise[picked].to(device), torch.ones(B) if args.distill else t
        for _, sparse in sparse_layers(net) if args.dense_tail else ():
            sparse.dense.fill_(args.iters is not None and step >= (1 - args.dense_tail) * args.iters)
        total = torch.zeros((), device=device)
        for k in range(args.accumulate):
            mine = slice((rank() * args.accumulate + k) * part, (rank() * args.accumulate + k + 1) * part)
            x_0, mask, extra = (v if v is None else v.to(device, non_blocking=True) for v in (pair_batch if pairs else batch)(picked[mine], size))
            if args.augment:
                x_0, mask = augment(x_0, mask, u[mine])
            x_0, times = x_0 if pairs else process.to_range(x_0), t[mine].to(device, non_blocking=True)
            given = mask_condition(mask, args.p_uncond, present[mine])
            last = k == args.accumulate - 1
            with contextlib.nullcontext() if last or world() == 1 else model.no_sync():
                with autocast(device, args.dtype):
                    loss, square, x0_hat = process.loss(model, x_0, noise[mine], times, given, extra=extra, min_snr=args.min_snr)
                loss = loss.mean()
                if vgg:
                    loss = loss + args.perceptual / part * perceptual_loss(vgg, x0_hat, x_0, t[mine], process)
                if args.fft or args.fft_log:
                    loss = loss + fft_loss(x0_hat, x_0, t[mine], process, args.fft, args.fft_log) / part
                (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
            losses.add(0, process.log_snr(times), square.detach(), mask)
        for group in opt.param_groups:
            group['lr'] = lr
        norm = nn.utils.get_total_norm([p.grad.float() for p in net.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(net.parameters(), args.clip, norm)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return total, norm

    @torch.no_grad()
    def held_out(network):
        """Mean squared error on validation patients, with the same t and noise every time. Fills loss_by_t's second half."""
        losses.sums[1] = 0
        picked = val[batch_rows(len(val), min(128, len(val)), 0, 0)]
        t = process.times(min(len(picked), args.steps or len(picked)))[:-1]
        t = t[torch.arange(len(picked)) * len(t) // len(picked)]
        noise = torch.randn(len(picked), 1, args.size, args.size, generator=generator('held-out'))
        for part in (slice(i, i + args.batch_size) for i in range(0, len(picked), args.batch_size)):
            x_0, mask, extra, eps, times = (v if v is None else v.to(device) for v in (*batch(picked[part]), noise[part], t[part]))
            with autocast(device, args.dtype):
                square = process.loss(network, process.to_range(x_0), eps, times, mask_condition(mask, args.p_uncond), extra=extra)[1]
            losses.add(1, process.log_snr(times), square, mask)
        return losses.held_out()

    @torch.no_grad()
    def picture(path, size):
        """Real slices of validation patients, their masks, and two images generated for each mask."""
        pool = val if len(val) else data.rows('train')
        full = np.array([i for i in pool if data.table[i]['tumour'] > 0], int)
        pool = full if len(full) >= 8 else pool
        picked = pool[np.linspace(0, len(pool), 8, endpoint=False).astype(int)]
        x_0, mask, extra = (v if v is None else v.to(device) for v in batch(picked, size))
        denoise = make_denoise(ema.net, process, mask_condition(mask, args.p_uncond), None, extra, args.dtype, clip=not args.rflow)
        ts, rows_ = process.times(min(25 if args.rflow else 50, args.steps or 25), shift=process.shift), []
        for k in range(2):
            noise = torch.randn(x_0.shape, generator=generator('picture', k)).to(device)
            rows_.append(process.from_range(sample_ddim(denoise, noise, ts, process)).float().cpu()[:, 0])
        zoom, masks = max(1, 128 // size), mask.cpu()[:, 0]
        save_grid(path, [list(x_0.cpu()[:, 0]), list(masks * 2 - 1), *rows_, [outline(x, m, zoom=zoom) for x, m in zip(rows_[0], masks)]],
                  ['real', 'mask', 'generated', 'generated 2', 'with mask'], zoom)

    # length, learning rate test
    if args.dry_run:
        return dry_run(net, train_step, opt, args)
    if args.lr_find and not state:
        lr_find(train_step, net, opt, out)
    if args.iters is None:
        args.iters = iters_for(args.minutes, train_step, net, opt, device, args.lr)
    if not state:
        losses.sums.zero_()                                                  # the steps above were undone
    sample_every = args.sample_every or max(args.iters // 4, 1)
    spacing = tuple(np.median([data.table[i]['spacing'] for i in data.rows('train')], 0).tolist())

    def save(step):
        losses.merge()
        if rank() == 0:
            save_checkpoint(out, dict(net=net.state_dict(), ema=ema.net.state_dict(), ema_updates=ema.updates, opt=opt.state_dict(),
                                      step=step, args=plain(args), box=list(data.box), spacing=list(spacing), in_channels=net.in_channels,
                                      out_channels=1, extra_dim=int(args.slice_level), loss_by_t=losses.sums.cpu(), curriculum=curriculum.state), args.keep_every)
            losses.write(out / 'loss_by_t.csv')

    if rank() == 0:
        atomic_write(out / 'args.json', json.dumps(plain(args), indent=1).encode())
        write_csv(out / 'split.csv', ['patient', 'part', 'slices'], sorted(
            (name, part, n) for (name, part), n in Counter((r['patient'], p) for r, p in zip(data.table, data.part)).items()))
        log = Log(out / 'log.csv', ['step', 'loss', 'lr', 'grad_norm', 's_per_step', 'held_out', 'held_out_raw'], start)
    if not state and not args.iters:
        save(0)                                                              # with --init: a foreign network becomes a run
    if start >= args.iters:
        print0(f'{out}: complete at step {start}; another length needs another --out')

    if pairs and not state:
        print0(f'straightness before: {straightness(ema.net, process, pairs, args, device):.5f} a pixel (0: straight)')

    # the loop
    stop, recent, clock = Stop(), [], time.perf_counter()
    bar = progress(range(start, args.iters), initial=start, total=args.iters)
    for step in bar:
        stage, first = stage_of(step, args)
        if stage and step == first:                                          # a new size: the average forgets sooner for a while
            ema.updates = min(ema.updates, 20)
        loss, norm = train_step(step, lr_at(step, args))
        ema.update(net)
        recent.append(loss + 0 * norm)                                        # a gradient that is none counts as well
        done = step + 1
        signum = stop.asked(device) if world() == 1 or done % 10 == 0 else 0
        final, show = done == args.iters, done % sample_every == 0 or done == args.iters
        keep = final or signum or done % args.save_every == 0
        if done % 20 == 0 or show or keep:
            values = torch.stack(recent)
            if world() > 1:
                dist.all_reduce(values)
                values /= world()
            values = values.tolist()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    at = done - len(values) + i
                    fail(f'loss is {value} at step {at}, lr {lr_at(at, args):.2e}; stopped, the last checkpoint in {out} is '
                         'intact. Try a lower --lr', 1)
            curriculum.add(values, done)
            seconds, recent = (time.perf_counter() - clock) / len(values), []
            if rank() == 0:
                bar.set_postfix(loss=f'{np.mean(values):.4f}', refresh=False)
                scores = {}
                if show and len(val):
                    scores = dict(held_out_raw=held_out(net), held_out=held_out(ema.net))
                if show:
                    picture(out / f'samples_{done:06d}.png', sizes[stage])
                log.add(step=done, loss=float(np.mean(values)), lr=lr_at(step, args), grad_norm=float(norm), s_per_step=seconds, **scores)
            clock = time.perf_counter()
        if keep:
            save(done)
        if signum and not final:
            bar.close()
            print0(f'{out}: stopped by signal {signum} and saved at step {done}; the same command goes on')
            raise SystemExit(128 + signum)
    stop.restore()
    if rank() == 0 and start < args.iters:
        plot(out / 'log.png', {'loss': log.curve('loss'), 'held-out (EMA)': log.curve('held_out')}, str(out), 'step', 'squared error', logy=True)
        told = log.curve('held_out')[1][-1:]
        print0(f'{out}: {args.iters} steps done' + (f', held-out error {told[0]:.4f} (EMA)' if told else '')
               + f'; look at {out}/samples_{args.iters:06d}.png, then: python sample.py --bravo {out}')
        if pairs:
            print0(f'straightness after: {straightness(ema.net, process, pairs, args, device):.5f} a pixel (0: straight)')
    barrier()


if __name__ == '__main__':
    main(get_args())
