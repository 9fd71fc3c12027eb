"""`cudnn-flex bench`: flex_attention through torch.compile, cuDNN beside Inductor and torch's SDPA, on this machine.

Nothing else of the package knows of it.
"""
