"""Makes synthetic patients: masks from a mask model, from patients or from a folder, and images that fit them.

  python sample.py --seg runs/seg --bravo runs/bravo --n 16            new masks, new images
  python sample.py --data DIR --part train --bravo runs/bravo --n 100  masks of real training patients, new images
  python sample.py --masks runs/masks --bravo runs/bravo --n 15000     masks that an earlier call made (--seg alone)
  python sample.py --data DIR --bravo runs/bravo --n 4096 --pairs --out runs/pairs   noise and image, for train_bravo.py --reflow
  python sample.py --seg runs/seg --count 3 --size 8 --location 0.6,0.4   masks as asked for (train_seg.py --controllable)

Leaves in --out one folder a patient in the layout of real data (bravo.nii.gz, seg.nii.gz, preview.png), manifest.csv (seed,
condition, source patient, hash of the run for each), grid.png. The same command goes on with a half-done set; torchrun
shares it out. Image i is the same whatever the batch size, the number of processes and how many were asked for.
"""
from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    g = p.add_argument_group('what')
    g.add_argument('--bravo', metavar='RUN', help='image model: run folder or checkpoint; none: masks only')
    g.add_argument('--seg', metavar='RUN', help='masks: drawn by this mask model')
    g.add_argument('--data', nargs='+', metavar='DIR', help='masks: of these patients')
    g.add_argument('--masks', metavar='DIR', help='masks: of this folder, already cut to the brain box (a set made with --seg)')
    g.add_argument('--part', choices=tuple(PARTS), help='which patients of --data; none: train')
    g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name, with --data')
    g.add_argument('--empty-slices', type=number(float, 0, 1), help='share of masks without tumour, with --data; none: 0.2')
    g.add_argument('--slice-level', type=number(float, 0, 1), help='level for models that know it; none: the mask\'s own, or drawn')
    g.add_argument('--n', type=number(int, 1), default=16, help='number of patients')
    g = p.add_argument_group('what the masks hold (a mask model trained with --controllable)')
    g.add_argument('--count', type=number(int, 0, LESIONS), help='lesions in each mask')
    g.add_argument('--size', type=numbers(float, 0), help='their diameters, mm, as 8 or 8,5; none: any')
    g.add_argument('--location', nargs='+', type=numbers(float, 0, 1), metavar='X,Y', help='their centres, from the left and the top of the box; none: any')
    g.add_argument('--requests', metavar='FILE', help='CSV count,size,x,y with a line for each mask in turn; several values as 8;5')
    g = p.add_argument_group('guidance (models trained with --p-uncond)')
    g.add_argument('--cfg', type=number(float, 0), default=1.0, help='weight of the mask on the image; 1: none, one forward a step')
    g.add_argument('--seg-cfg', type=number(float, 0), default=1.0, help='weight of the request on the mask')
    g.add_argument('--cfg-interval', nargs=2, type=number(float, 0, 1), default=(0.0, 1.0), metavar=('A', 'B'), help='guide only where A < t <= B')
    g.add_argument('--cfg-rescale', type=number(float, 0, 1), default=0.0, help='bring the guided x0_hat back to its spread; 0: no, 1: fully')
    g = p.add_argument_group('solver')
    g.add_argument('--sampler', choices=tuple(SAMPLERS), help='none: euler for RFlow, ddim for DDPM')
    g.add_argument('--steps', type=number(int, 1), help='solver steps of the image; none: 25 for RFlow, 50 for DDPM, all for ddpm')
    g.add_argument('--seg-steps', type=number(int, 1), help='solver steps of the mask; none: 25 for RFlow, 50 for DDPM')
    g.add_argument('--eta', type=number(float, 0, 1), default=0.0, help='noise of ddim, 1 = ancestral')
    g.add_argument('--grid', choices=('time', 'log-snr'), default='time', help='equal steps of t or of log-SNR')
    g.add_argument('--shift', type=number(float, 0, open_low=True), default=1.0, help='t -> A t / (1 + (A - 1) t); A < 1: large steps early, small at the end')
    g.add_argument('--learn-steps', type=number(int, 1), metavar='N', help='make no set: find the best N steps of Euler for this model, write steps.json')
    g.add_argument('--steps-file', metavar='FILE', help='solver times of the image that --learn-steps wrote, instead of --steps')
    g.add_argument('--tol', type=number(float, 0, open_low=True), help='error that adaptive allows a step; none: 0.01')
    g.add_argument('--pair', choices=tuple(PAIRS), help='of adaptive; none: bs23')
    g.add_argument('--clip', action=argparse.BooleanOptionalAction, help='bound x0_hat to the data\'s range; none: for DDPM only')
    g.add_argument('--weights', choices=('ema', 'raw'), default='ema')
    g.add_argument('--save-at', type=numbers(float, 0, 1), help='also keep x_t and x0_hat at these times, as 1,.5,.1,0')
    g = p.add_argument_group('run')
    g.add_argument('--pairs', action='store_true', help='write noise and image of each in shards, for train_bravo.py --reflow, and no patients')
    g.add_argument('--out', default='runs/synthetic', metavar='DIR')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept, with --data')
    g.add_argument('--batch-size', type=number(int, 1), default=16)
    g.add_argument('--seed', type=number(int, 0), default=0)
    g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    g.add_argument('--dtype', choices=('auto', 'bf16', 'fp32'), default='auto')
    g.add_argument('--compile', action='store_true', help='torch.compile the networks')
    args = p.parse_args(argv)
    sources = [f'--{s}' for s in ('seg', 'data', 'masks') if getattr(args, s)]
    if len(sources) != 1:
        fail(f'masks come from one place: give one of --seg, --data, --masks (got {", ".join(sources) or "none"})')
    if not args.bravo and not args.seg:
        fail(f'{sources[0]} alone makes nothing new; add --bravo RUN')
    if args.pairs and (not args.bravo or args.save_at or args.eta or args.sampler in ('ddpm', 'dpm++sde')):
        fail('--pairs: needs --bravo and a solver without fresh noise (an image must follow from its noise); leave --save-at away')
    if args.steps_file and (args.steps or args.grid != 'time' or args.shift != 1 or args.sampler == 'adaptive' or args.learn_steps):
        fail('--steps-file holds the times; leave --steps, --grid, --shift, --learn-steps and --sampler adaptive away')
    if args.steps_file and not Path(args.steps_file).is_file():
        fail(f'--steps-file {args.steps_file}: no such file; write one with --learn-steps N')
    if (args.steps_file or args.learn_steps) and not args.bravo:
        fail('--learn-steps and --steps-file are for the steps of an image; add --bravo RUN')
    if args.learn_steps and (args.sampler or args.steps or args.eta or args.save_at):
        fail('--learn-steps: walks every trained time with Euler; leave --sampler, --steps, --eta and --save-at away')
    for name in ('tol', 'pair'):
        if getattr(args, name) is not None and args.sampler != 'adaptive':
            fail(f'--{name} {getattr(args, name)}: is for --sampler adaptive')
    for name, low in (('steps', None), ('seg_steps', None), ('save_at', None), ('grid', 'time'), ('shift', 1.0)):
        if args.sampler == 'adaptive' and getattr(args, name) != low:
            fail(f'--{name.replace("_", "-")}: --sampler adaptive chooses its own times; leave it away')
    for name, wanted in (('part', 'data'), ('split', 'data'), ('empty_slices', 'data'), ('seg_steps', 'seg')):
        if getattr(args, name) is not None and not getattr(args, wanted):
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: does nothing without --{wanted}')
    asked = [f'--{k}' for k in ('count', 'size', 'location', 'requests') if getattr(args, k) is not None]
    if asked and not args.seg:
        fail(f'{asked[0]}: says what a mask model draws; give it with --seg')
    if args.requests and len(asked) > 1:
        fail(f'--requests and {asked[0]}: give one of them')
    if (args.size or args.location) and (args.count is None or max(len(args.size or ()), len(args.location or ())) > args.count):
        fail(f'--size and --location describe the lesions of --count; count is {args.count}')
    if any(len(at) != 2 for at in args.location or ()):
        fail('--location: expected x,y for each lesion, as 0.6,0.4 0.3,0.5')
    if args.requests and not Path(args.requests).is_file():
        fail(f'--requests {args.requests}: no such file; expected a CSV with columns count,size,x,y')
    if args.cfg_interval[0] >= args.cfg_interval[1]:
        fail(f'--cfg-interval {args.cfg_interval[0]:g} {args.cfg_interval[1]:g}: expected two rising times')
    if args.cfg == args.seg_cfg == 1 and (args.cfg_rescale or tuple(args.cfg_interval) != (0, 1)):
        fail('--cfg-interval and --cfg-rescale do nothing without --cfg W or --seg-cfg W')
    for weight, name in ((args.cfg, 'bravo'), (args.seg_cfg, 'seg')):
        if weight != 1 and not getattr(args, name):
            fail(f'--{"cfg" if name == "bravo" else "seg-cfg"} {weight:g}: does nothing without --{name}')
    args.part, args.empty_slices = args.part or 'train', 0.2 if args.empty_slices is None else args.empty_slices
    if args.eta and args.sampler != 'ddim':
        fail(f'--eta {args.eta}: is for --sampler ddim')
    for name in ('bravo', 'seg', 'masks'):
        if getattr(args, name) and not Path(getattr(args, name)).exists():
            fail(f'--{name} {getattr(args, name)}: no such {"folder" if name == "masks" else "run folder or checkpoint"}')
    if args.save_at and not args.bravo:
        fail('--save-at keeps the steps of an image; add --bravo RUN')
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f'--out {args.out}: is a file; give a folder')
    if Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not (Path(args.out) / 'sample.json').exists():
        fail(f'--out {args.out}: holds files that are not a set of this script; give an empty folder')
    return args


def solver(run, args, steps):
    """Fills in what was not asked for: the name of the sampler, its steps and whether x0_hat is clipped."""
    name = args.sampler or ('euler' if run.args.rflow else 'ddim')
    if steps is None:
        steps = min((25 if run.args.rflow else run.args.steps if name == 'ddpm' else 50), run.args.steps or 25)
    if name == 'adaptive' and not run.args.rflow:
        fail(f'--sampler adaptive: is for RFlow; {run.path} is DDPM, use dpm++ or ddim')
    ts = run.process.times(steps, args.grid, args.shift)
    if args.steps_file and run.args.script == 'bravo':
        ts = read_steps(args, run)
    pixels = not run.process.space.about
    if args.clip and not pixels:
        fail(f'--clip: bounds pixels; {run.path} acts on {run.process.space.name}, which have no bounds')
    return name, ts, pixels and not run.args.rflow if args.clip is None else args.clip


def jump_costs(states, x_0s, ts, process):
    """C[i,j]: error of one Euler jump from ts[i] to ts[j], j > i, against the fine walk (Chen 2024, GITS, 2405.11326).

    states, x_0s (M+1,B,...), (M,B,...) of a walk over ts (M+1). Root mean square over an image, mean over images; inf for j <= i.
    """
    a, s = process.alpha(ts).tolist(), process.sigma(ts).tolist()
    cost = torch.full((len(ts), len(ts)), math.inf, dtype=torch.float64)
    for i in range(len(ts) - 1):
        eps = (states[i] - a[i] * x_0s[i]) / s[i]
        for j in range(i + 1, len(ts)):
            cost[i, j] = (a[j] * x_0s[i] + s[j] * eps - states[j]).flatten(1).square().mean(1).sqrt().mean()
    return cost


def best_steps(cost, n):
    """The cheapest way 0 = i_0 < i_1 < ... < i_n = M by dynamic programming, exactly: indices, summed cost."""
    M = len(cost) - 1
    value, before = torch.full((M + 1,), math.inf, dtype=torch.float64), []
    value[0] = 0
    for _ in range(n):
        value, last = (value[:, None] + cost).min(0)
        before.append(last)
    path = [M]
    for last in reversed(before):
        path.append(int(last[path[-1]]))
    return path[::-1], float(value[M])


def learn_steps(run, args, draw_with, out):
    """Walks the finest grid with 64 images, finds the best N of its times, writes steps.json and a plot."""
    ts = run.process.times(min(run.args.steps or 100, 100))
    if args.learn_steps > len(ts) - 1:
        fail(f'--learn-steps {args.learn_steps}: the walk has {len(ts) - 1} steps to choose from')
    states, x_0s = [], []

    def callback(i, t, x_t, x_0):
        states.append(x_t), x_0s.append(x_0)

    end = draw_with(callback, len(ts) - 1)
    cost = jump_costs([*states, end], x_0s, ts, run.process)
    path, total = best_steps(cost, args.learn_steps)
    plain_path = [round(i * (len(ts) - 1) / args.learn_steps) for i in range(args.learn_steps + 1)]
    uniform = sum(float(cost[i, j]) for i, j in zip(plain_path, plain_path[1:]))
    times = [float(ts[i]) for i in path]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / 'steps.json', json.dumps(dict(times=times, cost=total, cost_of_equal_steps=uniform, grid=[float(t) for t in ts], run=run.hash,
                                                     cfg=args.cfg, cfg_interval=list(args.cfg_interval), cfg_rescale=args.cfg_rescale), indent=1).encode())
    n = range(args.learn_steps + 1)
    plot(out / 'steps.png', {f'learned, cost {total:.3f}': (n, times), f'equal steps, {uniform:.3f}': (n, [float(ts[i]) for i in plain_path])},
         f'{args.learn_steps} steps of {run.path}', 'step', 't')
    print0(f'{out}/steps.json: {args.learn_steps} steps, summed cost of the jumps {total:.4f} (equal steps {uniform:.4f}); use with --steps-file; '
           f'look at {out}/steps.png')


def write_pairs(args, run, conditions, out):
    """Shards of 64 pairs: noise, image (in the process's range), mask, level, number. One file appears at once; the next start skips it."""
    stop, shards = Stop(), list(range(0, args.n, 64))
    for k in progress(shards[rank()::world()], 'pairs', unit='shard'):
        ids, file = list(range(k, min(k + 64, args.n))), out / f'pairs_{k:07d}_{min(64, args.n - k)}.npz'
        if file.exists():
            continue
        parts = []
        for i in range(0, len(ids), args.batch_size):
            some, start = ids[i:i + args.batch_size], []
            mask, level, about = conditions(some)
            image = draw(run, args, some, 'image', args.steps, mask, level, lambda i, t, x_t, x_0: start or start.append(x_t.cpu()))
            parts.append((start[0].numpy(), image.cpu().numpy(), np.uint8(mask.cpu().numpy()), level.numpy(), np.array(some),
                          np.array([a[0] for a in about])))
        buffer = io.BytesIO()
        np.savez(buffer, **dict(zip(('noise', 'image', 'mask', 'level', 'index', 'source'), map(np.concatenate, zip(*parts)))))
        atomic_write(file, buffer.getbuffer())
        for old in out.glob(f'pairs_{k:07d}_*.npz'):
            if old != file:
                old.unlink()                                             # a shorter last shard of a smaller --n
        if stop.signum:
            print0(f'{out}: stopped by signal {stop.signum}; the same command goes on')
            raise SystemExit(128 + stop.signum)
    stop.restore()
    barrier()
    print0(f'{out}: {args.n} pairs; train on them with: python train_bravo.py --rflow --reflow {out} --init {args.bravo}')


def read_steps(args, run):
    """Solver times from a file of --learn-steps. Fails when they are no falling times; says when they are another model's."""
    try:
        told = json.loads(Path(args.steps_file).read_text())
        ts = torch.tensor(told['times'], dtype=torch.float32)
        good = ts.ndim == 1 and len(ts) > 1 and ts[0] == 1 and ts[-1] == 0 and bool((ts.diff() < 0).all())
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        fail(f'--steps-file {args.steps_file}: expected a JSON with "times" that fall from 1 to 0, as --learn-steps writes it')
    if told.get('run') != run.hash or told.get('cfg') != args.cfg:
        print0(f'note: {args.steps_file} was learned for run {told.get("run")} with --cfg {told.get("cfg")}; this is {run.hash} with {args.cfg:g}')
    return ts


def read_requests(args, run):
    """What the masks shall hold: a list of arrays (n,3) of diameter, x, y as fractions of the box, nan for any; [] for no wish."""
    if args.count is None and not args.requests:
        return []
    side = run.args.size * sum(run.spacing) / 2                                                   # of the box, mm
    if args.requests:
        rows = read_csv(args.requests)
        if not rows or not {'count', 'size', 'x', 'y'} <= rows[0].keys():
            fail(f'--requests {args.requests}: expected columns count,size,x,y')
    else:
        x, y = zip(*args.location) if args.location else ((), ())
        rows = [dict(count=args.count, size=args.size or (), x=x, y=y)]
    out = []
    for i, row in enumerate(rows):
        request = np.full((0, 3), math.nan)
        try:
            values = [[float(v) for v in (row[k].split(';') if isinstance(row[k], str) else row[k]) if v != ''] for k in ('size', 'x', 'y')]
            request = np.full((int(row['count']), 3), math.nan)
            for j, column in enumerate(values):
                request[:len(column), j] = column
        except ValueError:
            values = None
        low, high = np.nanmin(request, 0, initial=0), np.nanmax(request, 0, initial=0)
        if values is None or len(request) > LESIONS or low.min() < 0 or high[1:].max() > 1 or len(values[1]) != len(values[2]):
            fail(f'--requests {args.requests}: line {i + 2}: expected a count of at most {LESIONS}, and for no more lesions than that '
                 'sizes in mm and x, y from 0 to 1')
        request[:, 0] /= side
        out.append(request)
    return out


def draw(run, args, numbers_, what, steps, mask=None, level=None, callback=None, requests=None, trace=None):
    """x_0 (B,C,...) in the process's space and range for the images of these numbers. Each has a generator of its own, so that its
    noise is the same bits whatever shares its batch. trace: gets the steps of --sampler adaptive."""
    name, ts, clip = solver(run, args, steps)
    device, weight = next(run.net.parameters()).device, args.cfg if what == 'image' else args.seg_cfg
    sources = [generator(args.seed, what, i) for i in numbers_]
    noise = lambda: torch.stack([torch.randn(run.process.space.shape(run.args.size), generator=g) for g in sources]).to(device)
    extra = level[:, None].to(device) if run.args.slice_level else None
    null = [None] * len(numbers_)
    context = lesion_tokens(requests or null).to(device) if run.args.controllable else None
    mask = None if mask is None else mask_condition(mask, run.args.p_uncond)
    guidance = None if weight == 1 else Guidance(weight, args.cfg_interval, args.cfg_rescale, None if mask is None else torch.zeros_like(mask),
                                                 lesion_tokens(null).to(device) if run.args.controllable else None)
    denoise = make_denoise(run.model, run.process, mask, context, extra, args.dtype, clip, guidance)
    more = {'ddim': dict(eta=args.eta), 'adaptive': dict(tol=args.tol or 0.01, pair=args.pair or 'bs23', trace=trace)}.get(name, {})
    return SAMPLERS[name](denoise, noise(), ts, run.process, noise, callback, **more)


class Masks:
    """Mask number i, its slice level and where it comes from: (S,S) uint8, level, source patient, condition."""

    def __init__(self, args, size, box):
        self.args, self.items = args, []
        if args.data:
            data = load_slices(args.data, size, ('bravo',), box, args.split, args.cache)
            rows = data.rows(args.part, args.empty_slices, args.seed)
            rows = rows[torch.randperm(len(rows), generator=generator(args.seed, 'order')).numpy()]
            self.items = [(data.masks[r, 0], data.table[r]['level'], data.table[r]['source'] or data.table[r]['patient'],
                           f'{data.table[r]["folder"]}:{data.table[r]["z"]}', data.table[r]['spacing']) for r in rows]
        elif args.masks:
            for p in find_patients([args.masks], ('seg',)):
                volume, spacing = read_nifti(p['files']['seg'])
                for z, m in enumerate(volume > 0):
                    pixel = [n * s / size for n, s in zip(m.shape, spacing[1:])]
                    m = m.astype(np.uint8) if m.shape == (size, size) else shrink_mask(m, size, 1.0, 0)[0]
                    self.items.append((m, None, p['source'] if p['synthetic'] else p['name'], f'{p["folder"].name}:{z}', pixel))
        if not self.items and not args.seg:
            fail(f'{args.masks or args.part + " part of " + " ".join(args.data)}: holds no mask to use')

    def __getitem__(self, i):
        mask, level, source, condition, spacing = self.items[i % len(self.items)]
        return mask, self.level(i) if level is None or self.args.slice_level is not None else level, source, condition, spacing

    def level(self, i):
        """The level asked for, or one drawn for image i."""
        return self.args.slice_level if self.args.slice_level is not None else float(torch.rand((), generator=generator(self.args.seed, 'level', i)))


HEADER = ['folder', 'index', 'seed', 'condition', 'source_patient', 'level', 'tumour_pixels', 'sampler', 'steps', 'bravo', 'seg']


def open_set(args, runs, requests):
    """Finds what of a half-done set is whole, drops the rest, writes manifest.csv before any image. Returns its rows.

    A folder without a line in the manifest is not part of the set, so that an unfinished one never passes for real data.
    """
    out = Path(args.out)
    same = {k: v for k, v in plain(args).items() if k not in ('n', 'batch_size', 'device', 'compile', 'out', 'cache')}
    last = list(runs.values())[-1]
    same.update({k: r.hash for k, r in runs.items()}, pixels=last.args.size, box=list(last.box),
                asked=[[[None if math.isnan(v) else round(float(v), 6) for v in lesion] for lesion in r] for r in requests])
    note = out / 'sample.json'
    if note.exists():
        old = json.loads(note.read_text())
        changed = [f'{k} {same[k]} (was {old.get(k)})' for k in same if old.get(k) != same[k]]
        if changed:
            fail(f'--out {out}: holds a set made otherwise: {", ".join(changed[:3])}; choose another --out')
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for file in [out / 'manifest.csv', *out.glob('manifest.part*.csv')]:
        if file.exists():
            lines = file.read_text().split('\n')[:-1]                           # a line without its end was cut off by a kill
            for row in csv.reader(lines[1:] if file.name == 'manifest.csv' else lines):
                if len(row) == len(HEADER) and (out / row[0]).is_dir():
                    rows[int(row[1])] = row
    if rank() == 0:
        known = {r[0] for r in rows.values()}
        for f in out.iterdir():
            if f.is_dir() and f.name not in known:
                shutil.rmtree(f)
        atomic_write(note, json.dumps(same, indent=1).encode())
        write_csv(out / 'manifest.csv', HEADER, [rows[i] for i in sorted(rows)])
    barrier()
    if rank() == 0:
        for f in out.glob('manifest.part*.csv'):
            f.unlink()
    barrier()
    return rows


def close_set(out):
    """Brings the processes' lines together into manifest.csv. Returns its rows."""
    rows = {int(r['index']): [r[h] for h in HEADER] for r in read_csv(out / 'manifest.csv')}
    for file in out.glob('manifest.part*.csv'):
        rows.update({int(r[1]): r for r in csv.reader(file.read_text().splitlines())})
    rows = [rows[i] for i in sorted(rows)]
    write_csv(out / 'manifest.csv', HEADER, rows)
    for file in out.glob('manifest.part*.csv'):
        file.unlink()
    return rows


def keep_steps(wanted, ts, store, space):
    """A sampler callback that puts x_t and x0_hat, as images, into `store` at the solver's times nearest to the wanted ones."""
    at = {t: int((ts - t).abs().argmin()) for t in wanted if t > 0}
    if len(set(at.values())) < len(at):
        fail(f'--save-at {",".join(map(str, wanted))}: two of these fall on one of the {len(ts) - 1} solver steps; use more --steps')

    def callback(i, t, x_t, x0_hat):
        if i in at.values():
            store.append((t, space.decode(x_t).cpu(), space.decode(x0_hat).cpu()))

    return callback


def plot_steps(path, traces, args, guidance):
    """Step size against t of up to 8 images of this process, refused steps as points; prints what an image cost."""
    forwards, curves, spots = [], {}, ([], [])
    for t, h, good in traces:
        for b in range(t.shape[1]):
            there = h[:, b] > 0
            asks = 3 if args.pair != 'heun-euler' else 2
            doubled = 1 + guidance.at(t[there, b]).double().mean().item()                             # guided steps ask twice
            forwards.append((asks * int(there.sum()) + 1) * doubled)
            if len(curves) < 8:
                kept, refused = there & good[:, b], there & ~good[:, b]
                curves[f'image {len(curves)}'] = (t[kept, b].tolist(), h[kept, b].tolist())
                spots[0].extend(t[refused, b].tolist()), spots[1].extend(h[refused, b].tolist())
    plot(path, {**curves, **({'.refused': spots} if spots[0] else {})}, f'step size, {args.pair or "bs23"}, tol {args.tol or 0.01:g}', 't', 'h', logy=True)
    print0(f'adaptive: {np.mean(forwards):.1f} forwards an image ({min(forwards):.0f} to {max(forwards):.0f}); look at {path}')


@torch.no_grad()
def main(args):
    # models and masks
    device, out = setup(args), Path(args.out)
    runs = {k: load_run(getattr(args, k), device, args.dtype, args.weights) for k in ('seg', 'bravo') if getattr(args, k)}
    for kind, run in runs.items():
        if run.args.script != kind:
            fail(f'--{kind} {run.path}: is a run of train_{run.args.script}.py')
        if (args.cfg if kind == 'bravo' else args.seg_cfg) != 1 and not run.args.p_uncond:
            fail(f'--{"cfg" if kind == "bravo" else "seg-cfg"}: {run.path} was trained without --p-uncond and knows no image without its condition')
        run.model = torch.compile(run.net) if args.compile else run.net
        solver(run, args, args.steps if kind == 'bravo' else args.seg_steps)
    main_run = runs.get('bravo', runs.get('seg'))
    if len(runs) == 2 and runs['seg'].args.size != main_run.args.size:
        fail(f'--seg draws {runs["seg"].args.size} pixels, --bravo {main_run.args.size}; train both at one --size')
    if len(runs) == 2 and max(abs(a - b) for a, b in zip(runs['seg'].box, main_run.box)) > 0.02:
        print0(f'note: the mask model saw the brain box {runs["seg"].box}, the image model {main_run.box}; masks may not fit')
    requests = read_requests(args, runs['seg']) if args.seg else []
    if requests and not runs['seg'].args.controllable:
        fail(f'--count and --requests: {runs["seg"].path} was trained without --controllable')
    if args.seg and not requests and runs['seg'].args.controllable and not runs['seg'].args.p_uncond:
        fail(f'--seg {runs["seg"].path}: was trained with --controllable and no --p-uncond, so it must be told what to draw; give --count or --requests')
    masks = Masks(args, main_run.args.size, main_run.box)
    name, ts, _ = solver(main_run, args, args.steps if args.bravo else args.seg_steps)
    if args.save_at:
        keep_steps(args.save_at, ts, [], None)                                         # fails now, not after the first batch

    def conditions(ids):
        """Of the images of these numbers: masks (B,1,S,S) of 0 and 1, levels (B,), and (source patient, condition, spacing) of each."""
        if not args.seg:
            picked = [masks[i] for i in ids]
            mask = torch.from_numpy(np.stack([p[0] for p in picked])).float()[:, None].to(device)
            return mask, torch.tensor([p[1] for p in picked]), [p[2:] for p in picked]
        level = torch.tensor([masks.level(i) for i in ids])
        asked = [requests[i % len(requests)] for i in ids] if requests else None
        drawn = runs['seg'].process.from_range(draw(runs['seg'], args, ids, 'mask', args.seg_steps, level=level, requests=asked))
        told = [f'seg:{runs["seg"].hash}' + (f' request {i % len(requests)}: {len(r)} lesions' if asked else '') for i, r in zip(ids, asked or ids)]
        return (drawn > 0).float(), level, [('', t, runs['seg'].spacing) for t in told]

    if args.learn_steps:
        ids = list(range(64))
        mask, level, _ = conditions(ids)
        args.sampler = 'euler'
        return learn_steps(main_run, args, lambda callback, n: draw(main_run, args, ids, 'image', n, mask, level, callback), out)
    done = open_set(args, runs, requests)
    if args.pairs:
        return write_pairs(args, main_run, conditions, out)
    guidance = Guidance(args.cfg if args.bravo else args.seg_cfg, args.cfg_interval)
    asked = asked_times(name, ts, main_run.process)
    told = f'{name} with {len(ts) - 1} steps = {len(asked) + sum(guidance.at(t).item() for t in asked)} forwards an image'
    if name == 'dpm++2s':
        told += ', some at times that the network was not trained on'
    if name == 'adaptive':
        told, traces = f'adaptive, {args.pair or "bs23"}, at times that the network was not trained on', []
    todo = [i for i in range(args.n) if i not in done][rank()::world()]
    print0(f'{out}: {args.n} patients, {len(done)} there already; {told}')

    # batch by batch, image by image to disk
    stop, clock, made = Stop(), time.perf_counter(), 0
    part = open(out / f'manifest.part{rank()}.csv', 'a', newline='')
    bar = progress(total=len(todo), unit='image')
    for k in range(0, len(todo), args.batch_size):
        ids = todo[k:k + args.batch_size]
        mask, level, about = conditions(ids)
        images, steps = None, []
        if args.bravo:
            callback = keep_steps(args.save_at, ts, steps, main_run.process.space) if args.save_at else None
            trace = []
            x_0 = draw(main_run, args, ids, 'image', args.steps, mask, level, callback, None, trace)
            images = main_run.process.from_range(x_0).clamp(-1, 1).cpu().numpy()[:, 0]
            if name == 'adaptive':
                traces.append([torch.stack(v) for v in zip(*trace)])
        mask = mask.cpu().numpy()[:, 0]
        for j, i in enumerate(ids):
            source, condition, spacing = about[j]
            zoom = max(1, 128 // mask.shape[-1])
            show = mask[j] * 2 - 1 if images is None else images[j]
            files = {'preview.png': grid_png([[show, outline(show, mask[j], zoom=zoom)]], zoom=zoom)}
            if steps:
                final = [(0.0, images[j], images[j])] if 0 in args.save_at else []
                t, x_t, x_0 = zip(*[(s[0], s[1][j, 0].numpy(), s[2][j, 0].numpy()) for s in steps], *final)
                buffer = io.BytesIO()
                np.savez_compressed(buffer, t=np.float32(t), x_t=np.float32(x_t), x0_hat=np.float32(x_0))
                files |= {'trajectory.npz': buffer.getvalue(), 'trajectory.png': grid_png([x_t, x_0], ['x_t', 'x0_hat'], zoom)}
            folder = f'syn_{args.seed}_{i:06d}'
            write_patient(out / folder, {} if images is None else {'bravo': images[j]}, mask[j], spacing, files)
            csv.writer(part, lineterminator='\n').writerow([folder, i, args.seed, condition, source, f'{float(level[j]):.4f}', int(mask[j].sum()),
                                                            name, len(ts) - 1, *(runs[r].hash if r in runs else '' for r in ('bravo', 'seg'))])
            part.flush()
        made += len(ids)
        bar.update(len(ids))
        if stop.signum:
            print0(f'{out}: stopped by signal {stop.signum}; the same command goes on')
            raise SystemExit(128 + stop.signum)
    part.close(), bar.close(), stop.restore()
    seconds = time.perf_counter() - clock
    barrier()
    if rank() == 0:
        rows = close_set(out)
        first = [out / r[0] for r in rows[:16]]
        m = [read_nifti(f / 'seg.nii.gz')[0][0] for f in first]
        a = [read_nifti(f / 'bravo.nii.gz')[0][0] for f in first] if args.bravo else [x * 2.0 - 1 for x in m]
        zoom = max(1, 128 // m[0].shape[-1])
        pairs = [(x, outline(x, y, zoom=zoom)) for x, y in zip(a, m)]
        save_grid(out / 'grid.png', [[p[k] for p in pairs[r:r + 8]] for r in range(0, len(pairs), 8) for k in (0, 1)], None, zoom)
        empty = sum(int(r[6]) == 0 for r in rows)
        if name == 'adaptive' and args.bravo and made:
            plot_steps(out / 'steps.png', traces, args, guidance)
        rate = f'{made * world() / seconds:.2f} images/s, ' if made else ''
        print0(f'{out}: {len(rows)} patients ({rate}{empty} without tumour); look at {out}/grid.png')
    barrier()


if __name__ == '__main__':
    main(get_args())
