__version__ = "0.1.0"
NOISE_VERSION = 1
