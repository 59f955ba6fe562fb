"""Whether a training can run on this machine, and on what.

Nothing but the standard library is imported here: what is missing is what is to be told.
"""
