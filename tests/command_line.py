"""What tests of the command line share."""

import pytest

from tokenlearn.main import main


def error_of(arguments, capsys):
    """The one line that bad input gives."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenlearn: error: ")]
    assert len(lines) == 1
    return lines[0]
