"""Model folders on disk: are they whole, which class loads them, their chat template, their weights."""
