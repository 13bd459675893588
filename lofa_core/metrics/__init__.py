"""Metrics for real models: FVD, CLIP-T, CLIP-I, DINO, CSD, faces, Dynamic Degree, Motion Smoothness.

`evaluation.METRICS` is the table of them; `python -m lofa_core evaluate` runs it. No weights come with it and
none are downloaded: each metric says which files and which package it needs.
"""
