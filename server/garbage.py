"""When Python looks for reference cycles: seldom, and not among what was there at the start.

A full collection visits every object there is, while neither the event loop nor the engine runs. With 256
streams that was 60 to 110 ms, about once a second, and the largest part of what a new request or a question
for /health waited for at the worst (two cores of a Zen 4, `benchmarks/no_cost`). What serving makes dies by
itself as a rule: about forty objects of a request, some kilobytes, are left in cycles. So young objects are
looked through seldom, and all of them every few minutes of full load; and that is done when a step's tokens
have been sent and the device computes the next one, where no token waits for it. Left to Python it begins
wherever an object is made, and was what the slowest hundredth of all tokens waited for.
"""

import gc

_NEW_OBJECTS = 2_000  # more of them than died since: look through those. 2 ms
_YOUNG_ROUNDS = 10  # of these: look through what survived them. 15 ms
_MIDDLE_ROUNDS = 250  # of these: look through everything. 60 ms, every few minutes
_TOO_MANY = 2  # times as many new objects: Python need not wait for a lull


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
    gc.set_threshold(_TOO_MANY * _NEW_OBJECTS, _YOUNG_ROUNDS, _MIDDLE_ROUNDS)


def collect_in_lull() -> None:
    """Call it when there is nothing to send: look through what is due."""
    new, young_rounds, middle_rounds = gc.get_count()
    if new <= _NEW_OBJECTS or not gc.isenabled():
        return
    if middle_rounds > _MIDDLE_ROUNDS:
        gc.collect(2)
    else:
        gc.collect(1 if young_rounds > _YOUNG_ROUNDS else 0)
