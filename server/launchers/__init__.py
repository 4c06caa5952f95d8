"""`text-generation-launcher` and `lorax-launcher`: the commands of two other servers, which start this one.

A compose file that was written for TGI or LoRAX goes on working: its flags and variables are translated into
words of `motet serve`, which are printed and then run. There is one table per launcher (tgi_flags.py,
lorax_flags.py, and shared_flags.py for what both know), and each of its rows is taken, ignored with a line
that says why, or refused where starting anyway would change answers or promise what is not there. `MOTET_…`
variables say everything that the other launchers have no word for.
"""


def tgi() -> int:
    """Be `text-generation-launcher`; returns the exit status."""
    from server.launchers.launch import launch
    from server.launchers.tgi_flags import TGI

    return launch(TGI)


def lorax() -> int:
    """Be `lorax-launcher`; returns the exit status."""
    from server.launchers.launch import launch
    from server.launchers.lorax_flags import LORAX

    return launch(LORAX)
