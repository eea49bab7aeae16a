"""Hours of what the tests do for seconds: ``python -m soak`` with ``.`` and ``tests`` on the path.

Four parts, each a module with ``cases(share)``, ``run(case, seed, folder)``, which raises if something is wrong, and
``figures(lines)``: ``stateful`` (random sequences of what users do), ``kills`` (training killed and resumed),
``damage`` (checkpoints that are not what was saved) and ``flat`` (memory in a long training).
"""
