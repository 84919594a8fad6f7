"""Fuzzing: traces of well-formed requests against a running server, and what is none to each reader.

``python -m tests.fuzz --minutes 10 --seed 1`` or ``make fuzz``. A trace is a few requests with the moment
at which each is sent, and left. Mutators change both; what a trace did is judged by oracles::

    crash       a process has ended, or the shards were lost
    hang        a request has no end
    slow-down   a stream that runs beside the trace stands still for long
    corruption  an answer is not what another server, without prefix cache and company, gives
    leak        rows, blocks or adapters are held when nobody asks any more

``targets`` has the other half: malformed bodies, messages, files, templates and grammars, given to what
reads them in processes of their own. ``--target NAME`` plays one of them, ``--case N`` one of its cases.

``--planted KIND`` starts the server with a fault that the oracle of this name has to find.
"""
