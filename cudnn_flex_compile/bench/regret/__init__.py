"""`cudnn-flex bench --regret`: how much slower the chooser's choice is than the best way to run a call, by measurement.

command.py runs it, and worker.py measures in processes of its own.
"""
