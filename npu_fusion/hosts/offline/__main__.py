"""``python -m npu_fusion.hosts.offline -- COMMAND``: run a command where torch_npu can be imported.

``--soc`` and ``--cann`` as in :func:`npu_fusion.hosts.offline.environment`. The exit status is the command's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from npu_fusion.hosts.offline import OfflineError, environment


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by the command; returns 2 with a message where that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m npu_fusion.hosts.offline", description=__doc__)
    parser.add_argument("--soc", help="a family such as ascend950, or a name such as Ascend910B3")
    parser.add_argument("--cann", help="the release that CANN claims to be")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, a program and its arguments")
    arguments = parser.parse_args(argv)
    try:
        variables = environment(arguments.soc, arguments.cann)
        os.execvpe(arguments.command[0], arguments.command, variables)
    except OfflineError as error:
        print(f"offline Ascend: {error}", file=sys.stderr)
    except OSError as error:
        print(f"cannot run {arguments.command[0]!r}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
