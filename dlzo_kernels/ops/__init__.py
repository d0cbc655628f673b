"""One module per kernel, each a PyTorch operator; add_low_rank is a plain function for steps."""
