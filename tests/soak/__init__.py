"""Mixed traffic and faults for some minutes, and what must hold during and after it.

``python -m tests.soak --minutes 10`` or ``make soak``. Clients of several tenants ask for all kinds of
answers while adapters come, change, break and go, and processes are killed, stopped and restarted.

::

    reference ──► storm: traffic + faults ──► calm: traffic alone ──► rest: what is left behind
    (undisturbed)  nothing lost or changed     nothing grows            nothing runs, nothing held

Each request is drawn from a seed, each answer is compared with that of an undisturbed server, and each
that ended otherwise must have a reason that a fault of that moment explains.
"""
