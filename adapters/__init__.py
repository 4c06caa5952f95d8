"""Everything that is true of LoRA adapters without a server: files, memory, kernels."""

OWNER = "motet"
"""Another package on the Python index also imports as `adapters`; the command line compares this sentinel."""
