"""Trains the mask generator: tumour masks as they lie in the brain box.

  python train_seg.py --rflow --steps 100                           the built-in phantom, minutes on two cores
  python train_seg.py --rflow --data DIR --out runs/mine            your patients (one folder each: bravo.nii.gz, seg.nii.gz)
  python train_seg.py --rflow --data DIR --slice-level              where in the head a slice lies is a condition
  python train_seg.py --rflow --data DIR --volume 32 --size 64      volumes of 32 slices, coherent from slice to slice

The network sees the noisy mask alone, as an image of -1 and 1; sample.py cuts what it draws at 0. Beside train_bravo.py
this file lacks the mask channel and the perceptual loss; the rest is the same, line by line.
Leaves in --out: ckpt.pt, log.csv, loss_by_t.csv, samples_*.png.
"""
from common import *


def get_args(argv=None):
    p = train_parser(__doc__.split('\n')[0], 'runs/seg')
    g = p.add_argument_group('anatomy (patients with a parc.nii.gz: evaluate.py atlas --write)')
    g.add_argument('--anatomy', type=number(float, 0), default=0.0, metavar='W', help='weight of the loss on tumour where none can be; 0: off, 0.01 to 0.1 is usual')
    g.add_argument('--anatomy-mode', choices=('soft', 'hard'), help='soft: also by how often tumours are there; hard: ventricles and outside the brain; none: soft')
    g.add_argument('--anatomy-atlas', metavar='FILE', help='CSV label,plausible (0 to 1; 1 where not named) instead of the training tumours\' places')
    args = finish_args(p.parse_args(argv))
    if args.p_uncond and not args.controllable:
        fail(f'--p-uncond {args.p_uncond:g}: a mask model has a condition to drop only with --controllable')
    if args.model == 'mmdit' and not args.controllable:
        fail('--model mmdit: its second stream holds masks or requests, and a mask model has neither without --controllable; add it, or use dit')
    for name in ('anatomy_mode', 'anatomy_atlas'):
        if getattr(args, name) and not args.anatomy:
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: does nothing without --anatomy W')
    if args.anatomy and not args.slice_level:
        fail(f'--anatomy {args.anatomy:g}: what is plausible depends on the level of the slice, which the network must know; add --slice-level')
    if args.anatomy and not args.data:
        fail(f'--anatomy {args.anatomy:g}: needs patients with a parc.nii.gz, and the phantom has none; add --data DIR')
    if args.anatomy_atlas and args.anatomy_mode == 'hard':
        fail('--anatomy-atlas: grades the brain, and --anatomy-mode hard does not; give one of them')
    args.anatomy_mode = args.anatomy_mode or (args.anatomy and 'soft') or None
    args.script = 'seg'
    return args


def read_atlas(path):
    """CSV label,plausible as a table (65536,) that is 1 for labels without a line."""
    if not Path(path).is_file():
        fail(f'--anatomy-atlas {path}: no such file; expected a CSV with columns label,plausible')
    table, rows = np.ones(2 ** 16), read_csv(path)
    try:
        for row in rows:
            table[int(row['label'])] = float(row['plausible'])
    except (KeyError, ValueError, IndexError):
        rows = []
    if not rows or not ((table >= 0) & (table <= 1)).all():
        fail(f'--anatomy-atlas {path}: expected columns label,plausible: whole numbers from 0 to 65535 and numbers from 0 to 1')
    return table


def plausibility(data, rows, atlas=None, levels=8):
    """How plausible tumour is at each pixel of each slice, (N,1,S,S) uint8 of 255: 0 in ventricles and outside the brain, at least 1 elsewhere.

    There (n + 1) / (max n + 1), n the number of masks of `rows` with tumour at that place of the brain box and level, under a Gaussian of 8 mm
    and one of `levels` steps: the 1 is the floor that keeps rare sites possible. Or atlas[label].
    """
    at = np.array([min(int(r['level'] * levels), levels - 1) for r in data.table])
    inside = (data.parc > 0) & ~np.isin(data.parc, VENTRICLES)
    if atlas is not None:
        A = atlas[data.parc]
    else:
        n = torch.stack([torch.from_numpy(data.masks[rows[at[rows] == k], 0].sum(0, dtype=np.float32)) for k in range(levels)])
        n = blur(n, 8, (8, *np.median([data.table[i]['spacing'] for i in rows], 0))).numpy()
        A = ((n + 1) / (n.max() + 1))[at, None]
    return np.where(inside, np.round(A * 255).clip(1, 255), 0).astype(np.uint8)


def anatomy_loss(p, A, mode='soft', eps=None, t=None):
    """Share of tumour p (B,1,S,S) in [0,1] that lies where it cannot, of each image (B,): sum p w / (sum p + eps); soft: w = 1 - A, hard: w = [A = 0].

    eps: a thousandth of the pixels, so that a speck in an otherwise empty mask does not weigh like a tumour; 0 for an empty one.
    t (B,): where p is of an x0_hat; beyond 0.5, where that is a blur, the loss is 0.
    """
    w = 1 - A if mode == 'soft' else (A == 0).float()
    share = (p * w).flatten(1).sum(1) / (p.flatten(1).sum(1) + (p[0].numel() / 1000 if eps is None else eps))
    return share if t is None else share * (t <= 0.5)


def augment_both(x_0, A, u, how):
    """augment() of masks x_0 (B,1,S,S) of -1 and 1 and, where it is given, of the map A in [0,1] that belongs to each: moved alike."""
    moved, x_0 = augment(x_0 if A is None else 2 * A - 1, x_0 + 1, u, how)             # nearest for masks, background outside
    return x_0 - 1, None if A is None else (moved + 1) / 2


def main(args):
    # run folder, data
    device, out = setup(args), Path(args.out)
    state = None if args.dry_run else open_run(args)
    print0(f'{out}: preset {args.preset}, {args.device}, {args.dtype}' + (f', going on from step {state["step"]}' if state else ''))
    roots = args.data or [phantom_root(args.cache)]
    sizes = args.progressive or (args.size,)                                 # data has the last one: what the run is for
    atlas = args.anatomy_atlas and read_atlas(args.anatomy_atlas)
    sets = {s: load_slices(roots, s, ('bravo',), state and state['box'], args.split, args.cache, args.labels, args.speck, depth=args.volume, parc=args.anatomy > 0) for s in sizes}
    data = sets[args.size]
    rows, val = data.rows('train', args.empty_slices, args.seed), data.rows('val', args.empty_slices, args.seed)
    if not len(rows):
        fail(f'--data {" ".join(map(str, roots))}: no slice of a training patient; see --split')
    level = torch.tensor([r['level'] for r in data.table])
    levels = quantiles(level[rows]) if args.slice_level else None            # sample.py asks for levels as they come here
    seen = patients_seen(data, state, args.init)
    print0(f'training on {len(rows)} {"volumes" if args.volume else "slices"}, held out {len(val)}')
    plausible = {s: plausibility(sets[s], rows, atlas) for s in sizes} if args.anatomy else {}
    if args.anatomy:
        tumour, A = sets[args.size].masks[rows] > 0, plausible[args.size][rows]
        print0(f'anatomy: {(A == 0).mean():.3f} of the pixels are ventricle or outside the brain; {(A[tumour] == 0).mean():.4f} of the real tumour is there')

    def batch(picked, size=args.size):
        """Masks as images of -1 and 1 (B,1,[D,]S,S), slice level (B,1) or None, on the CPU."""
        extra = level[picked][:, None] if args.slice_level else None
        return torch.tensor(sets[size].masks[picked]).float() * 2 - 1, extra

    # network, process, optimiser
    torch.manual_seed(seed_of(args.seed, 'weights') % 2 ** 32)
    net = build_net(args, in_channels=1, out_channels=1, extra_dim=int(args.slice_level))
    if args.init and not state:
        load_init(net, args)
    net = net.to(device)
    process = build_process(args)
    if args.prune and not state:                                             # of the network from --init; the training goes on with what is left
        x_0, extra = (v if v is None else v.to(device) for v in batch(rows[:args.batch_size if args.volume else 64]))
        prune(net, process, args, process.to_range(x_0), None, request_tokens(x_0, args), extra)
    if state:
        fit_pruned(net, state['net'], out)
        net.load_state_dict(state['net'])
    net = channels_last(net)
    ema = EMA(net, args.ema_decay)
    if args.dtype == 'pure-bf16':
        pure_bf16(net)
    opt = build_optimizer(net, args)
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

    def train_step(step, lr):
        """One optimiser step. All that is random is a function of (seed, step) and drawn for the whole batch, of which each
        process takes its part: so resuming and the number of processes change nothing. Returns loss, gradient norm."""
        B, part = args.batch_size, args.batch_size // world() // args.accumulate
        size = sizes[stage_of(step, args)[0]]
        picked = rows[batch_rows(len(rows), B, step, args.seed)]
        g = generator(args.seed, 'step', step)
        t, u = process.draw_t(B, g, curriculum.window, size / sizes[0]), torch.rand(B, 5, generator=g)
        present = torch.rand(B, generator=g) >= args.p_uncond                # whose condition the network is told
        hide = torch.rand(B, LESIONS, 2, generator=g) < 0.2                  # whose size and place it is not
        noise = torch.randn(B, *([1, *args.crop, args.crop[1]] if args.crop else process.space.shape(size)),
                            generator=generator(args.seed, 'noise', step, device=device), device=device)
        for _, sparse in sparse_layers(net) if args.dense_tail else ():
            sparse.dense.fill_(args.iters is not None and step >= (1 - args.dense_tail) * args.iters)
        total = torch.zeros((), device=device)
        for k in range(args.accumulate):
            mine = slice((rank() * args.accumulate + k) * part, (rank() * args.accumulate + k + 1) * part)
            x_0, extra = (v if v is None else v.to(device, non_blocking=True) for v in batch(picked[mine], size))
            A = torch.tensor(plausible[size][picked[mine]]).to(device) / 255 if args.anatomy else None
            if args.augment:
                x_0, A = augment_both(x_0, A, u[mine], args.augment)
            if args.crop:                                                    # anywhere: more lesions than there are would be learned
                x_0, _, extra = crop_volumes(x_0, x_0, args.crop, torch.rand(B, 4, generator=generator(args.seed, 'crop', step))[mine])
            context = request_tokens(x_0, args, present[mine], hide[mine])
            tumour, x_0, times = (x_0 > 0).float(), process.to_range(x_0), t[mine].to(device, non_blocking=True)
            last = k == args.accumulate - 1
            with contextlib.nullcontext() if last or world() == 1 else model.no_sync():
                with autocast(device, args.dtype):
                    loss, square, x0_hat = process.loss(model, x_0, noise[mine], times, None, context, extra, args.min_snr)
                if args.anatomy:                                               # of what would be cut as tumour
                    loss = loss + args.anatomy * anatomy_loss(process.from_range(x0_hat).clamp(0, 1), A, args.anatomy_mode, t=times)
                loss = loss.mean()
                (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
            losses.add(0, process.log_snr(times), square.detach(), tumour)
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
        noise = torch.randn(len(picked), *process.space.shape(args.size), generator=generator('held-out'))
        for part in (slice(i, i + args.batch_size) for i in range(0, len(picked), args.batch_size)):
            x_0, extra, eps, times = (v if v is None else v.to(device) for v in (*batch(picked[part]), noise[part], t[part]))
            with autocast(device, args.dtype):
                square = process.loss(network, process.to_range(x_0), eps, times, None, request_tokens(x_0, args), extra)[1]
            losses.add(1, process.log_snr(times), square, (x_0 > 0).float())
        return losses.held_out()

    @torch.no_grad()
    def picture(path, size):
        """Real masks of validation patients, and generated ones (for the same slice levels and, with --controllable, requests)."""
        pool = val if len(val) else data.rows('train')
        picked = pool[np.linspace(0, len(pool), 2 if args.volume else 8, endpoint=False).astype(int)]
        x_0, extra = (v if v is None else v.to(device) for v in batch(picked, size))
        thrice = lambda v: v if v is None else torch.cat([v] * 3)
        denoise = make_denoise(ema.net, process, None, thrice(request_tokens(x_0, args)), thrice(extra), args.dtype, clip=not args.rflow)
        noise = torch.cat([torch.randn(x_0.shape, generator=generator('picture', k)) for k in range(3)]).to(device)
        sampler, steps, _ = default_solver(args)
        made = SAMPLERS[sampler](denoise, noise, process.times(steps, own=True), process)
        rows_ = process.from_range(made).float().cpu()[:, 0].chunk(3)
        save_grid(path, [views(v, v > 0) for v in (x_0.cpu()[:, 0], *rows_)], ['real', 'generated', 'generated 2', 'generated 3'], max(1, 128 // size))

    # length, learning rate test
    if args.dry_run:
        return dry_run(net, train_step, opt, args)
    if args.lr_find and not state:
        lr_find(train_step, net, opt, out)
    if args.iters is None:
        args.iters = iters_for(args.minutes, train_step, net, opt, device, args.lr, len(args.progressive or (0,)))
    if not state:
        losses.sums.zero_()                                                  # the steps above were undone
    sample_every = args.sample_every or max(args.iters // 4, 1)
    spacing = tuple(np.median([data.table[i]['spacing'] for i in data.rows('train')], 0).tolist())

    def save(step):
        losses.merge()
        if rank() == 0:
            save_checkpoint(out, dict(net=net.state_dict(), ema=ema.net.state_dict(), ema_updates=ema.updates, opt=opt.state_dict(),
                                      step=step, args=plain(args), box=list(data.box), spacing=list(spacing), in_channels=net.in_channels,
                                      out_channels=1, extra_dim=int(args.slice_level), loss_by_t=losses.sums.cpu(), seen=seen,
                                      levels=levels, curriculum=curriculum.state), args.keep_every)
            losses.write(out / 'loss_by_t.csv')

    if rank() == 0:
        log = Log.start(args, data, ['step', 'loss', 'lr', 'grad_norm', 's_per_step', 'held_out', 'held_out_raw'], start)
    if not state and not args.iters:
        save(0)                                                              # with --init: a foreign network becomes a run
    if start >= args.iters:
        print0(f'{out}: complete at step {start}; another length needs another --out')

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
        keep = final or signum or done % args.save_every == 0 or args.keep_every and done % args.keep_every == 0
        if done % 20 == 0 or show or keep:
            values = checked(recent, done, args)
            if curriculum.add(values, done):
                ema.updates = min(ema.updates, 20)
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
               + f'; look at {out}/samples_{args.iters:06d}.png, then: python sample.py --seg {out}')
    barrier()


if __name__ == '__main__':
    main(get_args())
