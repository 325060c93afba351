"""The makemore ladder: six short models from counting pairs to GPT-2, one idea a rung.

    python -m makemore climb                 every rung in turn, a table and a figure
    python -m makemore mlp --data names      one rung

After Andrej Karpathy's makemore, which makes more of what it is given.
"""
