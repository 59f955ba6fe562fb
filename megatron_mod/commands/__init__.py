"""What a user starts: a module a command, each with its options and what is then called.

Nothing heavy is imported before the command line has been understood. The scripts of ``launch/``
and ``tools/`` and the console entry points (``megatron-mod-...``) call the same ``main``.
"""
