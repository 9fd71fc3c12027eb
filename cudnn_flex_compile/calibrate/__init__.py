"""The command `cudnn-flex calibrate`: measures how fast each way to run attention is on a kind of device."""
