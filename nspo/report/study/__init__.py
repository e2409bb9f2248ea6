"""The page of a study: its variants side by side, with the keys in which they differ."""
