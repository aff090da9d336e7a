"Loss of plasticity, watched and repaired in notebooks"
__version__ = "0.0.1"
