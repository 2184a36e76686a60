"""Looks at what other scripts left behind.

  python analysis.py compare runs/a runs/b runs/quality_a runs/quality_b     runs and their metrics side by side
  python analysis.py timesteps runs/a runs/b                                 which steps are hard, tumour and background apart
  python analysis.py release runs/bravo bravo64.pt                           a run as one small file that sample.py takes
  python analysis.py patients --fake runs/synthetic --scores runs/scores     which patients' images come out distorted (or --answers runs/labels)
  python analysis.py taxonomy runs/labels                                    kinds of distortion, and how far raters agree
  python analysis.py onset --fake runs/steps --gate runs/detector            when along the way from noise a distortion is decided
  python analysis.py hard-cases runs/downstream/cv_lesions.csv               which lesions a segmenter misses; hard.json for sample.py --hard-cases
  python analysis.py attention runs/bravo --data DIR                         where a tumour looks inside the network, and what its mask does
  python analysis.py uncertainty runs/a runs/b --data DIR --seeds 10         how much images of one mask differ, by seed and by model

compare takes run folders (log.csv) and folders of evaluate.py (metrics.json) in any number and order. Leaves in --out: compare.csv,
and loss.png, held_out.png, loss_by_t.png with a curve for each run, metrics.png with a bar for each set. timesteps leaves
timesteps.csv, and timesteps.png with a curve for each run and region.
"""
from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    c = commands.add_parser('compare', help='curves, flags and metrics of several runs over each other')
    c.add_argument('runs', nargs='+', metavar='DIR', help='run folders, or folders that evaluate.py wrote')
    c.add_argument('--out', default='runs/compare', metavar='DIR')
    t = commands.add_parser('timesteps', help='error by noise of several runs over each other, in tumours and around them')
    t.add_argument('runs', nargs='+', metavar='RUN')
    t.add_argument('--set', choices=('train', 'held-out'), default='train', help='training steps, or held-out patients at fixed t and noise')
    t.add_argument('--out', default='runs/timesteps', metavar='DIR')
    r = commands.add_parser('release', help='the averaged weights of a run in half precision, with what sampling needs')
    r.add_argument('run', metavar='RUN')
    r.add_argument('file', metavar='FILE')
    c = commands.add_parser('patients', help='share of distorted images by source patient: intervals, is there more spread than chance, who stands out')
    c.add_argument('--fake', required=True, metavar='DIR', help='a set of sample.py --data DIR --per-patient K')
    c.add_argument('--scores', metavar='DIR', help='what the reporting detector says: a folder of classifier.py score')
    c.add_argument('--answers', nargs='+', metavar='DIR', help='what people say: folders of classifier.py label')
    c.add_argument('--out', default='runs/patients', metavar='DIR')
    c = commands.add_parser('taxonomy', help='how often each kind of distortion, agreement between and within raters, a gallery')
    c.add_argument('answers', nargs='+', metavar='DIR', help='folders of classifier.py label')
    c.add_argument('--repeats', type=number(int, 20), default=1000, help='bootstrap draws of images')
    c.add_argument('--out', default='runs/taxonomy', metavar='DIR')
    c = commands.add_parser('onset', help='distortion along the trajectory, against good images at the same time')
    c.add_argument('--fake', required=True, metavar='DIR', help='a set of sample.py --save-at 1,.75,.5,.25,.1,.05,0')
    c.add_argument('--gate', required=True, metavar='RUN', help='detector (classifier.py train)')
    c.add_argument('--threshold', type=number(float, 0, 1, open_low=True), metavar='P', help='bad in the end is p(bad) >= P; none: the detector\'s own')
    c.add_argument('--answers', nargs='+', metavar='DIR', help='bad in the end is what people say (folders of classifier.py label), and not the detector')
    c.add_argument('--early', type=number(float, 0, 1), default=0.5, help='what is decided at this t or above is structure, below it detail; 0.5: as much noise as image')
    c.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws of source patients')
    c.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    c.add_argument('--out', default='runs/onset', metavar='DIR')
    c = commands.add_parser('hard-cases', help='lesions found, by size, place, number and edge; how often to ask for each kind')
    c.add_argument('lesions', nargs='+', metavar='FILE', help='cv_lesions.csv of evaluate.py downstream --cross-validate K')
    c.add_argument('--split', metavar='FILE', help='CSV patient,part; none: split.csv beside the first FILE, else by name')
    c.add_argument('--data', nargs='+', metavar='DIR', help='patients with a parc.nii.gz (evaluate.py atlas): also the distance to the ventricles')
    c.add_argument('--alpha', type=number(float, 0), default=1.0, help='weight of a kind of lesion: its share of misses to this power; 0: all alike')
    c.add_argument('--lam', type=number(float, 0, 1), default=0.4, help='share of masks drawn by weight; the others as the patients have them')
    c.add_argument('--out', default='runs/hard', metavar='DIR')
    for name, told in (('attention', 'does generation attend to the mask? attention of the tumour by layer and time, beside what changes without the mask'),
                       ('uncertainty', 'variance of images of one mask, split into that of seeds and that of models')):
        c = commands.add_parser(name, help=told)
        c.add_argument('runs' if name == 'uncertainty' else 'run', nargs='+' if name == 'uncertainty' else None, metavar='RUN')
        c.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients whose masks are used')
        c.add_argument('--part', choices=tuple(PARTS), default='test', help='which of them')
        c.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
        c.add_argument('--n', type=number(int, 2), default=8 if name == 'attention' else 6, help='masks with tumour')
        if name == 'attention':
            c.add_argument('--times', type=numbers(float, 0, 1), default=(0.9, 0.7, 0.5, 0.3, 0.1), help='looked at at the solver\'s steps nearest to these t')
        else:
            c.add_argument('--seeds', type=number(int, 2), default=10, metavar='K', help='images of each mask from each run')
            c.add_argument('--steps', type=numbers(int, 1), help='solver steps, several as 5,10,25 to see how they change the spread; none: the usual number')
        c.add_argument('--out', default=f'runs/{name}', metavar='DIR')
        c.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
        c.add_argument('--seed', type=number(int, 0), default=0)
        c.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    if args.command == 'release':
        if not Path(args.run).exists():
            fail(f'{args.run}: no such run folder or checkpoint file')
        if Path(args.file).is_dir() or not Path(args.file).parent.is_dir():
            fail(f'{args.file}: is a folder or lies in none; give the name of a file')
        return args
    check_out(args.out)
    if args.command == 'patients' and bool(args.scores) == bool(args.answers):
        fail('patients: say who judged, with --scores DIR or with --answers DIR; one of them')
    if args.command == 'onset' and args.answers and args.threshold:
        fail(f'--threshold {args.threshold:g}: does nothing with --answers')
    if args.command in ('patients', 'onset') and not (Path(args.fake) / 'sample.json').is_file():
        fail(f'--fake {args.fake}: holds no sample.json; give a set made by sample.py')
    if getattr(args, 'scores', None) and not (Path(args.scores) / 'scores.csv').is_file():
        fail(f'--scores {args.scores}: holds no scores.csv; give a folder of classifier.py score')
    for folder in getattr(args, 'answers', None) or ():
        if not (Path(folder) / 'labels.csv').is_file():
            fail(f'--answers {folder}: holds no labels.csv; give a folder of classifier.py label')
    for file in getattr(args, 'lesions', ()):
        if not Path(file).is_file():
            fail(f'{file}: no such file; expected a CSV of evaluate.py downstream --cross-validate K')
    for run in getattr(args, 'runs', ()):
        if args.command == 'uncertainty' and not Path(run).exists():
            fail(f'{run}: no such run folder or checkpoint file')
        if args.command == 'timesteps' and not (Path(run) / 'loss_by_t.csv').is_file():
            fail(f'{run}: holds no loss_by_t.csv; give a run folder of train_seg.py or train_bravo.py')
        if args.command == 'compare' and not any((Path(run) / f).is_file() for f in ('log.csv', 'metrics.json')):
            fail(f'{run}: holds neither log.csv nor metrics.json; give a run folder or a folder of evaluate.py')
    return args


def short_names(paths):
    """The last parts of paths, as many as make them different."""
    parts = [Path(p).resolve().parts for p in paths]
    depth = next((n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len({*parts})), 1)
    return ['/'.join(p[-depth:]) for p in parts]


def compare(args):
    """Curves over each other, the flags that differ, and a table of metrics with intervals. One floor stands for all: the mean."""
    out, names = Path(args.out), short_names(args.runs)
    out.mkdir(parents=True, exist_ok=True)
    runs = {n: Path(r) for n, r in zip(names, args.runs) if (Path(r) / 'log.csv').is_file()}
    sets = {n: dict(json.loads((Path(r) / 'metrics.json').read_text()), at=r) for n, r in zip(names, args.runs) if (Path(r) / 'metrics.json').is_file()}
    saved = []
    for n in [n for n, v in sets.items() if 'metrics' not in v]:
        print0(f'{n}: its metrics.json holds no metrics of a set (of a detector, say); left out')
        del sets[n]
    if runs:
        logs = {n: read_csv(r / 'log.csv') for n, r in runs.items()}
        flags = {n: json.loads((r / 'args.json').read_text()) for n, r in runs.items()}
        column = lambda log, key: list(zip(*[(float(r['step']), float(r[key])) for r in log if r.get(key)])) or [(), ()]
        last = lambda log, key: f'{column(log, key)[1][-1]:.4f}' if column(log, key)[0] else ''
        rows = []
        for n, log in logs.items():
            steps, seconds = column(log, 's_per_step')
            hours = sum(np.diff([0, *steps]) * seconds) / 3600
            rows.append([n, int(steps[-1]) if steps else 0, f'{hours:.2f}', *(last(log, k) for k in ('loss', 'held_out', 'held_out_raw'))])
        header = ['run', 'steps', 'hours', 'loss', 'held out (EMA)', 'held out (raw)']
        print_table(header, rows)
        write_csv(out / 'compare.csv', header, rows)
        told = {'out', 'cache', 'data', 'split', 'minutes'}
        differ = [k for k in sorted({k for f in flags.values() for k in f} - told) if len({str(f.get(k)) for f in flags.values()}) > 1]
        if differ:
            print0()
            print_table(['flag', *flags], [[f'--{k.replace("_", "-")}', *(f.get(k) for f in flags.values())] for k in differ])
        for key, title in (('loss', 'training loss'), ('held_out', 'held-out error, EMA')):
            plot(out / f'{key}.png', {n: column(log, key) for n, log in logs.items()}, title, 'step', 'squared error', logy=True)
            saved.append(f'{key}.png')
        by_t = {n: read_csv(r / 'loss_by_t.csv') for n, r in runs.items() if (r / 'loss_by_t.csv').is_file()}
        if by_t:
            curve = lambda rows: list(zip(*[(float(r['log_snr_low']) + 0.5, float(r['mean_squared_error'])) for r in rows if r['set'] == 'train' and r.get('region', 'all') == 'all']))
            plot(out / 'loss_by_t.png', {n: curve(rows) for n, rows in by_t.items()}, 'training loss by noise', 'log-SNR', 'squared error', logy=True)
            saved.append('loss_by_t.png')
    metrics = [m for m in next(iter(sets.values()))['metrics'] if all(m in s['metrics'] for s in sets.values())] if sets else []
    if sets and not metrics:
        print0(f'{", ".join(sets)}: have no metric in common; no table of them')
    if metrics:
        cell = lambda v, k='fake': f'{v[k]:.3f} [{v[k + "_low"]:.3f}, {v[k + "_high"]:.3f}]'
        rows = [[m, *(cell(s['metrics'][m]) for s in sets.values()), f'{np.mean([s["metrics"][m]["floor"] for s in sets.values()]):.3f}'] for m in metrics]
        print0()
        print_table(['metric', *sets, 'floor'], rows)
        write_csv(out / 'metrics.csv', ['metric', *sets, 'floor'], rows)
        bars(out / 'metrics.png', {m: {n: s['metrics'][m] for n, s in sets.items()} for m in metrics})
        saved += ['metrics.csv', 'metrics.png']
        bands = {n: np.array(s['spectrum']['fake']) - s['spectrum']['real'] for n, s in sets.items() if 'spectrum' in s}
        if bands:
            plot(out / 'spectra.png', {n: (np.arange(1, len(dB) + 1), dB) for n, dB in bands.items()}, 'radial power less that of real images', 'cycles an image', 'dB')
            saved.append('spectra.png')
        names, rows = differences(sets, metrics)
        if names:
            print0()
            print_table([f'less {next(iter(sets))}; * 0 is outside (95 % each)', *names], rows)
            write_csv(out / 'differences.csv', ['metric', *names], rows)
            saved.append('differences.csv')
    print0(f'look at {", ".join(str(out / f) for f in saved)}' if saved else 'nothing to compare')


def differences(sets, metrics):
    """Of each set to the first, with 95 %: names, rows of cells. Sets with masks of the same patients are drawn alike by the bootstrap of
    evaluate.py quality (the same `drawn`), so the difference is taken draw by draw, where what the patients do to both is gone."""
    first, *names = sets
    names = [n for n in names if sets[n].get('drawn') and all(sets[n].get(k) == sets[first].get(k) for k in ('drawn', 'repeats'))]
    draws = {n: read_csv(Path(sets[n]['at']) / 'draws.csv') for n in (first, *names)} if names else {}

    def cell(n, m):
        gap = sets[n]['metrics'][m]['fake'] - sets[first]['metrics'][m]['fake']
        low, high = (round(v, 3) + 0.0 for v in centred(gap, [float(a[m]) - float(b[m]) for a, b in zip(draws[n], draws[first])], -1, 1))
        return f'{gap:+.3f} [{low:+.3f}, {high:+.3f}]{"*" if low * high > 0 else ""}'

    return names, [[m, *(cell(n, m) for n in names)] for m in metrics]


def timesteps(args):
    """Error of the network by log-SNR, the runs over each other: which steps are hardest, and what a step loses in tumours.

    In the network's own target, so that runs compare where their targets are the same; hardest: the bin of the largest mean, and the
    share of the whole error (as many steps in a bin as were drawn) that the three hardest bins hold.
    """
    out, names = Path(args.out), short_names(args.runs)
    out.mkdir(parents=True, exist_ok=True)
    curves, table, targets = {}, [], set()
    for name, run in zip(names, args.runs):
        flags = json.loads((Path(run) / 'args.json').read_text())
        targets.add(('RFlow ' if flags['rflow'] else 'DDPM ') + flags['target'])
        rows = [r for r in read_csv(Path(run) / 'loss_by_t.csv') if r['set'] == args.set]
        for region in REGIONS:
            bins = [(float(r['log_snr_low']) + 0.5, float(r['mean_squared_error']), int(r['count'])) for r in rows if r.get('region', 'all') == region]
            if not bins:
                continue
            L, error, count = map(np.array, zip(*bins))
            curves[f'{name} {region}' if len(names) > 1 else region] = (L, error)
            part = np.sort(error * count)[::-1]
            table.append([name, region, int(count.sum()), f'{(error * count).sum() / count.sum():.4f}', f'{L[error.argmax()]:g}', f'{error.max():.4f}',
                          f'{L[error.argmin()]:g}', f'{error.min():.4f}', f'{part[:3].sum() / part.sum():.2f}'])
    if not table:
        fail(f'{args.runs[0]}: its loss_by_t.csv has no {args.set} rows yet; train on, or give --set')
    header = ['run', 'region', 'images', 'mean error', 'hardest log-SNR', 'error', 'easiest log-SNR', 'error', 'share of 3 hardest bins']
    print_table(header, table)
    write_csv(out / 'timesteps.csv', header, table)
    if len(targets) > 1:
        print0(f'note: these runs predict different things ({", ".join(sorted(targets))}); compare the shapes, not the heights')
    plot(out / 'timesteps.png', curves, f'{args.set} error by noise', 'log-SNR (high: little noise)', 'squared error', logy=True)
    print0(f'look at {out / "timesteps.png"}')


def bars(path, metrics, width=330, line=18):
    """A panel for each metric, a bar with its interval for each set, the floor as a line; what is not finite is not drawn."""
    panels = []
    for name, sets in metrics.items():
        numbers_ = [v for s in sets.values() for v in (s['fake_high'], s['fake_low'], s['fake'], s['floor'], 0) if math.isfinite(v)]
        low, high = min(numbers_), max(numbers_) or 1
        at = lambda v: 150 + int((min(max(v, low), high) - low) / (high - low + 1e-12) * (width - 165))
        panel = Image.new('RGB', (width, 24 + line * len(sets) + 8), (255, 255, 255))
        draw, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
        draw.text((6, 4), name, (0, 0, 0), font)
        for i, (n, s) in enumerate(sets.items()):
            y = 24 + line * i
            draw.text((6, y), n[-22:], (60, 60, 60), font)
            if math.isfinite(s['fake']):
                draw.rectangle([min(at(0), at(s['fake'])), y + 2, max(at(0), at(s['fake'])), y + line - 5], COLOURS[i % len(COLOURS)])
            if math.isfinite(s['fake_low']) and math.isfinite(s['fake_high']):
                draw.line([at(s['fake_low']), y + line // 2 - 2, at(s['fake_high']), y + line // 2 - 2], (0, 0, 0))
        floors = [s['floor'] for s in sets.values() if math.isfinite(s['floor'])]
        if floors:
            draw.line([at(np.mean(floors)), 22, at(np.mean(floors)), 24 + line * len(sets)], (120, 120, 120))
        panels.append(np.asarray(panel))
    save_grid(path, [panels[i:i + 3] for i in range(0, len(panels), 3)])


def release(args):
    """Writes FILE with the EMA weights in fp16 (2 bytes a parameter) and no optimiser; folders are named without their path."""
    state = load_checkpoint(args.run)
    if not isinstance(state, dict) or not {'args', 'ema', 'box'} <= state.keys():
        fail(f'{args.run}: is not a run of train_seg.py or train_bravo.py')
    half = {k: v.half() for k, v in state['ema'].items()}
    worst = max(float((half[k].float() - v).abs().max() / v.abs().max().clamp(min=1e-12)) for k, v in state['ema'].items())
    flags = {k: [Path(v).name for v in x] if k == 'data' and x else Path(x).name if isinstance(x, str) and '/' in x else x for k, x in state['args'].items()}
    keep = {k: state[k] for k in ('step', 'box', 'spacing', 'in_channels', 'out_channels', 'extra_dim', 'loss_by_t', 'space', 'seen', 'levels') if k in state}
    if 'weights' in (keep.get('space') or {}):                                            # of the autoencoder
        keep['space'] = {**keep['space'], 'weights': {k: v.half() for k, v in keep['space']['weights'].items()}}
    buffer = io.BytesIO()
    torch.save(dict(ema=half, args=flags, **keep), buffer)
    atomic_write(args.file, buffer.getbuffer())
    print0(f'{args.file}: {sum(v.numel() for v in half.values()) / 1e6:.2f} M weights of step {state["step"]}, {buffer.tell() / 1e6:.2f} MB; '
           f'rounding at most {worst:.1e} of a tensor\'s largest weight')


# ---------------------------------------------------------------------------------------------------------------------
# patients
# ---------------------------------------------------------------------------------------------------------------------


def verdicts(answers, fake):
    """{folder: bad} of the images of a set, by the majority of raters, how many images they left undecided, and {folder: class} of the bad, the one
    named most often ('' where none was). Repeats are no second vote.
    A set may have been moved since: its name says which it is, its full path where several judged sets have that name."""
    votes, kinds, here = {}, {}, Path(fake).resolve()
    sets = {r['set']: Path(r['set']).resolve() for r in answers if Path(r['set']).name == here.name}
    if len({*sets.values()}) > 1:
        if here not in sets.values():
            fail(f'--fake {fake}: people judged {" and ".join(sorted(sets))}, and none of them is this one; give one of these')
        sets = {name: path for name, path in sets.items() if path == here}
    slices = {}
    for r in answers:
        if r['repeat'] == '0' and r['set'] in sets:
            if slices.setdefault(r['folder'], r.get('z')) != r.get('z'):
                fail(f'--fake {fake}: people judged several slices of {r["folder"]}, and images are counted here; give a set of single slices')
            votes.setdefault(r['folder'], Counter())[r['verdict']] += 1
            kinds.setdefault(r['folder'], Counter())[r['class']] += r['class'] != ''
    told = {f: v['bad'] > v['good'] for f, v in votes.items() if v['bad'] != v['good']}
    return told, len(votes) - len(told), {f: kinds[f].most_common(1)[0][0] for f, bad in told.items() if bad}


def tarone(x, n):
    """Do rates x/n spread more than chance (Tarone 1979)? Z, about N(0,1) when they do not, and the correlation within a patient.

    The numerator over sum n (n - 1) is the moment estimate of that correlation: images of one patient are worth 1/(1 + (n-1) rho) each.
    """
    x, n = np.asarray(x, float), np.asarray(n, float)
    p, pairs = x.sum() / n.sum(), (n * (n - 1)).sum()
    if not 0 < p < 1 or not pairs:
        return math.nan, math.nan
    extra = ((x - n * p) ** 2).sum() / (p * (1 - p)) - n.sum()
    return float(extra / math.sqrt(2 * pairs)), float(extra / pairs)


def patients(args):
    """Rates of distorted images by source patient; a patient stands out against the rate of all others, corrected for looking at all."""
    out, source = Path(args.out), {r['folder']: r['source_patient'] for r in read_csv(Path(args.fake) / 'manifest.csv')}
    if args.scores:
        rows = read_csv(Path(args.scores) / 'scores.csv')
        told, undecided = {r['folder']: r['verdict'] == 'bad' for r in rows}, 0
        if len(told) < len(rows):
            fail(f'--scores {args.scores}: holds several slices of a folder; patients counts images, give a set of single slices')
    else:
        told, undecided, _ = verdicts(read_answers(args.answers), args.fake)
    groups = {}
    for folder, bad in told.items():
        if source.get(folder):
            groups.setdefault(source[folder], []).append(bad)
    left = sum(not source.get(f) for f in told)
    if len(groups) < 2:
        fail(f'--fake {args.fake}: {len(groups)} source patients among {len(told)} judged images; at least 2 are needed (sample.py --data DIR --per-patient K)')
    names = sorted(groups, key=lambda g: (-np.mean(groups[g]), g))
    x, n = (np.array([f(groups[g]) for g in names]) for f in (sum, len))
    others = (x.sum() - x + 0.5) / (n.sum() - n + 1)                  # half a bad one more: none elsewhere must not make one here certain
    raw = np.array([upper_tail(int(a), int(b), float(q)) for a, b, q in zip(x, n, others)])
    p, (Z, rho), bounds = holm(raw), tarone(x, n), [wilson(int(a), int(b)) for a, b in zip(x, n)]
    rows = [[g, b, a, f'{a / b:.4f}', f'{low:.4f}', f'{high:.4f}', f'{u:.3g}', f'{v:.3g}'] for g, a, b, (low, high), u, v in zip(names, x, n, bounds, raw, p)]
    out.mkdir(parents=True, exist_ok=True)
    header = ['patient', 'images', 'bad', 'rate', 'low', 'high', 'p', 'p_holm']
    write_csv(out / 'patients.csv', header, rows)
    print_table(header, rows[:12])
    pooled, each = x.sum() / n.sum(), 1 + (n.mean() - 1) * max(rho, 0)
    stand_out = [g for g, v in zip(names, p) if v < 0.05]
    print0(f'{x.sum()} of {n.sum()} images of {len(names)} patients are bad, {pooled:.1%} (Wilson {wilson(int(x.sum()), int(n.sum()))[0]:.1%} to '
           f'{wilson(int(x.sum()), int(n.sum()))[1]:.1%} if images were independent); {undecided} undecided, {left} judged images without a source left out')
    print0(f'more spread than chance: Tarone Z {Z:.2f}, p {math.erfc(Z / math.sqrt(2)) / 2:.2g}; correlation within a patient {rho:.3f}: {n.mean():.0f} images '
           f'are worth {n.mean() / each:.0f}; above the others (Holm, 5 %): {", ".join(stand_out) or "nobody"}')
    atomic_write(out / 'patients.json', json.dumps(dict(bad=int(x.sum()), images=int(n.sum()), patients=len(names), rate=pooled, tarone_z=Z, rho=rho,
                                                        undecided=undecided, stand_out=stand_out), indent=1).encode())
    at = np.arange(1, len(names) + 1)
    plot(out / 'patients.png', {'.rate': (at, x / n), 'low': (at, [b[0] for b in bounds]), 'high': (at, [b[1] for b in bounds]), 'all': (at, [pooled] * len(at))},
         f'share of distorted images, 95 % Wilson; Z {Z:.2f}', 'patient, by rate', 'share')
    print0(f'look at {out}/patients.png')


# ---------------------------------------------------------------------------------------------------------------------
# taxonomy
# ---------------------------------------------------------------------------------------------------------------------


SEVERITIES = ('1', '2', '3')


def weighted_kappa(a, b, most):
    """Agreement of two raters' whole numbers 0 .. most with linear weights (Cohen 1968): po = 1 - mean |a - b| / most, pe the same of
    independent draws, kappa = (po - pe) / (1 - pe)."""
    po, pe = 1 - float(np.abs(a - b).mean()) / most, 1 - float(np.abs(np.subtract.outer(a, b)).mean()) / most
    return dict(po=po, pe=pe, kappa=(po - pe) / (1 - pe) if pe < 1 else math.nan)


def agreement_row(name, columns, answers, repeats):
    """A row of the agreement table: columns (N,m) of what m raters answered, with intervals from a bootstrap over images. Of two raters'
    grades (SEVERITIES) all are weighted; AC1, which is not, is left out."""
    codes = np.array([[answers.index(a) for a in row] for row in columns])
    one = np.eye(len(answers))[codes]                                                             # (N, m, J)

    def measure(i):
        return weighted_kappa(*codes[i].T, len(answers) - 1) if graded else agreement(one[i].sum(1), one[i].mean(0) if codes.shape[1] == 2 else None)

    graded = answers == SEVERITIES and codes.shape[1] == 2
    at, draws = measure(np.arange(len(codes))), [measure(torch.randint(len(codes), (len(codes),), generator=generator('agree', k)).numpy()) for k in range(repeats)]
    cell = lambda k: '{:.3f} [{:.3f}, {:.3f}]'.format(at[k], *(np.nanpercentile([d[k] for d in draws], (2.5, 97.5)) if any(d[k] == d[k] for d in draws) else (math.nan,) * 2)) if k in at else ''
    return [name, len(codes), 'Cohen, weighted' if graded else 'Cohen' if codes.shape[1] == 2 else 'Fleiss', f'{at["po"]:.3f}', f'{at["pe"]:.3f}', cell('kappa'), cell('ac1')]


def taxonomy(args):
    """Shares of the six classes among images called bad, agreement of verdicts and classes, and a gallery of each class."""
    out, answers = Path(args.out), read_answers(args.answers)
    first = {}                                                                         # image -> rater -> answer
    for r in answers:
        if r['repeat'] == '0':
            first.setdefault((r['set'], r['folder'], r['z']), {})[r['rater']] = r
    raters = sorted({r['rater'] for r in answers})
    bad = {i: [r for r in of.values() if r['verdict'] == 'bad' and r['class']] for i, of in first.items()}
    bad = {i: rows for i, rows in bad.items() if rows}
    if not bad:
        fail(f'{" ".join(args.answers)}: no image is called bad with a class')
    share = {c: sum(sum(r['class'] == c for r in rows) / len(rows) for rows in bad.values()) for c in CLASSES}       # raters of an image share its vote
    severity = {c: [int(r['severity']) for rows in bad.values() for r in rows if r['class'] == c] for c in CLASSES}
    header = ['class', 'images', 'share of bad', 'low', 'high', 'severity 1', '2', '3']
    rows = [[c, f'{k:g}', f'{k / len(bad):.3f}', *(f'{v:.3f}' for v in wilson(k, len(bad))), *(severity[c].count(s) for s in (1, 2, 3))] for c, k in share.items()]
    count = Counter(r['verdict'] for of in first.values() for r in of.values())
    print0(f'{len(first)} images, {sum(count.values())} answers of {len(raters)} raters: {count["good"]} good, {count["bad"]} bad, {count["unsure"]} unsure; '
           f'{len(bad)} images called bad by somebody')
    print_table(header, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'taxonomy.csv', header, rows)

    table, pairs = [], [(a, b) for i, a in enumerate(raters) for b in raters[i + 1:]]
    both = {f'{a} and {b}': [(of[a], of[b]) for of in first.values() if a in of and b in of] for a, b in pairs}
    if len(raters) > 2:
        both[f'all {len(raters)}'] = [tuple(of[a] for a in raters) for of in first.values() if len(of) == len(raters)]
    again = {(r['rater'], r['set'], r['folder'], r['z']): r for r in answers if r['repeat'] != '0'}
    for a in raters:
        both[f'{a} again'] = [(first[k[1:]][a], r) for k, r in again.items() if k[0] == a and a in first.get(k[1:], {})]
    for name, rows in both.items():
        for what, options, rows_ in (('verdict', ('good', 'bad', 'unsure'), rows), ('class', CLASSES, [v for v in rows if all(r['class'] for r in v)]),
                                     ('severity', SEVERITIES, [v for v in rows if all(r['severity'] in SEVERITIES for r in v)])):
            if len(rows_) > 1:
                table.append(agreement_row(f'{name}, {what}', [[r[what] for r in v] for v in rows_], options, args.repeats))
    header = ['who', 'images', 'kappa of', 'agree', 'by chance', 'kappa', 'AC1']
    if table:
        print0()
        print_table(header, table)
    write_csv(out / 'agreement.csv', header, table)

    pictures, names, skipped = [], [], 0
    for c in CLASSES:
        mine = sorted((max(int(r['severity']) for r in rows if r['class'] == c), i) for i, rows in bad.items() if any(r['class'] == c for r in rows))[::-1]
        made = [(Path(root) / folder, z) for _, (root, folder, z) in mine if (Path(root) / 'manifest.csv').is_file() and (Path(root) / folder).is_dir()]
        skipped += len(mine) - len(made)
        images = [(read_nifti(f / 'bravo.nii.gz')[0][z], read_nifti(f / 'seg.nii.gz')[0][z]) for f, z in made[:8]]
        pictures += [[outline(a, m, zoom=max(1, 128 // a.shape[-1])) for a, m in images]] if images else []
        names += [c] if images else []
    if pictures:
        save_grid(out / 'gallery.png', pictures, names)
    print0(f'look at {out}/gallery.png' if pictures else 'no picture: the sets are not there', f'({skipped} images of real patients, or gone, are not in it)' if skipped else '')


# ---------------------------------------------------------------------------------------------------------------------
# onset
# ---------------------------------------------------------------------------------------------------------------------


def onset_of(above):
    """above (N,T): whether an image looks bad at each time, from noise to image. The first time from which it always does: (N,), T if not even the last."""
    return above.shape[1] - np.cumprod(above[:, ::-1], 1).sum(1)


def onset(args):
    """x0_hat along the way from noise, each time judged against x0_hat of images that end good: at high t all of them are a blur, which is no fault."""
    device, out, fake = setup(args), Path(args.out), Path(args.fake)
    detector, rows = load_detector(args.gate, device), read_csv(fake / 'manifest.csv')
    rows = [r for r in rows if (fake / r['folder'] / 'trajectory.npz').is_file()]
    if not rows:
        fail(f'--fake {fake}: holds no trajectory.npz; make it with sample.py --save-at 1,.75,.5,.25,.1,.05,0')
    kept = [np.load(fake / r['folder'] / 'trajectory.npz') for r in rows]
    ts = [float(f'{t:.6g}') for t in kept[0]['t']]
    x = np.stack([k['x0_hat'] for k in kept]).clip(-1, 1)                                                      # (N,T,S,S)
    if x.ndim != 4:
        fail(f'--fake {fake}: holds volumes, and a detector judges slices; give a set of slices')
    if ts[-1] != 0:
        fail(f'--fake {fake}: its steps end at t={ts[-1]:g}; add 0 to --save-at, the image itself')
    masks = torch.from_numpy(np.stack([read_nifti(fake / r['folder'] / 'seg.nii.gz')[0][0] for r in rows])).float()[:, None]
    with torch.no_grad():
        z = np.stack([torch.cat([detector_logits(detector, i.to(device), m.to(device)).cpu() for i, m in
                                 zip(torch.from_numpy(x[:, k])[:, None].split(64), masks.split(64))]).double().numpy() for k in range(len(ts))], 1)     # (N,T,7)
    p_class = np.exp(z[..., 1:] - z[..., 1:].max(-1, keepdims=True))
    p_class /= p_class.sum(-1, keepdims=True)
    if args.answers:
        told, _, named = verdicts(read_answers(args.answers), fake)
        known = np.array([r['folder'] in told for r in rows])
        rows, z, x, p_class = [r for r, k in zip(rows, known) if k], z[known], x[known], p_class[known]
        bad = np.array([told[r['folder']] for r in rows], bool)
    else:
        threshold = args.threshold or detector.threshold
        bad = 1 / (1 + np.exp(-z[:, -1, 0])) >= threshold
    if bad.sum() < 3 or (~bad).sum() < 20:
        fail(f'--fake {fake}: {bad.sum()} images end bad and {(~bad).sum()} good; at least 3 and 20 are needed')
    cut = np.quantile(z[~bad, :, 0], 0.95, axis=0)                                                            # the t-matched reference
    at = onset_of(z[bad][..., 0] > cut)
    times = np.array([*ts, math.nan])[at]
    names, of = np.unique([r.get('source_patient') or r['folder'] for r in rows], return_inverse=True)          # images of one patient are not independent
    if len(names) < 2:
        print0(f'note: all images are of patient {names[0]}: intervals over patients cannot be told')
    picked = [np.concatenate([np.flatnonzero(of == p) for p in torch.randint(len(names), (len(names),), generator=generator('onset', k)).tolist()])
              for k in range(args.repeats)]
    table = []
    for k, t in enumerate(ts):
        draws = [auc(z[i[bad[i]], k, 0], z[i[~bad[i]], k, 0]) for i in picked]
        far = [float(((x[some, k] - x[some, -1]) ** 2).mean()) for some in (~bad, bad)]
        table.append([t, auc(z[bad, k, 0], z[~bad, k, 0]), *np.nanpercentile(draws, (2.5, 97.5)), float((z[bad, k, 0] > cut[k]).mean()), int((at == k).sum()),
                      *far, *(p_class[bad, k] .mean(0) - p_class[~bad, k].mean(0))])
    header = ['t', 'auc', 'low', 'high', 'bad beyond 95 % of good', 'onsets', 'distance good', 'distance bad', *(f'{c}, bad - good' for c in CLASSES)]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'onset.csv', header, [[f'{v:.4g}' for v in r] for r in table])
    print_table(header[:8], [[f'{v:.3g}' for v in r[:8]] for r in table])
    kinds = [named[r['folder']] for r, b in zip(rows, bad) if b] if args.answers else [CLASSES[k] for k in p_class[bad, -1].argmax(1)]
    early, late = times >= args.early, times < args.early
    print0(f'{bad.sum()} of {len(bad)} images end bad: {early.sum()} are so for good from t >= {args.early:g} (structure), {late.sum()} only below it (detail), '
           f'{np.isnan(times).sum()} never beyond 95 % of the good')
    split = [[c, *(sum(k == c for k, here in zip(kinds, v) if here) for v in (early, late, np.isnan(times)))] for c in CLASSES]
    print_table([f'kind at the end ({"raters" if args.answers else "detector"})', 'structure', 'detail', 'neither'], split)
    write_csv(out / 'kinds.csv', ['class', 'structure', 'detail', 'neither'], split)
    if not args.answers:
        print0('note: at t = 0 the detector judges its own verdict; with --answers people say what ended bad')
    curves = {'AUC': (ts, [r[1] for r in table]), 'low': (ts, [r[2] for r in table]), 'high': (ts, [r[3] for r in table]), 'chance': (ts, [0.5] * len(ts))}
    plot(out / 'onset.png', curves, 'bad against good images, by x0_hat at the same t', 't (0: image, 1: noise)', 'AUC')
    plot(out / 'classes.png', {c: (ts, [r[8 + k] for r in table]) for k, c in enumerate(CLASSES)}, 'p(class given bad), bad minus good', 't', 'difference')
    worst = np.flatnonzero(bad)[np.argsort(-z[bad, -1, 0])[:6]]
    best = np.flatnonzero(~bad)[np.argsort(z[~bad, -1, 0])[:2]]
    save_grid(out / 'trajectories.png', [list(x[i]) for i in (*worst, *best)], [*(f'bad, from {v:g}' for v in times[np.argsort(-z[bad, -1, 0])[:6]]), *['good'] * len(best)],
              max(1, 96 // x.shape[-1]))
    print0(f'look at {out}/onset.png, classes.png and trajectories.png (x0_hat at t = {", ".join(f"{t:g}" for t in ts)})')


# ---------------------------------------------------------------------------------------------------------------------
# hard cases
# ---------------------------------------------------------------------------------------------------------------------
LESION = ('diameter', 'x', 'y', 'count', 'edge', 'hit', 'arm', 'seed', 'patient', 'folder', 'slice', 'lesion', 'unit')


def read_lesions(args):
    """Lesions of training patients: their (patient, folder, slice, lesion), numbers (N,7) of LESION's first six and the distance to the ventricles,
    and dict of unit, arms and seeds. A lesion counts once, with the mean of its hits over arms and seeds."""
    rows, file, seen = [r for f in args.lesions for r in read_csv(f)], args.lesions[0], {}
    if not rows or not {*LESION} <= rows[0].keys():
        fail(f'{file}: holds ' + (f'columns {",".join(rows[0])}; expected {",".join(LESION)}' if rows else 'no lesion'))
    split = args.split or next((str(f) for f in [Path(file).parent / 'split.csv'] if f.is_file()), None)
    people = [dict(name=n, source=n, synthetic=True) for n in sorted({r['patient'] for r in rows})]     # as sources: they need not fill every part
    for p in split_patients(people, split, training=False):
        if p['part'] != 'train':
            fail(f'{file}: patient {p["name"]} is in the {p["part"]} part; what is hard may be learned from training patients only (see --split)')
    for i, r in enumerate(rows):
        try:
            v = [float(r.get(k) or 'nan') for k in (*LESION[:6], 'ventricle')]
            good = v[0] > 0 and 0 <= min(v[1:3]) <= max(v[1:3]) <= 1 and v[5] in (0, 1) and all(map(math.isfinite, v[:6]))
        except ValueError:
            good = False
        if not good or r['unit'] != rows[0]['unit']:
            fail(f'{file}: lesion {i + 1}: expected numbers, x and y from 0 to 1, hit 0 or 1, unit {rows[0]["unit"]} throughout; got {",".join(r.values())}')
        seen.setdefault(tuple(r[k] for k in ('patient', 'folder', 'slice', 'lesion')), []).append(v)
    keys, a = list(seen), np.array([np.mean(v, 0) for v in seen.values()])
    patients = [p for p in split_patients(find_patients(args.data, ('bravo', 'seg')), split) if p['part'] == 'train'] if args.data else []
    box = measure_box(patients) if patients else None
    for p in patients:
        mine, file = [i for i, k in enumerate(keys) if k[:2] == (p['name'], p['folder'].name)], p['folder'] / 'parc.nii.gz'
        labels, spacing = read_nifti(file) if mine and file.is_file() else (np.zeros((1, 1, 1)), (1, 1, 1))
        voxels, (y0, x0, y1, x1) = (np.argwhere(np.isin(labels, VENTRICLES)) + 0.5) * spacing, square_view(labels.shape[1:], spacing[1:], box)
        for i in mine if len(voxels) else ():                                                            # in three dimensions, mm
            at = np.multiply((int(keys[i][2]) + 0.5, y0 + a[i, 2] * (y1 - y0), x0 + a[i, 1] * (x1 - x0)), spacing)
            a[i, 6] = np.linalg.norm(voxels - at, axis=1).min()
    if np.isnan(a[:, 6]).any():
        print0(f'note: {np.isnan(a[:, 6]).sum()} of {len(a)} lesions have no distance to the ventricles (a column ventricle, or --data with parc.nii.gz of '
               'evaluate.py atlas); left out of that')
    return keys, a, dict(unit=rows[0]['unit'], patients=len(people), **{f'{k}s': sorted({r[k] for r in rows}) for k in ('arm', 'seed')})


def hard_weights(hits, n, alpha, k=10, floor=0.05, clip=4.0):
    """Of bins with `hits` of n lesions found: recall drawn towards that of all lesions as by k more of those, and sampling weight.

    The weight is max(1 - recall, floor)^alpha over its mean over lesions, within [1/clip, clip].
    """
    recall = (hits + k * hits.sum() / n.sum()) / (n + k)
    w = np.maximum(1 - recall, floor) ** alpha
    return recall, np.clip(w * n.sum() / (w * n).sum(), 1 / clip, clip)


def hard_cases(args):
    """Recall by feature, and a mixture of the patients' own slices in which those with lesions of often missed kinds come more often.

    A kind is a third of sizes and a cell of 3 x 3 over the brain box; a slice is as hard as its lesions on average.
    """
    out, (keys, a, about) = Path(args.out), read_lesions(args)

    def thirds(v):
        cut = np.nanquantile(v, (1 / 3, 2 / 3))
        return np.where(np.isnan(v), -1, np.digitize(v, cut)), [f'below {cut[0]:.1f}', f'to {cut[1]:.1f}', 'above']

    (size, sizes), hit = thirds(a[:, 0]), a[:, 5]
    x, y = np.minimum(a[:, 1:3] * 3, 2).astype(int).T
    kind = size * 9 + y * 3 + x
    n, hits = (np.bincount(kind, w, 27) for w in (None, hit))
    recall, weight = hard_weights(hits, n, args.alpha)
    bins = [dict(diameter=sizes[b // 9], x=b % 3, y=b // 3 % 3, lesions=int(n[b]), found=hits[b], recall=recall[b], weight=weight[b]) for b in range(27)]
    slices = {}
    for i in np.argsort(-a[:, 0], kind='stable'):                        # largest first, as in all requests
        slices.setdefault(keys[i][:3], []).append(i)
    w = np.array([weight[kind[i]].mean() for i in slices.values()])
    p = (1 - args.lam) / len(w) + args.lam * w / w.sum()
    conditions = [dict(folder=k[1], slice=k[2], p_real=1 / len(w), p=q, lesions=a[i, :3].tolist()) for (k, i), q in zip(slices.items(), p)]
    about |= dict(lesions=len(a), size_edges=np.quantile(a[:, 0], (1 / 3, 2 / 3)).tolist(), recall=hit.mean(), alpha=args.alpha, lam=args.lam, ess=effective(p),
                  bins=bins, conditions=conditions, input={f: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in args.lesions})
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / 'hard.json', json.dumps(about, indent=1).encode())

    features = {f'diameter, {about["unit"]}': (size, sizes), 'lesions in the slice': (np.clip(a[:, 3], 1, 3) - 1, ['1', '2', '3 or more']),
                f'to the edge, {about["unit"]}': thirds(a[:, 4]), 'across': (x, ['left', 'middle', 'right']), 'along': (y, ['front', 'middle', 'back'])}
    if np.isfinite(a[:, 6]).any():
        features['to the ventricles'] = thirds(a[:, 6])
    table, panels = [], {name: {} for name in features}
    for name, told, found in ((name, told, hit[which == b]) for name, (which, names) in features.items() for b, told in enumerate(names)):
        r, (low, high) = found.sum() / max(len(found), 1), wilson(found.sum(), len(found))
        table.append([name, told, len(found), *(f'{v:.3f}' for v in (r, low, high))])
        panels[name][f'{told} {r:.2f} of {len(found)}'] = dict(fake=r, fake_low=low, fake_high=high, floor=hit.mean())
    header = ['feature', 'of', 'lesions', 'recall', 'low', 'high']
    print_table(header, table)
    write_csv(out / 'recall.csv', header, table)
    bars(out / 'recall.png', panels)
    cells = [Image.new('RGB', (64, 48), (128 + int(60 * math.log2(b['weight'])),) * 3) for b in bins]
    for cell, b in zip(cells, bins):
        ImageDraw.Draw(cell).text((5, 5), f'x {b["weight"]:.2f}\n{b["found"]:.0f} of {b["lesions"]}', (0, 0, 0) if b['weight'] > 0.8 else (255, 255, 255))
    rows = [[np.asarray(cells[s + r + c]) if c < 3 else np.full((48, 12, 3), 255, np.uint8) for s in (0, 9, 18) for c in range(4)] for r in (0, 3, 6)]
    save_grid(out / 'weights.png', rows, ['front', 'middle', 'back'])
    print0(f'{len(a)} lesions in {len(w)} slices of {about["patients"]} patients, {len(about["arms"])} arms, {len(about["seeds"])} seeds: {hit.mean():.3f} found; '
           f'{((n > 0) & (n < 10)).sum()} of {(n > 0).sum()} kinds have fewer than 10. Lesions of one patient are alike: intervals are too narrow')
    print0(f'{out}/hard.json: drawn with lam {args.lam:g}, the {len(w)} slices count as {about["ess"]:.0f}; use it with sample.py --hard-cases; look at recall.png and '
           f'weights.png: a map of the box each for diameters {sizes[0]}, {sizes[1]} and above')


# ---------------------------------------------------------------------------------------------------------------------
# attention
# ---------------------------------------------------------------------------------------------------------------------


def load_single(path, device):
    """load_run of a run that makes single slices; others end in one line."""
    run = load_run(path, device)
    if run.args.volume or getattr(run.args, 'dual', None):
        fail(f'{path}: makes {"volumes" if run.args.volume else "pairs"}; give a run on single slices')
    return run


def tumour_rows(run, args):
    """Real masks with tumour of --part for a run, drawn with the seed: the slices (N,S,S), masks (N,1,S,S) and levels (N,)."""
    data = load_slices(args.data, run.args.size, ('bravo',), run.box, args.split, args.cache, run.args.labels, run.args.speck, training=False)
    rows = np.array([i for i in data.rows(args.part) if data.table[i]['tumour']], int)
    if len(rows) < args.n:
        fail(f'--n {args.n}: {len(rows)} slices of the {args.part} part have a tumour; ask for fewer, see --split')
    rows = rows[torch.randperm(len(rows), generator=generator(args.seed, 'order')).numpy()[:args.n]]
    return data.images[rows][:, 0], torch.tensor(data.masks[rows]).float(), torch.tensor([data.table[i]['level'] for i in rows])


def denoiser(run, mask, level):
    """The denoise closure of a run for masks (B,1,S,S), or of a mask model for the requests that they fulfil, in fp32 and without guidance."""
    context, none = request_tokens(mask, run.args), mask.new_zeros(len(mask), run.args.neighbours, *mask.shape[2:]) if run.args.neighbours else None
    mask = mask_condition(mask, run.args.p_uncond, near=none) if run.args.script == 'bravo' else None
    clip = default_solver(run.args)[2] and not run.process.space.about
    return make_denoise(run.net, run.process, mask, context, level[:, None] if run.args.slice_level else None, clip=clip)


def walk(run, denoise, keys, device, steps=None, callback=None):
    """x_0 by the run's usual solver, the noise of each image from a generator of its own."""
    name, steps, _ = default_solver(run.args, None, steps)
    sources = [generator(*k) for k in keys]
    noise = lambda: torch.stack([torch.randn(run.process.space.shape(run.args.size), generator=g) for g in sources]).to(device)
    return SAMPLERS[name](denoise, noise(), run.process.times(steps, own=True), run.process, noise, callback)


@contextlib.contextmanager
def watching(net, see):
    """Inside, see(name, q, k, mask) is called for every attention of net, name being the module's, before it is computed. Changes no output."""
    at, inner = [''], [(n, m) for n, m in net.named_modules() if isinstance(m, (Attention, JointBlock))]
    hooks = [m.register_forward_pre_hook(lambda *_, n=n: at.__setitem__(0, n)) for n, m in inner]
    WATCHERS.append(lambda *seen: see(at[0], *seen))
    try:
        yield
    finally:
        WATCHERS.clear()
        for h in hooks:
            h.remove()


def attention_rows(q, k, mask=None, rows=slice(None)):
    """softmax(q k^T / sqrt(d)) of the queries `rows` alone, in fp32: q (heads,N,d), k (heads,M,d), mask (M,) of keys -> (heads,R,M)."""
    logits = (q[:, rows].float() * q.shape[-1] ** -0.5) @ k.float().mT
    return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)


def looks(A, region, mirror, start, n, open_keys, target=None):
    """What attention A (N,M), the image's tokens to all keys, nan where it was not asked for, makes of n keys from `start` on: dict.

    Keys on a grid (target None): lift = attention of the tumour's tokens `region` (N,) on the tumour's keys over chance, their share of the keys
    that may be attended to; mirror: the same of the region's mirror image, which says what being near oneself does; elsewhere: of the mirror
    image's tokens on the tumour. AUROC of the tumour's mean row against region. Other keys: target (n,) says which count; AUROC is of
    the attention on them, over the image, against region."""
    on = lambda rows, keys: float(A[rows][:, start:start + n][:, keys].sum(1).mean() / (keys.sum() / open_keys)) if rows.any() and keys.any() else math.nan
    if target is not None:
        picture = A[:, start:start + n][:, target].sum(1)
        return dict(lift=on(region, target), mirror=math.nan, elsewhere=on(~region, target), auroc=auc(picture[region], picture[~region]), map=picture)
    picture = A[region][:, start:start + n].mean(0)
    return dict(lift=on(region, region), mirror=on(mirror, mirror), elsewhere=on(mirror, region), auroc=auc(picture[region], picture[~region]), map=picture)


def heat(image, value, mask, zoom):
    """A slice with value (h,w) >= 0 over it in red, brightest at its maximum, and the mask's border."""
    k = image.shape[-1] * zoom // value.shape[-1]
    a = (value / max(value.max(), 1e-12)).repeat(k, 0).repeat(k, 1)[..., None]
    rgb, border = to_rgb(image).repeat(zoom, 0).repeat(zoom, 1), outline(image, mask, (90, 220, 255), zoom)
    return np.where((border != rgb).any(-1, keepdims=True), border, np.uint8(rgb * (1 - a) + a * np.array([255, 60, 20])))


@torch.no_grad()
def attention_maps(args):
    """Attention on the way from noise to image (x_t of the solver, not noised real images), averaged over heads; then x0_hat at the same x_t with the
    mask taken away or mirrored. Attention is not attribution: it says where a layer reads, the second what the output owes to the mask."""
    device = setup(args)
    run = load_single(args.run, device)
    net, size, bravo = run.net, run.args.size, run.args.script == 'bravo'
    if not any(isinstance(m, (Attention, JointBlock)) for m in net.modules()):
        fail(f'{args.run}: has no attention (--model {run.args.model}); give a run of unet, dit or mmdit')
    if run.process.space.factor[0] != run.process.space.factor[1]:
        fail(f'{args.run}: acts on latents that are not square; give a run on pixels, bands or square latents')
    _, mask, level = tumour_rows(run, args)
    asked = [len(lesion_records(m)) for m in mask[:, 0].numpy()]
    mask, level = mask.to(device), level.to(device)
    denoise, states = denoiser(run, mask, level), []
    x_0 = walk(run, denoise, [(args.seed, 'image', i) for i in range(args.n)], device, None, lambda i, t, x, _: states.append((t, x)))
    kept = [states[i] for i in sorted({min(range(len(states)), key=lambda i: abs(states[i][0] - t)) for t in args.times})]
    images = run.process.from_range(x_0).clamp(-1, 1)[:, 0].cpu().numpy()
    region = mask if bravo else (run.process.from_range(x_0) > 0).float()
    use = [b for b in range(args.n) if region[b].any()]
    if len(use) < 2:
        fail(f'{args.run}: {len(use)} of {args.n} drawn masks hold a tumour; ask for more with --n', 1)
    found, t_now = [], 0.0

    def see(layer, q, k, open_):
        joint, cross = isinstance(net.get_submodule(layer), JointBlock), layer.endswith(('attn2', 'cross'))
        N = (size // run.process.space.factor[0] // net.patch) ** 2 if joint else q.shape[2]
        parts = [('requests', k.shape[2])] if cross else [('image', N)]
        if joint:
            parts = [*([('mask', N)] if net.embed_mask is not None else []), *([('requests', 1 + LESIONS)] if run.args.controllable else []), *parts]
        for b in use:
            R = F.adaptive_max_pool2d(region[b], math.isqrt(N))[0].cpu() > 0
            R, M = R.flatten().numpy(), (R.flip(1) & ~R).flatten().numpy()
            rows = np.flatnonzero(R | M if parts[0][0] != 'requests' else np.ones(N, bool))
            A, keys = np.full((N, k.shape[2]), math.nan, np.float32), None if open_ is None else open_[b, 0, 0]
            A[rows] = attention_rows(q[b], k[b], keys, torch.as_tensor(rows + q.shape[2] - N, device=q.device)).mean(0).cpu().numpy()
            start = 0
            for kind, n in parts:
                target = np.isin(np.arange(n), np.arange(1, 1 + asked[b])) if kind == 'requests' else None
                seen = looks(A, R, M, start, n, k.shape[2] if keys is None else int(keys.sum()), target)
                found.append(dict(seen, t=t_now, layer=layer, to=kind, image=b))
                start += n

    changes = []
    away = [denoiser(run, m, level) for m in (torch.zeros_like(mask), mask.flip(3))] if bravo else ()
    for t, x in kept:
        t_now = round(t, 6)
        with watching(net, see):
            own = denoise(x, t)[0]
        changes.append([(run.process.from_range(f(x, t)[0]) - run.process.from_range(own))[:, 0].abs().cpu().numpy() for f in away])
    report_attention(args, run, found, changes, [round(t, 6) for t, _ in kept], images, region[:, 0].cpu().numpy() > 0, use)


def report_attention(args, run, found, changes, times, images, R, use):
    """attention.csv and .json, lift.png, attention.png of what attention_maps saw: found, a dict for each look; changes, for each of `times` what x0_hat
    lost without the mask and with it mirrored, (N,S,S) each; images and their tumours R (N,S,S), of which `use` have one."""
    out, bravo = Path(args.out), run.args.script == 'bravo'
    out.mkdir(parents=True, exist_ok=True)
    numbers_ = ('lift', 'mirror', 'elsewhere', 'auroc')
    mean = lambda rows: [float(np.nanmean([r[k] for r in rows])) if any(r[k] == r[k] for r in rows) else math.nan for k in numbers_]
    table = [[layer, to, f'{t:g}', *(f'{v:.3f}' for v in mean([r for r in found if (r['layer'], r['to'], r['t']) == (layer, to, t)]))]
             for layer, to, t in dict.fromkeys((r['layer'], r['to'], r['t']) for r in sorted(found, key=lambda r: (r['to'], r['layer'], -r['t'])))]
    header = ['layer', 'to', 't', 'lift', 'lift of mirror', 'mirror on tumour', 'AUROC']
    write_csv(out / 'attention.csv', header, table)
    about = dict(run=run.hash, images=len(use), times=times)
    layers = list(dict.fromkeys((r['layer'], r['to']) for r in found))
    for layer, to in layers:                                       # layers do opposite things: no mean over them
        per = np.array([mean([r for r in found if (r['image'], r['layer'], r['to']) == (b, layer, to)]) for b in use])
        told = about[f'{layer} to {to}'] = {}
        for k, v in zip(numbers_, per.T):
            v = v[np.isfinite(v)]                                                                      # keys that are no grid have no mirror
            if len(v):
                draws = v[torch.randint(len(v), (1000, len(v)), generator=generator(args.seed, 'attention')).numpy()].mean(1)
                told[k] = [float(v.mean()), *map(float, np.percentile(draws, (2.5, 97.5)))]
        print0(f'{layer} to {to}, mean of t: ' + ', '.join('{} {:.2f} [{:.2f}, {:.2f}]'.format(k, *v) for k, v in told.items()))
    print0('lift 1 and AUROC 0.5: chance; 95 % over images')
    body = np.stack([head_mask(i[None])[0] for i in images])
    M = np.flip(R, 2) & ~R
    spots = {'tumour': R, 'mirror': M, 'rest of head': body & ~R & ~M}
    for k, what in enumerate(('removed', 'mirrored') if bravo else ()):
        rows = [[f'{t:g}', *(float(np.nanmean([c[k][b][s[b]].mean() if s[b].any() else math.nan for b in use])) for s in spots.values())] for t, c in zip(times, changes)]
        about[f'mask {what}'] = rows
        print0(f'mask {what}: mean |change of x0_hat|')
        print_table(['t', *spots], [[r[0], *(f'{v:.3f}' for v in r[1:])] for r in rows])
    atomic_write(out / 'attention.json', json.dumps(about, indent=1).encode())
    of = lambda which, t: [r for r in found if (r['layer'], r['to']) == which and r['t'] == t]
    plot(out / 'lift.png', {f'{w[0][-24:]} to {w[1]}': (times, [mean(of(w, t))[0] for t in times]) for w in layers[:8]},
         'attention of the tumour on itself or its mask', 't (0: image, 1: noise)', 'times chance')
    zoom, rows, labels, middle = max(1, 128 // run.args.size), [], [], times[len(times) // 2]
    shown = [layers[i] for i in sorted({round(v) for v in np.linspace(0, len(layers) - 1, max(len(times), 4))})]
    for b in sorted(use, key=lambda b: -R[b].sum())[:4]:
        maps = [next(r['map'] for r in of(w, middle) if r['image'] == b) for w in shown]
        rows.append([outline(images[b], R[b], (90, 220, 255), zoom), *(heat(images[b], m.reshape(-1, math.isqrt(m.size)), R[b], zoom) for m in maps)])
        labels.append('layers')
        if bravo:
            rows.append([to_rgb(images[b]).repeat(zoom, 0).repeat(zoom, 1), *(heat(images[b], c[0][b], R[b], zoom) for c in changes)])
            labels.append('no mask')
    save_grid(out / 'attention.png', rows, labels)
    print0(f'look at {out}/attention.png: where the tumour looks at t = {middle:g} in {", ".join(f"{a} to {b}" for a, b in shown)}'
           + (f'; what goes without the mask at t = {", ".join(f"{t:g}" for t in times)}' if bravo else '') + '; and lift.png')


# ---------------------------------------------------------------------------------------------------------------------
# uncertainty
# ---------------------------------------------------------------------------------------------------------------------


def decompose(x):
    """Law of total variance of x (M,K,...), M models with K independent seeds each: aleatoric = mean_m var_k, epistemic = var_m mean_k -
    aleatoric / K, which takes away what K seeds leave in a mean (unbiased; may be below 0). nan for M = 1: one model cannot doubt itself."""
    assert x.shape[1] > 1, f'{x.shape[1]} seed has no variance'
    aleatoric = x.var(1, ddof=1).mean(0)
    return aleatoric, x.mean(1).var(0, ddof=1) - aleatoric / x.shape[1] if len(x) > 1 else np.full_like(aleatoric, math.nan)


@torch.no_grad()
def uncertainty(args):
    """K images of each mask from each run. The spread of seeds is what the data leave open given a mask (and what the solver makes of it), not
    doubt; models that were trained with other --seed differ by what they do not know."""
    device, out = setup(args), Path(args.out)
    runs = [load_single(r, device) for r in args.runs]
    for run in runs:
        if run.args.script != 'bravo' or run.args.size != runs[0].args.size:
            fail(f'{run.path}: is a run of train_{run.args.script}.py on {run.args.size} pixels; expected image models of one size, {runs[0].args.size}')
    if len({r.hash for r in runs}) < len(runs):
        fail(f'{" ".join(args.runs)}: two of these are the same network; an ensemble is trained with several --seed')
    real, mask, level = tumour_rows(runs[0], args)
    out.mkdir(parents=True, exist_ok=True)
    N, K, m = args.n, args.seeds, mask[:, 0].numpy() > 0

    def draws(model, run, steps):
        """(K,N,S,S) in fp64; kept in a file, so that a stopped command goes on. Each model has noise of its own: what they share would look like agreement."""
        steps = default_solver(run.args, None, steps)[1]
        key = hashlib.sha256(repr((run.hash, mask.numpy().tobytes(), level.tolist(), K, args.seed, model, steps)).encode()).hexdigest()[:16]
        file, parts = out / f'draws_{key}.npy', []
        if not file.exists():
            for k in progress(range(K), f'{run.path}, {steps} steps', leave=False):
                for i in range(0, N, 16):
                    denoise = denoiser(run, mask[i:i + 16].to(device), level[i:i + 16].to(device))
                    x_0 = walk(run, denoise, [(args.seed, 'image', model, j, k) for j in range(i, min(i + 16, N))], device, steps)
                    parts.append(run.process.from_range(x_0).clamp(-1, 1)[:, 0].cpu().numpy())
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(parts).reshape(K, N, *m.shape[1:]))
            atomic_write(file, buffer.getvalue())
        return np.load(file).astype(np.float64), steps

    table, curves, by_steps = [], {}, []
    for wanted in args.steps or (None,):
        x, steps = zip(*[draws(i, run, wanted) for i, run in enumerate(runs)])
        x, steps = np.stack(x), '/'.join(map(str, dict.fromkeys(steps)))
        aleatoric, epistemic = decompose(x)                                                            # (N,S,S) each
        mean = x.mean((0, 1))
        body = np.stack([head_mask(v[None])[0] for v in mean.astype(np.float32)]) | m
        places = {'tumour': m, 'rest of head': body & ~m}
        for i in range(N):
            table += [[steps, i, p, int(w[i].sum()), *(f'{v[i][w[i]].mean():.6g}' for v in (aleatoric, epistemic, mean))] for p, w in places.items() if w[i].any()]
        edges = np.quantile(mean[body], np.linspace(0, 1, 6))
        bin_ = np.clip(np.searchsorted(edges, mean, 'right') - 1, 0, 4)
        level_ = [(float(mean[body & (bin_ == k)].mean()), *(float(v[body & (bin_ == k)].mean()) for v in (aleatoric, epistemic))) for k in range(5)]
        table += [[steps, 'all', f'intensity, fifth {k + 1}', int((body & (bin_ == k)).sum()), f'{v[1]:.6g}', f'{v[2]:.6g}', f'{v[0]:.6g}'] for k, v in enumerate(level_)]
        curves[f'seeds, {steps} steps'] = ([v[0] for v in level_], [math.sqrt(v[1]) for v in level_])
        if len(runs) > 1:
            curves[f'models, {steps} steps'] = ([v[0] for v in level_], [math.sqrt(max(v[2], 0)) for v in level_])
        by_steps.append([steps, *(float(v[w].mean()) for w in places.values() for v in (aleatoric, epistemic))])
    write_csv(out / 'uncertainty.csv', ['steps', 'mask', 'place', 'pixels', 'aleatoric variance', 'epistemic variance', 'mean intensity'], table)
    last = by_steps[-1]
    root = lambda v: f'{math.copysign(math.sqrt(abs(v)), v):.4f}' if v == v else 'none'
    print_table(['steps', *(f'{what}, {p}' for p in places for what in ('sd of seeds', 'sd of models')), 'sd of seeds / last row, tumour', 'rest'],
                [[r[0], *map(root, r[1:]), f'{math.sqrt(r[1] / last[1]):.3f}', f'{math.sqrt(r[3] / last[3]):.3f}'] for r in by_steps])
    print0(f'{len(runs)} runs x {K} seeds x {N} masks; a pixel\'s sd of {K} seeds is known to {1 / math.sqrt(2 * K - 2):.0%}; '
           + ('a minus: below what chance leaves, no disagreement is seen' if len(runs) > 1 else 'one run: there is no epistemic term, train more with other --seed')
           + '; few steps and guidance spread less: compare at one solver')
    atomic_write(out / 'uncertainty.json', json.dumps(dict(runs=[r.hash for r in runs], seeds=K, masks=N, by_steps=[dict(zip(
        ('steps', *(f'{what} variance, {p}' for p in places for what in ('aleatoric', 'epistemic'))), r)) for r in by_steps]), indent=1).encode())
    zoom, show = max(1, 128 // m.shape[-1]), range(min(N, 8))
    maps = [('sd of seeds x 4', aleatoric)] + ([('sd of models x 4', epistemic)] if len(runs) > 1 else [])
    save_grid(out / 'uncertainty.png', [[real[i] for i in show], [x[0, 0, i] for i in show], [outline(mean[i], m[i], zoom=zoom) for i in show],
                                        *([4 * np.sqrt(v[i].clip(0)) - 1 for i in show] for _, v in maps)], ['real', 'one draw', 'mean', *(n for n, _ in maps)], zoom)
    plot(out / 'by_intensity.png', curves, 'spread by intensity, fifths of the head', 'mean intensity', 'standard deviation')
    print0(f'look at {out}/uncertainty.png and by_intensity.png')


def main(args):
    {'compare': compare, 'timesteps': timesteps, 'release': release, 'patients': patients, 'taxonomy': taxonomy, 'onset': onset,
     'hard-cases': hard_cases, 'attention': attention_maps, 'uncertainty': uncertainty}[args.command](args)


if __name__ == '__main__':
    main(get_args())
