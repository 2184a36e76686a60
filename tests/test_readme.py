"""README names every flag of every script, and no flag that no script has."""
import argparse
import re
from pathlib import Path

import pytest

import analysis
import classifier
import common
import draft
import evaluate
import sample
import train_bravo
import train_seg

README = (Path(common.__file__).parent / 'README.md').read_text()
FOREIGN = {'--help', '--nproc_per_node', '--ignore', '--slow', '--rounds', '--shapes', '--precisions', '--tokens', '--lean'}          # torchrun's, pytest's, tests/bench.py's


def flags(script, monkeypatch):
    """Long options of a script and its subcommands, read from the parsers that get_args builds."""
    found, add = set(), argparse._ActionsContainer.add_argument
    with monkeypatch.context() as m:
        m.setattr(argparse._ActionsContainer, 'add_argument', lambda self, *names, **kw: (found.update(n for n in names if n.startswith('--')), add(self, *names, **kw))[1])
        with pytest.raises(SystemExit):
            script.get_args(['--no-such-flag'])
    return found - {'--help'}


def test_every_flag_has_its_place(monkeypatch, capsys):
    known = {name: flags(script, monkeypatch) for name, script in dict(train_seg=train_seg, train_bravo=train_bravo, sample=sample, classifier=classifier,
                                                                       draft=draft, evaluate=evaluate, analysis=analysis).items()}
    assert len(known['train_bravo']) > 60 and all(len(v) > 8 for v in known.values())
    told = set(re.findall(r'(?<![\w-])--[a-z][a-z0-9_-]*', README))
    assert sorted(f'{name}.py {f}' for name, some in known.items() for f in some - told) == []
    assert sorted(told - set().union(*known.values()) - FOREIGN) == []


def test_every_asset_is_there_and_used():
    """What README shows or names under assets/ exists, each picture is shown and below 300 kB."""
    assets = Path(common.__file__).parent / 'assets'
    told = set(re.findall(r'assets/([\w./-]*\w)', README))
    assert [name for name in sorted(told) if not (assets / name).exists()] == []
    assert [f.name for f in sorted(assets.glob('*.png')) if f'](assets/{f.name})' not in README or f.stat().st_size > 300_000] == []
