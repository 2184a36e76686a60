"""What the tests share: the repository on the path, a small phantom, quiet progress bars, --slow."""
import os
import sys
from pathlib import Path

import pytest

os.environ['TQDM_DISABLE'] = '1'
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also the tests that train for minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: trains for minutes; runs with --slow')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if 'slow' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs --slow'))


@pytest.fixture(scope='session')
def phantom(tmp_path_factory):
    """14 phantom patients of 3 slices at 32x32, enough that every part of the split has one."""
    from common import make_phantom
    return make_phantom(tmp_path_factory.mktemp('data') / 'phantom', 14, 0, 3, 32)
