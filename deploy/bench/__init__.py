"""``vfio-model bench``: what things cost, as ratios to limits measured in the same run.

A machine is shared and its speed drifts, so the thing and its limit are timed in turn, many short rounds of each, and
the median of the rounds' ratios is the figure. Absolute times are printed beside it and judged by nobody.
"""
