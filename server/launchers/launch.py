"""Start `motet serve` as another launcher's words ask for it."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from server.launchers.flags import Launcher, UsageError
from server.launchers.translation import make_parser, translate, wishes_of


def launch(
    launcher: Launcher, words: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> int:
    """Run until the server has stopped; returns its exit status. Exits with 2 for what is not understood."""
    environ = os.environ if environ is None else environ  # not ours: settings.py reads those
    parser = make_parser(launcher)
    parsed = parser.parse_args(words)
    try:
        translation = translate(wishes_of(launcher, parsed, environ), environ)
    except UsageError as error:
        parser.error(str(error))
    for notice in translation.notices:
        print(f"{launcher.name}: {notice}", file=sys.stderr)
    shown = shlex.join(["motet", *translation.words(has_secrets=False)])
    print(f"{launcher.name}: this is {shown}", file=sys.stderr, flush=True)
    from server.__main__ import main

    return main(translation.words())
