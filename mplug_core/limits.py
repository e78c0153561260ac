"""How much a caller may ask of a model at once, in commands, API and recipes."""

MOST_BEAMS = 128
"""Beams of a search: each is a sequence as long as the text, with the probabilities of the whole vocabulary."""
MOST_TEXTS = 256
"""Texts that are drawn for one image."""
MOST_AT_ONCE = 1024
"""Images, or texts, that are computed at once where somebody waits for answers."""
