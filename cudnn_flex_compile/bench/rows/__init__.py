"""`cudnn-flex bench --rows`: layers of real training configurations, launched as their projects launch them.

Nothing else of the package knows of it.
"""
