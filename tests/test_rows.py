"""Every row of the table of clients, and every trap that concerns a server, is named by a test.

The letters are the systems whose clients are served: J is TuneOS's jobs, K KServe and Inferless, C kiwi with
nginx and Ollama, L LoRAX and TGI, Z ZSE, U clients of more than one of them; T are the traps between them.
A test names its row in its name or in its docstring; a module's docstring does not count.

Left out: Z7 is a measurement (`python -m benchmarks.no_cost --streams 1`, `benchmarks.proxy`); C18 is a route
of kiwi's own; Z20 is optional and not served; T9 is a limit of the HTTP server that the README tells of; T17
and T23 are about texts to learn from.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ROWS = """
J1
J2
J3
J4
J5
J6
J7
J8
J9
J10
J11
J12
J13
J14

K1
K2
K3
K4
K5
K6
K7
K8
K9
K10
K11
K12
K13
K14
K15
K16
K17
K18
K19
K20
K21

C1
C2
C3
C4
C5
C6
C7
C8
C9
C10
C11
C12
C13
C14
C15
C16
C17
C19

L1
L2
L3
L4
L5
L6
L7
L8
L9
L10
L11
L12
L13
L14
L15
L16
L17
L18
L19

Z1
Z2
Z3
Z4
Z5
Z6
Z8
Z9
Z10
Z11
Z12
Z13
Z14
Z15
Z16
Z17
Z18
Z19

U1
U2
U3
U4
U5
U6
U7

T1
T2
T3
T4
T5
T6
T7
T8
T10
T11
T12
T13
T14
T15
T16
T18
T19
T20
T21
T22
T24
T25
T26
T27
"""


def names_of_tests() -> Iterator[str]:
    """The name and docstring of every test."""
    for file in TESTS.rglob("test_*.py"):
        if file != Path(__file__):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                    yield f"{node.name} {ast.get_docstring(node) or ''}"


@pytest.fixture(scope="module")
def named() -> set[str]:
    """The ids that tests name."""
    return {
        row
        for text in names_of_tests()
        for row in re.findall(r"(?<![A-Za-z0-9])[A-Z]\d+(?![A-Za-z0-9])", text)
    }


@pytest.mark.parametrize("row", ROWS.split())
def test_row_is_named_by_a_test(named: set[str], row: str) -> None:
    assert row in named
