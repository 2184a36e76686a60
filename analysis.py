"""Looks at what other scripts left behind.

  python analysis.py compare runs/a runs/b runs/quality_a runs/quality_b     runs and their metrics side by side
  python analysis.py timesteps runs/a runs/b                                 which steps are hard, tumour and background apart
  python analysis.py release runs/bravo bravo64.pt                           a run as one small file that sample.py takes

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
    args = p.parse_args(argv)
    if args.command == 'release':
        if not Path(args.run).exists():
            fail(f'{args.run}: no such run folder or checkpoint file')
        if Path(args.file).is_dir() or not Path(args.file).parent.is_dir():
            fail(f'{args.file}: is a folder or lies in none; give the name of a file')
        return args
    for run in args.runs:
        if args.command == 'timesteps' and not (Path(run) / 'loss_by_t.csv').is_file():
            fail(f'{run}: holds no loss_by_t.csv; give a run folder of train_seg.py or train_bravo.py')
        if args.command == 'compare' and not any((Path(run) / f).is_file() for f in ('log.csv', 'metrics.json')):
            fail(f'{run}: holds neither log.csv nor metrics.json; give a run folder or a folder of evaluate.py')
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f'--out {args.out}: is a file; give a folder')
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
            curve = lambda rows: list(zip(*[(float(r['log_snr_low']) + 0.5, float(r['mean_squared_error'])) for r in rows if r['set'] == 'train' and r['region'] == 'all']))
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
            bins = [(float(r['log_snr_low']) + 0.5, float(r['mean_squared_error']), int(r['count'])) for r in rows if r['region'] == region]
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


def main(args):
    {'compare': compare, 'timesteps': timesteps, 'release': release}[args.command](args)


if __name__ == '__main__':
    main(get_args())
