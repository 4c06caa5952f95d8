"""The model that `motet serve` offers when no model is named, with its four adapters."""
