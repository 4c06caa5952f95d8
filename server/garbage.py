"""When Python looks for reference cycles: seldom, and not among what was there at the start.

A full collection visits every object there is, while neither the event loop nor the engine runs. With 256
streams that was 60 to 110 ms, about once a second, and the largest part of what a new request or a question
for /health waited for at the worst (two cores of a Zen 4, `benchmarks/no_cost`). What serving makes dies by
itself as a rule: about forty objects of a request, some kilobytes, are left in cycles. So young objects are
looked through seldom, and all of them every few minutes of full load.
"""

import gc

_NEW_OBJECTS = 2_000  # more of them than died since: look through those. 2 ms
_YOUNG_ROUNDS = 10  # of these: look through what survived them. 15 ms
_MIDDLE_ROUNDS = 250  # of these: look through everything. 60 ms, every few minutes


def collect_nothing() -> None:
    """While the server starts: hardly anything of what imports make dies, and looking through it again and
    again takes a fifth of their time. Holds until `collect_seldom`.
    """
    gc.disable()


def keep_all() -> None:
    """What is there now will be looked through by nobody. Call it once everything is imported."""
    gc.freeze()


def collect_seldom() -> None:
    """Call it once everything is loaded. Holds for the whole process."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(_NEW_OBJECTS, _YOUNG_ROUNDS, _MIDDLE_ROUNDS)
