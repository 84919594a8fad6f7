"""Passes as programs: what a model's code asks of a CPU, noted once and computed in one call.

::

    the model's code, at three sizes ──► Recording x 3 ──► Program: calls whose fields are
                (recorder)                (recording)        numbers + T * numbers + S * numbers
                                                                        │
    a pass of any size ──► torch's first operations ──► one native call ┘──► logits

Legend: T tokens of a pass, S tokens whose logits are asked for.

Behind the last layer's keys and values a token has no effect on others: the kernels that are left
are computed for the tokens alone whose logits, or whose states, someone asks for.
"""
