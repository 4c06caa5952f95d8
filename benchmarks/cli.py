"""`motet bench`: arguments, missing packages, exit status. The run itself is `benchmarks.run`.

Exit status: 0 if every level had a good answer, 1 if one had none, 2 if there is nothing to measure (no
server, wrong arguments, missing packages).
"""

import asyncio
import importlib.util
import sys
from collections.abc import Sequence

from benchmarks.options import parse


def main(argv: Sequence[str]) -> int:
    """Run `motet bench` with these arguments and return its exit status."""
    options = parse(argv)
    needed = ["aiohttp", "tqdm"] + (["matplotlib"] if options.plot else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"motet bench needs {' and '.join(missing)}: pip install 'motet[bench]'")
    from benchmarks.probe import NotReady  # here, because these import the packages just looked for
    from benchmarks.run import run

    try:
        return asyncio.run(run(options, ["motet", "bench", *argv]))
    except NotReady as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
