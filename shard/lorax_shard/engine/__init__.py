"""The engine of one rank: resident rows, one ragged step, sampling, memory sizing."""
