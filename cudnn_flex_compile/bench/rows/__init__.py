"""`cudnn-flex bench --rows`: layers of real training configurations, launched as their projects launch them.

bench/command.py runs it; no other part of the package imports it.
"""
