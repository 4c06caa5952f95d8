"""Motet: many LoRA adapters over one base model, in one batch."""

__version__ = "0.1.0"
