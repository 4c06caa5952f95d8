"""What an operator sees while the server starts."""

import io
import itertools

from server.progress import StartProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stage_fills_a_bar_in_place_and_leaves_a_line() -> None:
    out = Terminal()
    progress = StartProgress(out, itertools.count().__next__)
    for fraction in (0.0, 0.5, 1.0):
        progress("packing", fraction)
    shown = out.getvalue().split("\r\x1b[K")
    assert shown[1:3] == [f"  packing      {'.' * 24}   0%", f"  packing      {'#' * 12}{'.' * 12}  50%"]
    assert shown[3].startswith("  packing        1.0 s\n")
    assert progress.text == "packing: 100%"


def test_a_log_file_gets_a_line_a_stage_and_nothing_that_moves() -> None:
    out = io.StringIO()
    progress = StartProgress(out, itertools.count().__next__)
    for fraction in (0.0, 0.5, 1.0):
        progress("packing", fraction)
    progress.note("kernels", "our own")
    assert out.getvalue() == "  packing        1.0 s\n  kernels      our own\n"
