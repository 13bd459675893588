"""Data that you bring: folders of clips with sentences, read, checked and encoded once."""
