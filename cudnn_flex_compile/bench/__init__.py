"""`cudnn-flex bench`: flex_attention through torch.compile, cuDNN beside Inductor and torch's SDPA, on this machine.

cli.py runs it; no other part of the package imports it.
"""
