"""Makes synthetic patients: masks from a mask model, from patients or from a folder, and images that fit them.

  python sample.py --seg runs/seg --bravo runs/bravo --n 16            new masks, new images
  python sample.py --data DIR --part train --bravo runs/bravo --n 100  masks of real training patients, new images
  python sample.py --masks runs/masks --bravo runs/bravo --n 15000     masks that an earlier call made (--seg alone)
  python sample.py --data DIR --bravo runs/bravo --n 4096 --pairs --out runs/pairs   noise and image, for train_bravo.py --reflow
  python sample.py --seg runs/seg --count 3 --size 8 --location 0.6,0.4   masks as asked for (train_seg.py --controllable)
  python sample.py --seg runs/seg --hard-cases runs/hard/hard.json        masks of the kinds that a segmenter misses (analysis.py hard-cases)
  python sample.py --seg runs/seg --bravo runs/bravo --gate runs/detector    only images that a detector calls good (classifier.py train)
  python sample.py --seg runs/seg3d --bravo runs/bravo3d --n 100 --batch-size 2   volumes, from runs trained with --volume
  python sample.py --data DIR --part test --per-patient 100 --bravo runs/bravo    100 images for each patient, on masks of that patient
  python sample.py --data DIR --part test --stack --rho 0.7 --bravo runs/bravo    volumes: all slices of a patient, with noise alike along z

Leaves in --out one folder a patient in the layout of real data (bravo.nii.gz, seg.nii.gz, preview.png), manifest.csv (seed,
condition, source patient, hash of the run for each), grid.png. The same command goes on with a half-done set; torchrun
shares it out. Image i is the same whatever the batch size, the number of processes and how many were asked for.
"""
import itertools

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
    g.add_argument('--slice-level', type=number(float, 0, 1), help='level for models that know it; none: the mask\'s own, or drawn as training slices have them')
    g.add_argument('--n', type=number(int, 1), help='number of patients; none: 16')
    g.add_argument('--per-patient', type=number(int, 1), metavar='K', help='instead of --n: K images for each patient of --data, on masks of that patient in turn')
    g.add_argument('--mc', type=number(int, 2), metavar='K', help='draw K images for each mask; beside the first, write their mean and standard deviation')
    g = p.add_argument_group('volumes from a model of slices')
    g.add_argument('--stack', action='store_true', default=None, help='draw all slices of a patient of --data or --masks in order, as one volume (--n: of patients; none: all)')
    g.add_argument('--rho', type=number(float, 0, 1), metavar='R', help='correlation of the noise of one slice with that of the next; none: 0')
    g = p.add_argument_group('what the masks hold (a mask model trained with --controllable)')
    g.add_argument('--count', type=number(int, 0, LESIONS), help='lesions in each mask')
    g.add_argument('--size', type=numbers(float, 0), help='their diameters, mm, as 8 or 8,5; none: any')
    g.add_argument('--location', nargs='+', type=numbers(float, 0, 1), metavar='X,Y', help='their centres, from the left and the top of the box; none: any')
    g.add_argument('--requests', metavar='FILE', help='CSV count,size,x,y with a line for each mask in turn; several values as 8;5')
    g.add_argument('--hard-cases', metavar='FILE', help='hard.json of analysis.py hard-cases: lesions that a segmenter often misses are asked for more often')
    g = p.add_argument_group('guidance (models trained with --p-uncond)')
    g.add_argument('--cfg', type=number(float, 0), default=1.0, help='weight of the mask on the image; 1: none, one forward a step')
    g.add_argument('--seg-cfg', type=number(float, 0), default=1.0, help='weight of the request on the mask')
    g.add_argument('--cfg-interval', nargs=2, type=number(float, 0, 1), default=(0.0, 1.0), metavar=('A', 'B'), help='guide only where A < t <= B')
    g.add_argument('--cfg-rescale', type=number(float, 0, 1), default=0.0, help='bring the guided x0_hat back to its spread; 0: no, 1: fully')
    g = p.add_argument_group('what is kept')
    g.add_argument('--gate', metavar='RUN', help='detector of distorted images (classifier.py train): draw again what it calls bad')
    g.add_argument('--threshold', type=number(float, 0, 1, open_low=True), metavar='P', help='keep where p(bad) < P; none: the detector\'s own, or with --best-of all')
    g.add_argument('--rate', type=number(float, 0, 1), metavar='Q', help='share of bad images of this model, if known: only to say what to expect')
    g.add_argument('--best-of', type=number(int, 1), metavar='N', help='draw N images for each mask, keep the one with the lowest p(bad)')
    g.add_argument('--reject-copies', nargs='+', metavar='DIR', help='real patients: draw again what correlates with a training slice more than other patients\' do')
    g.add_argument('--max-draws', type=number(int, 1), metavar='M', help='draws for one image at most; none: 20, or 20 times --best-of')
    g = p.add_argument_group('solver')
    g.add_argument('--sampler', choices=tuple(SAMPLERS), help='none: dpm++ for RFlow, ddim for DDPM; euler with --steps-file')
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
    g.add_argument('--lora-scale', type=number(float, 0, 1), metavar='S', help='of a --bravo run of draft.py: 0 is the model that it started from; none: 1')
    g.add_argument('--save-at', type=numbers(float, 0, 1), help='also keep x_t and x0_hat at these times, as 1,.5,.1,0')
    g = p.add_argument_group('run')
    g.add_argument('--pairs', action='store_true', help='write noise and image of each in shards, for train_bravo.py --reflow, and no patients')
    g.add_argument('--out', default='runs/synthetic', metavar='DIR')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept, with --data')
    g.add_argument('--batch-size', type=number(int, 1), default=16)
    g.add_argument('--splits', type=number(int, 1, 64), default=1, help='slabs in which an autoencoder decodes volumes, to save memory')
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
    judges = 'gate' if args.gate else 'reject_copies'
    for name, wanted in (('part', 'data'), ('split', 'reject_copies' if args.reject_copies else 'data'), ('empty_slices', 'data'), ('seg_steps', 'seg'),
                         ('per_patient', 'data'), ('threshold', 'gate'), ('rate', 'gate'), ('best_of', 'gate'), ('max_draws', judges), ('gate', 'bravo'),
                         ('reject_copies', 'bravo'), ('lora_scale', 'bravo'), ('mc', 'bravo'), ('steps', 'bravo'), ('rho', 'stack')):
        if getattr(args, name) is not None and not getattr(args, wanted):
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: does nothing without --{wanted.replace("_", "-")}')
    if (args.gate or args.reject_copies) and (args.pairs or args.learn_steps):
        fail('--gate and --reject-copies choose what a set keeps; leave --pairs and --learn-steps away')
    for name, others in (('stack', ('seg', 'mc', 'per_patient', 'empty_slices', 'slice_level', 'save_at', 'gate', 'reject_copies', 'pairs', 'learn_steps')),
                         ('mc', ('gate', 'reject_copies', 'pairs', 'learn_steps', 'save_at'))):
        for other in others if getattr(args, name) else ():
            if getattr(args, other) not in (None, False):
                why = 'all slices of a patient, as they are in --data or --masks' if name == 'stack' else 'the mean and spread of all draws'
                fail(f'--{name} makes {why}; leave --{other.replace("_", "-")} away')
    if args.max_draws and args.max_draws < (args.best_of or 1):
        fail(f'--max-draws {args.max_draws}: is less than --best-of {args.best_of}')
    if args.n and args.per_patient:
        fail('--n and --per-patient both say how many; give one')
    if args.lora_scale is not None and args.weights == 'raw':
        fail('--weights raw: is --lora-scale 0 of a run of draft.py; give one of them')
    args.n = args.n or (0 if args.stack else 16)
    asked = [f'--{k.replace("_", "-")}' for k in ('count', 'size', 'location', 'requests', 'hard_cases') if getattr(args, k) is not None]
    if asked and not args.seg:
        fail(f'{asked[0]}: says what a mask model draws; give it with --seg')
    if (args.requests or args.hard_cases) and len(asked) > 1:
        fail(f'{asked[-1]} and {asked[0]}: give one of them')
    if args.hard_cases and (args.pairs or args.learn_steps):
        fail('--hard-cases: writes into manifest.csv how likely each mask was; leave --pairs and --learn-steps away')
    if args.hard_cases and not Path(args.hard_cases).is_file():
        fail(f'--hard-cases {args.hard_cases}: no such file; write it with analysis.py hard-cases')
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
    for name in ('bravo', 'seg', 'masks', 'gate'):
        if getattr(args, name) and not Path(getattr(args, name)).exists():
            fail(f'--{name} {getattr(args, name)}: no such {"folder" if name == "masks" else "run folder or checkpoint"}')
    if args.save_at and not args.bravo:
        fail('--save-at keeps the steps of an image; add --bravo RUN')
    check_out(args.out)
    if Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not (Path(args.out) / 'sample.json').exists():
        fail(f'--out {args.out}: holds files that are not a set of this script; give an empty folder')
    return args


def solver(run, args, steps):
    """Fills in what was not asked for: the name of the sampler, its steps and whether x0_hat is clipped."""
    name, steps, clip = default_solver(run.args, args.sampler or ('euler' if args.steps_file else None), steps)           # whose jumps they were learned for
    if name == 'adaptive' and not run.args.rflow:
        fail(f'--sampler adaptive: is for RFlow; {run.path} is DDPM, use dpm++ or ddim')
    if name == 'maisi' and run.args.maisi != 'rflow':
        fail(f'--sampler maisi: repeats the rounding of MAISI\'s RFlow networks; {run.path} does not come from one, use euler')
    ts = run.process.times(steps, 'maisi' if name == 'maisi' else args.grid, args.shift, own=True)
    if args.steps_file and run.args.script == 'bravo':
        ts = read_steps(args, run)
    pixels = not run.process.space.about
    if args.clip and not pixels:
        fail(f'--clip: bounds pixels; {run.path} acts on {run.process.space.name}, which have no bounds')
    return name, ts, pixels and clip if args.clip is None else args.clip


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


def learned_for(args, run):
    """What the best times depend on: the network and its guidance."""
    return dict(run=run.hash, cfg=args.cfg, cfg_interval=list(args.cfg_interval), cfg_rescale=args.cfg_rescale)


def learn_steps(run, args, draw_with, out):
    """Walks the finest grid with 64 images, finds the best N of its times, writes steps.json and a plot."""
    n = min(run.args.steps or 100, 100)
    ts = solver(run, args, n)[1]
    if args.learn_steps > len(ts) - 1:
        fail(f'--learn-steps {args.learn_steps}: the walk has {len(ts) - 1} steps to choose from')
    states, x_0s = [], []

    def callback(i, t, x_t, x_0):
        states.append(x_t), x_0s.append(x_0)

    end = draw_with(callback, n)
    cost = jump_costs([*states, end], x_0s, ts, run.process)
    path, total = best_steps(cost, args.learn_steps)
    plain_path = [round(i * (len(ts) - 1) / args.learn_steps) for i in range(args.learn_steps + 1)]
    uniform = sum(float(cost[i, j]) for i, j in zip(plain_path, plain_path[1:]))
    times = [float(ts[i]) for i in path]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / 'steps.json', json.dumps(dict(times=times, cost=total, cost_of_equal_steps=uniform, grid=[float(t) for t in ts],
                                                     **learned_for(args, run)), indent=1).encode())
    n = range(args.learn_steps + 1)
    plot(out / 'steps.png', {f'learned, cost {total:.3f}': (n, times), f'equal steps, {uniform:.3f}': (n, [float(ts[i]) for i in plain_path])},
         f'{args.learn_steps} steps of {run.path}', 'step', 't')
    print0(f'{out}/steps.json: {args.learn_steps} steps, summed cost of the jumps {total:.4f} (equal steps {uniform:.4f}); use with --steps-file; '
           f'look at {out}/steps.png')


def write_pairs(args, run, conditions, out):
    """Shards of 64 pairs: noise, image (in the process's range), mask, level, number, source, and how it was guided. One file appears at once; the next start skips it."""
    stop, shards = Stop(), list(range(0, args.n, 64))
    for k in progress(shards[rank()::world()], 'pairs', unit='shard'):
        ids, file = list(range(k, min(k + 64, args.n))), out / f'pairs_{k:07d}_{min(64, args.n - k)}.npz'
        if file.exists():
            continue
        parts = []
        for i in range(0, len(ids), args.batch_size):
            some, start = ids[i:i + args.batch_size], []
            mask, level, about = conditions(some)
            x_0 = draw(run, args, [(i,) for i in some], 'image', args.steps, mask, level, lambda i, t, x_t, x_0: start or start.append(x_t.cpu()))
            guidance = np.tile(np.float32([args.cfg, *args.cfg_interval, args.cfg_rescale] if args.cfg != 1 else [1, 0, 1, 0]), (len(some), 1))
            parts.append((start[0].numpy(), x_0.cpu().numpy(), np.uint8(mask.cpu().numpy()), level.numpy(), np.array(some),
                          np.array([a[0] for a in about]), guidance))
        buffer = io.BytesIO()
        np.savez(buffer, **dict(zip(('noise', 'image', 'mask', 'level', 'index', 'source', 'guidance'), map(np.concatenate, zip(*parts)))))
        atomic_write(file, buffer.getbuffer())
        for old in out.glob(f'pairs_{k:07d}_*.npz'):
            if old != file:
                old.unlink()                                             # a shorter last shard of a smaller --n
        if stop.signum:
            print0(f'{out}: stopped by signal {stop.signum}; the same command goes on')
            raise SystemExit(128 + stop.signum)
    stop.restore()
    barrier()
    print0(f'{out}: {args.n} pairs; train on them with: python train_bravo.py --rflow --reflow {out} --init {args.bravo}'
           + f' --data {" ".join(map(str, run.args.data))}' * bool(run.args.data))


def read_steps(args, run):
    """Solver times from a file of --learn-steps. Fails when they are no falling times."""
    try:
        told = json.loads(Path(args.steps_file).read_text())
        ts = torch.tensor(told['times'], dtype=torch.float32)
        good = ts.ndim == 1 and len(ts) > 1 and ts[0] == 1 and ts[-1] == 0 and bool((ts.diff() < 0).all())
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        fail(f'--steps-file {args.steps_file}: expected a JSON with "times" that fall from 1 to 0, as --learn-steps writes it')
    return ts


def note_steps(args, run):
    """Says what differs where --steps-file was learned for another model, or other guidance."""
    told = json.loads(Path(args.steps_file).read_text())
    differ = [f'{k} {told.get(k)}, now {v}' for k, v in learned_for(args, run).items() if told.get(k) != v]
    if differ:
        print0(f'note: {args.steps_file} was learned for {"; ".join(differ)}')


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


def read_hard(path, run):
    """The mixture of analysis.py hard-cases: requests as read_requests gives them, and of each p and p_real / p, the weight that undoes the choice."""
    try:
        told = json.loads(Path(path).read_text())
        side = run.args.size * (sum(run.spacing) / 2 if told['unit'] == 'mm' else 1)              # of the box, in the file's unit
        requests = [np.array(c['lesions'], float).reshape(-1, 3)[:LESIONS] / (side, 1, 1) for c in told['conditions']]
        p, real = (torch.tensor([c[k] for c in told['conditions']], dtype=torch.float64) for k in ('p', 'p_real'))
        good = len(p) > 0 and bool((p > 0).all()) and all(abs(v.sum().item() - 1) < 1e-6 for v in (p, real)) and all(np.isfinite(r).all() for r in requests)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        fail(f'--hard-cases {path}: expected a JSON with unit and conditions of lesions, p, p_real, as analysis.py hard-cases writes it')
    return requests, p, real / p


def draw_condition(p, seed, i):
    """The number of image i's condition, drawn with probabilities p from a generator of its own."""
    return int(torch.multinomial(p, 1, generator=generator(seed, 'hard', i)))


def along(rho, noises):
    """Noise of the last of some slices, from fresh noise of each: e_k = rho e_(k-1) + sqrt(1 - rho^2) n_k. Every e_k is N(0,1), and
    corr(e_j, e_k) = rho^|j-k|: a slice by itself is drawn as ever, only neighbours are drawn alike."""
    e = noises[0]
    for n in noises[1:]:
        e = rho * e + math.sqrt(1 - rho ** 2) * n
    return e


def draw(run, args, keys, what, steps, mask=None, level=None, callback=None, requests=None, trace=None, near=None, spacing=None):
    """x_0 (B,C,...) in the process's space and range for images of these keys: (i,) for image i, (i, j) for its candidate j > 0, a list of keys
    for a slice and all below it (along). Each has a generator of its own, so that its noise is the same bits whatever shares its batch.
    trace: gets the steps of --sampler adaptive. near (B,K,S,S): the slices below, for a run of --neighbours; none: 0. spacing: of each
    volume, mm, for networks that know it."""
    name, ts, clip = solver(run, args, steps)
    device, weight = next(run.net.parameters()).device, args.cfg if what == 'image' else args.seg_cfg
    sources = [[generator(args.seed, what, *k) for k in (key if isinstance(key, list) else [key])] for key in keys]
    fresh = lambda g: torch.randn(run.process.space.shape(run.args.size), generator=g)
    noise = lambda: torch.stack([along(args.rho, [fresh(g) for g in some]) for some in sources]).to(device)
    extra = maisi_extra(run.args, spacing).to(device) if run.args.maisi else level[:, None].to(device) if run.args.slice_level else None
    null = [None] * len(keys)
    told = lambda asked: lesion_tokens(asked).to(device) if run.args.controllable else None
    context, nothing = told(requests or null) if mask is None else request_tokens(mask, run.args), None     # a mask's lesions are the request
    if mask is not None:
        near = mask.new_zeros(len(keys), run.args.neighbours, *mask.shape[2:]) if run.args.neighbours and near is None else near
        mask, nothing = (mask_condition(mask, run.args.p_uncond, present, near) for present in (None, torch.zeros(len(keys))))
    guidance = None if weight == 1 else Guidance(weight, args.cfg_interval, args.cfg_rescale, nothing, told(null))
    denoise = make_denoise(run.model, run.process, mask, context, extra, args.dtype, clip, guidance)
    more = {'ddim': dict(eta=args.eta), 'adaptive': dict(tol=args.tol or 0.01, pair=args.pair or 'bs23', trace=trace)}.get(name, {})
    return SAMPLERS[name](denoise, noise(), ts, run.process, noise, callback, **more)


class Masks:
    """Mask number i, its slice level and where it comes from: (S,S) or (depth,S,S) uint8, level, source patient, condition, spacing.

    levels: quantiles of the levels to draw where a mask knows none; none: no network is told any. groups: lists of masks, each used in
    turn: one, or with --per-patient (which sets --n) one for each patient; with --stack the slices of each volume, from the lowest up,
    whose spacing is then (z, y, x).
    """

    def __init__(self, args, run, names, levels):
        size, depth = run.args.size, run.args.volume
        self.args, self.levels, items, grid = args, levels, [], (depth, size, size) if depth else (size, size)
        if args.data:
            data = load_slices(args.data, size, names, run.box, args.split, args.cache, run.args.labels, run.args.speck, depth=depth)
            rows = data.rows(args.part, None if args.stack else args.empty_slices, args.seed)
            if not args.stack:
                rows = rows[torch.randperm(len(rows), generator=generator(args.seed, 'order')).numpy()]
            folders = {(data.table[r]['root'], data.table[r]['folder']) for r in rows} if args.stack else ()
            dz = {f: read_nifti(find_file(Path(*f), 'seg'))[1][:1] for f in folders}
            items = [(data.masks[r, 0], data.table[r]['level'], data.table[r]['source' if data.table[r]['synthetic'] else 'patient'],
                      f'{data.table[r]["folder"]}:{data.table[r]["z"]}', [*dz.get((data.table[r]['root'], data.table[r]['folder']), ()), *data.table[r]['spacing']])
                     for r in rows]
        elif args.masks:
            for p in find_patients([args.masks], ('seg',)):
                volume, spacing = read_nifti(p['files']['seg'])
                for z, m in enumerate([volume > 0] if depth else volume > 0):
                    pixel = [n * s / g for n, s, g in zip(m.shape, spacing[-m.ndim:], grid)]
                    m = m.astype(np.uint8) if m.shape == grid else shrink_mask(m, grid if depth else size, 1.0, 0)[0]
                    items.append((m, p['level'], p['source'] if p['synthetic'] else p['name'], f'{p["folder"].name}:{z}', [*spacing[:1] * bool(args.stack), *pixel]))
        if not items and not args.seg:
            fail(f'{args.masks or args.part + " part of " + " ".join(args.data)}: holds no mask to use')
        self.groups = [items]
        if args.stack:
            self.groups = [g for g in (list(v) for _, v in itertools.groupby(items, lambda item: item[3].rsplit(':', 1)[0])) if len(g) > 1]
            if not self.groups:
                fail(f'--stack: {args.masks or args.part + " part of " + " ".join(args.data)} holds single slices only; a stack needs a volume of them')
            args.n = args.n or len(self.groups)
        if args.per_patient:
            names = sorted({item[2] for item in items} - {''})             # a mask that a model drew is nobody's
            if not names:
                fail(f'--per-patient {args.per_patient}: a model drew all masks of {" ".join(args.data)}, they are of no patient; give --n instead')
            self.groups = [[item for item in items if item[2] == name] for name in names]
            args.n = args.per_patient * len(names)
            out = {r['source'] or r['patient'] for r, part in zip(data.table, data.part) if part == args.part} - {*names}
            print0(f'{args.per_patient} images for each of {len(names)} patients' + (f'; left out {len(out)} without a mask to use' if out else ''))

    def __getitem__(self, i):
        turn, group = divmod(i, len(self.groups))
        mask, level, *about = self.groups[group][turn % len(self.groups[group])]
        return mask, self.level(i) if level is None or self.args.slice_level is not None else level, *about

    def level(self, i):
        """The level asked for, or one drawn for image i as the training slices have them; nan where no network is told any."""
        if not self.levels:
            return math.nan
        if self.args.slice_level is not None:
            return self.args.slice_level
        u = float(torch.rand((), generator=generator(self.args.seed, 'level', i)))
        return float(np.interp(u, np.linspace(0, 1, len(self.levels)), self.levels))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept. A patient has rounds of --best-of candidates; the best of a round is kept if it may be, else there is another
# round. Candidate 0 is what plain sampling draws, so a gate that lets all pass changes nothing.
# ---------------------------------------------------------------------------------------------------------------------
HARD = ['log_p', 'weight']
HEADER = ['folder', 'index', 'seed', 'condition', 'source_patient', 'level', 'tumour_pixels', 'sampler', 'steps', 'bravo', 'seg']
JUDGED = ['candidate', 'p_bad', *CLASSES, 'nearest_train', 'lesions', 'diameters_mm']
REJECTED = ['index', 'seed', 'condition', 'source_patient', 'tumour_pixels', *JUDGED, 'why']


class Judge:
    """p(bad) and classes given bad by the detector of --gate; correlation with the nearest training slice for --reject-copies."""

    def __init__(self, args, run, device):
        self.detector, self.train, self.cut, self.threshold = None, None, math.inf, math.inf
        self.on, self.device = bool(args.gate or args.reject_copies), device
        if args.gate:
            self.detector = load_detector(args.gate, device)
            if self.detector.part == 'judge':
                fail(f'--gate {args.gate}: learned from judge patients, so it reports and must not select; give one of training patients')
            if max(abs(a - b) for a, b in zip(self.detector.box, run.box)) > 0.02:
                print0(f'note: the detector saw the brain box {self.detector.box}, the image model {run.box}; its verdict may not fit')
            self.threshold = args.threshold or (math.inf if args.best_of else self.detector.threshold)
        if self.detector and run.args.dual:
            print0('note: the detector learned bravo on its own scale; here it shares that of a pair')
        if args.reject_copies:
            data = load_slices(args.reject_copies, run.args.size, ('bravo',), run.box, args.split, args.cache, run.args.labels, run.args.speck)
            train = data.rows('train')
            others = np.setdiff1d(np.arange(len(data.table)), train)
            if min(len(train), len(others)) < 8:
                fail(f'--reject-copies: {len(train)} slices of training and {len(others)} of other patients; 8 of each are needed, see --split')
            self.train = data.images[train][:, 0]
            self.cut = copy_cut(self.train, data.images[others][:, 0])

    def __call__(self, images, masks):
        """Of images and masks (B,S,S): p(bad), the classes, the correlation; nan where nobody looks."""
        out = np.full((len(images), 2 + len(CLASSES)), math.nan)
        if self.detector:
            x, m = (torch.from_numpy(np.float32(v))[:, None].to(self.device) for v in (images, masks))
            logits = detector_logits(self.detector, x, m).double().cpu()
            out[:, 0], out[:, 1:-1] = logits[:, 0].sigmoid(), logits[:, 1:].softmax(1)
        if self.train is not None:
            out[:, -1] = correlation(images, self.train).max(1)
        return out

    def order(self, candidate):
        return candidate['score'][-1] > self.cut, candidate['score'][0]

    def why(self, score):
        """Why an image with that score is not kept; '' when it is."""
        return 'copy' if score[-1] > self.cut else 'distorted' if score[0] >= self.threshold else ''


def acceptance(q, tpr, fpr):
    """Share of draws that a gate lets pass, and share of bad ones among them: q bad draws, tpr of them stopped, fpr of the good ones."""
    a = q * (1 - tpr) + (1 - q) * (1 - fpr)
    return a, q * (1 - tpr) / max(a, 1e-12)


def bad_share(a, tpr, fpr):
    """Share of bad draws that an acceptance a speaks of: acceptance() solved for q (Rogan and Gladen 1978)."""
    return (1 - a - fpr) / (tpr - fpr)


def draws_for(n, a):
    """Draws until n have passed a gate that lets a share a pass: mean and standard deviation (negative binomial)."""
    return n / a, math.sqrt(n * (1 - a)) / a


def mean_of(rows, column, which=lambda r: True):
    values = [float(r[column]) for r in rows if which(r)]
    return float(np.mean(values)) if values else math.nan


class Set:
    """The folder --out: manifest.csv, a line for each patient, and rejected.csv, one for each candidate that was not kept.

    Until the end each process adds to files of its own beside them. A folder without a line in the manifest is not part of the
    set, so that an unfinished one never passes for real data: what of a half-done set is not whole goes first.
    """

    def __init__(self, args, runs, requests, judge):
        self.out, last = Path(args.out), list(runs.values())[-1]
        head = HEADER + (HARD if args.hard_cases else [])
        self.headers = {'manifest': head + JUDGED, 'rejected': REJECTED} if judge.on else {'manifest': head}
        same = {k: v for k, v in plain(args).items() if k not in ('n', 'batch_size', 'splits', 'device', 'compile', 'out', 'cache', 'max_draws', 'rate')}
        same.update({k: r.hash for k, r in runs.items()}, pixels=last.args.size, box=list(last.box), labels=last.args.labels, speck=last.args.speck,
                    seen=joined([*(r.seen for r in runs.values()), *map(seen_by, [*([args.masks] if args.masks else []), *(args.data or [])])]), per_patient=bool(args.per_patient) or None,
                    gate=judge.detector and judge.detector.hash, hard=args.hard_cases and hashlib.sha256(Path(args.hard_cases).read_bytes()).hexdigest(), dual=last.args.dual,
                    times=args.steps_file and read_steps(args, last).tolist(),
                    asked=[[[None if math.isnan(v) else round(float(v), 6) for v in lesion] for lesion in r] for r in requests])
        same, note = json.loads(json.dumps(same)), self.out / 'sample.json'                # as it will be read: lists for tuples
        if note.exists():
            old = json.loads(note.read_text())
            changed = [f'{k} {same[k]} (was {old.get(k)})' for k in same if old.get(k) != same[k]]
            if changed:
                fail(f'--out {self.out}: holds a set made otherwise: {", ".join(changed[:3])}; choose another --out')
        make_folder(self.out, '--out')
        self.tables = {name: self.read(name) for name in self.headers}
        name = solver(last, args, args.steps if last.args.script == 'bravo' else args.seg_steps)[0]
        before = {r[HEADER.index('sampler')] for r in self.tables['manifest'].values()} - {name, 'sampler'}
        if before:
            fail(f'--out {self.out}: its images were drawn with {before.pop()}, then the default; it is {name} now; choose another --out')
        if rank() == 0:
            known = {r[0] for r in self.tables['manifest'].values()}
            for f in self.out.iterdir():
                if f.is_dir() and f.name not in known and re.match(r'\.?syn_\d+_\d+(\.|$)', f.name):          # what else lies there is not ours
                    shutil.rmtree(f)
            atomic_write(note, json.dumps(same, indent=1).encode())
        self.write()
        self.parts = {name: open(self.out / f'{name}.part{rank()}.csv', 'a', newline='') for name in self.headers}

    def read(self, name):
        """{key: line} of a table and of its parts. A line without its end was cut off by a kill."""
        rows = {}
        for file in [self.out / f'{name}.csv', *sorted(self.out.glob(f'{name}.part*.csv'))]:
            for row in csv.reader(file.read_text().split('\n')[:-1] if file.exists() else ()):
                if name == 'manifest' and len(row) == len(self.headers[name]) and (self.out / row[0]).is_dir():
                    rows[int(row[1])] = row
                elif name == 'rejected' and len(row) == len(REJECTED) and row != REJECTED:
                    rows[int(row[0]), int(row[5])] = row
        return rows

    def write(self):
        """Brings the processes' lines together."""
        barrier()
        if rank() == 0:
            for name, rows in self.tables.items():
                write_csv(self.out / f'{name}.csv', self.headers[name], [rows[k] for k in sorted(rows)])
        barrier()
        if rank() == 0:
            for f in self.out.glob('*.part*.csv'):
                f.unlink()
        barrier()

    def add(self, name, row):
        csv.writer(self.parts[name], lineterminator='\n').writerow(row)
        self.parts[name].flush()

    def close(self):
        """The whole tables, of all processes, as lists of dicts."""
        for f in self.parts.values():
            f.close()
        barrier()
        self.tables = {name: self.read(name) for name in self.headers}
        self.write()
        return [[dict(zip(header, self.tables[name][k])) for k in sorted(self.tables[name])] for name, header in self.headers.items()]


def report_choice(args, judge, kept, rejected):
    """What the choice cost against the formula, and how it moved the lesions: printed, and gate.json."""
    N, every, why = args.best_of or 1, kept + rejected, Counter(r['why'] for r in rejected)
    rounds, first = len(kept) + why['copy'] + why['distorted'], (sum(int(r['candidate']) < N for r in kept), len({r['index'] for r in every}))
    a, between_, known = first[0] / max(first[1], 1), wilson(*first), lambda v: v if v < 2 else None
    about = dict(kept=len(kept), draws=len(every), why=why, best_of=N, threshold=known(judge.threshold), correlation_cut=known(judge.cut), rounds=rounds,
                 acceptance=len(kept) / max(rounds, 1), first_rounds=a, first_rounds_95=between_, rounds_formula=draws_for(len(kept), a) if a else None)
    print0(f'kept {len(kept)} of {len(every)} draws ({", ".join(f"{n} {w}" for w, n in why.items()) or "none rejected"}); of first rounds {a:.3f} '
           f'[{between_[0]:.3f}, {between_[1]:.3f}] pass')
    if a:                                                                       # by first rounds, where each mask counts once
        print0('in {} rounds of {}; from the first ones follow {:.0f} +- {:.0f} (more: some masks are harder)'.format(rounds, N, *about['rounds_formula']))
    if judge.detector:
        about.update(detector=judge.detector.hash, p_bad_first=mean_of(every, 'p_bad', lambda r: r['candidate'] == '0'), p_bad_kept=mean_of(kept, 'p_bad'))
        print0(f'mean p(bad) {about["p_bad_first"]:.4f} of first draws, {about["p_bad_kept"]:.4f} of those kept, by the detector that chose')
    figures = Path(args.gate or '') / 'metrics.json'
    if args.gate and not args.threshold and N == 1 and figures.is_file():
        tpr, fpr = (json.loads(figures.read_text())['detector'][k]['value'] for k in ('bad caught at threshold', 'good flagged at threshold'))
        q = args.rate if args.rate is not None or tpr <= fpr else min(max(bad_share(a, tpr, fpr), 0.0), 1.0)
        if q is not None:
            about['expected'] = dict(zip(('acceptance', 'bad_kept'), acceptance(q, tpr, fpr)), bad_drawn=q, tpr=tpr, fpr=fpr)
            print0(f'its own test: {tpr:.1%} of bad caught, {fpr:.1%} of good flagged; with {q:.1%} bad draws ({"told" if args.rate is not None else "from the acceptance"}) '
                   f'{about["expected"]["acceptance"]:.3f} should pass and {about["expected"]["bad_kept"]:.2%} of the kept be bad')
    for name, rows in (('drawn', every), ('kept', kept)):
        mm = [float(d) for r in rows for d in r['diameters_mm'].split(';') if d]
        size, empty = np.percentile(mm or [math.nan], (25, 50, 75)).tolist(), sum(r['lesions'] == '0' for r in rows)
        about[f'lesions_{name}'] = dict(images=len(rows), count=mean_of(rows, 'lesions'), empty=empty, diameters_mm=size)
        print0(f'{name:6}{len(rows):6} images, {mean_of(rows, "lesions"):.3f} lesions each, {empty} without; diameter {size[1]:.1f} mm (quartiles {size[0]:.1f}, {size[2]:.1f})')
    atomic_write(Path(args.out) / 'gate.json', json.dumps(about, indent=1).encode())


def keep_steps(wanted, ts, store, process):
    """A sampler callback that puts x_t and x0_hat, as images, into `store` at the solver's times nearest to the wanted ones."""
    at = {t: int((ts[:-1] - t).abs().argmin()) for t in wanted if t > 0}
    if len(set(at.values())) < len(at):
        fail(f'--save-at {",".join(map(str, wanted))}: two of these fall on one of the {len(ts) - 1} solver steps; use more --steps')

    def callback(i, t, x_t, x0_hat):
        if i in at.values():
            store.append((t, process.from_range(x_t).cpu(), process.from_range(x0_hat).cpu()))

    return callback


def plot_steps(path, traces, args, guidance):
    """Step size against t of up to 8 images of this process, refused steps as points; prints what an image cost."""
    forwards, curves, spots = [], {}, ([], [])
    for t, h, good in traces:
        for b in range(t.shape[1]):
            there = h[:, b] > 0
            t_, h_, kept_ = (v[there, b] for v in (t, h, good))
            more = [t_ - h_ / 2, t_ - h_ * 3 / 4] if args.pair != 'heun-euler' else [(t_ - h_)[kept_]]   # a refused step keeps its first slope
            asked = torch.cat([t_[:1], t_ - h_, *more])
            forwards.append(len(asked) + guidance.at(asked).sum().item())                              # where guided, it asks twice
            if len(curves) < 8:
                kept, refused = there & good[:, b], there & ~good[:, b]
                curves[f'image {len(curves)}'] = (t[kept, b].tolist(), h[kept, b].tolist())
                spots[0].extend(t[refused, b].tolist()), spots[1].extend(h[refused, b].tolist())
    plot(path, {**curves, **({'.refused': spots} if spots[0] else {})}, f'step size, {args.pair or "bs23"}, tol {args.tol or 0.01:g}', 't', 'h', logy=True)
    print0(f'adaptive: {np.mean(forwards):.1f} forwards an image ({min(forwards):.0f} to {max(forwards):.0f}); look at {path}')


def write_item(out, folder, names, images, mask, spacing, steps, more=None):
    """One patient to disk: images (C,S,S) or (C,D,S,S) of these names or None, mask (S,S) or (D,S,S), steps of --save-at as lists of t, x_t, x0_hat,
    more images {name: (S,S)}."""
    zoom, (flat,) = max(1, 128 // mask.shape[-1]), views(mask[None], mask[None])
    show = [flat * 2 - 1] if images is None else views(images, [mask] * len(images))
    files = {'preview.png': grid_png([[*show, outline(show[-1], flat, zoom=zoom), *(shown_mc(more) if more else ())]], zoom=zoom)}
    if steps:
        t, x_t, x_0 = zip(*steps)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, t=np.float32(t), x_t=np.float32(x_t), x0_hat=np.float32(x_0))
        files |= {'trajectory.npz': buffer.getvalue(), 'trajectory.png': grid_png([views(np.stack(v), [mask] * len(t)) for v in (x_t, x_0)], ['x_t', 'x0_hat'], zoom)}
    write_patient(out / folder, {} if images is None else {**dict(zip(names, images)), **(more or {})}, mask, spacing, files)


def shown_mc(more):
    """Mean and standard deviation of --mc as pictures; white is a deviation of 0.5, a quarter of the range."""
    return more['bravo_mean'], 4 * more['bravo_std'] - 1


def draw_stacks(args, run, masks, made, out):
    """A volume for each patient's stack of masks. A run of --neighbours draws slice by slice from the lowest up, one slice of many patients
    at a time; without, slices know of each other through their noise alone (--rho). Slices left out for too little head leave no gap."""
    K, size, device, (name, ts, _) = run.args.neighbours, run.args.size, next(run.net.parameters()).device, solver(run, args, args.steps)
    queue, stop = deque([i for i in range(args.n) if i not in made.tables['manifest']][rank()::world()]), Stop()
    print0(f'{out}: {args.n} stacks, {args.n - len(queue)} there already; {name} with {len(ts) - 1} steps; noise correlation {args.rho or 0:g}; '
           + (f'each slice sees the {K} below it' if K else 'slices do not see each other (train_bravo.py --neighbours)'))
    bar = progress(total=len(queue), unit='stack')
    while queue:
        ids = [queue.popleft() for _ in range(min(args.batch_size if K else 1, len(queue)))]
        stacks = [masks.groups[i % len(masks.groups)] for i in ids]
        volumes = [np.zeros((len(s), size, size), np.float32) for s in stacks]
        waves = [[(b, z) for b, s in enumerate(stacks) if z < len(s)] for z in range(max(map(len, stacks)))]
        for wave in waves if K else [sum(waves, [])]:
            for part in (wave[k:k + args.batch_size] for k in range(0, len(wave), args.batch_size)):
                if stop.signum:
                    print0(f'{out}: stopped by signal {stop.signum}; the same command goes on')
                    raise SystemExit(128 + stop.signum)
                mask = torch.from_numpy(np.stack([stacks[b][z][0] for b, z in part])).float()[:, None].to(device)
                level = torch.tensor([z / (len(stacks[b]) - 1) if stacks[b][z][1] is None else stacks[b][z][1] for b, z in part], dtype=torch.float32)
                near = [[volumes[b][z - j] if z >= j else np.zeros_like(volumes[b][0]) for j in range(1, K + 1)] for b, z in part]
                keys = [[(ids[b], 'slice', y) for y in range(0 if args.rho else z, z + 1)] for b, z in part]
                x_0 = draw(run, args, keys, 'image', args.steps, mask, level, near=torch.from_numpy(np.array(near)).to(device) if K else None)
                for (b, z), image in zip(part, run.process.from_range(x_0).clamp(-1, 1).cpu().numpy()[:, 0]):
                    volumes[b][z] = image
        for i, s, volume in zip(ids, stacks, volumes):
            folder, mask, show = f'syn_{args.seed}_{i:06d}', np.stack([item[0] for item in s]), np.linspace(0, len(s) - 1, 8).round().astype(int)
            preview = grid_png([[outline(volume[z], mask[z], zoom=max(1, 128 // size)) for z in show]])
            write_patient(out / folder, {'bravo': volume}, mask, s[0][4], {'preview.png': preview})
            made.add('manifest', [folder, i, args.seed, f'{s[0][3]}-{s[-1][3].rsplit(":", 1)[1]}', s[0][2], '', int(mask.sum()), name, len(ts) - 1, run.hash, ''])
            bar.update()
    bar.close(), stop.restore()
    rows, = made.close()
    if rank() == 0:
        shown = [Image.open(out / r['folder'] / 'preview.png') for r in rows[:6]]
        save_grid(out / 'grid.png', [[np.asarray(p.convert('RGB'))] for p in shown])
        print0(f'{out}: {len(rows)} volumes; look at {out}/grid.png, then: python evaluate.py coherence --fake {out} --data DIR')
    barrier()


@torch.no_grad()
def bake_sparse(net, device, dtype, always=False):
    """Folds the masks of --sparse24 into the weights, the same values without their making. On a GPU in bf16, a linear whose shape the
    sparse kernels take is multiplied by those if that is faster there (always: even if not): on one H200 with torch 2.11 it never was."""
    layers = {n: m for n, m in net.named_modules() if parametrize.is_parametrized(m, 'weight')}
    packed = 0
    for name, m in layers.items():
        dense = bool(m.parametrizations.weight[0].dense)                       # trained with a dense tail to its end
        parametrize.remove_parametrizations(m, 'weight')
        fits = isinstance(m, nn.Linear) and m.out_features % 32 == m.in_features % 64 == 0 and not {*name.split('.')} & {'time_embed', 'extra_embed', 'ada'}
        if device == 'cuda' and dtype == 'bf16' and not dense and fits:        # what modulates tokens is computed in fp32
            packed += pack(m, always)
    if layers:
        print0(f'2:4 sparsity: {packed} of {len(layers)} sparse layers run on sparse kernels, the others as dense ones with zeros')


def pack(linear, always):
    """Puts a 2:4 sparse linear on the GPU's sparse kernels if there is one for it and, on 16,384 tokens, it is faster. Returns whether it did."""
    weight, x = linear.weight, torch.ones(16, linear.in_features, 1024, device='cuda', dtype=torch.bfloat16).transpose(1, 2)   # strided as a U-Net's tokens are
    hook = linear.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(),))                                  # the kernels take no such tokens

    def seconds():
        linear(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            linear(x)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with autocast('cuda', 'bf16'):
        limit = math.inf if always else seconds()
        try:
            linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.bfloat16().contiguous()), requires_grad=False)
            if seconds() < limit:
                return True
        except (RuntimeError, NotImplementedError) as e:                       # this card or this torch has no kernel for it
            print0(f'2:4 sparsity: no sparse kernel for {linear.out_features} x {linear.in_features} here ({str(e).splitlines()[0]})')
    linear.weight = weight
    hook.remove()
    return False


@torch.no_grad()
def main(args):
    # models and masks
    device, out, Conv3d.splits = setup(args), Path(args.out), args.splits
    weights = {'seg': args.weights, 'bravo': args.weights if args.lora_scale is None else args.lora_scale}
    runs = {k: load_run(getattr(args, k), device, args.dtype, weights[k]) for k in ('seg', 'bravo') if getattr(args, k)}
    for kind, run in runs.items():
        if run.args.script != kind:
            fail(f'--{kind} {run.path}: is a run of train_{run.args.script}.py')
        if (args.cfg if kind == 'bravo' else args.seg_cfg) != 1 and not run.args.p_uncond:
            fail(f'--{"cfg" if kind == "bravo" else "seg-cfg"}: {run.path} was trained without --p-uncond and knows no image without its condition')
        bake_sparse(run.net, args.device, args.dtype)
        run.model = torch.compile(run.net) if args.compile else run.net
        solver(run, args, args.steps if kind == 'bravo' else args.seg_steps)
    main_run = runs.get('bravo', runs.get('seg'))
    if args.slice_level is not None and not any(r.args.slice_level for r in runs.values()):
        fail(f'--slice-level {args.slice_level:g}: {main_run.path} was trained without --slice-level and would not know it')
    if args.lora_scale is not None and not getattr(main_run.args, 'lora_rank', 0):
        fail(f'--lora-scale {args.lora_scale:g}: {main_run.path} is no run of draft.py')
    if len(runs) == 2 and runs['seg'].args.size != main_run.args.size:
        fail(f'--seg draws {runs["seg"].args.size} pixels, --bravo {main_run.args.size}; train both at one --size')
    if len(runs) == 2 and runs['seg'].args.volume != main_run.args.volume:
        fail(f'--seg was trained with --volume {runs["seg"].args.volume}, --bravo with {main_run.args.volume}; train both with one')
    slices = [f'--{k.replace("_", "-")}' for k in ('gate', 'reject_copies', 'pairs', 'learn_steps', 'mc', 'stack') if getattr(args, k)]
    if main_run.args.volume and slices:
        fail(f'{slices[0]}: is for slices, and {main_run.path} draws volumes; leave it away')
    if len(runs) == 2 and max(abs(a - b) for a, b in zip(runs['seg'].box, main_run.box)) > 0.02:
        print0(f'note: the mask model saw the brain box {runs["seg"].box}, the image model {main_run.box}; masks may not fit')
    requests = read_requests(args, runs['seg']) if args.seg else []
    wish = lambda i: i % len(requests)
    if args.hard_cases:
        requests, p, undo = read_hard(args.hard_cases, runs['seg'])
        wish = lambda i: draw_condition(p, args.seed, i)
    if requests and not runs['seg'].args.controllable:
        fail(f'--count, --requests and --hard-cases: {runs["seg"].path} was trained without --controllable')
    if args.seg and not requests and runs['seg'].args.controllable and not runs['seg'].args.p_uncond:
        fail(f'--seg {runs["seg"].path}: was trained with --controllable and no --p-uncond, so it must be told what to draw; give --count or --requests')
    names = tuple(main_run.args.dual or ('bravo',))
    judged = names.index('bravo') if 'bravo' in names else -1                          # the image of a pair that a detector and analysis.py look at
    if main_run.args.dual and (args.mc or args.stack):
        fail(f'--{"mc" if args.mc else "stack"}: is for single images, and {main_run.path} makes {" and ".join(names)}')
    if judged < 0 and (args.gate or args.reject_copies):
        fail(f'--gate and --reject-copies judge bravo images; {main_run.path} makes {" and ".join(names)}')
    judge = Judge(args, main_run, device)
    levels = next((r.levels or [0.0, 1.0] for r in runs.values() if r.args.slice_level), None)         # the mask model's first; older runs do not say
    masks = Masks(args, main_run, names, levels)
    name, ts, _ = solver(main_run, args, args.steps if args.bravo else args.seg_steps)
    note_off_grid(name, ts, main_run.process)
    if args.steps_file:
        note_steps(args, main_run)
    if args.save_at:
        keep_steps(args.save_at, ts, [], None)                                         # fails now, not after the first batch

    def conditions(ids, rounds=None):
        """Of the images of these numbers: masks (B,1,S,S) of 0 and 1, levels (B,), and (source patient, condition, spacing) of each.

        Another round has the same mask, unless a model drew it: then it draws another, for the fault may lie there.
        """
        if not args.seg:
            picked = [masks[i] for i in ids]
            mask = torch.from_numpy(np.stack([p[0] for p in picked])).float()[:, None].to(device)
            return mask, torch.tensor([p[1] for p in picked]), [p[2:] for p in picked]
        level = torch.tensor([masks.level(i) for i in ids])
        asked = [requests[wish(i)] for i in ids] if requests else None
        keys = [(i, r) if r else (i,) for i, r in zip(ids, rounds or [0] * len(ids))]
        drawn = runs['seg'].process.from_range(draw(runs['seg'], args, keys, 'mask', args.seg_steps, level=level, requests=asked))
        told = [f'seg:{runs["seg"].hash}' + (f' request {wish(i)}: {len(r)} lesions' if asked else '') for i, r in zip(ids, asked or ids)]
        return (drawn > 0).float(), level, [('', t, runs['seg'].spacing) for t in told]

    if args.learn_steps:
        ids = list(range(64))
        mask, level, _ = conditions(ids)
        args.sampler = 'euler'
        return learn_steps(main_run, args, lambda callback, n: draw(main_run, args, [(i,) for i in ids], 'image', n, mask, level, callback), out)
    made = Set(args, runs, requests, judge)
    if args.pairs:
        return write_pairs(args, main_run, conditions, out)
    if args.stack:
        return draw_stacks(args, main_run, masks, made, out)
    guidance = Guidance(args.cfg if args.bravo else args.seg_cfg, args.cfg_interval)
    asked = asked_times(name, ts, main_run.process)
    told, traces = f'{name} with {len(ts) - 1} steps = {len(asked) + sum(guidance.at(t).item() for t in asked)} forwards an image', []
    if name == 'adaptive':
        told = f'adaptive, {args.pair or "bs23"}'
    N, cap = args.best_of or args.mc or 1, (args.max_draws or 20 * (args.best_of or 1)) // (args.best_of or 1)
    rounds = Counter(r[0] for r in made.tables.get('rejected', {}).values() if r[-1] in ('copy', 'distorted'))
    todo = [(i, rounds[str(i)]) for i in range(args.n) if i not in made.tables['manifest']]
    print0(f'{out}: {args.n} patients, {args.n - len(todo)} there already; {told}' + (f'; best of {N}' if args.best_of else f'; {N} draws a mask' if args.mc else '')
           + (f'; kept where p(bad) < {judge.threshold:.4g}' if judge.threshold < 2 else '') + (f'; a copy above {judge.cut:.4f}' if judge.cut < 2 else ''))

    def candidate(c, batch, mask, level, about):
        """Candidate c of the round of each patient: a list of dicts of its number, images (C,[D,]S,S) or None, steps for --save-at, score, table row."""
        numbers_, images, steps, trace = [r * N + c for _, r in batch], None, [], []
        if args.bravo:
            callback = keep_steps(args.save_at, ts, steps, main_run.process) if args.save_at else None
            keys = [(i, n) if n else (i,) for (i, _), n in zip(batch, numbers_)]
            x_0 = draw(main_run, args, keys, 'image', args.steps, mask, level, callback, None, trace, spacing=[a[2] for a in about])
            images = main_run.process.from_range(x_0).clamp(-1, 1).cpu().numpy()
            steps = [(t, x[:, judged].numpy(), x_0[:, judged].numpy()) for t, x, x_0 in steps] + [(0.0, images[:, judged], images[:, judged])] * (0 in (args.save_at or ()))
            traces.extend([[torch.stack(v) for v in zip(*trace)]] if trace else [])
        scores, found = judge(images[:, judged], mask.cpu().numpy()[:, 0]) if judge.on else [None] * len(batch), []
        for b, n in enumerate(numbers_):
            new = dict(number=n, images=None if images is None else images[b], steps=[(t, x[b], x_0[b]) for t, x, x_0 in steps], score=scores[b], row=[])
            if judge.on:
                mm = lesion_records(mask[b, 0].cpu().numpy())[:, 0] * mask.shape[-1] * sum(about[b][2]) / 2
                new['row'] = [n, *('' if math.isnan(v) else f'{v:.6f}' for v in scores[b]), len(mm), ';'.join(f'{d:.2f}' for d in mm)]
            found.append(new)
        return found

    # batch by batch, image by image to disk
    stop, clock, seen, kept, shown = Stop(), time.perf_counter(), 0, 0, []
    queue = deque([(i, r) for i, r in todo if r < cap][rank()::world()])
    bar = progress(total=len(queue), unit='image')
    while queue and wilson(kept, seen, 4)[1] >= 0.5 / cap:                                # else it is hopeless
        batch = [queue.popleft() for _ in range(min(args.batch_size, len(queue)))]
        mask, level, about = conditions(*zip(*batch))
        drawn = zip(*[candidate(c, batch, mask, level, about) for c in range(N)])
        for (i, r), m, z, (source, condition, spacing), mine in zip(batch, mask.cpu().numpy()[:, 0], level.tolist(), about, drawn):
            best, *lost = sorted(mine, key=judge.order) if judge.on else mine
            drawn_ = np.stack([v['images'][0] for v in mine]).astype(np.float64) if args.mc else None
            more = dict(bravo_mean=np.float32(drawn_.mean(0)), bravo_std=np.float32(drawn_.std(0, ddof=1))) if args.mc else None
            lost, why = [(v, 'not the best') for v in lost if judge.on], judge.why(best['score']) if judge.on else ''
            for v, reason in lost + ([(best, why)] if why else []):
                made.add('rejected', [i, args.seed, condition, source, int(m.sum()), *v['row'], reason])
            if why:
                queue.extend([(i, r + 1)] if r + 1 < cap else [])
                shown.extend([(best['images'], m)] if len(shown) < 16 else [])
            else:
                folder = f'syn_{args.seed}_{i:06d}'
                write_item(out, folder, names, best['images'], m, spacing, best['steps'], more)
                made.add('manifest', [folder, i, args.seed, condition, source, '' if math.isnan(z) else f'{z:.4f}', int(m.sum()), name, len(ts) - 1,
                                      *(runs[k].hash if k in runs else '' for k in ('bravo', 'seg')),
                                      *([f'{p[wish(i)].log().item():.6f}', f'{undo[wish(i)].item():.6f}'] if args.hard_cases else []), *best['row']])
                kept += 1
                bar.update()
        seen += len(batch)
        if stop.signum:
            print0(f'{out}: stopped by signal {stop.signum}; the same command goes on')
            raise SystemExit(128 + stop.signum)
    bar.close(), stop.restore()
    seconds = time.perf_counter() - clock
    rows, *rejected = made.close()
    if rank() == 0:
        first = [out / r['folder'] for r in rows[:16]]
        whole = lambda name: [v if main_run.args.volume else v[0] for v in (read_nifti(f / f'{name}.nii.gz')[0] for f in first)]
        m = whole('seg')
        a = list(zip(*[views(np.array(whole(n)), m) for n in names])) if args.bravo else [[x * 2.0 - 1] for x in views(np.array(m), m)]
        m = views(np.array(m), m)
        zoom = max(1, 128 // main_run.args.size)
        for file, pairs in (('grid.png', list(zip(a, m))), ('rejected.png', shown)):
            pairs = [(*x, outline(x[-1], y, zoom=zoom)) for x, y in pairs]
            if pairs:
                save_grid(out / file, [column for r in range(0, len(pairs), 8) for column in zip(*pairs[r:r + 8])], None, zoom)
        if args.mc:
            maps = [[read_nifti(f / f'{k}.nii.gz')[0][0] for f in first] for k in ('bravo_mean', 'bravo_std')]
            inside, outside = (np.mean([v[(s > 0) == k].mean() for v, s in zip(maps[1], m) if ((s > 0) == k).any()] or [math.nan]) for k in (True, False))
            save_grid(out / 'mc.png', [[x[-1] for x in a[:8]], *map(list, zip(*[shown_mc(dict(bravo_mean=x, bravo_std=y)) for x, y in zip(*maps)][:8]))],
                      ['first draw', f'mean of {args.mc}', 'deviation x 4'], zoom)
            print0(f'standard deviation over {args.mc} seeds (each +- {1 / math.sqrt(2 * args.mc - 2):.0%}): {inside:.3f} in tumours, {outside:.3f} elsewhere; the mean '
                   f'is a blur, not a sample; fewer steps spread less; look at {out}/mc.png')
        empty = sum(int(r['tumour_pixels']) == 0 for r in rows)
        if name == 'adaptive' and args.bravo and kept:
            plot_steps(out / 'steps.png', traces, args, guidance)
        rate = f'{kept * world() / seconds:.2f} images/s, ' if kept else ''
        print0(f'{out}: {len(rows)} patients ({rate}{empty} without tumour); look at {out}/grid.png')
        if args.hard_cases and rows:
            print0(f'weights of manifest.csv (p_real / p) undo the choice: {len(rows)} masks then count as {effective([float(r["weight"]) for r in rows]):.1f}')
        if judge.on:
            report_choice(args, judge, rows, rejected[0])
        if len(rows) < args.n:
            fail(f'{out}: {len(rows)} of {args.n} patients, for the others {cap * N} draws were not enough or too few pass at all; see gate.json and '
                 'rejected.png. The same command with a larger --max-draws goes on; another --threshold needs another --out', 1)
    barrier()


if __name__ == '__main__':
    main(get_args())
