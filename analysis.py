"""Looks at what other scripts left behind.

  python analysis.py compare runs/a runs/b runs/quality_a runs/quality_b     runs and their metrics side by side
  python analysis.py timesteps runs/a runs/b                                 which steps are hard, tumour and background apart
  python analysis.py release runs/bravo bravo64.pt                           a run as one small file that sample.py takes
  python analysis.py patients --fake runs/synthetic --scores runs/scores     which patients' images come out distorted (or --answers runs/labels)
  python analysis.py taxonomy runs/labels                                    kinds of distortion, and how far raters agree
  python analysis.py onset --fake runs/steps --gate runs/detector            when along the way from noise a distortion is decided

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
    c.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws of images')
    c.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    c.add_argument('--out', default='runs/onset', metavar='DIR')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    if args.command == 'release':
        if not Path(args.run).exists():
            fail(f'{args.run}: no such run folder or checkpoint file')
        if Path(args.file).is_dir() or not Path(args.file).parent.is_dir():
            fail(f'{args.file}: is a folder or lies in none; give the name of a file')
        return args
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f'--out {args.out}: is a file; give a folder')
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
    for run in getattr(args, 'runs', ()):
        if args.command == 'timesteps' and not (Path(run) / 'loss_by_t.csv').is_file():
            fail(f'{run}: holds no loss_by_t.csv; give a run folder of train_seg.py or train_bravo.py')
        if args.command == 'compare' and not any((Path(run) / f).is_file() for f in ('log.csv', 'metrics.json')):
            fail(f'{run}: holds neither log.csv nor metrics.json; give a run folder or a folder of evaluate.py')
    return args


def print_table(header, rows):
    """Columns as wide as their longest cell, the first one to the left."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print0('  '.join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:]))]))


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
    sets = {n: json.loads((Path(r) / 'metrics.json').read_text()) for n, r in zip(names, args.runs) if (Path(r) / 'metrics.json').is_file()}
    saved = []
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
    if sets:
        metrics = [m for m in next(iter(sets.values()))['metrics'] if all(m in s['metrics'] for s in sets.values())]
        cell = lambda v, k='fake': f'{v[k]:.3f} [{v[k + "_low"]:.3f}, {v[k + "_high"]:.3f}]'
        rows = [[m, *(cell(s['metrics'][m]) for s in sets.values()), f'{np.mean([s["metrics"][m]["floor"] for s in sets.values()]):.3f}'] for m in metrics]
        print0()
        print_table(['metric', *sets, 'floor'], rows)
        write_csv(out / 'metrics.csv', ['metric', *sets, 'floor'], rows)
        bars(out / 'metrics.png', {m: {n: s['metrics'][m] for n, s in sets.items()} for m in metrics})
        saved += ['metrics.csv', 'metrics.png']
    print0(f'look at {", ".join(str(out / f) for f in saved)}')


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
    """A panel for each metric, a bar with its interval for each set, the floor as a line."""
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
            draw.rectangle([min(at(0), at(s['fake'])), y + 2, max(at(0), at(s['fake'])), y + line - 5], COLOURS[i % len(COLOURS)])
            draw.line([at(s['fake_low']), y + line // 2 - 2, at(s['fake_high']), y + line // 2 - 2], (0, 0, 0))
        floor = at(float(np.nanmean([s['floor'] for s in sets.values()])))
        draw.line([floor, 22, floor, 24 + line * len(sets)], (120, 120, 120))
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
    keep = {k: state[k] for k in ('step', 'box', 'spacing', 'in_channels', 'out_channels', 'extra_dim', 'loss_by_t', 'space') if k in state}
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
    """{folder: bad} of the images of a set, by the majority of raters, and how many images they left undecided. Repeats are no second vote."""
    votes = {}
    for r in answers:
        if r['repeat'] == '0' and Path(r['set']).name == Path(fake).resolve().name:
            votes.setdefault(r['folder'], Counter())[r['verdict']] += 1
    told = {f: v['bad'] > v['good'] for f, v in votes.items() if v['bad'] != v['good']}
    return told, len(votes) - len(told)


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


def holm(p):
    """p-values corrected for their number (Holm 1979): the k-th smallest times how many are left, never below the one before."""
    p, order = np.asarray(p, float), np.argsort(p, kind='stable')
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty(len(p))
    out[order] = np.minimum(steps, 1)
    return out


def patients(args):
    """Rates of distorted images by source patient; a patient stands out against the rate of all others, corrected for looking at all."""
    out, source = Path(args.out), {r['folder']: r['source_patient'] for r in read_csv(Path(args.fake) / 'manifest.csv')}
    if args.scores:
        told, undecided = {r['folder']: r['verdict'] == 'bad' for r in read_csv(Path(args.scores) / 'scores.csv')}, 0
    else:
        told, undecided = verdicts(read_answers(args.answers), args.fake)
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


def agreement_row(name, columns, answers, repeats):
    """A row of the agreement table: columns (N,m) of what m raters answered, with intervals from a bootstrap over images."""
    codes = np.array([[answers.index(a) for a in row] for row in columns])
    one = np.eye(len(answers))[codes]                                                             # (N, m, J)

    def measure(i):
        return agreement(one[i].sum(1), one[i].mean(0) if codes.shape[1] == 2 else None)

    at, draws = measure(np.arange(len(codes))), [measure(torch.randint(len(codes), (len(codes),), generator=generator('agree', k)).numpy()) for k in range(repeats)]
    cell = lambda k: '{:.3f} [{:.3f}, {:.3f}]'.format(at[k], *(np.nanpercentile([d[k] for d in draws], (2.5, 97.5)) if any(d[k] == d[k] for d in draws) else (math.nan,) * 2))
    return [name, len(codes), 'Cohen' if codes.shape[1] == 2 else 'Fleiss', f'{at["po"]:.3f}', f'{at["pe"]:.3f}', cell('kappa'), cell('ac1')]


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
        for what, options, rows_ in (('verdict', ('good', 'bad', 'unsure'), rows), ('class', CLASSES, [v for v in rows if all(r['class'] for r in v)])):
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
    if ts[-1] != 0:
        fail(f'--fake {fake}: its steps end at t={ts[-1]:g}; add 0 to --save-at, the image itself')
    masks = torch.from_numpy(np.stack([read_nifti(fake / r['folder'] / 'seg.nii.gz')[0][0] for r in rows])).float()[:, None]
    with torch.no_grad():
        z = np.stack([torch.cat([detector_logits(detector, i.to(device), m.to(device)).cpu() for i, m in
                                 zip(torch.from_numpy(x[:, k])[:, None].split(64), masks.split(64))]).double().numpy() for k in range(len(ts))], 1)     # (N,T,7)
    p_class = np.exp(z[..., 1:] - z[..., 1:].max(-1, keepdims=True))
    p_class /= p_class.sum(-1, keepdims=True)
    if args.answers:
        told, _ = verdicts(read_answers(args.answers), fake)
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
    table, picked = [], [torch.randint(len(bad), (len(bad),), generator=generator('onset', k)).numpy() for k in range(args.repeats)]
    for k, t in enumerate(ts):
        draws = [auc(z[i[bad[i]], k, 0], z[i[~bad[i]], k, 0]) for i in picked]
        far = [float(((x[some, k] - x[some, -1]) ** 2).mean()) for some in (~bad, bad)]
        table.append([t, auc(z[bad, k, 0], z[~bad, k, 0]), *np.nanpercentile(draws, (2.5, 97.5)), float((z[bad, k, 0] > cut[k]).mean()), int((at == k).sum()),
                      *far, *(p_class[bad, k] .mean(0) - p_class[~bad, k].mean(0))])
    header = ['t', 'auc', 'low', 'high', 'bad beyond 95 % of good', 'onsets', 'distance good', 'distance bad', *(f'{c}, bad - good' for c in CLASSES)]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'onset.csv', header, [[f'{v:.4g}' for v in r] for r in table])
    print_table(header[:8], [[f'{v:.3g}' for v in r[:8]] for r in table])
    kinds, late = p_class[bad, -1].argmax(1), times < args.early
    early = times >= args.early
    print0(f'{bad.sum()} of {len(bad)} images end bad: {early.sum()} are so for good from t >= {args.early:g} (structure), {late.sum()} only below it (detail), '
           f'{np.isnan(times).sum()} never beyond 95 % of the good')
    split = [[c, *(int((kinds == k)[v].sum()) for v in (early, late, np.isnan(times)))] for k, c in enumerate(CLASSES)]
    print_table(['kind at the end (detector)', 'structure', 'detail', 'neither'], split)
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


def main(args):
    {'compare': compare, 'timesteps': timesteps, 'release': release, 'patients': patients, 'taxonomy': taxonomy, 'onset': onset}[args.command](args)


if __name__ == '__main__':
    main(get_args())
